"""Attention of sequences with one new token each, over the paged cache: split-KV decoding.

One query reads its whole context, so bytes bound it: its roof is the memory's bandwidth over the keys and values. To
reach it, work is cut into parts that fill the machine whatever the lengths are. A part is a run of one sequence's keys;
one program attends over it for one kv head, with the query heads of that kv head as rows of one tile:

    sequence 0   keys 0 .................................. 9000     parts 0 1 2 3
    sequence 1   keys 0 ...... 1500                                 part  4
    padding      no keys                                            part  5        gives zeros
                                                                    parts 6 7      are no parts: they end at once

There are always as many programs as the shapes allow (sequences + parts that fill the machine), so a CUDA graph can
replay the launch over other lengths. `plan_kernel` cuts the parts on the device from the lengths alone, once per step.
A sequence of one part is finished by its program; the parts of others are joined by `combine_kernel` through the
logarithms of their sums.

Sources: Dao et al., "Flash-Decoding for long-context inference" (2023); Kwon et al., "PagedAttention" (SOSP 2023); the
work list as in Ye et al., "FlashInfer" (2025).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pagedllm_core.kernels.attention_parts import (
    attend_tile,
    check_shapes,
    finish,
    launch_strides,
    padded_width,
    score_factors,
)
from pagedllm_core.kernels.cache import split_fp8

_PROGRAMS_PER_MULTIPROCESSOR = 8  # two run at once; more of them even out what they differ by
_LEAST_PART = 128  # keys
_TILE_BYTES = 16384  # of keys in q's type, and as much of values, in each stage of the pipeline
_STAGES = 5  # two from a table's entries to the keys they point to, two from those to their use
_LEAST_SEQUENCES = 128  # that are planned for, so that few sizes are compiled
_COMBINED = 16  # parts that are joined at once
_NO_WINDOW = 1 << 30


class SplitPlan(NamedTuple):
    """Which part of which sequence each program attends over.

    Attributes:
        parts: int32 [4, P]: sequence (-1 where there is no such part), first key, end, parts of that sequence.
        firsts: int32 [B + 1], the first part of each sequence.
    """

    parts: torch.Tensor
    firsts: torch.Tensor


@triton.jit(do_not_specialize=["sequences", "count", "fill"])  # or each of many values would be compiled for
def plan_kernel(context_lens, parts, firsts, sequences, count, fill, window,
                LEAST: tl.constexpr, SEQUENCES: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """One program for each sequence; the last one marks what is left over."""
    number = tl.program_id(0)
    sequence = tl.arange(0, SEQUENCES)
    contexts = tl.load(context_lens + sequence, mask=sequence < sequences, other=0)
    lengths = tl.minimum(contexts, window)
    share = tl.cdiv(tl.sum(lengths.to(tl.int64), axis=0), fill).to(tl.int32)
    most = tl.maximum(tl.cdiv(share, LEAST), 1) * LEAST
    cuts = tl.where(sequence < sequences, tl.maximum(tl.cdiv(lengths, most), 1), 0)
    first = tl.sum(tl.where(sequence < number, cuts, 0), axis=0)
    tl.store(firsts + number, first)
    part = tl.arange(0, PARTS)
    if number == sequences:
        tl.store(parts + first + part, -1, mask=first + part < count)
        return
    context = tl.load(context_lens + number)
    length = tl.minimum(context, window)
    mine = tl.maximum(tl.cdiv(length, most), 1)
    size = tl.cdiv(tl.cdiv(length, mine), LEAST) * LEAST
    begin = context - length + part * size
    at = parts + first + part
    tl.store(at, number, mask=part < mine)
    tl.store(at + count, begin, mask=part < mine)
    tl.store(at + 2 * count, tl.minimum(begin + size, context), mask=part < mine)
    tl.store(at + 3 * count, mine, mask=part < mine)


def plan_splits(context_lens: torch.Tensor, kv_heads: int, window: int | None, multiprocessors: int) -> SplitPlan:
    """Cut the work of a decode step into parts. The plan's size depends on the shapes alone.

    Args:
        context_lens: int32 [B]; 0 for padding, which gets a part without keys.
        kv_heads: Programs for each part.
        window: Sliding window in tokens, or None.
        multiprocessors: Of the device.
    """
    sequences = context_lens.shape[0]
    fill = max(1, multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR // kv_heads)
    count = sequences + fill
    parts = context_lens.new_empty(4, count)
    firsts = context_lens.new_empty(sequences + 1)
    padded = max(_LEAST_SEQUENCES, triton.next_power_of_2(sequences))
    plan_kernel[(sequences + 1,)](
        context_lens, parts, firsts, sequences, count, fill, window or _NO_WINDOW,
        LEAST=_LEAST_PART, SEQUENCES=padded, PARTS=triton.next_power_of_2(padded + fill), num_warps=4,
    )  # fmt: skip
    return SplitPlan(parts, firsts)


@triton.jit(do_not_specialize=["table_stride", "count"])
def decode_kernel(
    q, out, cache, scales, sinks, tables, rows, parts, partials, logsums,
    q_head, q_row, out_row, out_head, cache_half, cache_head, cache_block, scale_half, scale_head, scale_block,
    table_stride, count, inner, outer,
    GROUP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One part for one kv head."""
    part = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.load(parts + part)
    if sequence < 0:
        return
    begin = tl.load(parts + count + part)
    end = tl.load(parts + 2 * count + part)
    siblings = tl.load(parts + 3 * count + part)
    row = sequence.to(tl.int64)
    if rows is not None:
        row = tl.load(rows + sequence).to(tl.int64)
    local = tl.arange(0, ROWS)
    dim = tl.arange(0, WIDTH)
    head = kv_head * GROUP + local
    valid = local < GROUP
    mask = valid[:, None] & (dim[None, :] < DIM)
    q_tile = tl.load(q + row * q_row + head[:, None] * q_head + dim[None, :], mask=mask, other=0.0)
    table = tables + sequence.to(tl.int64) * table_stride
    keys = cache + kv_head.to(tl.int64) * cache_head
    key_scales = scales
    if scales is not None:
        key_scales = scales + kv_head.to(tl.int64) * scale_head
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    lowest = tl.zeros([ROWS], tl.int32)
    last = lowest + end - 1
    for start in range(begin, end, TILE):
        acc, top, total = attend_tile(
            acc, top, total, q_tile, keys, key_scales, table, start + tl.arange(0, TILE), end - 1, lowest, last,
            cache_half, cache_block, scale_half, scale_block, inner, outer, BLOCK_SIZE, DIM, WIDTH, SOFTCAP, True,
        )  # fmt: skip
    if siblings == 1:
        acc, _ = finish(acc, top, total, sinks, head, valid)
        at_out = out + row * out_row + head[:, None] * out_head + dim[None, :]
        tl.store(at_out, acc.to(out.dtype.element_ty), mask=mask)
    else:
        acc, logsum = finish(acc, top, total, None, head, valid)
        at = part.to(tl.int64) * (tl.num_programs(1) * GROUP) + head
        tl.store(partials + at[:, None] * DIM + dim[None, :], acc, mask=mask)
        tl.store(logsums + at, logsum, mask=valid)


@triton.jit
def combine_kernel(
    out, partials, logsums, sinks, rows, firsts, out_row, out_head,
    COMBINED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One sequence and query head: the mean of its parts, weighted by the sums behind them."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(firsts + sequence)
    end = tl.load(firsts + sequence + 1)
    if end - first == 1:
        return
    dim = tl.arange(0, WIDTH)
    acc = tl.zeros([1, WIDTH], tl.float32)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for start in range(first, end, COMBINED):
        part = start + tl.arange(0, COMBINED)
        at = part.to(tl.int64) * tl.num_programs(1) + head
        logsum = tl.load(logsums + at, mask=part < end, other=float("-inf"))
        partial = tl.load(
            partials + at[:, None] * DIM + dim[None, :], mask=(part < end)[:, None] & (dim[None, :] < DIM), other=0.0
        )
        highest = tl.maximum(top, tl.max(logsum, axis=0))
        weights = tl.exp2(logsum - highest)
        fade = tl.exp2(top - highest)
        acc = acc * fade[:, None] + tl.sum(weights[:, None] * partial, axis=0)[None, :]
        total = total * fade + tl.sum(weights, axis=0)
        top = highest
    one = tl.arange(0, 1)
    acc, _ = finish(acc, top, total, sinks, head + one, one == 0)
    row = sequence.to(tl.int64)
    if rows is not None:
        row = tl.load(rows + sequence).to(tl.int64)
    at_out = out + row * out_row + head * out_head + dim[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=dim[None, :] < DIM)


def _key_tile(width: int, dtype: torch.dtype, fp8: bool) -> int:
    """Keys that are attended over at once; more would spill registers."""
    if dtype == torch.float32:  # without tensor cores
        return 16
    return max(16, min(64 if fp8 else 128, _TILE_BYTES // (width * dtype.itemsize)))


def decode_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    out: torch.Tensor,
    block_tables: torch.Tensor,
    rows: torch.Tensor | None,
    plan: SplitPlan,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attend with one query per sequence. The window is in the plan.

    Args:
        q: [heads, T, head_dim], last stride 1.
        kv: One layer's cache, [2, kv_heads, blocks, block_size, head_dim], or its fp8 form (kernels/cache.py).
        out: [T, heads, head_dim], last stride 1; the rows of the sequences are written.
        block_tables: int32 [B, max_blocks], last stride 1.
        rows: int32 [B], the row of q and out that each sequence has; None where sequence b has row b.
        plan: What `plan_splits` made of the sequences' lengths.
        scale: Factor on the query-key products.
        softcap: See `LayerSpec`.
        sinks: [heads], see `LayerSpec`.

    Raises:
        ValueError: Shapes do not belong together.
        UnsupportedModelError: Heads are too wide.
    """
    values, scales = split_fp8(kv)
    group = check_shapes(q, values, out)
    heads, _, dim = q.shape
    width = padded_width(dim)
    count, kv_heads = plan.parts.shape[1], heads // group
    partials = torch.empty(count, heads, dim, dtype=torch.float32, device=q.device)
    logsums = torch.empty(count, heads, dtype=torch.float32, device=q.device)
    inner, outer = score_factors(scale, softcap)
    decode_kernel[(count, kv_heads)](
        q, out, values, scales, sinks, block_tables, rows, plan.parts, partials, logsums,
        *launch_strides(q, out, values, scales, block_tables), count, inner, outer,
        GROUP=group, ROWS=max(16, triton.next_power_of_2(group)),
        TILE=_key_tile(width, q.dtype, scales is not None), BLOCK_SIZE=values.shape[3], DIM=dim, WIDTH=width,
        SOFTCAP=softcap is not None, num_warps=4, num_stages=_STAGES,
    )  # fmt: skip
    combine_kernel[(block_tables.shape[0], heads)](
        out, partials, logsums, sinks, rows, plan.firsts, out.stride(0), out.stride(1),
        COMBINED=_COMBINED, DIM=dim, WIDTH=width, num_warps=4,
    )  # fmt: skip
