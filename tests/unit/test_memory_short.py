"""Steps that the device's memory does not hold: they are tried again in smaller parts, and nothing is lost."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pagedllm_core.kv.storage as storage_module
from pagedllm_core import scheduler
from pagedllm_core.async_engine import AsyncEngine
from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.config import EngineConfig
from pagedllm_core.engine import Engine
from pagedllm_core.errors import CapacityError, EngineClosedError, ModelLoadError, RequestFailedError, is_out_of_memory
from pagedllm_core.model import runner as runner_module
from pagedllm_core.model import sizing
from pagedllm_core.model.runner import ModelRunner
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


@pytest.mark.parametrize(("caching", "scored"), [(False, None), (True, 1)])
def test_growing_too_early_keeps_nobody_from_its_end(
    caching: bool, scored: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed from its start after each step that fails needs more steps than steps wait before they grow."""
    monkeypatch.setattr(scheduler, "GOOD_STEPS", 8)
    runner = FakeRunner(num_blocks=100, max_model_len=400)

    def check(batch: ForwardBatch) -> None:
        if len(batch.token_ids) > 10:
            raise MemoryError("does not fit")

    runner.before_run = check
    engine = fake_engine(runner, enable_prefix_caching=caching)
    prompt = [number % VOCAB for number in range(300)]
    engine.add(prompt, SamplingParams(max_tokens=3, prompt_logprobs=scored), request_id="long")
    result = run_all(engine, most_steps=300)["long"]
    assert result.error is None
    assert result.outputs[0].token_ids == expected_greedy(prompt, 3, VOCAB)


def test_a_step_under_way_that_fails_after_a_smaller_one_raises_no_limit() -> None:
    engine, _, _ = engine_with_room(1000)
    engine.scheduler._limit(3)
    engine.add([number % VOCAB for number in range(30)], SamplingParams(max_tokens=1))
    engine.scheduler.max_num_batched_tokens = 30
    batch = engine.scheduler.schedule()
    engine.scheduler.max_num_batched_tokens = 3
    assert engine.scheduler.shrink(batch)
    assert engine.scheduler.max_num_batched_tokens == 3


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


def test_a_prompts_scores_that_do_not_fit_are_made_in_smaller_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from pagedllm_core.decode import advance

    original = advance.score_tokens

    def score(logits: torch.Tensor, *arguments: Any) -> Any:
        if len(logits) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(logits, *arguments)

    prompt = [number % VOCAB for number in range(30)]
    wanted = SamplingParams(max_tokens=3, prompt_logprobs=1)
    plain = fake_engine()
    plain.add(prompt, wanted, request_id="scored")
    expected = run_all(plain)["scored"]
    monkeypatch.setattr(advance, "score_tokens", score)
    engine = fake_engine()
    engine.add(prompt, wanted, request_id="scored")
    result = run_all(engine)["scored"]
    assert result.error is None
    assert result.prompt_logprobs == expected.prompt_logprobs
    assert result.outputs[0].token_ids == expected.outputs[0].token_ids


def test_an_engine_whose_device_is_lost_ends_at_once() -> None:
    runner = FakeRunner()
    steps: list[int] = []
    submitted = threading.Event()

    def fail(batch: ForwardBatch) -> None:
        submitted.wait()
        steps.append(len(batch.token_ids))
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def check_device() -> None:
        raise EngineClosedError("cuda:0 computes no more (an illegal memory access); start the process again")

    runner.before_run, runner.check_device = fail, check_device  # type: ignore[method-assign]
    engine = AsyncEngine(EngineConfig(model="fake", block_size=4), runner=runner)
    handles = [engine.submit([number], SamplingParams(max_tokens=3)) for number in range(3)]
    submitted.set()
    for handle in handles:
        with pytest.raises(EngineClosedError, match="start the process again"):
            handle.result()
    assert len(steps) == 1, "the requests of a lost device are not tried one by one"
    assert not engine.health()
    with pytest.raises(EngineClosedError, match="start the process again"):
        engine.submit([1])
    engine.close()


@pytest.mark.parametrize("where", ["load_model", "probe_layers"])
def test_a_model_that_does_not_fit_is_an_error_that_idle_engines_make_room_for(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    monkeypatch.setattr(runner_module, "load", lambda tier: None)
    monkeypatch.setattr(runner_module, where, fail)
    with pytest.raises(CapacityError, match=r"too little memory.*9 GiB\.\); free memory") as caught:
        ModelRunner(EngineConfig(model="tiny", device="cpu", kv_cache_memory="1MiB"))
    assert is_out_of_memory(caught.value.__cause__)


def test_a_pool_that_finds_no_memory_makes_idle_engines_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_memory", lambda: 1000)
    with pytest.raises((CapacityError, ModelLoadError), match="bytes are left") as caught:
        ModelRunner(EngineConfig(model="tiny", device="cpu"))
    assert is_out_of_memory(caught.value.__cause__)


def test_what_a_gpu_has_left_for_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share that is asked for, without what others have, what the largest step takes and what graphs may take."""
    peak = [0]
    cuda = SimpleNamespace(
        empty_cache=lambda: None,
        reset_peak_memory_stats=lambda device: peak.__setitem__(0, 300),
        memory_allocated=lambda device: 300,
        max_memory_allocated=lambda device: peak[0],
        mem_get_info=lambda device: (5000, 10_000),
        get_device_properties=lambda device: SimpleNamespace(total_memory=10_000),
    )
    monkeypatch.setattr(sizing.torch, "cuda", cuda)
    config = EngineConfig(model="any", gpu_memory_utilization=0.8, max_num_seqs=1000)
    device = torch.device("cuda")
    blocks = sizing.pool_blocks(config, 100, 1 << 20, device, lambda: peak.__setitem__(0, 1000))
    assert blocks == (5000 - 2000 - 700 - 500) // 100


@pytest.mark.parametrize("asked", [None, 0.001])
def test_host_memory_that_cannot_be_locked_is_gone_without_unless_it_was_asked_for(
    asked: float | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = storage_module.KVStorage

    def storage(layers: Any, blocks: int, size: int, device: torch.device, host: int = 0) -> Any:
        if host:
            raise CapacityError("swap_space: 4.0 GiB of host memory cannot be locked for the GPU (CUDA error 2)")
        return made(layers, blocks, size, device, host)

    monkeypatch.setattr(runner_module, "KVStorage", storage)
    monkeypatch.setattr(runner_module, "host_blocks", lambda *arguments: 7)
    config = EngineConfig(model="tiny", device="cpu", kv_cache_memory="1MiB", swap_space=asked)
    if asked:
        with pytest.raises(CapacityError, match="swap_space"):
            ModelRunner(config)
        return
    with caplog.at_level(logging.WARNING, "pagedllm"):
        runner = ModelRunner(config)
    assert runner.num_host_blocks == 0
    assert [record.getMessage()[:40] for record in caplog.records] == ["preempted requests are recomputed, not s"]
    runner.close()
