"""Models on the GPU, for the tests here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.config import EngineConfig
from pagedllm_core.model.runner import ModelRunner
from tests.parity.driver import make_batch

DEVICE = torch.device("cuda")


def gpu_runner(folder: Path, *, overlaps: bool = True, kv_cache_dtype: str = "auto", **fields: Any) -> ModelRunner:
    """A runner on the GPU, with small blocks and a small pool.

    Args:
        folder: The model.
        overlaps: Let steps overlap.
        kv_cache_dtype: Of the cache.
        fields: Further fields of the configuration.
    """
    settings: dict[str, Any] = {"block_size": 4, "kv_cache_memory": "8MiB", "device": str(DEVICE), "swap_space": 0}
    config = EngineConfig(model=str(folder), **(settings | fields))
    runner = ModelRunner(config.model_copy(update={"kv_cache_dtype": kv_cache_dtype}))
    if not overlaps:
        runner.sampler = None
    return runner


class Watched:
    """What a runner is asked to do, counted.

    Attributes:
        runner: It.
        steps: Forward passes.
        carried: Of those, the ones launched before the tokens they compute were known.
        swapped: Blocks copied back from host memory.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.steps = self.carried = self.swapped = 0
        run, swap_in = runner.run, runner.swap_in

        def counted_run(batch: ForwardBatch) -> torch.Tensor:
            self.steps += 1
            self.carried += batch.carried is not None
            return run(batch)

        def counted_swap(moves: Any) -> None:
            self.swapped += len(moves)
            swap_in(moves)

        runner.run, runner.swap_in = counted_run, counted_swap  # type: ignore[method-assign]


def captured(runner: ModelRunner) -> list[int]:
    """The batch sizes of which there are graphs."""
    graphs = getattr(runner._steps, "graphs", None)
    return [] if graphs is None else list(graphs.buckets)


def prompt_logits(runner: ModelRunner, prompt: list[int]) -> torch.Tensor:
    """Logits after every token of a prompt: float32 [tokens, vocabulary], on the host."""
    blocks = -(-len(prompt) // runner.block_size)
    batch = make_batch([(prompt, list(range(blocks))[::-1])], [(0, len(prompt))], runner.block_size)
    batch.logits_rows = np.arange(len(prompt))
    return runner.run(batch).float().cpu()


def decode_logits(runner: ModelRunner, prompt: list[int], first: int) -> torch.Tensor:
    """Logits after tokens `first` and later of a prompt, computed one by one: float32 [tokens, vocabulary]."""
    table = list(range(-(-len(prompt) // runner.block_size)))[::-1]
    runner.run(make_batch([(prompt, table)], [(0, first)], runner.block_size))
    spans = [(place, place + 1) for place in range(first, len(prompt))]
    steps = [runner.run(make_batch([(prompt, table)], [span], runner.block_size)).cpu() for span in spans]
    return torch.cat(steps).float()


def distances(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How far each row of logits is from what it should be, relative to its spread."""
    spread = wanted - wanted.mean(dim=1, keepdim=True)
    distance: torch.Tensor = (found - wanted).norm(dim=1) / spread.norm(dim=1)
    return distance
