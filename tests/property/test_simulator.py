"""The real scheduler and pool under random traffic: everything ends, exactly, in small and large pools."""

from __future__ import annotations

import random

import pytest

from pagedllm_core.errors import CapacityError
from pagedllm_core.params import SamplingParams
from tests.fakes import FakeRunner, expected_greedy, fake_engine

VOCAB = 31


@pytest.mark.parametrize("seed", range(150))
def test_random_traffic_ends_exactly(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(seed)
    block_size = generator.choice([1, 2, 4, 8])
    blocks = generator.choice([2, 5, 12, 40, 200])
    runner = FakeRunner(
        num_blocks=blocks, block_size=block_size, vocab_size=VOCAB, max_model_len=64, generation_defaults={}
    )
    seats = generator.choice([1, 4, 16])
    engine = fake_engine(
        runner, max_num_seqs=seats, max_num_batched_tokens=max(seats, generator.choice([4, 16, 64])),
        enable_prefix_caching=generator.random() < 0.7,
    )  # fmt: skip
    monkeypatch.setattr(engine, "_recover", unexpected)  # recovering would hide a mistake of the scheduler
    waiting = [request(generator, seats) for _ in range(30)]
    running: dict[str, tuple[list[int], SamplingParams]] = {}
    tokens: dict[str, dict[int, list[int]]] = {}
    reasons: dict[str, set[str | None]] = {}
    steps = 0
    aborted = set()
    while waiting or engine.has_unfinished:
        while waiting and generator.random() < 0.4:
            prompt, params = waiting.pop()
            try:
                running[engine.add(prompt, params, stream=generator.random() < 0.5)] = (prompt, params)
            except CapacityError:
                assert -(-len(prompt) // block_size) > blocks or params.n > 1
        if running and generator.random() < 0.02:
            aborted.add(victim := generator.choice(list(running)))
            engine.abort(victim)
        for output in engine.step():
            assert output.error is None
            for part in output.outputs:
                tokens.setdefault(output.request_id, {}).setdefault(part.index, []).extend(part.token_ids)
                reasons.setdefault(output.request_id, set()).add(part.finish_reason)
        engine.check()
        steps += 1
        assert steps < 20_000, "no progress"
    for batch in runner.batches:
        assert len(batch.context_lens) <= seats
        assert len(batch.token_ids) <= engine.config.max_num_batched_tokens
    stats = engine.stats()
    assert stats.kv_blocks_used == 0
    assert stats.kv_blocks_free + stats.kv_blocks_cached == blocks
    for request_id, (prompt, params) in running.items():
        if request_id in aborted:
            continue
        assert set(tokens[request_id]) == set(range(params.n))
        if params.n == 1:
            found = tokens[request_id][0]
            wanted = expected_greedy(prompt, params.max_tokens or 0, VOCAB)
            assert found == wanted[: len(found)]
            if len(found) < len(wanted):  # the context limit, or a pool that is too small for the request alone
                assert len(prompt) + len(found) >= min(64, blocks * block_size)


def unexpected(batch: object, error: Exception, suspect: object) -> None:
    raise error


def request(generator: random.Random, seats: int) -> tuple[list[int], SamplingParams]:
    prefix = [1, 2, 3, 4, 5, 6, 7, 8][: generator.choice([0, 0, 4, 8])]
    prompt = prefix + [generator.randrange(VOCAB) for _ in range(generator.randint(1, 30))]
    count = generator.randint(1, 30)
    if generator.random() < 0.2 and seats > 1:
        return prompt, SamplingParams(n=generator.randint(2, 4), temperature=1.0, max_tokens=count, seed=1)
    return prompt, SamplingParams(temperature=0, max_tokens=count)
