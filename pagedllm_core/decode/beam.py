"""Beam search: which candidates go on, which are finished, and when to stop.

The rule is the one of `transformers` 5 `generate(num_beams=w)` (after the refactor of its beam search):

- `max(2, 1 + number of end tokens) * w` candidates are taken from the w x vocabulary scores. Only those among the best
  w may finish; the best w that do not end go on.
- A finished score is the sum of the log-probabilities over (generated length, end token included) ** length_penalty.
- The search stops when the best running score, at the length `early_stopping` assumes, cannot beat the worst of w
  finished ones.

Everything here is a function of scores; sequences, blocks and text are the caller's (`decode/advance.py`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Literal, NamedTuple, TypeVar

import torch

from pagedllm_core.kernels import has_triton

Hypothesis = TypeVar("Hypothesis")


class Candidate(NamedTuple):
    """One possible next token: of running beam `parent`, with the accumulated score it leads to."""

    parent: int
    token: int
    score: float


@dataclass(frozen=True, slots=True)
class BeamRule:
    """What a caller may choose about a beam search.

    Attributes:
        width: Running beams, and most finished hypotheses that are kept.
        length_penalty: Exponent of the length in a finished score.
        early_stopping: True stops once `width` are finished; False and "never" differ in the length they assume.
        num_end_tokens: Size of the end set, which decides how many candidates are looked at.
        max_tokens: Most generated tokens.
    """

    width: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    num_end_tokens: int
    max_tokens: int

    @property
    def num_candidates(self) -> int:
        """Candidates taken in each step."""
        return max(2, 1 + self.num_end_tokens) * self.width

    def finished_score(self, score: float, length: int) -> float:
        """The score of a hypothesis that ends after `length` generated tokens, the end token included."""
        try:
            scale = float(length**self.length_penalty)
        except OverflowError:
            return score / math.inf
        return score / max(scale, sys.float_info.min)


@dataclass
class BeamState(Generic[Hypothesis]):
    """A beam search between two steps.

    Attributes:
        rule: What the caller chose.
        scores: Accumulated log-probabilities of the running beams, best first.
        finished: (score, hypothesis) of the best `width` finished so far, best first.
        improvable: False once no running beam can beat the worst finished one.
    """

    rule: BeamRule
    scores: list[float] = field(default_factory=lambda: [0.0])
    finished: list[tuple[float, Hypothesis]] = field(default_factory=list)
    improvable: bool = True

    @property
    def full(self) -> bool:
        """True where `width` hypotheses are finished."""
        return len(self.finished) == self.rule.width

    def add_finished(self, score: float, hypothesis: Hypothesis) -> None:
        """Keep a finished hypothesis if it is among the best `width`; earlier ones win ties."""
        self.finished.append((score, hypothesis))
        self.finished.sort(key=lambda entry: -entry[0])
        del self.finished[self.rule.width :]

    def step(
        self,
        candidates: list[Candidate],
        length: int,
        ends: Callable[[Candidate], bool],
        finish: Callable[[Candidate], Hypothesis],
    ) -> tuple[list[Candidate], bool]:
        """Take one step.

        Args:
            candidates: The best continuations of all beams, best first (`best_candidates`).
            length: Generated tokens of a continuation, its new token included.
            ends: True where the continuation's new token ends it.
            finish: Makes the hypothesis of a continuation that ends.

        Returns:
            The continuations that go on, best first, and whether the search is over.
        """
        rule = self.rule
        last = length >= rule.max_tokens
        going_on: list[Candidate] = []
        closed = not self.improvable or (rule.early_stopping is True and self.full)
        for rank, candidate in enumerate(candidates):
            if not last and not ends(candidate):
                going_on.append(candidate)
            elif rank < rule.width and not closed:
                self.add_finished(rule.finished_score(candidate.score, length), finish(candidate))
        going_on = going_on[: rule.width]
        self.scores = [candidate.score for candidate in going_on]
        if going_on:
            self.improvable = self.improvable and self._can_improve(length)
        done = not going_on or not self.improvable or (rule.early_stopping is True and self.full)
        return going_on, done

    def _can_improve(self, length: int) -> bool:
        rule = self.rule
        if not self.full:
            return True
        assumed = rule.max_tokens if rule.early_stopping == "never" and rule.length_penalty > 0 else length
        return rule.finished_score(self.scores[0], assumed) > self.finished[-1][0]


def best_candidates(logprobs: torch.Tensor, state: BeamState[Hypothesis]) -> list[Candidate]:
    """The best continuations over all running beams, best first.

    Equal scores come in no particular order on a CPU (`torch.topk`), by beam and token on CUDA.

    Args:
        logprobs: float32 [beams, vocabulary], processed, not renormalised.
        state: The search.

    Returns:
        At most `rule.num_candidates`; impossible ones (-inf) are left out. None where any score is NaN.
    """
    count = min(state.rule.num_candidates, logprobs.numel())
    values, places = _best(logprobs, state.scores, count)
    # One copy, so that the host waits for a GPU once; a float64 holds every place.
    found = torch.cat([values.double(), places.double(), logprobs.isnan().any().double()[None]]).tolist()
    if found[-1]:
        return []
    width = logprobs.shape[-1]
    return [
        Candidate(int(place) // width, int(place) % width, score)
        for score, place in zip(found[:count], found[count:-1], strict=True)
        if score > -torch.inf
    ]


def _best(logprobs: torch.Tensor, scores: list[float], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best sums of a beam's score and a log-probability, and their places in the flattened scores."""
    running = torch.tensor(scores, dtype=logprobs.dtype, device=logprobs.device)
    if _runs_kernels(logprobs):
        from pagedllm_core.kernels import beams

        if count <= beams.MAX_COUNT:
            starts = torch.tensor([0, len(logprobs)], dtype=torch.int32, device=logprobs.device)
            values, places = beams.select_best(logprobs, count, starts, len(logprobs), add=running)
            return values[0], places[0]
    best = (logprobs + running[:, None]).flatten().topk(count)
    return best.values, best.indices


def _runs_kernels(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and has_triton()
