"""The engine over the fake model: continuous batching, forks, preemption, failures."""

from __future__ import annotations

import random

import pytest

from pagedllm_core.errors import (
    CapacityError,
    ContextLengthError,
    InvalidRequestError,
    RequestFailedError,
    RequestTimeoutError,
)
from pagedllm_core.params import SamplingParams
from tests.fakes import FakeRunner, expected_greedy, fake_engine, run_all

VOCAB = 61


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(VOCAB) for _ in range(generator.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("budget", [16, 32, 2048])
@pytest.mark.parametrize("caching", [True, False])
def test_mixed_batch_equals_alone(budget: int, caching: bool, stream: bool) -> None:
    engine = fake_engine(max_num_batched_tokens=budget, enable_prefix_caching=caching)
    wanted = {}
    for number, prompt in enumerate(prompts(12)):
        count = 5 + number
        request_id = engine.add(prompt, SamplingParams(max_tokens=count), stream=stream)
        wanted[request_id] = expected_greedy(prompt, count, VOCAB)
    results = run_all(engine)
    assert {key: result.outputs[0].token_ids for key, result in results.items()} == wanted
    assert engine.stats().max_batch_size >= 4


def test_chunks_of_a_prompt_mix_with_decoding_rows() -> None:
    runner = FakeRunner()
    engine = fake_engine(runner, max_num_batched_tokens=16)
    engine.add([1, 2, 3], SamplingParams(max_tokens=20), request_id="short", stream=False)
    engine.step()
    engine.add(list(range(50)), SamplingParams(max_tokens=4), request_id="long")
    results = run_all(engine)
    lengths = [(batch.query_starts[1:] - batch.query_starts[:-1]).tolist() for batch in runner.batches]
    assert [1, 15] in lengths  # one decoding row, and a chunk that fills the budget
    assert results["long"].outputs[0].token_ids == expected_greedy(list(range(50)), 4, VOCAB)
    assert results["short"].outputs[0].token_ids == expected_greedy([1, 2, 3], 20, VOCAB)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("blocks", [12, 16, 24])
def test_preemption_changes_no_token(blocks: int, caching: bool) -> None:
    engine = fake_engine(FakeRunner(num_blocks=blocks), enable_prefix_caching=caching)
    wanted = {}
    for prompt in prompts(10, seed=3, longest=20):
        wanted[engine.add(prompt, SamplingParams(max_tokens=25))] = expected_greedy(prompt, 25, VOCAB)
    results = run_all(engine)
    assert {key: result.outputs[0].token_ids for key, result in results.items()} == wanted
    assert engine.stats().preemptions > 0
    assert sum(result.metrics.preemptions for result in results.values()) == engine.stats().preemptions


def test_the_oldest_request_is_never_preempted() -> None:
    engine = fake_engine(FakeRunner(num_blocks=12))
    first, *others = [engine.add(prompt, SamplingParams(max_tokens=25)) for prompt in prompts(8, seed=5, longest=12)]
    results = run_all(engine)
    assert results[first].metrics.preemptions == 0
    assert sum(results[other].metrics.preemptions for other in others) > 0


def test_parallel_samples_share_the_prompt_and_copy_on_write() -> None:
    runner = FakeRunner(generation_defaults={})
    engine = fake_engine(runner)
    prompt = list(range(18))  # four full blocks and half of a fifth
    params = SamplingParams(n=4, max_tokens=12, seed=7)
    engine.add(prompt, params, request_id="group")
    peak = 0
    together = None
    while engine.has_unfinished:
        for output in engine.step():
            together = output if together is None else together
        engine.check()
        peak = max(peak, engine.stats().kv_blocks_used)
    assert engine.stats().tokens_prefilled == 18  # the prompt is computed once
    assert peak == 4 + 4 * 3  # 28 positions each before the last step: four shared blocks, three of their own
    alone = []
    for seed in range(1):
        engine.add(prompt, params, request_id=f"again {seed}")
        alone.append([output.token_ids for output in run_all(engine)[f"again {seed}"].outputs])
    assert len({tuple(tokens) for tokens in alone[0]}) == 4


def test_samples_are_the_same_alone_in_company_and_after_preemption() -> None:
    params = SamplingParams(n=3, temperature=0.8, top_p=0.9, top_k=20, max_tokens=15, seed=11)
    prompt = list(range(9))
    quiet = fake_engine(FakeRunner(generation_defaults={}))
    quiet.add(prompt, params, request_id="x")
    alone = [output.token_ids for output in run_all(quiet)["x"].outputs]
    for blocks in (64, 24):
        busy = fake_engine(FakeRunner(num_blocks=blocks, generation_defaults={}), enable_prefix_caching=blocks == 64)
        for other in prompts(6, seed=blocks, longest=12):
            busy.add(other, SamplingParams(max_tokens=20))
        busy.add(prompt, params, request_id="x")
        for other in prompts(3, seed=blocks + 1, longest=12):
            busy.add(other, SamplingParams(max_tokens=20))
        assert [output.token_ids for output in run_all(busy)["x"].outputs] == alone
        if blocks == 24:
            assert busy.stats().preemptions > 0


def test_best_of_returns_the_most_likely() -> None:
    engine = fake_engine(FakeRunner(generation_defaults={}))
    engine.add([1, 2, 3], SamplingParams(n=5, max_tokens=6, seed=3, logprobs=0), request_id="all")
    engine.add([1, 2, 3], SamplingParams(n=2, best_of=5, max_tokens=6, seed=3), request_id="best")
    results = run_all(engine)
    ranked = sorted(results["all"].outputs, key=lambda output: -(output.cumulative_logprob or 0.0))
    assert [output.token_ids for output in results["best"].outputs] == [output.token_ids for output in ranked[:2]]
    assert [output.index for output in results["best"].outputs] == [0, 1]


def test_cancelling_at_each_step_frees_the_blocks_at_once() -> None:
    for steps in range(51):
        engine = fake_engine(FakeRunner(num_blocks=64), enable_prefix_caching=False)
        engine.add(list(range(10)), SamplingParams(max_tokens=50), request_id="victim", stream=False)
        other = engine.add([5, 6, 7], SamplingParams(max_tokens=60), request_id="other", stream=False)
        for _ in range(steps):
            engine.step()
        engine.abort("victim")
        engine.check()
        used = sum(len(sequence.table) for sequence in engine._requests[other].sequences)
        assert engine.stats().kv_blocks_used == used
        engine.abort("victim")  # a late abort is harmless
        results = run_all(engine)
        if steps < 50:
            assert len(results["victim"].outputs[0].token_ids) == steps
            assert results["victim"].outputs[0].finish_reason == "abort"
        assert results["other"].outputs[0].token_ids == expected_greedy([5, 6, 7], 60, VOCAB)


def test_a_request_alone_that_outgrows_the_pool_ends_with_length() -> None:
    engine = fake_engine(FakeRunner(num_blocks=5))
    engine.add([1, 2, 3], SamplingParams(max_tokens=100), request_id="grows")
    output = run_all(engine)["grows"].outputs[0]
    assert output.finish_reason == "length"
    assert output.token_ids == expected_greedy([1, 2, 3], 18, VOCAB)  # 20 slots, and one token that needs none


def test_context_limit() -> None:
    engine = fake_engine(FakeRunner(max_model_len=20))
    engine.add(list(range(19)), SamplingParams(max_tokens=10), request_id="19")
    engine.add(list(range(20)), SamplingParams(max_tokens=None), request_id="20")
    engine.add(list(range(10)), SamplingParams(max_tokens=None), request_id="10")
    with pytest.raises(ContextLengthError, match="21 tokens exceed the context limit of 20"):
        engine.add(list(range(21)), SamplingParams(max_tokens=1))
    results = run_all(engine)
    assert {key: len(result.outputs[0].token_ids) for key, result in results.items()} == {"19": 1, "20": 1, "10": 10}
    assert {result.outputs[0].finish_reason for result in results.values()} == {"length"}


def test_what_can_never_fit_is_refused_at_submit() -> None:
    engine = fake_engine(FakeRunner(num_blocks=5))
    with pytest.raises(CapacityError, match="kv_cache_memory"):
        engine.add(list(range(21)), SamplingParams(max_tokens=1))
    engine.add(list(range(20)), SamplingParams(max_tokens=5), request_id="fits")
    assert len(run_all(engine)["fits"].outputs[0].token_ids) == 1
    with pytest.raises(CapacityError, match="n=4"):
        engine.add(list(range(8)), SamplingParams(n=4, temperature=1.0, max_tokens=5))


def test_stop_ids_eos_and_min_tokens() -> None:
    prompt = [3, 1, 4]
    free = expected_greedy(prompt, 30, VOCAB)
    end = free[6]
    first = free.index(end)
    engine = fake_engine(FakeRunner(eos_token_ids=(end,)))
    engine.add(prompt, SamplingParams(max_tokens=30), request_id="eos")
    engine.add(prompt, SamplingParams(max_tokens=30, ignore_eos=True), request_id="ignore")
    engine.add(prompt, SamplingParams(max_tokens=30, ignore_eos=True, stop_token_ids=[free[3]]), request_id="stop id")
    engine.add(prompt, SamplingParams(max_tokens=30, min_tokens=12), request_id="min")
    results = {key: result.outputs[0] for key, result in run_all(engine).items()}
    assert results["eos"].token_ids == free[: first + 1]
    assert (results["eos"].finish_reason, results["eos"].stop_reason) == ("stop", None)
    assert results["ignore"].token_ids == free
    assert results["stop id"].token_ids == free[: free.index(free[3]) + 1]
    assert results["stop id"].stop_reason == free[3]
    assert len(results["min"].token_ids) >= 12
    assert end not in results["min"].token_ids[:12]


def test_a_failing_step_fails_only_its_culprit() -> None:
    """Every request is tried alone after a failed step, and the others' tokens stay what they are."""

    def poison(batch: object) -> None:
        if 60 in batch.token_ids:  # type: ignore[attr-defined]
            raise RuntimeError("bad luck")

    runner = FakeRunner(vocab_size=60)
    runner.vocab_size = 61
    engine = fake_engine(runner)
    runner.before_run = poison
    good = {}
    for prompt in prompts(6, seed=9):
        clean = [token % 50 for token in prompt]
        good[engine.add(clean, SamplingParams(max_tokens=12, allowed_token_ids=list(range(60))), stream=False)] = clean
    engine.step()
    engine.add([60, 1, 2], SamplingParams(max_tokens=4), request_id="poison")
    results = run_all(engine)
    assert isinstance(results["poison"].error, RequestFailedError)
    assert "bad luck" in str(results["poison"].error)
    for request_id, prompt in good.items():
        assert results[request_id].error is None
        assert len(results[request_id].outputs[0].token_ids) == 12, prompt


@pytest.mark.parametrize("hook", ["run", "copy_blocks", "schedule", "allocate", "commit"])
def test_fault_at_each_call_of_each_hook(hook: str) -> None:
    """A fault that happens once, at the k-th call, loses no request, no token and no block."""

    def build() -> tuple[object, FakeRunner]:
        runner = FakeRunner(num_blocks=40, generation_defaults={})
        engine = fake_engine(runner)
        for number, prompt in enumerate(prompts(4, seed=2, longest=20)):
            params = (
                SamplingParams(n=2, seed=number, max_tokens=6)
                if number % 2
                else SamplingParams(temperature=0, max_tokens=6)
            )
            engine.add(prompt, params, request_id=str(number))
        return engine, runner

    def tokens(engine: object) -> dict[str, list[list[int]]]:
        return {key: [output.token_ids for output in result.outputs] for key, result in run_all(engine).items()}  # type: ignore[arg-type]

    engine, _ = build()
    clean = tokens(engine)
    for k in range(1, 200):
        engine, runner = build()
        owner = {
            "run": runner,
            "copy_blocks": runner,
            "schedule": engine.scheduler,
            "allocate": engine.pool,
            "commit": engine.pool,
        }[hook]  # type: ignore[attr-defined]
        original, calls = getattr(owner, hook), [0]

        def faulty(*args: object, original=original, calls=calls, k=k, **kwargs: object) -> object:  # type: ignore[no-untyped-def]
            calls[0] += 1
            if calls[0] == k:
                raise OSError("fault")
            return original(*args, **kwargs)

        setattr(owner, hook, faulty)
        assert tokens(engine) == clean, f"fault at call {k} of {hook}"
        if calls[0] < k:
            assert k > 1
            return
    pytest.fail("the hook was called more often than expected")


def test_a_callers_processor_that_raises_fails_alone() -> None:
    def broken(output: list[int], logits: object) -> object:
        if len(output) == 3:
            raise ValueError("oops")
        return logits

    engine = fake_engine()
    engine.add([1, 2], SamplingParams(max_tokens=10, logits_processors=[broken]), request_id="broken")
    engine.add([3, 4], SamplingParams(max_tokens=10), request_id="fine")
    results = run_all(engine)
    assert isinstance(results["broken"].error, RequestFailedError)
    assert "oops" in str(results["broken"].error)
    assert results["fine"].outputs[0].token_ids == expected_greedy([3, 4], 10, VOCAB)


def test_no_token_left_to_choose_is_an_error_of_that_request() -> None:
    engine = fake_engine()
    params = SamplingParams(max_tokens=10, min_tokens=5, allowed_token_ids=[7], stop_token_ids=[7])
    engine.add([1, 2], params, request_id="impossible")
    engine.add([3, 4], SamplingParams(max_tokens=10), request_id="fine")
    results = run_all(engine)
    assert isinstance(results["impossible"].error, RequestFailedError)
    assert "allowed_token_ids" in str(results["impossible"].error)
    assert results["fine"].outputs[0].token_ids == expected_greedy([3, 4], 10, VOCAB)


def test_a_search_that_ends_in_a_step_whose_sampling_fails_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    from pagedllm_core.decode import advance

    calls = []

    def once(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 1:
            raise MemoryError
        return original(*arguments)

    original = advance.sample
    monkeypatch.setattr(advance, "sample", once)
    engine = fake_engine()
    engine.add([1, 2, 3], SamplingParams(use_beam_search=True, n=2, max_tokens=1), request_id="beams")
    engine.add([4, 5], SamplingParams(max_tokens=3), request_id="greedy")
    results = run_all(engine)
    assert [len(output.token_ids) for output in results["beams"].outputs] == [1, 1]
    assert results["greedy"].outputs[0].token_ids == expected_greedy([4, 5], 3, VOCAB)


def test_timeout_by_the_engines_clock() -> None:
    now = [0.0]
    engine = fake_engine()
    engine._clock = lambda: now[0]
    engine.intake._clock = lambda: now[0]
    engine.add([1, 2], SamplingParams(max_tokens=50), request_id="late", timeout=5.0, stream=False)
    engine.add([3, 4], SamplingParams(max_tokens=20), request_id="fine", stream=False)
    for _ in range(3):
        engine.step()
    now[0] = 6.0
    results = run_all(engine)
    assert isinstance(results["late"].error, RequestTimeoutError)
    assert results["fine"].outputs[0].finish_reason == "length"


def test_duplicate_id_is_refused_and_the_first_goes_on() -> None:
    engine = fake_engine()
    engine.add([1, 2], SamplingParams(max_tokens=5), request_id="same")
    with pytest.raises(InvalidRequestError, match="request_id='same'"):
        engine.add([1, 2], SamplingParams(max_tokens=5), request_id="same")
    assert run_all(engine)["same"].outputs[0].token_ids == expected_greedy([1, 2], 5, VOCAB)


def test_logprobs_and_prompt_logprobs() -> None:
    import torch

    from tests.fakes import fake_logits

    engine = fake_engine(max_num_batched_tokens=16)
    prompt = list(range(30))
    engine.add([1, 2, 3], SamplingParams(max_tokens=12), request_id="other")
    engine.add(prompt, SamplingParams(max_tokens=5, logprobs=3, prompt_logprobs=2), request_id="scored")
    result = run_all(engine)["scored"]
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == 30
    assert result.prompt_logprobs[0] is None
    tokens = prompt + result.outputs[0].token_ids
    entries = [*result.prompt_logprobs, *(result.outputs[0].logprobs or [])]
    for position in range(1, 35):
        reference = torch.log_softmax(fake_logits(tokens[:position], VOCAB), dim=-1)
        entry = entries[position]
        assert entry is not None
        assert entry[tokens[position]].logprob == pytest.approx(float(reference[tokens[position]]), abs=1e-5)
        best = reference.topk(3 if position >= 30 else 2).indices.tolist()
        assert set(best) <= set(entry)
        assert [entry[token].rank for token in best] == list(range(1, len(best) + 1))
    assert result.outputs[0].cumulative_logprob == pytest.approx(
        sum(entry[token].logprob for entry, token in zip(result.outputs[0].logprobs or [], tokens[30:], strict=True))
    )
