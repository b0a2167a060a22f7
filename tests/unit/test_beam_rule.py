"""The rule of beam search on scores that were made up, one clause at a time."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from pagedllm_core.decode.beam import BeamRule, BeamState, Candidate

END = 9


def search(finished: list[float] | None = None, **fields: Any) -> BeamState[str]:
    given = {"width": 2, "length_penalty": 1.0, "early_stopping": False, "num_end_tokens": 1, "max_tokens": 10}
    return BeamState(BeamRule(**{**given, **fields}), finished=[(score, "earlier") for score in finished or []])


def step(state: BeamState[str], *found: tuple[int, float], length: int = 2) -> tuple[list[int], bool]:
    """One step over (token, score) pairs; the tokens that go on, and whether the search is over."""
    going_on, done = state.step(
        [Candidate(0, token, score) for token, score in found],
        length,
        ends=lambda candidate: candidate.token == END,
        finish=lambda candidate: f"at {length}",
    )
    return [candidate.token for candidate in going_on], done


@pytest.mark.parametrize(("ends", "count"), [(0, 6), (1, 6), (2, 9), (5, 18)])
def test_enough_candidates_that_a_full_width_can_go_on(ends: int, count: int) -> None:
    assert search(width=3, num_end_tokens=ends).rule.num_candidates == count


def test_only_the_best_width_may_finish_and_the_others_go_on() -> None:
    state = search()
    assert step(state, (1, -1.0), (2, -1.5), (END, -2.0), (3, -3.0)) == ([1, 2], False)
    assert state.finished == []
    assert step(state, (1, -2.0), (END, -2.5), (END, -2.6), (3, -3.0)) == ([1, 3], False)
    assert state.finished == [(-1.25, "at 2")]  # by its length, the end token included
    assert state.scores == [-2.0, -3.0]


def test_the_maximum_length_finishes_the_best_width() -> None:
    state = search()
    assert step(state, (1, -1.0), (2, -2.0), (3, -3.0), length=10) == ([], True)
    assert state.finished == [(-0.1, "at 10"), (-0.2, "at 10")]


def test_the_best_are_kept_and_the_earlier_of_equals() -> None:
    state = search(finished=[-1.0, -2.0])
    step(state, (END, -4.0), (END, -3.0), (1, -3.5))
    assert state.finished == [(-1.0, "earlier"), (-1.5, "at 2")]
    step(state, (END, -3.0), (1, -3.1))
    assert state.finished == [(-1.0, "earlier"), (-1.5, "at 2")]


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "score", "done"),
    [
        (False, 1.0, -5.0, True),  # -2.5 now is worse than -2.0
        (False, 1.0, -3.9, False),
        ("never", 1.0, -5.0, False),  # at the maximum length it would be -0.5
        ("never", 1.0, -20.0, True),
        ("never", 0.0, -5.0, True),
        ("never", -1.0, -0.9, False),  # longer is worse, so today's length counts: -1.8
        ("never", -1.0, -1.1, True),
        (True, 1.0, -0.1, True),
    ],
)
def test_when_a_full_search_stops(
    early_stopping: bool | Literal["never"], length_penalty: float, score: float, done: bool
) -> None:
    state = search(finished=[-1.0, -2.0], early_stopping=early_stopping, length_penalty=length_penalty)
    assert step(state, (1, score), (2, score - 1)) == ([1, 2], done)


def test_a_search_that_is_not_full_goes_on() -> None:
    assert step(search(finished=[-1.0]), (1, -90.0), (2, -95.0)) == ([1, 2], False)
    assert step(search(finished=[-1.0], early_stopping=True), (1, -90.0), (2, -95.0)) == ([1, 2], False)
