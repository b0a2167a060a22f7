"""transformers' continuous batching, behind the protocol of `benchmarks/peers/protocol.py`.

    PYTHON benchmarks/peers/continuous.py FOLDER --threads N --dtype bfloat16|float32 [--device cuda] [--graphs]

On a GPU it switches to flash attention by itself where that is installed. With --graphs CUDA graphs are asked for;
without, it decides.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from protocol import Progress, Unsupported, arguments, run
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

NO_TOKEN = -1  # an end token that never comes


class Continuous:
    """A `Peer` over `ContinuousBatchingManager`, which runs in a thread of its own."""

    def __init__(self, folder: str, threads: int, dtype: str, device: str, graphs: bool) -> None:
        torch.set_num_threads(threads)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        model = model.to(device).eval()
        settings = GenerationConfig(do_sample=False, max_new_tokens=64, eos_token_id=NO_TOKEN, pad_token_id=0)
        page = 32 if device == "cpu" else 256
        # As block_size was called until transformers 5.17.
        name = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"
        fields: dict[str, Any] = {name: page, "use_cuda_graph": graphs or None}
        config = ContinuousBatchingConfig(num_blocks=512, max_batch_tokens=2048, **fields)
        self._manager = model.init_continuous_batching(settings, continuous_batching_config=config)
        self._manager.start()
        self._given: dict[str, int] = {}
        kind = "continuous batching, CUDA graphs" if graphs else "continuous batching"
        attention = "" if device == "cpu" else f" ({model.config._attn_implementation})"
        self.system = f"transformers {transformers.__version__}, {kind}{attention}"

    def add(self, number: int, prompt: list[int], length: int, beams: int) -> None:
        """Takes a request."""
        if beams > 1:
            raise Unsupported("no beam search")
        self._given[str(number)] = 0
        self._manager.add_request(
            prompt, request_id=str(number), max_new_tokens=length, streaming=True, eos_token_id=NO_TOKEN
        )

    def step(self) -> list[Progress]:
        """Waits for what comes next, or looks again for new requests after a short while."""
        output = self._manager.get_result(timeout=0.01)
        if output is None:
            if (error := self._manager.background_thread_status.fatal_error) is not None:
                raise RuntimeError(f"its thread ended: {error}")
            return []
        if output.error:
            raise RuntimeError(output.error)
        before = self._given[output.request_id]
        self._given[output.request_id] = len(output.generated_tokens)
        return [Progress(int(output.request_id), output.generated_tokens[before:], output.is_finished())]


def main() -> None:
    """Command line."""
    options = arguments(__doc__, "graphs")
    run(lambda: Continuous(str(options.folder), options.threads, options.dtype, options.device, options.graphs))


if __name__ == "__main__":
    main()
