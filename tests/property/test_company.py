"""Everything a request may ask for, together, in company and in small pools: each is answered as it is alone."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pagedllm_core.outputs import Logprob, RequestOutput
from pagedllm_core.params import SamplingParams
from pagedllm_core.streams import merge_outputs
from tests.fakes import FakeRunner, fake_engine, run_all
from tests.traffic import CoinToss

VOCAB, LONGEST = 31, 64
LETTERS = "abcdefghijklmnopqrstuvwxyzäöü€😀"


class Letters:
    """A tokenizer of one character a token."""

    backend_tokenizer = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [LETTERS.index(character) for character in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(LETTERS[token] for token in ids)


def random_params(generator: random.Random) -> SamplingParams:
    longest, width = generator.randint(1, 18), generator.randint(1, 4)
    fields: dict[str, Any] = {
        "max_tokens": longest,
        "min_tokens": generator.choice([0, 0, generator.randint(0, longest)]),
        "stop": ["".join(generator.choices(LETTERS, k=generator.choice([1, 1, 2]))) for _ in range(width)],
        "include_stop_str_in_output": generator.random() < 0.3,
        "stop_token_ids": generator.sample(range(VOCAB), generator.randint(0, 3)),
        "logprobs": generator.choice([None, None, 0, 3]),
        "prompt_logprobs": generator.choice([None, None, None, 2]),
        "cache_salt": generator.choice([None, None, "salt"]),
        "repetition_penalty": generator.choice([None, 1.3]),
    }
    kind = generator.choice(["beams", "beams", "samples", "greedy"])
    if kind == "beams":
        fields |= {"use_beam_search": True, "n": width, "best_of": generator.choice([None, min(4, width + 1)])}
        fields |= {"length_penalty": generator.choice([0.0, 1.0, 2.0, -1.0])}
        fields |= {"early_stopping": generator.choice([True, False, "never"])}
    elif kind == "samples":
        fields |= {"n": max(2, width), "temperature": 1.0, "seed": generator.randrange(9)}
    else:
        fields |= {"temperature": 0}
    return SamplingParams(**fields)


def rounded(scores: list[dict[int, Logprob]] | list[dict[int, Logprob] | None] | None) -> Any:
    """Log-probabilities to be compared; in another batch the last digits may be others."""
    if scores is None:
        return None
    return [one and [(token, entry.rank, round(entry.logprob, 4)) for token, entry in one.items()] for one in scores]


def answer(output: RequestOutput) -> Any:
    assert output.error is None
    texts = [(one.index, one.text, one.token_ids, one.finish_reason, one.stop_reason) for one in output.outputs]
    return texts, [rounded(one.logprobs) for one in output.outputs], rounded(output.prompt_logprobs)


@pytest.mark.parametrize("seed", range(40))
def test_each_is_answered_as_alone(seed: int) -> None:
    generator = random.Random(seed)
    size = generator.choice([1, 2, 4, 8])
    runner = FakeRunner(
        generator.choice([240, 400]) // size, size, VOCAB, LONGEST, generation_defaults={}, tokenizer=Letters(),
        num_host_blocks=generator.choice([0, 4, 200]), overlaps=generator.random() < 0.4,
    )  # fmt: skip
    engine = fake_engine(
        runner,
        max_num_seqs=16,
        max_num_batched_tokens=generator.choice([16, 64]),
        enable_prefix_caching=generator.random() < 0.7,
        scheduling_policy=generator.choice(["fcfs", "priority", "fair"]),
    )
    engine.scheduler.swap.costs = CoinToss(seed)
    asked: dict[str, tuple[list[int], SamplingParams]] = {}
    given: dict[str, list[RequestOutput]] = {}
    while len(asked) < 14 or engine.has_unfinished:
        if len(asked) < 14 and generator.random() < 0.5:
            prompt = [*range(generator.choice([0, 4, 9])), *generator.choices(range(VOCAB), k=generator.randint(1, 12))]
            options = {"priority": generator.randrange(3), "share_key": generator.choice("ab")}
            params = random_params(generator)
            asked[engine.add(prompt, params, stream=generator.random() < 0.5, **options)] = (prompt, params)
        for output in engine.step():
            given.setdefault(output.request_id, []).append(output)
        engine.check()
    assert engine.pool.num_used == engine.scheduler.swap.pool.num_used == 0
    for request_id, (prompt, params) in asked.items():
        roomy = FakeRunner(1000, 8, VOCAB, LONGEST, generation_defaults={}, tokenizer=Letters())
        alone = fake_engine(roomy, max_num_batched_tokens=1000, enable_prefix_caching=False)
        alone.add(prompt, params, request_id="alone", stream=False)
        assert answer(merge_outputs(given[request_id])) == answer(run_all(alone, check=False)["alone"])
