"""Greedy tokens equal `transformers`' `generate`, in float32, on tiny random models."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity.driver import make_runner, paged_tokens, reference_tokens
from tests.parity.families import FAMILIES, VOCAB

# Several times the window of the sliding families, and several blocks.
LENGTHS = (5, 29, 13, 1)
LONG_LENGTHS = (70, 90, 66)
NEW_TOKENS = 16


def random_prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    order = random.Random(7)
    return [[order.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_generate(name: str, model_folder: Callable[[str], Path]) -> None:
    folder = model_folder(name)
    # Where long factors are in use, only requests beyond the original length are `generate`'s.
    prompts = random_prompts(LONG_LENGTHS if name == "phi3_longrope_long" else LENGTHS)
    expected = reference_tokens(folder, prompts, NEW_TOKENS)
    assert len({tuple(tokens) for tokens in expected}) > 1
    runner = make_runner(folder)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert paged_tokens(runner, [prompt], NEW_TOKENS) == [tokens]
    assert paged_tokens(runner, prompts, NEW_TOKENS) == expected
    assert paged_tokens(runner, prompts, NEW_TOKENS, chunk=3) == expected
    runner.close()


def test_longrope_neighbours_do_not_change_each_other(model_folder: Callable[[str], Path]) -> None:
    """A short request beside a long one; with the frequencies of the row's longest it would change."""
    runner = make_runner(model_folder("phi3_longrope_long"))
    short, long = random_prompts((20, 100))
    alone = paged_tokens(runner, [short], NEW_TOKENS) + paged_tokens(runner, [long], NEW_TOKENS)
    assert paged_tokens(runner, [short, long], NEW_TOKENS) == alone


def test_longrope_is_short_within_the_original_length(model_folder: Callable[[str], Path]) -> None:
    """A smaller `max_model_len` than the model's chooses the short factors, `generate`'s for short requests."""
    folder = model_folder("phi3_longrope_long")
    prompts = random_prompts((20, 5, 40))
    runner = make_runner(folder, max_model_len=64)
    assert paged_tokens(runner, prompts, NEW_TOKENS) == reference_tokens(folder, prompts, NEW_TOKENS)


def test_dynamic_rope_neighbours_do_not_change_each_other(model_folder: Callable[[str], Path]) -> None:
    """Beyond `max_position_embeddings` the frequencies are those of `max_model_len`, for every request."""
    runner = make_runner(model_folder("dynamic_rope"), max_model_len=256)
    short, long = random_prompts((20, 180))
    alone = paged_tokens(runner, [short], NEW_TOKENS) + paged_tokens(runner, [long], NEW_TOKENS)
    assert paged_tokens(runner, [short, long], NEW_TOKENS) == alone


def test_dtypes_run(model_folder: Callable[[str], Path]) -> None:
    prompts = random_prompts((9, 4))
    for dtype in ("bfloat16", "float16"):
        runner = make_runner(model_folder("llama"), dtype=dtype)
        assert paged_tokens(runner, prompts, 6) == paged_tokens(runner, prompts, 6, chunk=2)
