"""Steps that the device's memory does not hold: they are tried again in smaller parts, and nothing is lost."""

from __future__ import annotations

import logging

import pytest

from pagedllm_core import scheduler
from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.engine import Engine
from pagedllm_core.errors import RequestFailedError, is_out_of_memory
from pagedllm_core.params import SamplingParams
from tests.fakes import FakeRunner, expected_greedy, fake_engine, run_all
from tests.unit.test_swapping import Always, Never, swap_out_now, swapping_engine

VOCAB = 61


def engine_with_room(tokens: int, overlaps: bool = False, **fields: int) -> tuple[Engine, FakeRunner, list[int]]:
    """An engine whose steps hold this many tokens; and the sizes of the steps that did not fit."""
    runner = FakeRunner(overlaps=overlaps)
    refused: list[int] = []

    def check(batch: ForwardBatch) -> None:
        if len(batch.token_ids) > tokens:
            refused.append(len(batch.token_ids))
            raise MemoryError(f"a step of {len(batch.token_ids)} tokens does not fit")

    runner.before_run = check
    return fake_engine(runner, **fields), runner, refused


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_prompt_is_cut_until_its_steps_fit(overlaps: bool) -> None:
    engine, runner, refused = engine_with_room(11, overlaps)
    prompt = [number % VOCAB for number in range(70)]
    engine.add(prompt, SamplingParams(max_tokens=5), request_id="long")
    results = run_all(engine)
    assert results["long"].error is None
    assert results["long"].outputs[0].token_ids == expected_greedy(prompt, 5, VOCAB)
    assert refused == [32, 16]
    assert len(runner.batches) == 13  # eight tokens each, then four more decoding steps


@pytest.mark.parametrize("overlaps", [False, True])
def test_as_many_decode_as_fit_and_the_others_wait(overlaps: bool) -> None:
    engine, runner, refused = engine_with_room(6, overlaps)
    for number in range(8):
        engine.add([number, 1], SamplingParams(max_tokens=10), request_id=str(number))
    results = run_all(engine)
    for number in range(8):
        assert results[str(number)].outputs[0].token_ids == expected_greedy([number, 1], 10, VOCAB)
    assert refused == [16, 8]
    assert len(runner.batches) <= 28  # in two halves; one at a time it would be 80
    assert engine.stats().preemptions <= 16


@pytest.mark.parametrize("beams", [False, True])
def test_a_group_that_never_fits_fails_alone(beams: bool) -> None:
    engine, _, _ = engine_with_room(3)
    group = SamplingParams(n=4, max_tokens=6, **({"use_beam_search": True} if beams else {"temperature": 1, "seed": 1}))
    engine.add([5, 6], group, request_id="group")
    engine.add([3, 4, 5], SamplingParams(max_tokens=6), request_id="fine")
    results = run_all(engine)
    assert isinstance(results["group"].error, RequestFailedError)
    assert "does not fit" in str(results["group"].error)
    assert "max_num_batched_tokens" in str(results["group"].error)
    assert results["fine"].outputs[0].token_ids == expected_greedy([3, 4, 5], 6, VOCAB)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_group_larger_than_a_shrunk_step_takes_its_steps_alone(swapped: bool) -> None:
    """Its four sequences need four tokens of a step that holds two at most; nobody else is in its steps then."""
    engine, runner = swapping_engine(Always if swapped else Never)
    engine.add([5, 6], SamplingParams(n=4, max_tokens=8, temperature=1, seed=1), request_id="group", stream=False)
    engine.step()
    engine.step()
    if swapped:
        swap_out_now(engine, "group")
    else:
        engine.scheduler.preempt(engine._requests["group"])
    engine.scheduler._limit(2)
    engine.add([3, 4, 5], SamplingParams(max_tokens=6), request_id="fine")
    runner.batches.clear()
    results = run_all(engine)
    assert (runner.swapped_blocks > 0) is swapped
    assert results["fine"].outputs[0].token_ids == expected_greedy([3, 4, 5], 6, VOCAB)
    assert [len(one.token_ids) for one in results["group"].outputs] == [8] * 4
    assert max(len(batch.token_ids) for batch in runner.batches) == 4


def test_steps_grow_again_when_memory_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "GOOD_STEPS", 3)
    engine, runner, refused = engine_with_room(8)
    first = [number % VOCAB for number in range(64)]
    engine.add(first, SamplingParams(max_tokens=1), request_id="first")
    run_all(engine)
    sizes = [len(batch.token_ids) for batch in runner.batches]
    assert set(refused) == {32, 16}
    assert sizes[:3] == [8, 8, 8]
    runner.before_run = lambda batch: None  # whoever had the memory is gone
    runner.batches.clear()
    engine.add([7] * 200, SamplingParams(max_tokens=2), request_id="second")
    assert run_all(engine)["second"].outputs[0].token_ids == expected_greedy([7] * 200, 2, VOCAB)
    assert max(len(batch.token_ids) for batch in runner.batches) == 32
    assert engine.scheduler.max_num_seqs == engine.config.max_num_seqs


def test_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    engine, _, _ = engine_with_room(16)
    engine.add([1] * 30, SamplingParams(max_tokens=1))
    with caplog.at_level(logging.WARNING, "pagedllm"):
        run_all(engine)
    assert [record.getMessage() for record in caplog.records] == [
        "a step of 30 tokens does not fit; steps hold at most 15 tokens now"
    ]


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
        (None, False),
    ],
)
def test_what_says_that_memory_is_short(error: Exception | None, short: bool) -> None:
    assert is_out_of_memory(error) is short
