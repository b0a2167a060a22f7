"""Orca and FasterTransformer as the paper models them: contiguous reservations, first come first served."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass

from benchmarks.paper.buddy import BuddyAllocator
from benchmarks.paper.result import Result
from benchmarks.paper.workload import MAX_LENGTH, POOL_SLOTS, Job, step_seconds


class Reservation(enum.Enum):
    """How many slots Orca reserves for a request."""

    MAX = "Max"  # the longest request that the model allows
    POW2 = "Pow2"  # the output's length, rounded up to a power of two
    ORACLE = "Oracle"  # what it will need

    def slots(self, job: Job) -> int:
        """Slots reserved for a job."""
        if self is Reservation.MAX:
            return MAX_LENGTH
        if self is Reservation.POW2:
            return min(MAX_LENGTH, job.prompt + (1 << (job.output - 1).bit_length()))
        return job.length


@dataclass
class _Running:
    job: Job
    start: int
    slots: int
    written: int = 0

    @property
    def tokens(self) -> int:
        return self.job.prompt + self.written


def orca(jobs: list[Job], reservation: Reservation, total: int = POOL_SLOTS) -> Result:
    """Iteration-level scheduling (Orca, OSDI 2022) over a buddy allocator."""
    result, pool = Result(), BuddyAllocator(total)
    coming, running = deque(jobs), list[_Running]()
    now = coming[0].arrival
    while coming or running:
        if not running and coming[0].arrival > now:
            now = coming[0].arrival
        prefill = 0
        while coming and coming[0].arrival <= now:
            slots = reservation.slots(coming[0])
            start = pool.allocate(slots)
            if start is None:
                break
            running.append(_Running(coming.popleft(), start, slots))
            prefill += running[-1].job.prompt
        kv_tokens = sum(one.tokens for one in running)
        seconds = step_seconds(prefill, len(running), kv_tokens)
        now += seconds
        result.batches.append(len(running))
        result.durations.append(seconds)
        if coming and coming[0].arrival <= now - seconds:
            _count(result, running, total)
        for one in running:
            one.written += 1
        for one in [one for one in running if one.written == one.job.output]:
            running.remove(one)
            pool.release(one.start)
            result.latencies.append((now - one.job.arrival) / one.job.output)
    result.seconds = now - jobs[0].arrival
    return result


def _count(result: Result, running: list[_Running], total: int) -> None:
    memory = result.memory
    tokens = sum(one.tokens for one in running)
    needed = sum(one.job.length for one in running)
    slots = sum(one.slots for one in running)
    memory.tokens += tokens
    memory.reserved += needed - tokens
    memory.internal += slots - needed
    memory.external += total - slots


def faster_transformer(jobs: list[Job], total: int = POOL_SLOTS) -> Result:
    """Request-level batches: as many as have come and fit, padded to the longest, and all wait for the last."""
    result, most = Result(), total // MAX_LENGTH
    coming = deque(jobs)
    now = coming[0].arrival
    while coming:
        now = max(now, coming[0].arrival)
        batch: list[Job] = []
        while coming and len(batch) < most and coming[0].arrival <= now:
            batch.append(coming.popleft())
        prompt, output = max(job.prompt for job in batch), max(job.output for job in batch)
        for written in range(output):
            prefill = prompt * len(batch) if written == 0 else 0
            seconds = step_seconds(prefill, len(batch), (prompt + written) * len(batch))
            now += seconds
            result.batches.append(len(batch))
            result.durations.append(seconds)
        result.latencies += [(now - job.arrival) / job.output for job in batch]
    result.seconds = now - jobs[0].arrival
    return result
