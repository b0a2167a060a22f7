"""Swapping: what is preempted comes back from host memory, exactly, shared as before, or is recomputed."""

from __future__ import annotations

from typing import Any

import pytest

from pagedllm_core import LLM
from pagedllm_core.batch import ScheduledBatch
from pagedllm_core.engine import Engine
from pagedllm_core.errors import InvalidRequestError
from pagedllm_core.kv.offload import Line, PreemptionCosts
from pagedllm_core.params import SamplingParams
from tests.fakes import FakeRunner, expected_greedy, fake_engine, run_all

VOCAB = 61
GREEDY = SamplingParams(temperature=0, max_tokens=24)


class Never(PreemptionCosts):
    def swapping_pays(self, blocks: int, tokens: int) -> bool:
        return False


class Always(PreemptionCosts):
    def swapping_pays(self, blocks: int, tokens: int) -> bool:
        return True


def swapping_engine(
    costs: type[PreemptionCosts], blocks: int = 12, host: int = 64, **fields: Any
) -> tuple[Engine, FakeRunner]:
    runner = FakeRunner(num_blocks=blocks, block_size=4, vocab_size=VOCAB, num_host_blocks=host)
    engine = fake_engine(runner, **fields)
    engine.scheduler.swap.costs = costs()
    runner.swapped_blocks = 0
    return engine, runner


def prompts(count: int) -> list[list[int]]:
    return [[number + 1, 7, 3, number, 5] for number in range(count)]


def computed(runner: FakeRunner) -> int:
    return sum(len(batch.token_ids) for batch in runner.batches)


def swap_out_now(engine: Engine, request_id: str) -> None:
    """Preempt a running request between two steps, so that a test chooses who is swapped out and when."""
    batch = ScheduledBatch()
    engine.scheduler.preempt(engine._requests[request_id], batch)
    engine._mover.move(batch)
    assert engine.stats().swapped == 1


def watch_swap_in(runner: FakeRunner) -> list[int]:
    """How many blocks each later copy to the device moves."""
    counts: list[int] = []
    swap_in = runner.swap_in

    def watched(moves: list[tuple[int, int]]) -> None:
        counts.append(len(moves))
        swap_in(moves)

    runner.swap_in = watched  # type: ignore[method-assign]
    return counts


@pytest.mark.parametrize("caching", [True, False])
def test_swapped_requests_go_on_where_they_were(caching: bool) -> None:
    engine, runner = swapping_engine(Always, enable_prefix_caching=caching)
    for number, prompt in enumerate(prompts(6)):
        engine.add(prompt, GREEDY, request_id=str(number))
    outputs = run_all(engine)
    for number, prompt in enumerate(prompts(6)):
        assert outputs[str(number)].outputs[0].token_ids == expected_greedy(prompt, 24, VOCAB)
    assert engine.stats().preemptions > 0
    assert runner.swapped_blocks > 0
    assert computed(runner) == 6 * (5 + 24 - 1), "a token was computed twice"
    assert engine.scheduler.swap.pool.num_used == 0


def test_recomputed_where_swapping_does_not_pay() -> None:
    engine, runner = swapping_engine(Never, enable_prefix_caching=False)
    for number, prompt in enumerate(prompts(6)):
        engine.add(prompt, GREEDY, request_id=str(number))
    outputs = run_all(engine)
    for number, prompt in enumerate(prompts(6)):
        assert outputs[str(number)].outputs[0].token_ids == expected_greedy(prompt, 24, VOCAB)
    assert runner.swapped_blocks == 0
    assert computed(runner) > 6 * (5 + 24 - 1)


def test_recomputed_where_host_memory_is_full() -> None:
    engine, runner = swapping_engine(Always, host=3)
    for number, prompt in enumerate(prompts(6)):
        engine.add(prompt, GREEDY, request_id=str(number))
    outputs = run_all(engine)
    for number, prompt in enumerate(prompts(6)):
        assert outputs[str(number)].outputs[0].token_ids == expected_greedy(prompt, 24, VOCAB)
    assert 0 < runner.swapped_blocks < 12
    assert runner.host.shape == (3, 4)


GROUPS = [
    (SamplingParams(n=4, temperature=0.8, seed=3, max_tokens=20), 30),
    (SamplingParams(n=4, use_beam_search=True, max_tokens=20), 22),
]


@pytest.mark.parametrize(("params", "blocks"), GROUPS, ids=["samples", "beams"])
@pytest.mark.parametrize("costs", [Always, Never], ids=["swapped", "recomputed"])
def test_groups_move_together_and_stay_shared(
    params: SamplingParams, blocks: int, costs: type[PreemptionCosts]
) -> None:
    def answers(total: int) -> list[list[int]]:
        engine, _ = swapping_engine(costs, blocks=total)
        largest = {"out": 0}
        swap_out = engine.scheduler.swap.swap_out

        def watched(request: Any) -> Any:
            tables = [set(sequence.table.ids.tolist()) for sequence in request.sequences]
            moves = swap_out(request)
            if moves is not None:
                assert len(moves) == len(set.union(*tables)), "each block moves once"
                largest["out"] = max(largest["out"], sum(map(len, tables)) - len(moves))
            return moves

        engine.scheduler.swap.swap_out = watched  # type: ignore[method-assign]
        for number in range(2):
            engine.add(prompts(2)[number] * 3, params, request_id=str(number))
        outputs = run_all(engine)
        if total == blocks:
            assert engine.stats().preemptions > 0
            assert (largest["out"] > 0) == (costs is Always), "blocks that forks share are copied once"
        return [part.token_ids for number in range(2) for part in outputs[str(number)].outputs]

    assert answers(blocks) == answers(400)


def test_a_swapped_in_block_is_shared_with_what_the_cache_still_has() -> None:
    engine, runner = swapping_engine(Always, blocks=14)
    prefix = list(range(1, 13))  # three full blocks
    for number in range(3):
        engine.add([*prefix, 20 + number], GREEDY, request_id=str(number))
    moves = watch_swap_in(runner)
    outputs = run_all(engine)
    for number in range(3):
        assert outputs[str(number)].outputs[0].token_ids == expected_greedy([*prefix, 20 + number], 24, VOCAB)
    assert moves
    assert max(moves) <= 10 - 3, "the prefix is still on the device and is not copied"


def test_a_partial_block_that_forks_share_is_swapped_in_once() -> None:
    """Nobody finds it by its content, so only what the request's sequences shared in host memory says so."""
    engine, runner = swapping_engine(Always)
    params = SamplingParams(n=4, temperature=0.8, seed=3, max_tokens=8)
    engine.add([1, 2, 3, 4, 5, 6], params, request_id="group")
    engine.step()  # the forks share a full block and a partial one, and none has written yet
    swap_out_now(engine, "group")
    moves = watch_swap_in(runner)
    engine.step()
    assert moves == [1], "the device still has the full block"
    assert engine.stats().kv_blocks_used == 1 + 4
    run_all(engine)


def test_what_was_swapped_in_is_found_by_later_requests() -> None:
    """The device's own copies are gone: the blocks that came back are full ones to seal and one to fill first."""
    engine, _ = swapping_engine(Always)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    engine.add(prompt, GREEDY, request_id="0")
    engine.step()
    swap_out_now(engine, "0")
    for block in [engine.pool.allocate() for _ in range(engine.pool.total)]:
        engine.pool.release(block)
    assert engine.stats().kv_blocks_cached == 0
    run_all(engine)
    known = [*prompt, *expected_greedy(prompt, 24, VOCAB)]
    engine.add(known, SamplingParams(temperature=0, max_tokens=1), request_id="1")
    assert run_all(engine)["1"].metrics.cached_tokens == (len(known) - 1) // 4 * 4


def test_what_comes_back_keeps_to_the_token_budget() -> None:
    """A group takes its steps together: it waits where a more urgent prompt leaves it too few tokens."""
    engine, runner = swapping_engine(Always, blocks=40, scheduling_policy="priority")
    params = SamplingParams(n=4, temperature=0.8, seed=3, max_tokens=8)
    engine.add(prompts(1)[0], params, request_id="group", priority=1)
    engine.step()
    swap_out_now(engine, "group")
    engine.add(list(range(30)), GREEDY, request_id="urgent", priority=0)
    engine.step()
    assert len(runner.batches[-1].token_ids) == 30
    assert engine.stats().swapped == 1
    run_all(engine)
    assert max(len(batch.token_ids) for batch in runner.batches) <= 32


def test_what_lacks_the_room_it_might_need_goes_on_when_it_is_alone() -> None:
    """Two blocks and one more for each of four forks are six, but one fork may write where all read."""

    def answers(blocks: int) -> list[list[int]]:
        engine, _ = swapping_engine(Always, blocks=blocks)
        params = SamplingParams(n=4, temperature=0.8, seed=3, max_tokens=3)
        engine.add([1, 2, 3, 4, 5, 6], params, request_id="group", stream=False)
        engine.step()
        swap_out_now(engine, "group")
        engine.step()
        assert engine.stats().running == 1
        output = run_all(engine)["group"]
        assert engine.scheduler.swap.pool.num_used == 0
        return [part.token_ids for part in output.outputs]

    assert answers(blocks=5) == answers(blocks=40)


def test_a_resumed_prompt_that_finds_itself_counts_as_no_hit() -> None:
    """Hits are what the cache spared a new request; a request's own work found again would make it look useful."""
    engine, _ = swapping_engine(Never, blocks=20)
    engine.add(list(range(40)), GREEDY, request_id="0")
    engine.step()  # 32 of the 40 tokens
    engine.scheduler.preempt(engine._requests["0"])
    output = run_all(engine)["0"]
    assert engine.stats().tokens_prefilled == 40, "its blocks were found again"
    assert output.metrics.cached_tokens == engine.stats().prefix_cache_hits == 0


def test_a_failed_step_loses_what_it_was_to_swap_out() -> None:
    engine, runner = swapping_engine(Always)
    for number, prompt in enumerate(prompts(6)):
        engine.add(prompt, GREEDY, request_id=str(number))
    failed = []
    swap_out = runner.swap_out

    def fails(moves: list[tuple[int, int]]) -> None:
        if not failed:
            failed.append(moves)
            raise RuntimeError("no copy today")
        swap_out(moves)

    runner.swap_out = fails  # type: ignore[method-assign]
    outputs = run_all(engine)
    assert failed
    for number, prompt in enumerate(prompts(6)):
        assert outputs[str(number)].error is None
        assert outputs[str(number)].outputs[0].token_ids == expected_greedy(prompt, 24, VOCAB)


def test_a_forward_pass_that_fails_after_swapping_out() -> None:
    engine, runner = swapping_engine(Always)
    for number, prompt in enumerate(prompts(6)):
        engine.add(prompt, GREEDY, request_id=str(number))
    state = {"swapped": 0, "failed": False}

    def fail_once(batch: Any) -> None:
        if runner.swapped_blocks and not state["failed"]:
            state["failed"] = True
            raise RuntimeError("device lost its mind")

    runner.before_run = fail_once
    outputs = run_all(engine)
    assert state["failed"]
    for number, prompt in enumerate(prompts(6)):
        assert outputs[str(number)].outputs[0].token_ids == expected_greedy(prompt, 24, VOCAB)


def test_a_later_failure_loses_nothing_that_was_swapped_out() -> None:
    """Once the step that copies a request out has succeeded, its host blocks depend on no other step."""
    engine, runner = swapping_engine(Always)
    for number, prompt in enumerate(prompts(6)):
        engine.add(prompt, GREEDY, request_id=str(number), stream=False)
    while not engine.stats().swapped:
        engine.step()
    swapped = [request for request in engine.scheduler.waiting if request.swapped]

    def fail_once(batch: Any) -> None:
        runner.before_run = lambda batch: None
        raise RuntimeError("device lost its mind")

    runner.before_run = fail_once
    engine.step()
    assert runner.before_run is not fail_once
    assert all(request.swapped for request in swapped)
    outputs = run_all(engine)
    for number, prompt in enumerate(prompts(6)):
        assert outputs[str(number)].outputs[0].token_ids == expected_greedy(prompt, 24, VOCAB)


def test_aborting_a_swapped_request_frees_its_host_blocks() -> None:
    engine, _ = swapping_engine(Always)
    for number, prompt in enumerate(prompts(6)):
        engine.add(prompt, GREEDY, request_id=str(number))
    while not engine.stats().swapped:
        engine.step()
    assert engine.stats().swapped <= engine.stats().waiting
    held = engine.scheduler.swap.pool.num_used
    assert held > 0
    for request in list(engine.scheduler.waiting):
        engine.abort(request.request_id)
    assert engine.scheduler.swap.pool.num_used == 0
    engine.check()
    run_all(engine)


def test_the_cost_model_finds_a_line() -> None:
    line = Line()
    assert line.slope() == line.offset() == 0.0
    for amount in [1, 5, 20, 3, 8]:
        line.add(amount, 0.25 + 0.5 * amount)
    assert line.slope() == pytest.approx(0.5)
    assert line.offset() == pytest.approx(0.25)
    for _ in range(2000):  # the machine became slower
        for amount in (1, 5):
            line.add(amount, 1.0 + 2 * amount)
    assert line.slope() == pytest.approx(2.0)


def test_the_cheaper_way_is_chosen() -> None:
    costs = PreemptionCosts()
    for amount in (1, 10):
        costs.copy.add(amount, 0.001 * amount)
        costs.step.add(amount, 0.1 + 0.002 * amount)
    assert costs.swapping_pays(blocks=4, tokens=16)  # 8 ms of copies against 32 ms of computing
    assert not costs.swapping_pays(blocks=4, tokens=3)  # against 6 ms


def test_costs_are_measured_before_the_first_request() -> None:
    ticks = iter(range(1000))
    runner = FakeRunner(num_host_blocks=8)
    engine = Engine(fake_engine().config, runner=runner, clock=lambda: float(next(ticks)))
    assert engine.scheduler.swap.costs.copy.slope() + engine.scheduler.swap.costs.copy.offset() > 0


def test_real_blocks_come_back_bit_by_bit() -> None:
    texts = [f"Count to {number}: one, two, three," for number in range(6)]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    answers = []
    for swap_space, blocks in [(0.0, 2000), (0.05, 16)]:
        memory = blocks * 5 * 2 * 2 * 64 * 4 * 4
        with LLM(
            "tiny", dtype="float32", block_size=4, kv_cache_memory=memory, swap_space=swap_space, max_num_seqs=8
        ) as llm:
            engine = llm.engine
            if swap_space:
                engine._worker.core.scheduler.swap.costs = Always()
            answers.append([output.outputs[0].token_ids for output in llm.generate(texts, params)])
            if swap_space:
                assert llm.stats().preemptions > 0
                copies = engine._worker.core.scheduler.swap.costs.copy
                assert copies.slope() + copies.offset() > 0, "nothing was copied"
    assert answers[0] == answers[1]


def test_more_than_the_machine_has_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"swap_space=1000000.0: only .* GiB"):
        LLM("tiny", swap_space=1e6)
