"""Attention of sequences with several new tokens each, over the paged cache: prompts, chunks, catching up.

Arithmetic bounds it: its roof is the tensor cores over 4 * head_dim operations for each query head and visible key. A
program takes one tile of query rows of one kv head. The query heads of that kv head are rows of the tile, too, so that
short chunks fill tiles and every key that is read serves all of them:

    row = token * group + head in the group          token 0: head 0 1 2 3 | token 1: head 0 1 2 3 | ...

Keys come in three runs. Only those at the edges of what the tile's rows see are compared with positions:

    keys    | left edge of the window | seen by every row | up to the rows' own tokens |
              masked, with a window     no mask             masked

Where the runs meet depends on the tile's other rows. A masked key adds exact zeros, so only the instructions differ;
in deterministic mode they may not either, and all keys go through the one masked loop.

Sources: Dao, "FlashAttention-2" (2023) for the loop; packing grouped heads into rows as in Ye et al., "FlashInfer"
(2025).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
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

_NO_WINDOW = 1 << 30


class QueryTile(NamedTuple):
    """How a program is cut out.

    Attributes:
        rows: Query rows.
        keys: Keys that are attended over at once.
        warps: Of 32 threads.
        stages: Of the pipeline: the table's entries are read ahead of the keys, and both ahead of their use.
    """

    rows: int
    keys: int
    warps: int
    stages: int


# By (Hopper, fp8 cache) and padded head size: the largest that spill no registers. Hopper multiplies from shared memory
# (wgmma, up to 225 of 227 KB); the others keep to the 99 KB of an RTX card. With five stages the next keys arrive while
# a tile is worked on, with three only during its second product.
_TILES = {
    (True, False): {64: QueryTile(128, 128, 8, 5), 128: QueryTile(128, 128, 8, 5), 256: QueryTile(128, 32, 8, 5)},
    (True, True): {64: QueryTile(128, 64, 8, 5), 128: QueryTile(128, 64, 8, 5), 256: QueryTile(64, 32, 8, 5)},
    (False, False): {64: QueryTile(128, 64, 8, 5), 128: QueryTile(128, 64, 8, 5), 256: QueryTile(64, 32, 8, 3)},
    (False, True): {64: QueryTile(128, 64, 8, 5), 128: QueryTile(128, 32, 8, 5), 256: QueryTile(64, 16, 8, 3)},
}
_FLOAT32 = QueryTile(16, 16, 4, 2)  # without tensor cores


def query_tile(dim: int, dtype: torch.dtype, fp8: bool, hopper: bool) -> QueryTile:
    """The tile for a layer.

    Args:
        dim: Head size.
        dtype: Of the queries.
        fp8: Whether the cache is.
        hopper: Whether the device is of compute capability 9.

    Raises:
        UnsupportedModelError: Heads are too wide.
    """
    width = max(64, padded_width(dim))
    return _FLOAT32 if dtype == torch.float32 else _TILES[hopper, fp8][width]


def list_tiles(
    query_lens: npt.NDArray[np.int32], context_lens: npt.NDArray[np.int32], group: int, rows: int
) -> npt.NDArray[np.int32]:
    """The tiles of a step, those with the most keys first, so that the last ones to run are short.

    Args:
        query_lens: int32 [C], new tokens of each sequence.
        context_lens: int32 [C], its keys, new ones included.
        group: Query heads for each kv head.
        rows: Rows of a tile.

    Returns:
        int32 [N, 2]: the sequence, and the first of its query_len * group rows.
    """
    counts = -(-query_lens.astype(np.int64) * group // rows)
    sequence = np.repeat(np.arange(len(counts)), counts)
    first = (np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)) * rows
    keys = (context_lens - query_lens)[sequence] + np.minimum((first + rows) // group, query_lens[sequence])
    order = np.argsort(-keys, kind="stable")
    return np.stack([sequence, first], axis=1)[order].astype(np.int32)


def list_decode_tiles(count: int, group: int, rows: int, device: torch.device) -> torch.Tensor:
    """The tiles of `count` sequences of one new token each, made on the device: a CUDA graph can hold it.

    Args:
        count: Sequences.
        group: Query heads for each kv head.
        rows: Rows of a tile.
        device: Where the list is needed.

    Returns:
        int32 [N, 2], as from `list_tiles`.
    """
    each = -(-group // rows)
    number = torch.arange(count * each, dtype=torch.int32, device=device)
    return torch.stack([number // each, number % each * rows], dim=1)


@triton.jit
def _query_rows(tiles, start, length, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Row of the step, token of the sequence and head in the group of each row of this program's tile, and which exist.

    Asked for twice, before the loops and after them, and read anew (volatile): kept meanwhile, they would take the
    registers that sums need.
    """
    flat = tl.load(tiles + 2 * tl.program_id(0) + 1, volatile=True) + tl.arange(0, ROWS)
    token = flat // GROUP
    return (start + token).to(tl.int64), token, flat % GROUP, token < length


@triton.jit
def _runs(earliest, latest, window, TILE: tl.constexpr, WINDOWED: tl.constexpr, ONE_LOOP: tl.constexpr):
    """Where the three runs of keys begin, for rows at positions earliest .. latest; ONE_LOOP leaves the last alone."""
    begin, unmasked, diagonal = 0, 0, (earliest + 1) // TILE * TILE
    if WINDOWED:
        begin = tl.maximum(earliest - window + 1, 0) // TILE * TILE
        unmasked = tl.minimum(tl.cdiv(tl.maximum(latest - window + 1, 0), TILE) * TILE, diagonal)
    if ONE_LOOP:
        unmasked, diagonal = begin, begin
    return begin, unmasked, diagonal


@triton.jit(do_not_specialize=["table_stride"])  # it differs from step to step
def prefill_kernel(
    q, out, cache, scales, sinks, tables, context_lens, query_starts, query_lens, tiles,
    q_head, q_row, out_row, out_head, cache_half, cache_head, cache_block, scale_half, scale_head, scale_block,
    table_stride, inner, outer, window,
    GROUP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, SOFTCAP: tl.constexpr, WINDOWED: tl.constexpr, ONE_LOOP: tl.constexpr,
):  # fmt: skip
    """One tile of query rows for one kv head."""
    kv_head = tl.program_id(1)
    sequence = tl.load(tiles + 2 * tl.program_id(0))
    start_row = tl.load(query_starts + sequence)
    length = tl.load(query_lens + sequence)
    cached = tl.load(context_lens + sequence) - length
    row, token, head, valid = _query_rows(tiles, start_row, length, GROUP, ROWS)
    dim = tl.arange(0, WIDTH)
    mask = valid[:, None] & (dim[None, :] < DIM)
    head += kv_head * GROUP
    q_tile = tl.load(q + row[:, None] * q_row + head[:, None] * q_head + dim[None, :], mask=mask, other=0.0)
    table = tables + sequence.to(tl.int64) * table_stride
    keys = cache + kv_head.to(tl.int64) * cache_head
    key_scales = scales
    if scales is not None:
        key_scales = scales + kv_head.to(tl.int64) * scale_head
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)

    position = cached + token
    latest = cached + tl.minimum(tl.max(token, axis=0), length - 1)
    begin, unmasked, diagonal = _runs(tl.min(position, axis=0), latest, window, TILE, WINDOWED, ONE_LOOP)
    visible_from = position * 0
    if WINDOWED:
        visible_from = position - window + 1
    if WINDOWED and not ONE_LOOP:
        for start in range(begin, unmasked, TILE):
            acc, top, total = attend_tile(
                acc, top, total, q_tile, keys, key_scales, table, start + tl.arange(0, TILE), latest, visible_from,
                position, cache_half, cache_block, scale_half, scale_block, inner, outer,
                BLOCK_SIZE, DIM, WIDTH, SOFTCAP, True,
            )  # fmt: skip
    if not ONE_LOOP:
        for start in range(unmasked, diagonal, TILE):
            acc, top, total = attend_tile(
                acc, top, total, q_tile, keys, key_scales, table, start + tl.arange(0, TILE), latest, visible_from,
                position, cache_half, cache_block, scale_half, scale_block, inner, outer,
                BLOCK_SIZE, DIM, WIDTH, SOFTCAP, False,
            )  # fmt: skip
    for start in range(diagonal, latest + 1, TILE):
        acc, top, total = attend_tile(
            acc, top, total, q_tile, keys, key_scales, table, start + tl.arange(0, TILE), latest, visible_from,
            position, cache_half, cache_block, scale_half, scale_block, inner, outer,
            BLOCK_SIZE, DIM, WIDTH, SOFTCAP, True,
        )  # fmt: skip
    row, token, head, valid = _query_rows(tiles, start_row, length, GROUP, ROWS)
    head += kv_head * GROUP
    acc, _ = finish(acc, top, total, sinks, head, valid)
    at_out = out + row[:, None] * out_row + head[:, None] * out_head + dim[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=valid[:, None] & (dim[None, :] < DIM))


def prefill_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    out: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    query_lens: torch.Tensor,
    tiles: torch.Tensor,
    tile: QueryTile,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    deterministic: bool = False,
) -> None:
    """Attend with several queries per sequence, each to the keys up to its own.

    Args:
        q: [heads, T, head_dim], last stride 1.
        kv: One layer's cache, [2, kv_heads, blocks, block_size, head_dim], or its fp8 form (kernels/cache.py).
        out: [T, heads, head_dim], last stride 1; the rows of the sequences are written.
        block_tables: int32 [C, max_blocks], last stride 1.
        context_lens: int32 [C], keys of each sequence, those of its new tokens included.
        query_starts: int32 [C], the row of each sequence's first new token.
        query_lens: int32 [C], new tokens of each sequence.
        tiles: int32 [N, 2], what `list_tiles` or `list_decode_tiles` made of the lengths and `tile.rows`.
        tile: What `query_tile` says.
        scale: Factor on the query-key products.
        window: Sliding window in tokens, or None.
        softcap: See `LayerSpec`.
        sinks: [heads], see `LayerSpec`.
        deterministic: Let no bit of a query's result depend on the other queries.

    Raises:
        ValueError: Shapes do not belong together.
        UnsupportedModelError: Heads are too wide.
    """
    values, scales = split_fp8(kv)
    group = check_shapes(q, values, out)
    heads, _, dim = q.shape
    inner, outer = score_factors(scale, softcap)
    prefill_kernel[(tiles.shape[0], heads // group)](
        q, out, values, scales, sinks, block_tables, context_lens, query_starts, query_lens, tiles,
        *launch_strides(q, out, values, scales, block_tables), inner, outer, window or _NO_WINDOW,
        GROUP=group, ROWS=tile.rows, TILE=tile.keys, BLOCK_SIZE=values.shape[3], DIM=dim, WIDTH=padded_width(dim),
        SOFTCAP=softcap is not None, WINDOWED=window is not None, ONE_LOOP=deterministic, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
