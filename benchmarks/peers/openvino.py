"""OpenVINO GenAI's continuous batching, behind the protocol of `benchmarks/peers/protocol.py`.

    PYTHON benchmarks/peers/openvino.py FOLDER --threads N --dtype bfloat16|float32

PYTHON's environment has `openvino-genai`, `optimum-intel` and a CPU build of torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from protocol import Peer, Progress, apart, arguments, run  # first: it makes the real `openvino` importable

import openvino  # isort: skip
import openvino_genai


class OpenVINO:
    """A `Peer` over `ContinuousBatchingPipeline`.

    Args:
        folder: A model in OpenVINO's format.
        threads: Cores to compute with.
        dtype: Of the KV cache, and of the arithmetic where the processor has it.
    """

    def __init__(self, folder: Path, threads: int, dtype: str) -> None:
        self.system = f"OpenVINO GenAI {openvino_genai.__version__}"
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 1
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        # Without these hints the cache would be quantized to 8 bits. Without instructions for it bf16 is refused.
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        precision = "bf16" if dtype == "bfloat16" and ("avx512_bf16" in flags or "amx_bf16" in flags) else "f32"
        properties: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
        }
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self._handles: dict[int, Any] = {}

    def add(self, number: int, prompt: list[int], length: int, beams: int) -> None:
        """Takes a request."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = length
        config.ignore_eos = True
        config.set_eos_token_id(0)  # ignored, but the default of -1 is refused
        if beams > 1:
            config.num_beams = beams
            config.num_return_sequences = 1
        ids = openvino.Tensor([prompt])
        self._handles[number] = self._pipeline.add_request(number, ids, config)

    def step(self) -> list[Progress]:
        """Advances all requests."""
        self._pipeline.step()
        given = []
        for number, handle in list(self._handles.items()):
            ended = handle.get_status() != openvino_genai.GenerationStatus.RUNNING
            outputs = list(handle.read().values()) if handle.can_read() else []
            if outputs or ended:
                # All beams come at once, at the end.
                best = max(outputs, key=lambda output: output.score, default=None)
                given.append(Progress(number, list(best.generated_ids) if best else [], ended))
            if ended:
                if handle.get_status() != openvino_genai.GenerationStatus.FINISHED:
                    raise RuntimeError(f"request {number} ended as {handle.get_status()}")
                del self._handles[number]
        return given


def export(folder: Path, target: Path, dtype: str) -> None:
    """Writes the model in OpenVINO's format, with weights of this dtype."""
    import torch
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoModelForCausalLM

    # The export takes its dtype from the folder.
    AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).save_pretrained(target / "source")
    model = OVModelForCausalLM.from_pretrained(target / "source", export=True, compile=False, load_in_8bit=False)
    model.save_pretrained(target)


def main() -> None:
    """Command line."""
    options = arguments(__doc__)

    def load() -> Peer:
        with tempfile.TemporaryDirectory() as folder:
            apart(export, options.folder, Path(folder), options.dtype)
            return OpenVINO(Path(folder), options.threads, options.dtype)

    run(load)


if __name__ == "__main__":
    main()
