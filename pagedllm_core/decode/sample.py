"""Choose the next token of many rows at once.

A draw depends on (seed, sequence index, position) alone, never on the row's place in the batch, so a request's tokens
are the same alone and in company (up to float noise in its logits). The uniform number comes from a counter-based
generator (the SplitMix64 finaliser, Steele et al. 2014) and picks from the cumulative distribution in token-id order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pagedllm_core.params import Sampling

GREEDY_BELOW = 1e-5  # temperatures under this are greedy, as dividing by them overflows
CANDIDATES = 256  # top-p looks among this many tokens first, before it sorts a whole vocabulary


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row is sampled, and which random number it gets.

    Attributes:
        sampling: Temperature and filters.
        index: The sequence's index in its request.
        position: Position of the token to be chosen.
    """

    sampling: Sampling
    index: int
    position: int


def uniform(seeds: npt.NDArray[np.uint64], indices: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> (
    npt.NDArray[np.float64]
):  # fmt: skip
    """One number in [0, 1) per row from its three counters; float64 [rows]."""
    state = _mix(seeds + np.uint64(0x9E3779B97F4A7C15))
    state = _mix(state ^ (indices + np.uint64(0xD1B54A32D192ED03)))
    state = _mix(state ^ (positions + np.uint64(0x8CB92BA72F3D8DD7)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def sample(logits: torch.Tensor, draws: list[Draw], best: torch.Tensor | None = None) -> torch.Tensor:
    """Choose one token per row.

    Args:
        logits: float32 [rows, vocabulary], processed; every row has a finite maximum.
        draws: One per row.
        best: The most likely tokens, int64 [rows], where the caller has them.

    Returns:
        int64 [rows] on the logits' device.
    """
    tokens = most_likely(logits) if best is None else best.clone()
    random_rows = [row for row, draw in enumerate(draws) if draw.sampling.temperature >= GREEDY_BELOW]
    if random_rows:
        index = torch.tensor(random_rows, device=logits.device)
        tokens[index] = _sample_random(logits[index], [draws[row] for row in random_rows])
    return tokens


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """The first of the most likely tokens of each row, int64 [rows]. On a CPU numpy finds it 5 to 8 times faster."""
    if logits.device.type != "cpu":
        return logits.argmax(dim=-1)
    return torch.from_numpy(logits.numpy().argmax(axis=-1))


def _sample_random(logits: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    samplings = [draw.sampling for draw in draws]
    temperature = _column([sampling.temperature for sampling in samplings], logits)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    logits = keep_likely(logits, samplings)
    cumulative = torch.softmax(logits, dim=-1, dtype=_double(logits)).cumsum(dim=-1)
    number = uniform(
        np.array([sampling.seed for sampling in samplings], dtype=np.uint64),
        np.array([draw.index for draw in draws], dtype=np.uint64),
        np.array([draw.position for draw in draws], dtype=np.uint64),
    )
    target = torch.from_numpy(number)[:, None].to(logits.device, cumulative.dtype) * cumulative[:, -1:]
    # The first token whose cumulative probability exceeds the number: never one of probability zero.
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return tokens.clamp_(max=logits.shape[-1] - 1)


def keep_likely(logits: torch.Tensor, samplings: list[Sampling]) -> torch.Tensor:
    """Set tokens outside min-p, top-k and top-p (in this order) to -inf.

    A filter is a threshold on the logit, so that tokens that tie with the last one kept are kept as well.

    Args:
        logits: float [rows, vocabulary], divided by the temperature, row maximum 0.
        samplings: One per row.

    Returns:
        float [rows, vocabulary].
    """
    vocabulary = logits.shape[-1]
    if any(sampling.min_p > 0 for sampling in samplings):
        logits = _below(logits, _column([sampling.min_p for sampling in samplings], logits).log())
    top_ks = [sampling.top_k if 0 < sampling.top_k < vocabulary else vocabulary for sampling in samplings]
    limited = [row for row, top_k in enumerate(top_ks) if top_k < vocabulary]
    if limited:
        index = torch.tensor(limited, device=logits.device)
        rows = logits[index]
        best = rows.topk(max(top_ks[row] for row in limited), dim=-1).values
        last = torch.tensor([top_ks[row] - 1 for row in limited], device=logits.device)[:, None]
        logits = logits.index_copy(0, index, _below(rows, best.gather(1, last)))
    nucleus = [row for row, sampling in enumerate(samplings) if sampling.top_p < 1]
    if nucleus:
        index = torch.tensor(nucleus, device=logits.device)
        rows = logits[index]
        top_p = _column([samplings[row].top_p for row in nucleus], logits)
        logits = logits.index_copy(0, index, _below(rows, nucleus_threshold(rows, top_p)))
    return logits


def nucleus_threshold(logits: torch.Tensor, top_p: torch.Tensor, candidates: int = CANDIDATES) -> torch.Tensor:
    """Logit of the last token of each row's nucleus, the smallest set whose probability reaches `top_p`.

    Args:
        logits: float [rows, vocabulary].
        top_p: float [rows, 1].
        candidates: Tokens to look among first; rows whose nucleus is larger are sorted whole.

    Returns:
        float [rows, 1].
    """
    count = min(candidates, logits.shape[-1])
    best = logits.topk(count, dim=-1).values
    total = logits.logsumexp(dim=-1, keepdim=True)
    reached = (best - total).exp().cumsum(dim=-1)
    threshold = best.gather(1, (reached < top_p).sum(dim=-1, keepdim=True).clamp_(max=count - 1))
    if count < logits.shape[-1]:
        too_large = (reached[:, -1:] < top_p).squeeze(-1)
        if bool(too_large.any()):
            threshold[too_large] = nucleus_threshold(logits[too_large], top_p[too_large], logits.shape[-1])
    return threshold


def _below(logits: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(logits < threshold, -torch.inf)


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _double(logits: torch.Tensor) -> torch.dtype:
    return torch.float32 if logits.device.type == "mps" else torch.float64
