"""The best of many scores: beam candidates over beams x vocabulary, and top log-probabilities.

Two stages, both exact. Every chunk of a row gives its best tokens, best first; then one program per group of rows
merges those sorted lists, by taking the best of their heads again and again.

    row 0   [ chunk 0 | chunk 1 | chunk 2 ]      a list of `count` per chunk
    row 1   [ chunk 3 | chunk 4 | chunk 5 ]                 │
            └────────── group 0 ─────────┘  ──► heads ──► the best `count` of the group

Bound by one read of the scores for small counts; each of the `count` rounds costs one reduction over a chunk that lies
in registers. The rule of selection is that of transformers' beam search: `torch.topk` over the flattened scores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_COUNT = 128  # beyond this torch.topk is the better choice
CHUNK = 4096  # scores that one program holds
_LAST = tl.constexpr(2**63 - 1)


@triton.jit
def _chunk_best(scores, subtract, add, values, tokens, vocabulary, stride, count, CHUNK: tl.constexpr):
    """The best `count` of one chunk of one row. Grid: rows x chunks."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    score = tl.load(scores + row * stride + place, mask=place < vocabulary, other=float("-inf"))
    if subtract is not None:
        score -= tl.load(subtract + row)
    if add is not None:
        score += tl.load(add + row)
    score = tl.where(score == score, score, float("-inf"))
    first = (row * tl.num_programs(1) + tl.program_id(1)) * count
    for rank in range(count):
        best = tl.max(score, axis=0)
        token = tl.min(tl.where(score == best, place, vocabulary), axis=0)
        tl.store(values + first + rank, best)
        tl.store(tokens + first + rank, token)
        score = tl.where(place == token, float("-inf"), score)


@triton.jit
def _merge_best(values, tokens, starts, best_values, best_places, vocabulary, chunks, count, LISTS: tl.constexpr):
    """Merge the lists of one group of rows. Grid: groups."""
    group = tl.program_id(0)
    first = tl.load(starts + group)
    lists = (tl.load(starts + group + 1) - first) * chunks
    number = tl.arange(0, LISTS)
    head = (first.to(tl.int64) * chunks + number) * count
    end = head + count
    offset = (number // chunks).to(tl.int64) * vocabulary
    live = number < lists
    value = tl.load(values + head, mask=live, other=float("-inf"))
    place = offset + tl.load(tokens + head, mask=live, other=0)
    for rank in range(count):
        best = tl.max(value, axis=0)
        found = tl.min(tl.where(live & (value == best), place, _LAST), axis=0)
        tl.store(best_values + group.to(tl.int64) * count + rank, best)
        tl.store(best_places + group.to(tl.int64) * count + rank, found)
        taken = live & (place == found)
        head += taken.to(tl.int64)
        more = taken & (head < end)
        value = tl.where(taken, tl.load(values + head, mask=more, other=float("-inf")), value)
        place = tl.where(taken, offset + tl.load(tokens + head, mask=more, other=0), place)


def select_best(
    scores: torch.Tensor,
    count: int,
    starts: torch.Tensor,
    widest: int,
    *,
    subtract: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `count` scores of each group of rows, best first; of equal ones the first in the flattened order.

    Without `subtract` and `add` a value is the score itself; else `score - subtract[row] + add[row]` in float32: raw
    logits, their log-sum-exp and the beams' accumulated scores give the scores of continuations.

    Args:
        scores: float32 [rows, vocabulary], last stride 1. NaN counts as -inf.
        count: How many, 1 to `MAX_COUNT`.
        starts: int32 [groups + 1], each group's first row, and `rows` at the end.
        widest: Rows of the largest group.
        subtract: float32 [rows].
        add: float32 [rows].

    Returns:
        float32 [groups, count] values, and int64 [groups, count] places, row in the group x vocabulary + token. Entries
        of value -inf are impossible ones, or stand for missing ones, and their place means nothing.

    Raises:
        ValueError: A count out of range, or scores of another kind.
    """
    if not 1 <= count <= MAX_COUNT:
        raise ValueError(f"count={count}: must be 1 to {MAX_COUNT}")
    if scores.dim() != 2 or scores.dtype != torch.float32 or scores.stride(1) != 1:
        raise ValueError(f"scores: {scores.dtype} {tuple(scores.shape)}; give packed float32 [rows, vocabulary]")
    rows, vocabulary = scores.shape
    chunks = triton.cdiv(vocabulary, CHUNK)
    groups = starts.shape[0] - 1
    values = torch.empty(rows * chunks * count, dtype=torch.float32, device=scores.device)
    tokens = torch.empty(rows * chunks * count, dtype=torch.int32, device=scores.device)
    best_values = torch.empty((groups, count), dtype=torch.float32, device=scores.device)
    best_places = torch.empty((groups, count), dtype=torch.int64, device=scores.device)
    _chunk_best[(rows, chunks)](
        scores, subtract, add, values, tokens, vocabulary, scores.stride(0), count, CHUNK=CHUNK, num_warps=8
    )
    lists = max(32, triton.next_power_of_2(widest * chunks))
    _merge_best[(groups,)](
        values, tokens, starts, best_values, best_places, vocabulary, chunks, count, LISTS=lists,
        num_warps=4 if lists <= 1024 else 8,
    )  # fmt: skip
    return best_values, best_places
