"""Choose one token per row without sorting the vocabulary, and score it.

A row is seen as groups of 64 tokens. One launch reads it all and keeps each group's best logit and each split's mass;
from then on only groups whose best token can matter are read again:

    row          [ g0 g1 g2 ... | ... | ... gN ]      splits of SPLIT tokens, groups of 64
    _summarise   best of each group, mass of each split                 grid rows x splits, one read of the logits
    _choose      bound ──► groups ──► tokens within it ──► limit ──► draw          grid rows
    _score       log-sum-exp of the raw row, rank of the token                     grid rows

Each filter (min-p, top-k, top-p, in this order) is a limit on the distance from the row's best token (`search`);
tokens that tie with the last one kept are kept as well, as in `filters.keep_likely`. The groups' best tokens give a
first bound: k groups whose best is within a limit hold k tokens within it. The draw inverts the cumulative distribution
in token-id order with the number it is given, as `sample.sample` does: the two choose the same, up to float noise.

Bound by bytes: one read of the logits, where filters keep some hundred tokens. A nucleus of most of the vocabulary
costs up to 30 reads of the row by one program. Every sum has a fixed order: a row's token is the same in any company.

Sources: top-k, Fan et al., "Hierarchical Neural Story Generation" (2018); top-p, Holtzman et al., "The Curious Case of
Neural Text Degeneration" (2020); min-p, Nguyen et al., "Turning Up the Heat" (2024); the draw, inversion by sequential
search, Devroye, "Non-Uniform Random Variate Generation" (1986).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pagedllm_core.decode.staging import Staged, column
from pagedllm_core.kernels.search import (
    FARTHEST,
    GROUP,
    distance_of,
    draw,
    first_beyond,
    list_kept,
    list_tokens,
    mass_within,
    rank_of,
    search_groups,
    search_tokens,
    weight_of,
)

_SOURCE, _PLACE, _SCORED = tl.constexpr(column("source")), tl.constexpr(column("place")), tl.constexpr(column("scored"))
_TEMPERATURE, _REACH = tl.constexpr(column("temperature")), tl.constexpr(column("reach"))
_TOP_K, _TOP_P = tl.constexpr(column("top_k")), tl.constexpr(column("top_p"))
_FILTERED = tl.constexpr(column("filtered"))
SPLIT = 4096  # tokens that one program of `_summarise` reads


@triton.jit
def _float(record, COLUMN: tl.constexpr):
    return tl.load(record + COLUMN).to(tl.float32, bitcast=True)


@triton.jit
def _row(logits, changed, record, vocabulary, stride):
    """First number of the row to sample from: the changed one where there is one."""
    place = tl.load(record + _PLACE).to(tl.int64)
    start = logits + tl.load(record + _SOURCE).to(tl.int64) * stride
    if changed is not None:  # noqa: SIM102 (decided when compiled)
        if place >= 0:
            start = changed + place * vocabulary
    return start


@triton.jit
def _summarise(
    logits, changed, records, maxima, bests, masses, vocabulary, stride, fields, SPLIT: tl.constexpr, RAW: tl.constexpr
):
    """Each group's best logit (infinity where one is NaN), each split's best and its mass relative to that.

    RAW: of the raw logits at temperature 1, for rows whose token is scored.
    """
    row = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    record = records + row * fields
    if RAW:
        start = logits + tl.load(record + _SOURCE).to(tl.int64) * stride
        temperature, wanted = 1.0, tl.load(record + _SCORED) != 0
    else:
        start = _row(logits, changed, record, vocabulary, stride)
        temperature, wanted = _float(record, _TEMPERATURE), True
    if wanted:
        GROUPS: tl.constexpr = SPLIT // GROUP
        group = tl.arange(0, GROUPS)
        token = split * SPLIT + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        score = tl.load(start + token, mask=token < vocabulary, other=float("-inf"))
        score = tl.where(score == score, score, float("inf"))
        best = tl.max(score, axis=1)
        tl.store(maxima + (row * splits + split) * GROUPS + group, best)
        top = tl.max(best, axis=0)
        tl.store(bests + row * splits + split, top)
        if temperature > 0:
            mass = tl.where(score > float("-inf"), tl.exp((score - top) / temperature), 0.0)
            tl.store(masses + row * splits + split, tl.sum(tl.sum(mass, axis=1), axis=0))


@triton.jit
def _masses(bests, masses, row, top, temperature, splits, SPLITS: tl.constexpr):
    """Each split's mass relative to the row's best token: float64 [SPLITS], and the splits' numbers."""
    number = tl.arange(0, SPLITS)
    best = tl.load(bests + row * splits + number, mask=number < splits, other=float("-inf"))
    mass = tl.load(masses + row * splits + number, mask=number < splits, other=0.0).to(tl.float64)
    return tl.where(best > float("-inf"), mass * tl.exp(((best - top) / temperature).to(tl.float64)), 0.0), number


@triton.jit
def _bound(record, best, total, top, temperature, vocabulary):
    """A limit that holds all that the filters keep, found from the groups' best tokens alone."""
    reach, top_k, top_p = _float(record, _REACH), tl.load(record + _TOP_K), _float(record, _TOP_P)
    limit = tl.minimum(reach.to(tl.int32, bitcast=True), FARTHEST)
    distance = distance_of(best, top, temperature)
    if top_k > 0:
        limit = search_groups(distance, tl.full(best.shape, 1.0, tl.float32), top_k, limit)
    elif (top_p < 1) & (reach == float("inf")):
        # Tokens less likely than (1 - top_p) / vocabulary weigh less than 1 - top_p together; 1.0 is for rounding.
        rare = tl.log(vocabulary / ((1.0 - top_p) * total.to(tl.float32))) + 1.0
        limit = tl.minimum(limit, rare.to(tl.int32, bitcast=True))
        limit = search_groups(distance, weight_of(distance), top_p * total.to(tl.float32), limit)
    return limit


@triton.jit
def _draw_filtered(
    start, listed, candidates, record, uniform, best, number, total, top, temperature, vocabulary
):  # fmt: skip
    """A random token among those that min-p, top-k and top-p keep."""
    reach, top_k, top_p = _float(record, _REACH), tl.load(record + _TOP_K), _float(record, _TOP_P)
    limit = _bound(record, best, total, top, temperature, vocabulary)
    num_groups = list_kept(listed, 0, number, distance_of(best, top, temperature) <= limit)
    tl.debug_barrier()  # other threads read the list
    count = list_tokens(start, listed, num_groups, candidates, top, temperature, vocabulary, limit)
    tl.debug_barrier()
    if top_k > 0:
        limit = search_tokens(start, candidates, count, top, temperature, top_k, limit, True)
    if (top_k > 0) | (reach < float("inf")):
        total = mass_within(start, candidates, count, top, temperature, limit)
    if top_p < 1:
        limit = search_tokens(start, candidates, count, top, temperature, top_p.to(tl.float64) * total, limit, False)
        total = mass_within(start, candidates, count, top, temperature, limit)
    return draw(start, candidates, count, top, temperature, vocabulary, limit, uniform * total)


@triton.jit
def _draw_freely(start, mass, split, uniform, total, top, temperature, vocabulary, SPLIT: tl.constexpr):
    """A random token of the whole row: it is in the split in which the sum over splits passes the target."""
    target = uniform * total
    here, last = first_beyond(split, mass, 0.0, target, vocabulary)
    chosen = tl.minimum(here, last)
    target -= tl.sum(tl.where(split < chosen, mass, 0.0), axis=0)
    first = chosen * SPLIT
    count = tl.minimum(SPLIT, vocabulary - first)
    return first + draw(start + first, None, count, top, temperature, vocabulary, FARTHEST, target)


@triton.jit
def _first_best(start, best, number, top, vocabulary):
    """The first of the most likely tokens."""
    group = tl.min(tl.where(best == top, number, vocabulary), axis=0)
    token = group * GROUP + tl.arange(0, GROUP)
    score = tl.load(start + token, mask=token < vocabulary, other=float("-inf"))
    return tl.min(tl.where(score == top, token, vocabulary), axis=0)


@triton.jit
def _choose(
    logits, changed, records, uniforms, maxima, bests, masses, listed, candidates, tokens, summary,
    vocabulary, stride, fields, splits, SPLIT: tl.constexpr, SPLITS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Choose the token of a row, and say whether any is possible."""
    row = tl.program_id(0).to(tl.int64)
    record = records + row * fields
    groups = splits * (SPLIT // GROUP)
    number = tl.arange(0, GROUPS)
    best = tl.load(maxima + row * groups + number, mask=number < groups, other=float("-inf"))
    top = tl.max(best, axis=0)
    possible = (top > float("-inf")) & (top < float("inf"))
    temperature = _float(record, _TEMPERATURE)
    start = _row(logits, changed, record, vocabulary, stride)
    token = vocabulary * 0
    if possible & (temperature == 0):
        token = _first_best(start, best, number, top, vocabulary)
    elif possible:
        mass, split = _masses(bests, masses, row, top, temperature, splits, SPLITS)
        total, uniform = tl.sum(mass, axis=0), tl.load(uniforms + row)
        place = tl.load(record + _FILTERED).to(tl.int64)
        if place < 0:
            token = _draw_freely(start, mass, split, uniform, total, top, temperature, vocabulary, SPLIT)
        elif candidates is not None:
            token = _draw_filtered(
                start, listed + row * groups, candidates + place * vocabulary, record, uniform, best, number, total,
                top, temperature, vocabulary,
            )  # fmt: skip
    tl.store(tokens + row, token.to(tl.int64))
    column = tl.arange(0, 4)
    tl.store(summary + row * 4 + column, tl.where(column == 0, possible.to(tl.int32), 0))


@triton.jit
def _score(
    logits, records, tokens, maxima, bests, masses, listed, summary,
    vocabulary, stride, fields, splits, SPLIT: tl.constexpr, SPLITS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The rank of a row's token, its log-probability, and the row's log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    record = records + row * fields
    if tl.load(record + _SCORED) != 0:
        start = logits + tl.load(record + _SOURCE).to(tl.int64) * stride
        chosen = tl.load(start + tl.load(tokens + row))
        groups = splits * (SPLIT // GROUP)
        number = tl.arange(0, GROUPS)
        best = tl.load(maxima + row * groups + number, mask=number < groups, other=float("-inf"))
        top = tl.max(best, axis=0)
        mass, _ = _masses(bests, masses, row, top, 1.0, splits, SPLITS)
        total = top + tl.log(tl.sum(mass, axis=0)).to(tl.float32)
        listed += row * groups
        num_groups = list_kept(listed, 0, number, best > chosen)
        tl.debug_barrier()  # other threads read the list
        rank = rank_of(start, listed, num_groups, vocabulary, chosen)
        tl.store(summary + row * 4 + 1, rank)
        tl.store(summary + row * 4 + 2, (chosen - total).to(tl.int32, bitcast=True))
        tl.store(summary + row * 4 + 3, total.to(tl.int32, bitcast=True))


@dataclass(frozen=True, slots=True)
class Workspace:
    """What the launches leave for one another, for rows of one vocabulary.

    Attributes:
        maxima: float32 [max_rows, splits * groups per split], each group's best logit.
        bests: float32 [max_rows, splits].
        masses: float32 [max_rows, splits].
        listed: int32, as `maxima`: numbers of the groups that matter.
        split: Tokens of a split.
    """

    maxima: torch.Tensor
    bests: torch.Tensor
    masses: torch.Tensor
    listed: torch.Tensor
    split: int

    @classmethod
    def allocate(cls, max_rows: int, vocabulary: int, device: torch.device) -> Workspace:
        """Room for `max_rows` rows."""
        split = min(SPLIT, max(GROUP.value, triton.next_power_of_2(vocabulary)))
        splits = triton.cdiv(vocabulary, split)
        groups = splits * (split // GROUP.value)
        return cls(
            torch.empty((max_rows, groups), dtype=torch.float32, device=device),
            torch.empty((max_rows, splits), dtype=torch.float32, device=device),
            torch.empty((max_rows, splits), dtype=torch.float32, device=device),
            torch.empty((max_rows, groups), dtype=torch.int32, device=device),
            split,
        )


def sample_rows(
    logits: torch.Tensor,
    changed: torch.Tensor | None,
    num_filtered: int,
    staged: Staged,
    work: Workspace,
    tokens: torch.Tensor,
    summary: torch.Tensor,
) -> None:
    """Choose one token per row.

    Args:
        logits: float32 [n, vocabulary], raw, last stride 1.
        changed: float32 [m, vocabulary], packed: the rows that the records' `place` names; None where none does.
        num_filtered: Rows with min-p, top-k or top-p; the records' `filtered` numbers them.
        staged: The step's rows.
        work: Room for them.
        tokens: int64 [rows], receives the tokens; 0 where none is possible.
        summary: int32 [rows, 4]; its first column receives 1 where a token is possible, else 0; the others 0.
    """
    rows, fields = staged.records.shape
    vocabulary, splits = logits.shape[1], work.bests.shape[1]
    groups = triton.next_power_of_2(work.maxima.shape[1])
    candidates = None
    if num_filtered:
        candidates = torch.empty((num_filtered, vocabulary), dtype=torch.int32, device=logits.device)
    _summarise[(rows, splits)](
        logits, changed, staged.records, work.maxima, work.bests, work.masses, vocabulary, logits.stride(0), fields,
        SPLIT=work.split, RAW=False,
    )  # fmt: skip
    # Without a limit of its own, ptxas spills a few registers to fit two programs on a multiprocessor.
    _choose[(rows,)](
        logits, changed, staged.records, staged.uniforms, work.maxima, work.bests, work.masses, work.listed,
        candidates, tokens, summary, vocabulary, logits.stride(0), fields, splits, SPLIT=work.split,
        SPLITS=triton.next_power_of_2(splits), GROUPS=groups, num_warps=16 if groups > 256 else 8, maxnreg=128,
    )  # fmt: skip


def score_rows(
    logits: torch.Tensor, staged: Staged, work: Workspace, tokens: torch.Tensor, summary: torch.Tensor
) -> None:
    """Score the tokens of the rows whose record says `scored`, under the raw logits.

    Args:
        logits: float32 [n, vocabulary], raw, last stride 1.
        staged: The step's rows.
        work: Room for them; what it holds is written over.
        tokens: int64 [rows].
        summary: int32 [rows, 4]; columns 1 to 3 receive the rank, from 1, and the bits of two float32: the token's
            log-probability and the row's log-sum-exp.
    """
    rows, fields = staged.records.shape
    vocabulary, splits = logits.shape[1], work.bests.shape[1]
    _summarise[(rows, splits)](
        logits, None, staged.records, work.maxima, work.bests, work.masses, vocabulary, logits.stride(0), fields,
        SPLIT=work.split, RAW=True,
    )  # fmt: skip
    _score[(rows,)](
        logits, staged.records, tokens, work.maxima, work.bests, work.masses, work.listed, summary,
        vocabulary, logits.stride(0), fields, splits, SPLIT=work.split,
        SPLITS=triton.next_power_of_2(splits), GROUPS=triton.next_power_of_2(work.maxima.shape[1]), num_warps=8,
    )  # fmt: skip
