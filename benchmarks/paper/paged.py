"""Ours: the real engine, scheduler and block pool, over a model that only costs time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.paper.result import Result
from benchmarks.paper.workload import MAX_LENGTH, POOL_SLOTS, Job, step_seconds
from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.config import EngineConfig
from pagedllm_core.engine import Engine
from pagedllm_core.params import SamplingParams

VOCABULARY = 8


class TimedModel:
    """A `Runner` whose logits are all alike and whose steps take virtual seconds.

    Args:
        num_blocks: Blocks of the pool.
        block_size: Tokens in a block.
        vocabulary: Token ids that prompts may have; the logits have fewer columns.
    """

    max_model_len, num_host_blocks, sampler = MAX_LENGTH, 0, None
    eos_token_ids: tuple[int, ...] = ()
    generation_defaults: Mapping[str, Any] = {"do_sample": False}
    tokenizer: Any = None
    model_name = "timed"

    def __init__(self, num_blocks: int, block_size: int, vocabulary: int = VOCABULARY) -> None:
        self.num_blocks, self.block_size, self.vocab_size = num_blocks, block_size, vocabulary
        self.now = 0.0
        self.seconds = 0.0
        self.during: Callable[[], None] = lambda: None

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """Let the step's time pass; `during` may look at the memory meanwhile."""
        self.during()
        rows = len(batch.context_lens)
        decoding = int((batch.query_starts[1:] - batch.query_starts[:-1] == 1).sum())
        self.seconds = step_seconds(len(batch.token_ids) - decoding, rows, int(batch.context_lens.sum()))
        self.now += self.seconds
        return torch.zeros(len(batch.logits_rows), VOCABULARY)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Nothing is stored."""

    def swap_out(self, moves: list[tuple[int, int]]) -> None:
        """Never called: there is no host memory."""

    def check_device(self) -> None:
        """No device fails."""

    def swap_in(self, moves: list[tuple[int, int]]) -> None:
        """Never called: there is no host memory."""

    def close(self) -> None:
        """Nothing to free."""


@dataclass
class Sharing:
    """Blocks named by block tables, and blocks that are really there, summed over the steps."""

    named: int = 0
    held: int = 0

    @property
    def saved(self) -> float:
        """Percent of the blocks without sharing that sharing saved."""
        return 100 * (self.named - self.held) / max(1, self.named)

    def count(self, engine: Engine) -> None:
        """Add the state after one step."""
        tables = [one.table.ids.tolist() for request in engine.scheduler.running for one in request.sequences]
        self.named += sum(map(len, tables))
        self.held += len({block for table in tables for block in table})


@dataclass
class Simulation:
    """Jobs on the real engine.

    Attributes:
        block_size: Tokens in a block.
        slots: Size of the pool.
        params: Of all requests; the output's length is each job's own.
        prefix_caching: As `EngineConfig.enable_prefix_caching`.
        prompt: Token ids of a job; by default all alike.
        vocabulary: Token ids that prompts may have.
        sharing: How many blocks sharing saved.
    """

    block_size: int = 16
    slots: int = POOL_SLOTS
    params: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})
    prefix_caching: bool = False
    prompt: Callable[[int, Job], list[int]] = lambda number, job: [1] * job.prompt
    vocabulary: int = VOCABULARY
    sharing: Sharing = field(default_factory=Sharing)

    def run(self, jobs: list[Job]) -> Result:
        """Serve the jobs, first come first served; all of them end."""
        model = TimedModel(self.slots // self.block_size, self.block_size, self.vocabulary)
        engine = Engine(
            EngineConfig(
                model="timed",
                block_size=self.block_size,
                max_num_seqs=1024,
                max_num_batched_tokens=2560,
                enable_prefix_caching=self.prefix_caching,
            ),
            runner=model,
            clock=lambda: model.now,
        )
        result, coming, by_id = Result(), deque(enumerate(jobs)), dict[str, Job]()
        model.now = jobs[0].arrival
        while coming or engine.has_unfinished:
            if not engine.has_unfinished:
                model.now = max(model.now, coming[0][1].arrival)
            while coming and coming[0][1].arrival <= model.now:
                number, job = coming.popleft()
                by_id[engine.add(self.prompt(number, job), self._params(job, number), stream=False)] = job
            self._step(engine, model, result, by_id)
        result.seconds = model.now - jobs[0].arrival
        return result

    def _params(self, job: Job, number: int) -> SamplingParams:
        given = {"ignore_eos": True, "max_tokens": job.output, **self.params}
        return SamplingParams(**given, **({"seed": number} if given.get("temperature") else {}))

    def _step(self, engine: Engine, model: TimedModel, result: Result, by_id: dict[str, Job]) -> None:
        def look() -> None:
            result.batches.append(len(engine.scheduler.running))
            self.sharing.count(engine)
            if len(engine.scheduler.waiting):
                _count(result, engine, model)

        model.during, steps = look, len(result.batches)
        outputs = engine.step()
        if len(result.batches) > steps:
            result.durations.append(model.seconds)
        for output in outputs:
            job = by_id.pop(output.request_id)
            result.latencies.append((model.now - job.arrival) / job.output)


def _count(result: Result, engine: Engine, model: TimedModel) -> None:
    used = engine.pool.num_used * model.block_size
    empty = round(used * engine.stats().kv_waste)
    result.memory.tokens += used - empty
    result.memory.internal += empty
    result.memory.external += model.num_blocks * model.block_size - used
