"""Steps that overlap: the next one is scheduled and launched while the device still computes this one.

    host     schedule 1, launch | schedule 2, launch | read 1, stop, deliver | schedule 3, launch | read 2 ...
    device                      [ forward 1, sample 1 ][ forward 2, sample 2            ][ forward 3 ...

A sequence of step 1 takes part in step 2 before the host knows the token between them: its input is read
on the device from what step 1 chose, and `Sequence.ahead` counts it. Where that token turns out to be the sequence's
last, what step 2 computed for it is dropped; the slot it wrote was in a block that only this sequence could write, and
whoever gets the block writes later on the same stream.

Only sampling on the device can go ahead. Beams, guided output and whatever else `DeviceSampler` does not accept make
the engine wait for each step, as it always does without a device sampler.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pagedllm_core.attention.base import CarriedTokens
from pagedllm_core.batch import ScheduledBatch, wants_prompt_logprobs
from pagedllm_core.decode.advance import Choice, Failures, advance, append_choice, collect
from pagedllm_core.errors import NO_TOKEN, RequestFailedError, as_failure
from pagedllm_core.model.interface import Runner
from pagedllm_core.request import Request, Sequence

if TYPE_CHECKING:
    from pagedllm_core.decode.device import DeviceSampler, Pending, SampledTokens, SampleRow


@dataclass(slots=True)
class Flight:
    """A launched step.

    Attributes:
        batch: What it computes.
        logits: Its logits, float32 [rows, vocabulary]; on a GPU they may still be under way.
        started: Engine clock at its launch.
        choices: The tokens that the device chooses, in order.
        pending: What it chooses; None where the host has to.
    """

    batch: ScheduledBatch
    logits: torch.Tensor
    started: float
    choices: list[Choice] = field(default_factory=list)
    pending: Pending | None = None

    @property
    def allows_another(self) -> bool:
        """True where the next step needs nothing from this one but tokens, and forks nothing."""
        forks = any(choice.child != choice.sequence.index or not choice.request.forked for choice in self.choices)
        return self.pending is not None and not forks


def launch(
    batch: ScheduledBatch, runner: Runner, sampler: DeviceSampler | None, started: float, before: Flight | None = None
) -> Flight:
    """Run a step's forward pass and, where the device can, choose its tokens. Waits for nothing on a GPU.

    Args:
        batch: The step; copies it needs were made.
        runner: The model.
        sampler: Chooses tokens on the device, or None.
        started: Engine clock.
        before: The step under way, which chooses tokens that this one computes.
    """
    forward = batch.to_forward()
    places = {} if before is None else {choice.sequence: place for place, choice in enumerate(before.choices)}
    tokens = None if before is None or before.pending is None else before.pending.tokens
    if tokens is not None:
        forward.carried = _carried(batch, places, tokens)
    flight = Flight(batch, runner.run(forward), started)
    if sampler is None or not all(map(sampler.accepts, _asking(batch))):
        return flight
    choices, _ = collect(batch, flight.logits, {})
    if choices:
        rows = [_sample_row(choice, places) for choice in choices]
        with _device_of(flight.logits):
            flight.pending = sampler.launch(flight.logits, rows, tokens)
        flight.choices = choices
        for sequence in {choice.sequence for choice in choices}:
            sequence.ahead += 1
    return flight


def read(flight: Flight) -> SampledTokens | None:
    """What the device chose in a step, waited for; None where the host chooses."""
    with _device_of(flight.logits):
        return None if flight.pending is None else flight.pending.result()


def land(flight: Flight, sampled: SampledTokens | None) -> tuple[Failures, int]:
    """Give a step's tokens to the sequences that are still there.

    Args:
        flight: The step.
        sampled: What `flight.pending` chose; None where the host chooses, here.

    Returns:
        The requests that failed on their own, with the reason, and how many tokens were chosen.
    """
    if sampled is None:
        batch = flight.batch
        rows = [row for row in batch.rows if row.samples and row.request.active and not row.sequence.finished]
        chosen = sum(1 if row.request.forked else row.request.width for row in rows)
        with _device_of(flight.logits):
            return advance(batch, flight.logits), chosen + batch.forced
    failures: Failures = {}
    for sequence in {choice.sequence for choice in flight.choices}:
        sequence.ahead -= 1
    chosen = 0
    for place, choice in enumerate(flight.choices):
        if choice.sequence.finished or choice.request in failures:
            continue
        try:
            if not sampled.possible[place]:
                raise RequestFailedError(NO_TOKEN)
            append_choice(choice, sampled.tokens[place], sampled.scored, place)
            chosen += 1
        except Exception as error:
            failures[choice.request] = as_failure(choice.request.request_id, error)
    return failures, chosen


def forget(flight: Flight) -> None:
    """Nothing comes of a step: its tokens will be chosen again, the same ones, once its sequences are recomputed."""
    for sequence in {choice.sequence for choice in flight.choices}:
        sequence.ahead -= 1


def seal(flight: Flight) -> None:
    """Seal the blocks that the step's tokens fill, where their slots were assigned before the tokens were known."""
    for sequence in {choice.sequence for choice in flight.choices}:
        known, size = len(sequence.token_ids), sequence.table.block_size
        if known % size == 0 and sequence.num_computed >= known:
            sequence.table.seal(known // size - 1, sequence.block_hash(known // size - 1))


def _device_of(logits: torch.Tensor) -> AbstractContextManager[Any]:
    """Kernels and events belong to the thread's current GPU, which may be another one."""
    return torch.cuda.device(logits.device) if logits.is_cuda else nullcontext()


def _asking(batch: ScheduledBatch) -> list[Request]:
    """The requests that want something of the step's logits."""
    return list(dict.fromkeys(row.request for row in batch.rows if row.samples or wants_prompt_logprobs(row.request)))


def _sample_row(choice: Choice, places: dict[Sequence, int]) -> SampleRow:
    from pagedllm_core.decode.device import SampleRow

    carried = places[choice.sequence] if choice.sequence.ahead else -1
    return SampleRow(choice.request, choice.sequence, choice.child, choice.row, carried)


def _carried(batch: ScheduledBatch, places: dict[Sequence, int], tokens: torch.Tensor) -> CarriedTokens | None:
    """Which rows of the step compute a token that the step before chooses."""
    rows, sources, first = [], [], 0
    for row in batch.rows:
        first += row.end - row.start
        if row.end > len(row.sequence.token_ids):
            rows.append(first - 1)
            sources.append(places[row.sequence])
    if not rows:
        return None
    return CarriedTokens(np.array(rows, dtype=np.int64), np.array(sources, dtype=np.int64), tokens)
