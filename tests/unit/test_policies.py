"""Who is admitted first, and that nobody waits for ever."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pagedllm_core.engine import Engine
from pagedllm_core.params import SamplingParams
from pagedllm_core.queue import PRIORITY_SPAN
from tests.fakes import FakeRunner, fake_engine, run_all

PARAMS = SamplingParams(max_tokens=4)


def finished_order(engine: Engine) -> list[str]:
    order = []
    while engine.has_unfinished:
        order += [output.request_id for output in engine.step() if output.finished]
        engine.check()
    return order


def test_first_come_first_served() -> None:
    engine = fake_engine(max_num_seqs=1)
    for number in range(5):
        engine.add([number + 1], PARAMS, request_id=str(number), priority=-number, share_key=str(number % 2))
    assert finished_order(engine) == ["0", "1", "2", "3", "4"]


def test_lower_priority_values_go_first() -> None:
    engine = fake_engine(max_num_seqs=1, scheduling_policy="priority")
    for number, priority in enumerate([5, 0, 3, 0, -2]):
        engine.add([number + 1], PARAMS, request_id=str(number), priority=priority)
    assert finished_order(engine) == ["4", "1", "3", "2", "0"]


def test_requests_of_one_place_can_each_be_taken_out() -> None:
    """A level of priority is worth some arrivals, so two requests may have the same place."""
    engine = fake_engine(max_num_seqs=1, scheduling_policy="priority")
    engine.add([1], PARAMS, request_id="late", priority=1)
    for number in range(PRIORITY_SPAN):
        engine.add([2], PARAMS, request_id=str(number))
    last = str(PRIORITY_SPAN - 1)
    assert len({engine.scheduler.waiting.order(one) for one in engine.scheduler.waiting}) == PRIORITY_SPAN
    engine.abort(last)
    engine.abort("late")
    assert sorted(finished_order(engine)) == sorted(map(str, [*range(PRIORITY_SPAN), "late"]))


def test_the_least_urgent_is_preempted_first() -> None:
    engine = fake_engine(FakeRunner(num_blocks=12), scheduling_policy="priority")
    engine.add([1, 2, 3], SamplingParams(max_tokens=30), request_id="early", priority=3)
    engine.step()
    engine.add([4, 5, 6], SamplingParams(max_tokens=30), request_id="urgent", priority=0)
    results = run_all(engine)
    assert results["urgent"].metrics.preemptions == 0
    assert results["early"].metrics.preemptions > 0


def test_a_stream_of_urgent_requests_does_not_starve_the_others() -> None:
    engine = fake_engine(max_num_seqs=1, scheduling_policy="priority")
    engine.add([1], SamplingParams(max_tokens=1), request_id="patient", priority=1)
    for number in range(PRIORITY_SPAN + 5):
        engine.add([2], SamplingParams(max_tokens=1), request_id=str(number), priority=0)
        outputs = engine.step()
        if outputs and outputs[0].request_id == "patient":
            assert number >= PRIORITY_SPAN - 1
            return
    pytest.fail("the patient request starved")


def test_a_huge_batch_does_not_starve_another_chain() -> None:
    """One key has 200 requests waiting when another's five arrive; seats are shared alike from then on."""
    engine = fake_engine(FakeRunner(num_blocks=512), max_num_seqs=4, scheduling_policy="fair")
    for number in range(200):
        engine.add([1, 2, 3], PARAMS, request_id=f"huge {number}", share_key="huge")
    for _ in range(20):
        engine.step()
    for number in range(5):
        engine.add([4, 5, 6], PARAMS, request_id=f"small {number}", share_key="small")
    order = [request_id.split()[0] for request_id in finished_order(engine)]
    last = max(place for place, name in enumerate(order) if name == "small")
    assert Counter(order[: last + 1])["huge"] <= 12
    assert Counter(order)["huge"] > 150


def test_an_idle_key_saves_nothing_up() -> None:
    engine = fake_engine(FakeRunner(num_blocks=512), max_num_seqs=2, scheduling_policy="fair")
    engine.add([1], PARAMS, request_id="late 0", share_key="late")
    for number in range(40):
        engine.add([2, 3], PARAMS, request_id=f"busy {number}", share_key="busy")
    order = []
    for _ in range(40):
        order += [output.request_id for output in engine.step() if output.finished]
    for number in range(40):
        engine.add([1], PARAMS, request_id=f"late {number + 1}", share_key="late")
    order = [request_id.split()[0] for request_id in finished_order(engine)]
    assert Counter(order[:12])["busy"] >= 3  # the two keys take turns


def test_counters_are_bounded() -> None:
    engine = fake_engine(scheduling_policy="fair")
    for number in range(500):
        engine.add([1], SamplingParams(max_tokens=1), share_key=f"key {number}")
        run_all(engine)
    assert len(engine.scheduler.waiting._counters) < 200  # type: ignore[attr-defined]


def test_single_calls_without_end_do_not_starve_a_batch() -> None:
    """Five callers, each of whom calls again with a new key as soon as the last call has ended; two seats."""
    engine = fake_engine(FakeRunner(num_blocks=512), max_num_seqs=2, scheduling_policy="fair")
    for number in range(12):
        engine.add([1, 2, 3], PARAMS, request_id=f"batch {number}", share_key="batch")
    calls, calling, finished = 0, 0, Counter[str]()
    for _ in range(500):
        while calling < 5:
            engine.add([4, 5, 6], PARAMS, request_id=f"call {calls}", share_key=f"key {calls}")
            calls, calling = calls + 1, calling + 1
        ended = Counter(output.request_id.split()[0] for output in engine.step() if output.finished)
        calling -= ended["call"]
        finished += ended
    assert finished["batch"] == 12
    assert finished["call"] > 200
    assert len(engine.scheduler.waiting._counters) < 100  # type: ignore[attr-defined]


@pytest.mark.parametrize(("seats", "callers", "least", "most"), [(2, 1, 0.4, 0.6), (8, 7, 0.08, 0.2)])
def test_a_batch_beside_callers_gets_no_more_than_its_share(
    seats: int, callers: int, least: float, most: float
) -> None:
    """Callers that run and do not wait count, too."""
    engine = fake_engine(FakeRunner(num_blocks=512), max_num_seqs=seats, scheduling_policy="fair")
    for number in range(600):
        engine.add([1, 2, 3], PARAMS, request_id=f"batch {number}", share_key="batch")
    given, calling = Counter[str](), 0
    for _ in range(500):
        for caller in range(calling, callers):
            engine.add([4, 5, 6], PARAMS, request_id=f"call {given['call']} {caller}", share_key=f"key {caller}")
        calling = callers
        for output in engine.step():
            kind = output.request_id.split()[0]
            given[kind] += sum(len(one.token_ids) for one in output.outputs)
            if output.finished and kind == "call":
                key = output.request_id.split()[-1]
                engine.add([4, 5, 6], PARAMS, request_id=f"call {given['call']} {key}", share_key=f"key {key}")
    assert least < given["batch"] / sum(given.values()) < most


@pytest.mark.parametrize("caching", [False, True])
def test_shares_are_equal_where_memory_is_short(caching: bool) -> None:
    """Who comes later is preempted more often; what is recomputed then does not count against its share."""
    engine = fake_engine(
        FakeRunner(num_blocks=30), max_num_seqs=16, scheduling_policy="fair", enable_prefix_caching=caching
    )
    params = SamplingParams(max_tokens=40, temperature=0)
    for number in range(200):
        engine.add([number % 60, number // 60] * 4, params, request_id=f"early {number}", share_key="early")
    for _ in range(60):
        engine.step()
    for number in range(100):
        engine.add([60, number % 60, number // 60, 7] * 2, params, request_id=f"late {number}", share_key="late")
    given = Counter[str]()
    for _ in range(800):
        for output in engine.step():
            given[output.request_id.split()[0]] += sum(len(one.token_ids) for one in output.outputs)
    assert engine.scheduler.num_preemptions > 50
    assert 0.9 < given["late"] / given["early"] < 1.1


@pytest.mark.parametrize("length", [8, 9])
@pytest.mark.parametrize("kind", [{"use_beam_search": True}, {"temperature": 1.0, "seed": 1}])
def test_a_group_is_admitted_once_it_can_fork(kind: dict[str, Any], length: int) -> None:
    """Admitted with blocks for its prompt alone, it would be preempted in its next step."""
    engine = fake_engine(FakeRunner(num_blocks=12, generation_defaults={}), enable_prefix_caching=False)
    engine.add([1] * 24, SamplingParams(temperature=0, max_tokens=8))
    engine.step()
    engine.add([2] * length, SamplingParams(max_tokens=6, n=4, **kind))
    assert all(output.metrics.preemptions == 0 for output in run_all(engine).values())
    assert engine.stats().tokens_prefilled == 24 + length


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_small_pools_end_under_every_policy(policy: str) -> None:
    engine = fake_engine(FakeRunner(num_blocks=7), scheduling_policy=policy, max_num_batched_tokens=16)
    for number in range(30):
        engine.add(
            [number + 1] * (number % 9 + 1), SamplingParams(max_tokens=number % 11 + 1), request_id=str(number),
            priority=number % 3, share_key=str(number % 4),
        )  # fmt: skip
    results = run_all(engine, most_steps=2_000)
    assert len(results) == 30
    assert all(result.error is None for result in results.values())
