"""The best of many scores, in Triton's interpreter, against a stable sort and against `best_candidates`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pagedllm_core.decode import beam
from pagedllm_core.decode.beam import BeamRule, BeamState, best_candidates
from pagedllm_core.kernels import beams
from pagedllm_core.kernels.beams import select_best


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beams, "CHUNK", 64)


def starts(*counts: int) -> torch.Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def wanted(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Best first; of equal ones the first."""
    flat = scores.flatten()
    order = torch.sort(flat, descending=True, stable=True)
    return order.values[:count], order.indices[:count]


def check(scores: torch.Tensor, count: int, groups: torch.Tensor, **changes: torch.Tensor) -> None:
    widths = groups.diff()
    values, places = select_best(scores, count, groups, int(widths.max()), **changes)
    changed = scores
    if "subtract" in changes:
        changed = changed - changes["subtract"][:, None]
    if "add" in changes:
        changed = changed + changes["add"][:, None]
    for group, width in enumerate(widths.tolist()):
        rows = changed[int(groups[group]) : int(groups[group]) + width]
        best, place = wanted(rows, count)
        possible = best > -torch.inf
        assert torch.equal(values[group, : len(best)], best)
        assert torch.equal(places[group, : len(best)][possible], place[possible])
        assert values[group, len(best) :].eq(-torch.inf).all()


def random(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(("vocabulary", "count"), [(5, 3), (64, 20), (65, 8), (1000, 20)])
def test_groups_of_one_row(vocabulary: int, count: int) -> None:
    check(random(3, vocabulary), count, starts(1, 1, 1))


@pytest.mark.parametrize("count", [1, 9])
def test_groups_of_several_sizes_in_one_launch(count: int) -> None:
    check(random(9, 331), count, starts(1, 4, 2, 2))


def test_scores_are_shifted_by_row_first() -> None:
    logits = random(6, 331, seed=1)
    total, running = logits.logsumexp(dim=-1), -torch.arange(6.0)
    check(logits, 6, starts(3, 3), subtract=total, add=running)
    check(logits, 6, starts(3, 3), add=running)


def test_of_equal_scores_the_first_comes_first() -> None:
    generator = torch.Generator().manual_seed(2)
    scores = torch.randint(0, 4, (6, 331), generator=generator).float()
    check(scores, 12, starts(2, 3, 1))
    check(torch.zeros(4, 70), 71, starts(2, 2))


def test_impossible_scores_are_last() -> None:
    scores = random(4, 200, seed=3)
    scores[:2] = -torch.inf
    scores[0, 150] = 1.0
    scores[1, [3, 199]] = torch.tensor([0.5, 2.0])
    scores[2, 7] = torch.nan
    values, places = select_best(scores, 4, starts(2, 1, 1), 2)
    assert values[0].tolist() == [2.0, 1.0, 0.5, -torch.inf]
    assert places[0, :3].tolist() == [399, 150, 203]
    assert not places[1].eq(7).any()


def test_fewer_scores_than_are_asked_for() -> None:
    check(random(2, 3), 5, starts(2))
    check(random(2, 3), 9, starts(2))


def test_rows_need_not_be_packed() -> None:
    wide = random(4, 400, seed=5)
    assert torch.equal(select_best(wide[::2, :331], 7, starts(2), 2)[0][0], wanted(wide[::2, :331], 7)[0])


@pytest.mark.parametrize(("width", "ends"), [(4, 0), (4, 2), (2, 80)])
def test_the_candidates_of_a_beam_search(width: int, ends: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`best_candidates` gives the same with kernels, for scores without ties, impossible ones left out."""
    logprobs = random(width, 331, seed=6).log_softmax(dim=-1)
    logprobs[1, 5:] = -torch.inf
    scores = [-0.5, -0.75, -2.0, -3.25][:width]
    state: BeamState[object] = BeamState(BeamRule(width, 1.0, False, ends, 10), scores=scores)
    theirs = best_candidates(logprobs, state)
    calls = []
    monkeypatch.setattr(beam, "_runs_kernels", lambda tensor: True)
    monkeypatch.setattr(beams, "select_best", lambda *given, **more: calls.append(1) or select_best(*given, **more))
    assert best_candidates(logprobs, state) == theirs
    assert len(calls) == (state.rule.num_candidates <= beams.MAX_COUNT)


def test_a_beam_of_no_numbers_leaves_no_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes NaN for impossible; the other beams would go on as if nothing were wrong."""
    monkeypatch.setattr(beam, "_runs_kernels", lambda tensor: True)
    logprobs = torch.randn(2, 90).log_softmax(-1)
    state: BeamState[str] = BeamState(BeamRule(2, 1.0, False, 1, 10), scores=[-1.0, -2.0])
    assert len(best_candidates(logprobs, state)) == 4
    logprobs[1] = torch.nan
    assert best_candidates(logprobs, state) == []


def test_wrong_arguments_are_named() -> None:
    for scores, count, name in [
        (random(2, 9), 0, "count"),
        (random(2, 9), 129, "count"),
        (random(2, 9).half(), 2, "scores"),
        (random(2, 9).T, 2, "scores"),
    ]:
        with pytest.raises(ValueError, match=name):
            select_best(scores, count, starts(2), 2)
