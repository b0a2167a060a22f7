"""What a step costs beside the model: scheduling, building the batch, choosing tokens, detokenizing, delivering.

    python benchmarks/step_overhead.py [--output benchmarks/results/step_overhead.md]

The real engine over a model that computes nothing: its logits are there already. Greedy requests of the bundled
tokenizer's text decode in a batch of constant size; seconds per step, and how they are shared out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import pagedllm_core
from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.config import EngineConfig
from pagedllm_core.engine import Engine
from pagedllm_core.params import SamplingParams

TINY = Path(__file__).resolve().parents[1] / "pagedllm_core" / "bundled" / "tiny"
STEPS = 300


class NoModel:
    """A `Runner` that hands out logits which were made before.

    Args:
        vocab_size: Width of the logits.
        most: Rows.
        tokenizer: Detokenizes the ids, which are all below 2,000.
    """

    num_blocks, block_size, num_host_blocks, max_model_len, sampler = 4096, 16, 0, 4096, None
    eos_token_ids: tuple[int, ...] = ()
    generation_defaults: Mapping[str, Any] = {"do_sample": False}
    model_name = "none"

    def __init__(self, vocab_size: int, most: int, tokenizer: Any) -> None:
        self.vocab_size, self.tokenizer = vocab_size, tokenizer
        self._logits = torch.randn(most, vocab_size, generator=torch.Generator().manual_seed(0))
        self._logits[torch.arange(most), torch.randint(300, 2000, (most,))] = 20.0

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits, at no cost."""
        return self._logits[: len(batch.logits_rows)]

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Nothing is stored."""

    def swap_out(self, moves: list[tuple[int, int]]) -> None:
        """Never called."""

    def check_device(self) -> None:
        """No device fails."""

    def swap_in(self, moves: list[tuple[int, int]]) -> None:
        """Never called."""

    def close(self) -> None:
        """Nothing to free."""


def microseconds(batch: int, vocab_size: int, tokenizer: Any, stream: bool) -> float:
    """Median time of a decoding step of this many sequences."""
    engine = Engine(EngineConfig(model="none"), runner=NoModel(vocab_size, batch, tokenizer))
    for number in range(batch):
        params = SamplingParams(temperature=0, max_tokens=STEPS + 20, ignore_eos=True)
        engine.add([number + 1] * 40, params, stream=stream)
    for _ in range(10):
        engine.step()
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    lines = ["| batch | vocabulary | streamed, µs | at the end only, µs |", "| ---: | ---: | ---: | ---: |"]
    for vocab_size in (2048, 151_936):
        for batch in (1, 8, 32, 128):
            both = [microseconds(batch, vocab_size, tokenizer, stream) for stream in (True, False)]
            lines.append(f"| {batch} | {vocab_size:,} | {both[0]:.0f} | {both[1]:.0f} |")
    head = (
        "# A step's own cost\n\n"
        f"`benchmarks/step_overhead.py`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}, pagedllm-core {pagedllm_core.__version__}, one thread, medians of {STEPS} steps, "
        "greedy, with detokenizing. The logits are in memory that the processor's cache does not hold.\n\n"
    )
    text = head + "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
