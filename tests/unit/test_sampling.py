"""Filters, penalties and draws, against transformers' processors and against brute force."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pagedllm_core.decode.filters import Blocks, keep_likely, nucleus_threshold
from pagedllm_core.decode.processors import LogitsRules, takes_prompt
from pagedllm_core.decode.sample import Draw, sample, uniform
from pagedllm_core.kv.pool import BlockPool
from pagedllm_core.kv.table import BlockTable
from pagedllm_core.params import Sampling, SamplingParams
from pagedllm_core.request import Sequence

VOCAB = 700


def logits(rows: int, seed: int = 0, vocabulary: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def sampling(**fields: Any) -> Sampling:
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0}
    return Sampling(**{**neutral, **fields})


def sequence(prompt: list[int], output: list[int]) -> Sequence:
    return Sequence(0, [*prompt, *output], len(prompt), BlockTable(BlockPool(1), 4), b"")


@pytest.mark.parametrize(
    ("fields", "warper"),
    [
        ({"top_k": 5}, TopKLogitsWarper(5)),
        ({"top_k": 400}, TopKLogitsWarper(400)),
        ({"top_p": 0.3}, TopPLogitsWarper(0.3)),
        ({"top_p": 0.95}, TopPLogitsWarper(0.95)),
        ({"top_p": 0.9999}, TopPLogitsWarper(0.9999)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
    ],
)
def test_filters_equal_transformers(fields: dict[str, Any], warper: LogitsProcessor) -> None:
    rows = logits(8)
    rows = rows - rows.amax(dim=-1, keepdim=True)
    ours = keep_likely(rows.clone(), [sampling(**fields)] * 8)
    theirs = warper(torch.zeros(8, 1, dtype=torch.long), rows.clone())
    assert torch.equal(ours, theirs)


def test_filters_of_one_row_do_not_touch_another() -> None:
    rows = logits(4)
    rows = rows - rows.amax(dim=-1, keepdim=True)
    mixed = [sampling(top_k=3), sampling(), sampling(top_p=0.5), sampling(min_p=0.2)]
    ours = keep_likely(rows.clone(), mixed)
    for number, one in enumerate(mixed):
        assert torch.equal(ours[number], keep_likely(rows[number : number + 1].clone(), [one])[0])


def test_a_nucleus_larger_than_the_candidates_is_exact() -> None:
    rows = logits(5, vocabulary=5000) * 0.01  # nearly flat
    rows = Blocks(rows - rows.amax(dim=-1, keepdim=True))
    top_p = torch.full((5, 1), 0.9)
    few, every = (nucleus_threshold(rows, top_p, None, rows.largest(count)) for count in (16, 5000))
    assert torch.equal(few, every)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    row = logits(1)
    past = sequence([1, 2, 3, 3], [5, 6, 5])
    rules = LogitsRules(SamplingParams(), penalty, (), ())
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([past.token_ids]), row.clone())
    assert torch.allclose(rules.apply(row[0].clone(), past), theirs[0])


def test_bad_words_equal_transformers() -> None:
    row = logits(1)
    past = sequence([1, 2], [5, 6, 7])
    words = [[7, 9], [11], [6, 7, 13], [5, 7, 17], [8, 19]]
    rules = LogitsRules(SamplingParams(), 1.0, (), tuple(tuple(word) for word in words))
    theirs = NoBadWordsLogitsProcessor(words, eos_token_id=torch.tensor([0]))(
        torch.tensor([past.token_ids]), row.clone()
    )
    assert torch.equal(rules.apply(row[0].clone(), past), theirs[0])
    assert rules.apply(row[0].clone(), past)[[9, 11, 13]].isinf().all()


def test_presence_and_frequency_count_the_output_only() -> None:
    row = logits(1)[0]
    past = sequence([1, 1, 2], [5, 6, 5, 5])
    rules = LogitsRules(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), 1.0, (), ())
    wanted = row.clone()
    wanted[5] -= 0.5 + 3 * 0.25
    wanted[6] -= 0.5 + 0.25
    assert torch.allclose(rules.apply(row.clone(), past), wanted)


def test_allowed_bias_minimum_and_callers_processors() -> None:
    row = logits(1)[0]
    past = sequence([1], [5])
    seen: list[Any] = []

    def two(output: list[int], scores: torch.Tensor) -> torch.Tensor:
        seen.append(output)
        return scores + 1

    def three(prompt: list[int], output: list[int], scores: torch.Tensor) -> torch.Tensor:
        seen.append((prompt, output))
        return scores * 2

    params = SamplingParams(
        allowed_token_ids=[3, 4, 8],
        logit_bias={4: 2.0, 8: -math.inf},
        min_tokens=2,
        max_tokens=5,
        logits_processors=[two, three],
    )
    with_prompt = (takes_prompt(two), takes_prompt(three))
    result = LogitsRules(params, 1.0, (3,), (), with_prompt).apply(row.clone(), past)
    assert result[4] == pytest.approx((float(row[4]) + 2.0 + 1) * 2)
    assert int(result.isfinite().sum()) == 1
    assert seen == [[5], ([1], [5])]


@pytest.mark.parametrize(
    "fields", [{}, {"top_k": 7}, {"top_p": 0.6}, {"top_p": 0.9, "top_k": 40}, {"min_p": 0.02}, {"temperature": 0.3}]
)
@pytest.mark.parametrize("vocabulary", [50, 3001])
def test_draws_are_the_inverse_of_the_cumulative_distribution(fields: dict[str, Any], vocabulary: int) -> None:
    rows = logits(200, vocabulary=vocabulary)
    rows[:, ::3] = -torch.inf
    draws = [Draw(sampling(seed=seed, **fields), 0, 5) for seed in range(200)]
    for row, token in enumerate(sample(rows, draws).tolist()):
        one = draws[row].sampling
        scaled = (rows[row].double() - rows[row].max()) / one.temperature
        ordered = scaled.sort(descending=True).values
        floor = ordered[one.top_k - 1] if one.top_k else ordered[-1]
        floor = max(floor, math.log(one.min_p)) if one.min_p else floor
        kept = scaled.masked_fill(scaled < floor, -torch.inf).softmax(0)
        if one.top_p < 1:
            most = kept.sort(descending=True).values
            kept = kept.where(kept >= most[int((most.cumsum(0) < one.top_p).sum())], 0)
        counters = (np.array([number], dtype=np.uint64) for number in (one.seed, 0, 5))
        number = float(uniform(*counters)[0]) * float(kept.sum())
        assert token == int((kept.cumsum(0) <= number).sum())


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("threshold", [None, torch.tensor([[-6.0]])])
def test_no_number_draws_what_is_impossible(number: float, threshold: torch.Tensor | None) -> None:
    row = torch.full((1, 400), -torch.inf)
    row[0, 70:330] = torch.linspace(-5, 0, 260)
    token = int(Blocks(row).pick(torch.full((1, 1), number, dtype=torch.float64), threshold))
    assert token == (70 if number == 0 else 329)


def test_greedy_and_tiny_temperatures_take_the_best() -> None:
    rows = logits(3)
    draws = [Draw(sampling(temperature=temperature), 0, 5) for temperature in (0.0, 1e-6, 1e-3)]
    assert sample(rows, draws).tolist() == rows.argmax(dim=-1).tolist()


def test_a_draw_depends_on_its_counters_alone() -> None:
    rows = logits(6)
    draws = [
        Draw(sampling(seed=seed, temperature=2.0), index, position)
        for seed, index, position in [(1, 0, 5), (1, 0, 6), (1, 1, 5), (2, 0, 5), (1, 0, 5), (9, 3, 7)]
    ]
    together = sample(rows, draws).tolist()
    order = [4, 2, 0, 5, 1, 3]
    assert sample(rows[order], [draws[row] for row in order]).tolist() == [together[row] for row in order]
    assert [int(sample(rows[row : row + 1], [draws[row]])) for row in range(6)] == together
    mixed = [Draw(sampling(temperature=0.0), 0, 0), draws[0]]
    assert int(sample(rows[[1, 0]], mixed)[1]) == together[0]


def test_draws_follow_the_distribution() -> None:
    row = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    count = 20_000
    tokens = sample(row.expand(count, -1), [Draw(sampling(seed=3), 0, position) for position in range(count)])
    frequencies = torch.bincount(tokens, minlength=5) / count
    wanted = torch.softmax(row[0], dim=-1)
    assert torch.allclose(frequencies, wanted, atol=0.015)
    assert frequencies[4] == 0


def test_uniform_numbers_are_uniform_and_uncorrelated() -> None:
    count = 100_000
    zeros = np.zeros(count, dtype=np.uint64)
    counters = np.arange(count, dtype=np.uint64)
    for arguments in [(counters, zeros, zeros), (zeros, counters, zeros), (zeros, zeros, counters)]:
        numbers = uniform(*arguments)
        assert numbers.min() >= 0
        assert numbers.max() < 1
        histogram = np.histogram(numbers, bins=20, range=(0, 1))[0]
        assert abs(histogram - count / 20).max() < 5 * math.sqrt(count / 20)
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02


def test_model_defaults_fill_what_is_left_out() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    resolved = Sampling.resolve(SamplingParams(top_p=0.5), defaults, seed=4)
    assert resolved == Sampling(0.6, 0.5, 20, 0.0, 1.1, 4)
    assert Sampling.resolve(SamplingParams(), {"do_sample": False, "temperature": 0.6}, 0).temperature == 0
    assert Sampling.resolve(SamplingParams(temperature=0.3), {"do_sample": False}, 0).temperature == 0.3
    assert Sampling.resolve(SamplingParams(seed=-1), {}, 0).seed == 2**64 - 1
