"""Prefix caching over the fake model: what is computed, counted on the batches that really ran."""

from __future__ import annotations

import random

import pytest

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.engine import Engine
from pagedllm_core.errors import RequestFailedError
from pagedllm_core.kv.hashing import root_hash
from pagedllm_core.outputs import RequestOutput
from pagedllm_core.params import SamplingParams
from tests.fakes import FakeRunner, expected_greedy, fake_engine, run_all

VOCAB = 61


def random_tokens(count: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(VOCAB) for _ in range(count)]


def greedy(count: int = 4, salt: str | None = None) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, cache_salt=salt)


def ask(engine: Engine, prompt: list[int], params: SamplingParams | None = None) -> RequestOutput:
    """One request, on its own."""
    request_id = engine.add(prompt, params or greedy())
    return run_all(engine)[request_id]


def computed(runner: FakeRunner) -> list[int]:
    """The tokens of every batch so far, in order; forgets them."""
    tokens = [token for batch in runner.batches for token in batch.token_ids.tolist()]
    runner.batches.clear()
    return tokens


@pytest.mark.parametrize("budget", [16, 512])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_a_conversation_of_ten_turns_prefills_what_is_new(block_size: int, budget: int) -> None:
    runner = FakeRunner(num_blocks=1024, block_size=block_size, max_model_len=1024)
    engine = fake_engine(runner, max_num_batched_tokens=budget)
    history: list[int] = []
    for turn in range(10):
        new = random_tokens(5 + 3 * turn, seed=turn)
        prompt, before = history + new, engine.stats().tokens_prefilled
        result = ask(engine, prompt, greedy(9))
        answer = result.outputs[0].token_ids
        cached = result.metrics.cached_tokens
        assert answer == expected_greedy(prompt, 9, VOCAB)
        assert computed(runner) == (prompt + answer)[cached:-1]  # the last token's keys are never needed
        assert engine.stats().tokens_prefilled - before == len(prompt) - cached <= block_size + len(new)
        # All that the turn before computed is found: its answer too, up to the last full block.
        assert cached == max(0, len(history) - 1) // block_size * block_size
        history = prompt + answer


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 31, 32, 33])
def test_a_hit_never_covers_the_last_token(length: int) -> None:
    runner = FakeRunner()
    engine = fake_engine(runner)
    prompt = random_tokens(length, seed=length)
    first = ask(engine, prompt, greedy(1))
    assert first.metrics.cached_tokens == 0
    assert computed(runner) == prompt
    again = ask(engine, prompt, greedy(1))
    assert again.metrics.cached_tokens == (length - 1) // 4 * 4
    assert computed(runner) == prompt[again.metrics.cached_tokens :]
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def answers(caching: bool) -> tuple[list[list[list[int]]], int]:
    """Every kind of request on shared prefixes, twice, in a pool that has to evict; and how many tokens were found."""
    engine = fake_engine(FakeRunner(num_blocks=40, generation_defaults={}), enable_prefix_caching=caching)
    prefix, found = random_tokens(19, seed=1), []
    for _ in range(2):
        requests = []
        for number in range(3):
            prompt = prefix[: 9 + 5 * number] + random_tokens(number, seed=number)
            requests.append(engine.add(prompt, greedy(12), stream=False))
            requests.append(engine.add(prompt, SamplingParams(n=3, seed=number, max_tokens=12), stream=False))
            beams = SamplingParams(use_beam_search=True, n=3, max_tokens=12, stop_token_ids=[5, 17])
            requests.append(engine.add(prompt, beams))
        results = run_all(engine)
        found += [[part.token_ids for part in results[request_id].outputs] for request_id in requests]
    return found, engine.stats().prefix_cache_hits


def test_answers_are_the_same_with_caching_on_and_off() -> None:
    (with_cache, hits), (without, none) = answers(caching=True), answers(caching=False)
    assert with_cache == without
    assert with_cache[:9] == with_cache[9:]
    assert hits >= 9 * 8
    assert none == 0


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("budget", [64, 512, 4096])
def test_32_requests_compute_their_prefix_of_512_tokens_once(budget: int, together: bool) -> None:
    """Together they are admitted in one step, where the budget allows; else one more arrives before each step."""
    runner = FakeRunner(num_blocks=1024, block_size=16, max_model_len=1024)
    engine = fake_engine(runner, max_num_seqs=32, max_num_batched_tokens=budget)
    prefix = random_tokens(512, seed=0)
    prompts = {str(number): [*prefix, number, 7, number] for number in range(32)}
    results = []
    for request_id, prompt in prompts.items():
        engine.add(prompt, greedy(3), request_id=request_id, stream=False)
        if not together:
            results += engine.step()
    if together and budget > 512 + 32 * 3:
        results += engine.step()
        assert len(runner.batches[0].context_lens) == 32, "one step computes all prompts"
        assert len(runner.batches[0].token_ids) == 512 + 32 * 3
    outputs = {**{result.request_id: result for result in results}, **run_all(engine)}
    assert engine.stats().tokens_prefilled == 512 + 32 * 3
    assert engine.stats().prefix_cache_hits == 31 * 512
    assert engine.stats().prefix_cache_queries == 32 * 515
    assert sorted(output.metrics.cached_tokens for output in outputs.values()) == [0] + 31 * [512]
    for request_id, prompt in prompts.items():
        assert outputs[request_id].outputs[0].token_ids == expected_greedy(prompt, 3, VOCAB)


def test_a_salt_separates() -> None:
    engine = fake_engine()
    prompt = random_tokens(20, seed=4)
    salts = [None, "", "a", "b"]
    for salt in salts:
        assert ask(engine, prompt, greedy(salt=salt)).metrics.cached_tokens == 0
    for salt in salts:
        assert ask(engine, prompt, greedy(salt=salt)).metrics.cached_tokens == 16


def test_the_parts_of_a_root_do_not_run_together() -> None:
    """A model's name and a salt are two things, whatever they contain."""
    roots = [root_hash(*parts) for parts in [("a", "b"), ("a=b", None), ("a", None), ("a", ""), (None, "a"), ("", "a")]]
    assert len(set(roots)) == len(roots)


def test_cached_blocks_that_nobody_uses_count_as_taken_when_they_are_found() -> None:
    """10 blocks: 4 are cached, 5 are running. What finds the 4 and needs 2 more does not fit, though 5 can be taken."""
    engine = fake_engine(FakeRunner(num_blocks=10))
    prefix = random_tokens(16, seed=8)
    ask(engine, prefix, greedy(1))
    engine.add(random_tokens(18, seed=9), greedy(2))
    engine.step()
    assert (engine.stats().kv_blocks_used, engine.stats().kv_blocks_cached) == (5, 4)
    engine.add([*prefix, *random_tokens(7, seed=10)], greedy(1))
    engine.step()
    assert (engine.stats().waiting, engine.stats().prefix_cache_hits) == (1, 0)
    run_all(engine)
    assert (engine.stats().preemptions, engine.stats().prefix_cache_hits) == (0, 16)


def test_what_a_failed_step_was_to_compute_is_never_read() -> None:
    """The step writes nonsense and raises; then for both of its requests alone, so that they end with an error."""
    runner = FakeRunner()
    engine = fake_engine(runner)
    shared, own = random_tokens(16, seed=6), random_tokens(8, seed=7)
    assert ask(engine, shared, greedy(1)).error is None  # its blocks were computed, and stay

    def fail(batch: ForwardBatch) -> None:
        runner.slots[batch.slot_mapping] = 60
        raise RuntimeError("no more")

    usual, runner.before_run = runner.before_run, fail
    for number in range(2):
        engine.add(shared + own, greedy(), request_id=str(number))
    results = run_all(engine)
    assert all(isinstance(results[request_id].error, RequestFailedError) for request_id in "01")
    runner.before_run = usual
    computed(runner)
    result = ask(engine, shared + own)
    assert result.metrics.cached_tokens == 16
    assert computed(runner)[:8] == own
    assert result.outputs[0].token_ids == expected_greedy(shared + own, 4, VOCAB)


def test_the_prefix_unread_for_longest_goes_first_and_its_tail_before_its_head() -> None:
    engine = fake_engine(FakeRunner(num_blocks=12))
    old, new, other = random_tokens(17, seed=8), random_tokens(17, seed=9), random_tokens(23, seed=10)
    for prompt in (old, new, old):  # four full blocks each stay; the old one was read again
        ask(engine, prompt, greedy(1))
    assert engine.stats().kv_blocks_cached == 8
    ask(engine, other, greedy(1))  # takes six blocks: the four free ones, then two of the new prompt's
    assert ask(engine, old, greedy(1)).metrics.cached_tokens == 16
    assert ask(engine, new, greedy(1)).metrics.cached_tokens == 8


def test_a_block_is_found_although_its_twin_was_evicted() -> None:
    """Two requests compute the same blocks in one step; those that are found first go, the others are as good."""
    engine = fake_engine(FakeRunner(num_blocks=14), max_num_batched_tokens=64)
    prompt = [1, 2, 3, 4, 5]
    engine.add(prompt, SamplingParams(temperature=0, max_tokens=8), request_id="short")
    engine.add(prompt, SamplingParams(temperature=0, max_tokens=20), request_id="long")
    while "short" in engine._requests:
        engine.step()
    engine.add([9] * 38, SamplingParams(temperature=0, max_tokens=1))  # takes what `short` left
    run_all(engine)
    history = prompt + expected_greedy(prompt, 20, 61)
    assert ask(engine, [*history, 3], greedy(1)).metrics.cached_tokens == len(history) // 4 * 4
