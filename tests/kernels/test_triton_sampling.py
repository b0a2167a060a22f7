"""Sampling kernels, in Triton's interpreter, against `keep_likely`, `LogitsRules.apply` and `score_tokens`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from pagedllm_core.decode.filters import keep_likely
from pagedllm_core.decode.logprobs import score_tokens
from pagedllm_core.decode.processors import LogitsRules
from pagedllm_core.decode.sample import GREEDY_BELOW
from pagedllm_core.decode.staging import ROW, History, Staged, Staging
from pagedllm_core.kernels import rules as rules_module
from pagedllm_core.kernels import sampling as sampling_module
from pagedllm_core.kernels.rules import apply_rules
from pagedllm_core.kernels.sampling import Workspace, sample_rows, score_rows
from pagedllm_core.kv.pool import BlockPool
from pagedllm_core.kv.table import BlockTable
from pagedllm_core.params import Sampling, SamplingParams
from pagedllm_core.request import Sequence

CPU = torch.device("cpu")
NUMBERS = [0.0, 0.3127, 0.9427]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of some hundred tokens has several splits, a list of past tokens several blocks."""
    monkeypatch.setattr(sampling_module, "SPLIT", 128)
    monkeypatch.setattr(rules_module, "_COPIED", 128)
    monkeypatch.setattr(rules_module, "_LISTED", 16)


def random(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def sampling(**fields: Any) -> Sampling:
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0}
    return Sampling(**{**neutral, **fields})


def stage(
    records: np.ndarray[Any, Any], numbers: list[float], lists: list[np.ndarray[Any, Any]] | None = None
) -> Staged:
    none = [np.empty(0, dtype=np.int32)] * 4
    return Staging(CPU, len(records)).put(np.array(numbers), records, lists or none)


def records(samplings: list[Sampling], sources: list[int], vocabulary: int) -> tuple[np.ndarray[Any, Any], int]:
    """Records of rows that are sampled, and how many are filtered."""
    rows = np.zeros(len(samplings), dtype=ROW)
    rows["source"], rows["place"], rows["scored"] = sources, -1, 1
    filtered = 0
    for row, one in zip(rows, samplings, strict=True):
        row["temperature"] = one.temperature if one.temperature >= GREEDY_BELOW else 0
        row["reach"] = -np.log(np.float32(one.min_p)) if 0 < one.min_p < 1 else 0 if one.min_p else np.inf
        row["top_k"], row["top_p"] = one.top_k if one.top_k < vocabulary else 0, one.top_p
        row["filtered"] = -1
        if row["top_k"] or one.top_p < 1 or one.min_p:
            row["filtered"] = filtered
            filtered += 1
    return rows, filtered


def choose(
    logits: torch.Tensor, samplings: list[Sampling], sources: list[int], numbers: list[float], scored: bool = False
) -> tuple[list[int], torch.Tensor]:
    """Tokens by the kernels, and the rows' summary."""
    vocabulary = logits.shape[1]
    rows, filtered = records(samplings, sources, vocabulary)
    staged, work = stage(rows, numbers), Workspace.allocate(len(rows), vocabulary, CPU)
    tokens, summary = torch.full((len(rows),), -7), torch.full((len(rows), 4), -7, dtype=torch.int32)
    sample_rows(logits, None, filtered, staged, work, tokens, summary)
    if scored:
        score_rows(logits, staged, work, tokens, summary)
    return tokens.tolist(), summary


def wanted(row: torch.Tensor, one: Sampling, number: float) -> int:
    """The token by `keep_likely` and the inverse of the cumulative distribution."""
    if one.temperature < GREEDY_BELOW:
        return int(row.argmax())
    kept = keep_likely((row - row.max())[None].div(one.temperature).double(), [one])
    cumulative = kept.softmax(dim=-1).cumsum(dim=-1)[0]
    return int(torch.searchsorted(cumulative, number * cumulative[-1], right=True))


def check(logits: torch.Tensor, samplings: list[Sampling]) -> None:
    """Every row with every sampling and every number."""
    cases = [(row, one, number) for row in range(len(logits)) for one in samplings for number in NUMBERS]
    sources, every, numbers = (list(column) for column in zip(*cases, strict=True))
    tokens, _ = choose(logits, every, sources, numbers)
    assert tokens == [wanted(logits[row], one, number) for row, one, number in cases]


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 70},  # more than there are groups
    {"top_k": 10_000},
    {"top_p": 0.3},
    {"top_p": 0.9, "temperature": 1.5},
    {"top_p": 1e-6},
    {"top_p": 0.9995},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 0.02, "top_p": 0.7},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 12, "top_p": 0.6, "temperature": 5.0},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 0.8},
]


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_filters_and_draws(fields: dict[str, Any]) -> None:
    check(random(1, 331), [sampling(**fields)])


@pytest.mark.parametrize("vocabulary", [3, 65, 700])
def test_vocabularies_of_any_size(vocabulary: int) -> None:
    check(random(1, vocabulary, seed=1), [sampling(**FILTERS[place]) for place in (0, 4, 8, 13)])


def test_a_flat_row_has_a_large_nucleus() -> None:
    """More candidates than are held at a time; nothing is known from the groups' best tokens."""
    check(random(1, 3000, seed=2, scale=0.01), [sampling(top_k=2000, top_p=0.95)])
    check(random(1, 1500, seed=2, scale=0.01), [sampling(top_p=0.9)])


def test_the_likely_tokens_may_lie_far_apart() -> None:
    """One in each group of 64, so that the first bound is tight."""
    peaks = random(1, 331, seed=11) - 20
    peaks[0, [3, 70, 130, 200, 300, 325]] = torch.tensor([1.0, 2.0, 3.0, 2.5, 1.5, 0.5])
    few = [sampling(top_k=top_k, temperature=3.0) for top_k in (2, 4, 5)]
    check(peaks, [*few, *(sampling(top_p=top_p, temperature=3.0) for top_p in (0.44, 0.7, 0.97))])


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    tied = torch.randint(0, 6, (1, 331), generator=torch.Generator().manual_seed(3)).float()
    check(tied, [sampling(top_k=3), sampling(top_k=100), sampling(top_p=0.4), sampling(min_p=0.2)])
    check(torch.zeros(1, 200), [sampling(), sampling(top_k=3), sampling(top_p=0.5), sampling(temperature=0)])


def test_forbidden_tokens_are_never_drawn() -> None:
    few = torch.full((2, 331), -torch.inf)
    few[0, [5, 200, 330]] = torch.tensor([1.0, 2.0, 1.5])
    few[1, 130] = -4.0
    check(few, [sampling(), sampling(top_k=50), sampling(top_p=0.6), sampling(temperature=0)])


def test_far_and_near_logits() -> None:
    """Differences that overflow or vanish when they are weighed."""
    rows = random(2, 331, seed=4)
    rows[0] *= 1e30
    rows[1, 7:9] = 500.0
    check(rows, [sampling(), sampling(top_p=0.7), sampling(temperature=1e-4)])


@pytest.mark.parametrize("fields", [{}, {"top_k": 30}, {"top_p": 0.7}, {"min_p": 0.01}], ids=str)
def test_the_largest_number_draws_a_token_that_is_kept(fields: dict[str, Any]) -> None:
    """Where a sum misses the target by a rounding, no token is made up and none beyond the filters is taken."""
    rows = random(3, 331, seed=10)
    rows[:, 300:] = -torch.inf
    tokens, _ = choose(rows, [sampling(**fields)] * 3, [0, 1, 2], [1 - 2.0**-53] * 3)
    kept = keep_likely((rows - rows.amax(dim=-1, keepdim=True)).double(), [sampling(**fields)] * 3)
    assert kept[[0, 1, 2], tokens].isfinite().all()


def test_a_row_is_the_same_in_any_company() -> None:
    rows, samplings = random(4, 331, seed=5), [sampling(**fields) for fields in FILTERS[::2]]
    sources = [place % 4 for place in range(len(samplings))]
    numbers = [(place * 0.37) % 1 for place in range(len(samplings))]
    together, _ = choose(rows, samplings, sources, numbers)
    for place in (0, 5):
        alone, _ = choose(rows, samplings[place : place + 1], sources[place : place + 1], numbers[place : place + 1])
        assert alone == together[place : place + 1]
    assert choose(rows, samplings[::-1], sources[::-1], numbers[::-1])[0] == together[::-1]


def test_draws_follow_the_distribution() -> None:
    """Numbers that fill the interval evenly draw each token as often as its probability says, to one draw."""
    row = torch.full((1, 70), -torch.inf)
    row[0, [0, 3, 64, 69]] = torch.tensor([2.0, 1.0, 0.0, -1.0])
    count = 64
    numbers = [(place + 0.5) / count for place in range(count)]
    tokens, _ = choose(row, [sampling()] * count, [0] * count, numbers)
    frequencies = torch.bincount(torch.tensor(tokens), minlength=70) / count
    assert torch.allclose(frequencies, row[0].softmax(dim=-1), atol=1.01 / count)
    assert frequencies[row[0] == -torch.inf].sum() == 0
    assert tokens == sorted(tokens)


def test_rows_without_a_possible_token() -> None:
    rows = random(5, 331, seed=6)
    rows[0, 300] = math.nan
    rows[1] = -torch.inf
    rows[2, 4] = torch.inf
    rows[3, [9, 300]] = torch.tensor([math.nan, torch.inf])
    samplings = [one for _ in range(5) for one in (sampling(), sampling(temperature=0), sampling(top_k=3, top_p=0.5))]
    tokens, summary = choose(rows, samplings, [place // 3 for place in range(15)], [0.5] * 15)
    assert summary[:, 0].tolist() == [0] * 12 + [1] * 3
    assert tokens[:12] == [0] * 12
    assert tokens[12:] == [wanted(rows[4], one, 0.5) for one in samplings[12:]]


def test_scores_of_chosen_tokens() -> None:
    rows = random(4, 331, seed=7)
    rows[1] = rows[1].round()  # ranks among ties
    rows[2, 5:] = -torch.inf
    samplings = [sampling(temperature=temperature) for temperature in (0.0, 5.0, 20.0)] * 4
    sources = [place // 3 for place in range(12)]
    tokens, summary = choose(rows, samplings, sources, [0.11 * (place % 8) for place in range(12)], scored=True)
    theirs = score_tokens(rows[sources], torch.tensor(tokens), [0] * 12)
    assert theirs is not None
    assert summary[:, 1].tolist() == theirs.ranks
    assert max(theirs.ranks) > 100
    assert np.allclose(summary[:, 2].numpy().view(np.float32), theirs.chosen, atol=1e-5)
    assert np.allclose(summary[:, 3].numpy().view(np.float32), rows[sources].logsumexp(dim=-1), atol=1e-5)


def sequence(prompt: list[int], output: list[int]) -> Sequence:
    return Sequence(0, [*prompt, *output], len(prompt), BlockTable(BlockPool(1), 4), b"")


@pytest.mark.parametrize("carried", [None, 40, 7, 250])
@pytest.mark.parametrize("fields", [(1.3, 0.0, 0.0), (0.7, 0.5, 0.25), (1.0, -0.5, 1.0), (1.0, 0.0, 0.0)])
def test_penalties(fields: tuple[float, float, float], carried: int | None) -> None:
    """The carried token is new (250), of the prompt (40), or generated before (7)."""
    repetition, presence, frequency = fields
    row = random(3, 331, seed=8)
    past = sequence(list(range(30, 60)), [7, 8, 7, 31, 100])
    tokens, counts = History(past, with_prompt=repetition != 1).follow(past)
    record = np.zeros(2, dtype=ROW)
    record["source"], record["place"], record["carried"] = [0, 2], [-1, 0], -1 if carried is None else 1
    record["past_end"] = len(tokens)
    record["repetition"], record["presence"], record["frequency"] = repetition, presence, frequency
    none = np.empty(0, dtype=np.int32)
    staged = stage(record, [0.0, 0.0], [none, none, tokens, counts])
    changed = apply_rules(row, staged, 1, torch.tensor([3, carried or 0]))
    if carried is not None:
        past.token_ids.append(carried)
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    theirs = LogitsRules(params, repetition, (), ()).apply(row[2].clone(), past)
    assert torch.allclose(changed[0], theirs, atol=1e-6)
    assert torch.equal(changed[0] != row[2], theirs != row[2])


def test_a_history_follows_its_sequence() -> None:
    past = sequence([4, 5, 4], [6])
    with_prompt, without = History(past, True), History(past, False)
    for token in [6, 4, 9, 6]:
        past.token_ids.append(token)
        for history, prompt in ((with_prompt, {4, 5}), (without, set[int]())):
            output = past.output_token_ids
            tokens, counts = history.follow(past)
            assert dict(zip(tokens.tolist(), counts.tolist(), strict=True)) == {
                token: output.count(token) for token in prompt | set(output)
            }


@pytest.mark.parametrize("only", [False, True])
def test_edits(only: bool) -> None:
    """Two rows, the second with an empty list; of others nothing is touched."""
    rows = random(3, 331, seed=9)
    tokens = np.arange(0, 60, 2, dtype=np.int32)
    biases = np.linspace(-3, 3, 30, dtype=np.float32)
    biases[4] = -np.inf
    record = np.zeros(2, dtype=ROW)
    record["source"], record["place"], record["carried"] = [2, 0], [0, 1], -1
    record["edits"], record["edits_end"], record["only"] = [0, 30], 30, only
    record["repetition"] = 1
    none = np.empty(0, dtype=np.int32)
    staged = stage(record, [0.0, 0.0], [tokens, biases.view(np.int32), none, none])
    first, second = apply_rules(rows, staged, 2, torch.zeros(1, dtype=torch.int64))
    theirs = rows[2].clone()
    theirs[tokens.astype(np.int64)] += torch.from_numpy(biases)
    if only:
        theirs[torch.tensor([token for token in range(331) if token not in tokens])] = -torch.inf
    assert torch.equal(first, theirs)
    assert torch.equal(second, torch.full((331,), -torch.inf) if only else rows[0])
