"""Which tokens min-p, top-k and top-p leave, and a draw among them; only a large nucleus is sorted.

A filter is a threshold on the logit, so that tokens that tie with the last one kept are kept as well. Rows are cut
into blocks of `BLOCK` columns whose maxima say which of them matter: a top-k of 50 has to look at 50 blocks.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch.nn import functional

from pagedllm_core.params import Sampling

BLOCK = 64
CANDIDATES = 256  # top-p looks among this many tokens first
UNDERFLOW = -87.0  # exp of less is no normal float32, and slow on some processors


class Blocks:
    """Rows of logits, cut into blocks.

    Args:
        logits: float [rows, vocabulary], divided by the temperature, the maximum of each row 0.

    Attributes:
        blocks: float [rows, blocks, `BLOCK`]; the last block is filled up with -inf.
        precise: The type that sums are accumulated in: float64 where the device has it.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self.vocabulary = logits.shape[1]
        missing = -logits.shape[1] % BLOCK
        padded = functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits
        self.blocks: torch.Tensor = padded.unflatten(1, (-1, BLOCK))
        self.precise = torch.float32 if logits.device.type == "mps" else torch.float64

    @functools.cached_property
    def maxima(self) -> torch.Tensor:
        """Largest logit of each block, float [rows, blocks]; a draw without a filter does not need them."""
        return self.blocks.amax(dim=-1)

    def largest(self, count: int) -> torch.Tensor:
        """The `count` largest logits of each row, in descending order; they lie in as many blocks. [rows, count]."""
        blocks = self.blocks
        if count < blocks.shape[1]:
            chosen = self.maxima.topk(count, dim=-1, sorted=False).indices
            blocks = blocks.take_along_dim(chosen[:, :, None], dim=1)
        values: torch.Tensor = blocks.flatten(1).topk(count, dim=-1).values
        return values

    def sums(self, threshold: torch.Tensor | None) -> torch.Tensor:
        """The weight of each block, double [rows, blocks]."""
        if threshold is None:
            return weigh(self.blocks, None).sum(dim=-1).to(self.precise)
        rows, columns = (self.maxima >= threshold).nonzero(as_tuple=True)
        sums = self.maxima.new_zeros(self.maxima.shape, dtype=self.precise)
        sums[rows, columns] = weigh(self.blocks[rows, columns], threshold[rows]).sum(dim=-1).to(self.precise)
        return sums

    def pick(self, numbers: torch.Tensor, threshold: torch.Tensor | None) -> torch.Tensor:
        """The first token of each row whose cumulative share of the weight exceeds a number; never one of weight 0.

        Args:
            numbers: double [rows, 1], in [0, 1).
            threshold: float [rows, 1], or None where no row has one.

        Returns:
            int64 [rows].
        """
        reached = self.sums(threshold).cumsum(dim=-1)
        target = numbers * reached[:, -1:]
        column = torch.searchsorted(reached, target, right=True).clamp_(max=reached.shape[1] - 1)
        block = self.blocks.take_along_dim(column[:, :, None], dim=1).squeeze(1)
        inside = weigh(block, threshold).to(reached.dtype).cumsum(dim=-1)
        # A block's two sums differ by their rounding, so that the target may lie a hair beyond the second.
        most = inside[:, -1:].nextafter(inside.new_zeros(()))
        target = torch.minimum(target - functional.pad(reached, (1, 0)).gather(1, column), most)
        return (column * BLOCK + torch.searchsorted(inside, target, right=True)).squeeze(1)


def weigh(logits: torch.Tensor, threshold: torch.Tensor | None) -> torch.Tensor:
    """exp(logit), and 0 below the threshold, whose shape broadcasts."""
    weights: torch.Tensor = logits.clamp(min=UNDERFLOW).exp_()
    if threshold is None:
        return functional.threshold(weights, 2e-38, 0.0, inplace=True)  # a little more than exp(UNDERFLOW)
    return weights.masked_fill_(logits < threshold, 0.0)


def keep_likely(logits: torch.Tensor, samplings: list[Sampling]) -> torch.Tensor:
    """The logits with -inf for tokens outside min-p, top-k and top-p (in this order).

    Args:
        logits: float [rows, vocabulary], divided by the temperature, the maximum of each row 0.
        samplings: One per row.

    Returns:
        float [rows, vocabulary].
    """
    threshold = likely_threshold(Blocks(logits), samplings)
    return logits if threshold is None else logits.masked_fill(logits < threshold, -torch.inf)


def likely_threshold(rows: Blocks, samplings: list[Sampling]) -> torch.Tensor | None:
    """The least logit that min-p, top-k and top-p (in this order) keep; float [rows, 1], or None without a filter."""
    limits = [one.top_k if 0 < one.top_k < rows.vocabulary else 0 for one in samplings]
    most, is_nucleus = max(limits), any(one.top_p < 1 for one in samplings)
    threshold = None
    if most or any(one.min_p > 0 for one in samplings):
        threshold = _column([one.min_p for one in samplings], rows.blocks).log()
        threshold.clamp_(min=torch.finfo(threshold.dtype).min)  # below it is nothing but -inf
    if not most and not is_nucleus:
        return threshold
    largest = rows.largest(min(max(most, CANDIDATES if is_nucleus else 0), rows.vocabulary))
    if threshold is not None and most:
        last = torch.tensor([(limit or most) - 1 for limit in limits], device=largest.device)[:, None]
        limited = torch.tensor([limit > 0 for limit in limits], device=largest.device)[:, None]
        threshold = torch.maximum(threshold, largest.gather(1, last)).where(limited, threshold)
    if is_nucleus:
        threshold = nucleus_threshold(rows, _column([one.top_p for one in samplings], largest), threshold, largest)
    return threshold


def nucleus_threshold(
    rows: Blocks, top_p: torch.Tensor, threshold: torch.Tensor | None, largest: torch.Tensor
) -> torch.Tensor:
    """The least logit of each row's nucleus, the smallest set whose share of the weight reaches `top_p`.

    Args:
        rows: The logits.
        top_p: float [rows, 1]; 1 leaves a row as it is.
        threshold: Logits below it have no weight, float [rows, 1], or None.
        largest: Some of the largest logits of each row in descending order, to look among first.

    Returns:
        float [rows, 1], nowhere below `threshold`.
    """
    wanted = top_p * rows.sums(threshold).sum(dim=-1, keepdim=True)
    reached = weigh(largest, threshold).to(wanted.dtype).cumsum(dim=-1)
    place = (reached < wanted).sum(dim=-1, keepdim=True)
    found = largest.gather(1, place.clamp(max=largest.shape[1] - 1))
    if largest.shape[1] < rows.vocabulary:
        for row in ((place == largest.shape[1]) & (top_p < 1)).nonzero()[:, 0].tolist():
            found[row] = _large_nucleus(rows.blocks[row].flatten(), wanted[row])
    if threshold is None:
        threshold = torch.full_like(found, torch.finfo(found.dtype).min)
    return torch.maximum(threshold, found).where(top_p < 1, threshold)


def _large_nucleus(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The least logit of the smallest set whose weight reaches `wanted`, double [1]; float [1].

    Sorts, which numpy does up to thirty times faster than torch on a CPU.
    """
    if logits.device.type == "cpu":
        ordered = torch.from_numpy(np.sort(logits.numpy())).flip(0)
    else:
        ordered = logits.sort(descending=True).values
    reached = weigh(ordered, None).to(wanted.dtype).cumsum(dim=0)
    return ordered[torch.searchsorted(reached, wanted).clamp_(max=len(ordered) - 1)]


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
