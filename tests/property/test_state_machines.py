"""Hypothesis state machines: the block pool with its tables, and the engine, each against what it must give.

The default suite is the same in every run. A long search:

    PAGEDLLM_EXAMPLES=5000 python -m pytest --timeout 0 tests/property/test_state_machines.py
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.params import SamplingParams
from tests.pool_model import Sequence, TableModel
from tests.traffic import LONGEST, PREFIX, VOCAB, Ledger

LONG = int(os.environ.get("PAGEDLLM_EXAMPLES", "0"))


def how_long(examples: int, steps: int) -> settings:
    return settings(
        max_examples=LONG or examples,
        stateful_step_count=steps,
        derandomize=not LONG,
        suppress_health_check=list(HealthCheck),
    )


picks = st.integers(0, 99)
few_tokens = st.lists(st.integers(0, 1), min_size=1, max_size=9)


class PoolMachine(RuleBasedStateMachine):
    """Sequences of two different tokens, so that contents coincide often."""

    @initialize(total=st.integers(1, 12), block_size=st.integers(1, 4), retain=st.booleans())
    def begin(self, total: int, block_size: int, retain: bool) -> None:
        self.model = TableModel(total, block_size, retain)

    def _sequence(self, pick: int) -> Sequence:
        return self.model.sequences[pick % len(self.model.sequences)]

    @rule(tokens=few_tokens)
    def start(self, tokens: list[int]) -> None:
        self.model.write(self.model.start(), tokens)

    @rule(tokens=few_tokens)
    def hit(self, tokens: list[int]) -> None:
        self.model.hit(tokens)

    @precondition(lambda self: self.model.sequences)
    @rule(pick=picks, tokens=few_tokens)
    def write(self, pick: int, tokens: list[int]) -> None:
        self.model.write(self._sequence(pick), tokens)

    @precondition(lambda self: self.model.sequences)
    @rule(pick=picks)
    def fork(self, pick: int) -> None:
        self.model.fork(self._sequence(pick))

    @precondition(lambda self: self.model.sequences)
    @rule(pick=picks)
    def release(self, pick: int) -> None:
        self.model.release(self._sequence(pick))

    @rule()
    def commit(self) -> None:
        self.model.commit()

    @rule()
    def fail(self) -> None:
        self.model.fail()

    @invariant()
    def holds(self) -> None:
        self.model.check()

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.model.drain()


prompts = st.builds(
    lambda shared, own: PREFIX[:shared] + own,
    st.sampled_from([0, 4, 7, 8]),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
)
lengths = st.integers(1, 30)
widths = st.integers(2, 4)
timeouts = st.sampled_from([None, None, None, 2.0, 5.0])


class EngineMachine(RuleBasedStateMachine):
    """Any requests, aborts, timeouts and failing steps, in any order."""

    @initialize(
        blocks=st.integers(2, 30),
        block_size=st.sampled_from([1, 2, 4]),
        host_blocks=st.sampled_from([0, 6, 60]),
        seats=st.sampled_from([4, 16]),
        budget=st.sampled_from([8, 16, 64]),
        caching=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority", "fair"]),
    )
    def begin(
        self, blocks: int, block_size: int, host_blocks: int, seats: int, budget: int, caching: bool, policy: str
    ) -> None:
        self.ledger = Ledger(
            blocks,
            block_size,
            host_blocks,
            seats,
            max_num_batched_tokens=max(seats, budget),
            enable_prefix_caching=caching,
            scheduling_policy=policy,
        )

    @rule(prompt=prompts, length=lengths, timeout=timeouts, stream=st.booleans(), key=st.sampled_from("ab"))
    def greedy(self, prompt: list[int], length: int, timeout: float | None, stream: bool, key: str) -> None:
        params = SamplingParams(temperature=0, max_tokens=length)
        self.ledger.add(prompt, params, timeout, stream=stream, share_key=key, priority=ord(key))

    @rule(prompt=prompts, length=lengths, timeout=timeouts, n=widths, seed=st.integers(0, 3))
    def samples(self, prompt: list[int], length: int, timeout: float | None, n: int, seed: int) -> None:
        self.ledger.add(prompt, SamplingParams(n=n, temperature=1.0, seed=seed, max_tokens=length), timeout)

    @rule(prompt=prompts, length=lengths, timeout=timeouts, n=widths, ends=st.lists(st.integers(0, 30), max_size=4))
    def beams(self, prompt: list[int], length: int, timeout: float | None, n: int, ends: list[int]) -> None:
        params = SamplingParams(use_beam_search=True, n=n, max_tokens=length, stop_token_ids=ends)
        self.ledger.add(prompt, params, timeout)

    @precondition(lambda self: self.ledger.asked)
    @rule(pick=picks)
    def follow_up(self, pick: int) -> None:
        """The next turn of a conversation."""
        asked = list(self.ledger.asked.values())[pick % len(self.ledger.asked)]
        prompt = [*asked.prompt, *asked.answer.get(0, []), 3][:LONGEST]
        self.ledger.add(prompt, SamplingParams(temperature=0, max_tokens=4))

    @precondition(lambda self: self.ledger.unfinished)
    @rule(pick=picks)
    def abort(self, pick: int) -> None:
        unfinished = self.ledger.unfinished
        self.ledger.abort(unfinished[pick % len(unfinished)])

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.ledger.step()

    @rule(seconds=st.sampled_from([1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.ledger.now += seconds

    @rule(written=st.booleans())
    def failing_step(self, written: bool) -> None:
        """The forward pass raises, perhaps after it wrote nonsense to the slots that it was given."""
        runner = self.ledger.runner

        def fail(batch: ForwardBatch) -> None:
            if written:
                runner.slots[batch.slot_mapping] = 999
            raise OSError("the device is gone")

        self.ledger.may_fail = True
        runner.before_run, usual = fail, runner.before_run
        self.ledger.step()
        runner.before_run = usual

    @invariant()
    def holds(self) -> None:
        self.ledger.check()

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.finish()


TestPool = PoolMachine.TestCase
TestPool.settings = how_long(examples=200, steps=40)
TestEngine = EngineMachine.TestCase
TestEngine.settings = how_long(examples=150, steps=30)
