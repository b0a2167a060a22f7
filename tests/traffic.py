"""Requests of every kind through the real scheduler and pool, and what each must give: what it gives alone.

`Ledger` keeps the books of one engine over the fake model; `simulate` drives one with random traffic.
"""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any, NamedTuple

from pagedllm_core.errors import CapacityError, RequestFailedError, RequestTimeoutError
from pagedllm_core.kv.offload import PreemptionCosts
from pagedllm_core.outputs import RequestOutput
from pagedllm_core.params import SamplingParams
from tests.fakes import FakeRunner, expected_greedy, fake_engine, run_all

VOCAB, LONGEST = 31, 64
POOL_SIZES = [2, 3, 5, 12, 40, 200]
PREFIX = [1, 2, 3, 4, 5, 6, 7, 8]


class CoinToss(PreemptionCosts):
    """Swaps or recomputes as its dice say, not as a clock says, so that a run can be repeated."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def swapping_pays(self, blocks: int, tokens: int) -> bool:
        return self._random.random() < 0.7


class Asked(NamedTuple):
    """One request; `answer` holds the tokens of each of its sequences so far, and `ended` how it ended."""

    prompt: list[int]
    params: SamplingParams
    deadline: float
    answer: dict[int, list[int]]
    ended: list[RequestOutput]


class Ledger:
    """One engine, what it was asked, and what it said.

    Args:
        blocks: Of the pool.
        block_size: Tokens in a block.
        host_blocks: Blocks for swapping.
        seats: `max_num_seqs`.
        seed: Of the choice between swapping and recomputing.
        overlaps: Let steps overlap.
        fields: Further fields of the configuration.
    """

    def __init__(
        self,
        blocks: int,
        block_size: int,
        host_blocks: int = 0,
        seats: int = 16,
        seed: int = 0,
        overlaps: bool = False,
        **fields: Any,
    ) -> None:
        self.blocks, self.block_size, self.seats = blocks, block_size, seats
        self.runner = FakeRunner(
            blocks,
            block_size,
            VOCAB,
            LONGEST,
            generation_defaults={},
            num_host_blocks=host_blocks,
            overlaps=overlaps,
        )
        self.engine = fake_engine(self.runner, max_num_seqs=seats, **fields)
        self.engine.scheduler.swap.costs = CoinToss(seed)
        self.now = 0.0
        self.engine._clock = self.engine.intake._clock = lambda: self.now
        self.asked: dict[str, Asked] = {}
        self.aborted: set[str] = set()
        self.may_fail = False  # set by who makes steps fail: a request that fails alone is given up
        self.steps = 0

    @property
    def unfinished(self) -> list[str]:
        """Requests whose end was not delivered yet."""
        return [request_id for request_id, asked in self.asked.items() if not asked.ended]

    def add(self, prompt: list[int], params: SamplingParams, timeout: float | None = None, **options: Any) -> None:
        """Ask, if the engine takes it; it must refuse exactly what can never fit."""
        needed = -(-len(prompt) // self.block_size)
        if params.width > 1 and params.max_tokens != 1:
            needed = len(prompt) // self.block_size + params.width
        try:
            request_id = self.engine.add(prompt, params, timeout=timeout, **options)
        except CapacityError:
            assert needed > self.blocks
            return
        assert needed <= self.blocks
        deadline = self.now + timeout if timeout is not None else float("inf")
        self.asked[request_id] = Asked(prompt, params, deadline, defaultdict(list), [])

    def abort(self, request_id: str) -> None:
        """Abort, at any time."""
        if self.engine.abort(request_id):
            self.aborted.add(request_id)

    def step(self) -> None:
        """One step, with everything checked that can be after it."""
        for output in self.engine.step():
            self._note(output)
        self.steps += 1
        self.check()

    def _note(self, output: RequestOutput) -> None:
        asked = self.asked[output.request_id]
        assert not asked.ended, "something came after the end"
        if isinstance(output.error, RequestTimeoutError):
            assert asked.deadline <= self.now
        elif output.error is not None:
            assert self.may_fail, output.error
            assert isinstance(output.error, RequestFailedError)
        for part in output.outputs:
            asked.answer[part.index].extend(part.token_ids)
        if output.finished:
            asked.ended.append(output)

    def check(self) -> None:
        """The pools' invariants, and counters that agree with them."""
        self.engine.check()
        stats = self.engine.stats()
        assert stats.kv_blocks_used + stats.kv_blocks_cached + stats.kv_blocks_free == stats.kv_blocks_total
        assert stats.running + stats.waiting == len(self.engine._requests) <= len(self.unfinished)
        assert 0.0 <= stats.kv_waste < 1.0
        assert 0 <= stats.prefix_cache_hits <= stats.prefix_cache_queries
        assert stats.max_batch_size <= self.seats
        assert (stats.swapped > 0) == (self.engine.scheduler.swap.pool.num_used > 0)
        waiting = [one for request in self.engine.scheduler.waiting for one in request.sequences]
        assert not any(len(sequence.table) for sequence in waiting), "who waits has no blocks"

    def finish(self, most_steps: int = 20_000) -> None:
        """Let everything end, and compare every answer."""
        for _ in range(most_steps):
            if not self.engine.has_unfinished:
                break
            self.step()
        assert not self.unfinished, "no progress"
        assert self.engine.pool.num_used == self.engine.scheduler.swap.pool.num_used == 0
        for batch in self.runner.batches:
            assert len(batch.context_lens) <= self.seats
            assert len(batch.token_ids) <= self.engine.config.max_num_batched_tokens
        self._compare()

    def _compare(self) -> None:
        roomy = fake_engine(
            FakeRunner(1000, 8, VOCAB, LONGEST, generation_defaults={}),
            max_num_batched_tokens=1000, enable_prefix_caching=False,
        )  # fmt: skip
        for request_id, asked in self.asked.items():
            if asked.params.width > 1:
                roomy.add(asked.prompt, asked.params, request_id=request_id, stream=False)
        groups = run_all(roomy, check=False)
        for request_id, asked in self.asked.items():
            whole = request_id not in self.aborted and asked.ended[0].error is None
            if asked.params.width == 1:
                wanted = [expected_greedy(asked.prompt, asked.params.max_tokens or 0, VOCAB)]
            else:
                wanted = [part.token_ids for part in groups[request_id].outputs]
            self._compare_one(asked, wanted, whole)

    def _compare_one(self, asked: Asked, wanted: list[list[int]], whole: bool) -> None:
        assert not whole or set(asked.answer) == set(range(asked.params.n))
        longest = len(asked.prompt) + max(map(len, wanted))
        if asked.params.use_beam_search:  # hypotheses compete, so a search that was cut short has others
            if whole and asked.params.width * -(-longest // self.block_size) <= self.blocks:
                assert [asked.answer[index] for index in range(asked.params.n)] == wanted
            return
        for index, found in asked.answer.items():
            assert found == wanted[index][: len(found)]
            if whole and len(found) < len(wanted[index]):  # cut short by the context, or by a pool it had to itself
                room = self.blocks * self.block_size
                alone = len(asked.prompt) + len(found) >= min(LONGEST, room)
                assert alone or (asked.params.width > 1 and asked.params.width * (longest + self.block_size) > room)


def random_prompt(generator: random.Random, asked: list[Asked]) -> list[int]:
    """One of a few prefixes, or an earlier request with what it was answered, and something of its own."""
    prefix = PREFIX[: generator.choice([0, 0, 4, 8])]
    if asked and generator.random() < 0.2:
        earlier = generator.choice(asked)
        prefix = (earlier.prompt + earlier.answer.get(0, []))[: LONGEST - 31]
    return prefix + [generator.randrange(VOCAB) for _ in range(generator.randint(1, 30))]


def random_params(generator: random.Random, seats: int) -> SamplingParams:
    """Mostly greedy; sometimes several samples, or beams."""
    count, kind = generator.randint(1, 30), generator.random()
    if kind < 0.2 and seats > 1:
        return SamplingParams(n=generator.randint(2, 4), temperature=1.0, max_tokens=count, seed=generator.randrange(9))
    if kind < 0.3 and seats > 1:
        ends = generator.sample(range(VOCAB), generator.randint(0, 3))
        return SamplingParams(use_beam_search=True, n=generator.randint(2, 4), max_tokens=count, stop_token_ids=ends)
    return SamplingParams(temperature=0, max_tokens=count)


def simulate(seed: int, overlaps: bool = False, requests: int = 30) -> int:
    """Random traffic until all of it has ended, exactly, in a pool of 2 to 200 blocks; returns the steps it took.

    Every step lets the oldest request advance, which never loses what it has: so there are at most as many steps as
    tokens, after the last request has come.
    """
    generator = random.Random(seed)
    seats = generator.choice([1, 4, 16])
    ledger = Ledger(
        blocks=generator.choice(POOL_SIZES),
        block_size=generator.choice([1, 2, 4, 8]),
        host_blocks=generator.choice([0, 0, 3, 100]),
        seats=seats,
        seed=seed,
        max_num_batched_tokens=max(seats, generator.choice([4, 16, 64])),
        enable_prefix_caching=generator.random() < 0.7,
        scheduling_policy=generator.choice(["fcfs", "fcfs", "priority", "fair"]),
        overlaps=overlaps,
    )
    ledger.engine._recover = unexpected  # type: ignore[method-assign]  # recovering would hide a mistake
    left = requests
    coming = 0
    while left or ledger.engine.has_unfinished:
        while left and generator.random() < 0.4:
            left, coming = left - 1, ledger.steps + 1
            ledger.add(
                random_prompt(generator, list(ledger.asked.values())),
                random_params(generator, seats),
                stream=generator.random() < 0.5,
                priority=generator.randrange(3),
                share_key=generator.choice([None, "a", "b"]),
            )
        if ledger.asked and generator.random() < 0.02:
            ledger.abort(generator.choice(list(ledger.asked)))
        ledger.step()
        asked = ledger.asked.values()
        most = coming + sum(len(one.prompt) + one.params.width * (one.params.max_tokens or 0) for one in asked)
        assert left or ledger.steps <= most, "no progress"
    ledger.finish()
    return ledger.steps


def unexpected(batch: object, error: Exception, suspect: object) -> None:
    raise error
