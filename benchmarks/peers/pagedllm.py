"""PagedLLM, behind the protocol of `benchmarks/peers/protocol.py`.

PYTHON benchmarks/peers/pagedllm.py FOLDER --threads N --dtype bfloat16|float32 [--int8] [--device cuda]
"""

from __future__ import annotations

from typing import Any

from protocol import Progress, arguments, run

from pagedllm_core import __version__
from pagedllm_core.config import EngineConfig
from pagedllm_core.engine import Engine
from pagedllm_core.params import SamplingParams


class PagedLLM:
    """A `Peer` over the engine that every adapter uses."""

    def __init__(self, folder: str, threads: int, dtype: str, int8: bool, device: str) -> None:
        memory = "1GiB" if device == "cpu" else "16GiB"
        fields: dict[str, Any] = {
            "num_threads": threads, "kv_cache_memory": memory, "dtype": dtype, "device": device,
        }  # fmt: skip
        self._engine = Engine(EngineConfig(model=folder, quantization="int8" if int8 else None, **fields))
        self.system = f"PagedLLM {__version__}{', int8' if int8 else ''}"

    def add(self, number: int, prompt: list[int], length: int, beams: int) -> None:
        """Takes a request."""
        search: dict[str, Any] = {"use_beam_search": True, "n": beams} if beams > 1 else {}
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, **search)
        self._engine.add(prompt, params, request_id=str(number), stream=beams == 1)

    def step(self) -> list[Progress]:
        """Advances all requests."""
        return [
            Progress(int(output.request_id), output.outputs[0].token_ids, output.finished)
            for output in self._engine.step()
        ]


def main() -> None:
    """Command line."""
    options = arguments(__doc__, "int8")
    run(lambda: PagedLLM(str(options.folder), options.threads, options.dtype, options.int8, options.device))


if __name__ == "__main__":
    main()
