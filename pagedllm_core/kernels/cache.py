"""Writing keys and values into the paged cache, as they are or rounded to eight bits.

An fp8 cache of a layer is a uint8 tensor [2, kv_heads, blocks, block_size, head_dim + 4]. A block of one head keeps
its scales behind its values, so that a block stays one run of bytes and is copied and swapped like any other:

    | block_size * head_dim values, e4m3 | block_size scales, float32 |

There is one scale for each token and head, the largest magnitude over 448 (the largest e4m3 number). Nothing is
calibrated, no token changes another's, and attention multiplies scores and probabilities by scales, not tiles. The
scales take 3 % at a head size of 128.

Source: dynamic per-token scaling as in Dettmers et al., "LLM.int8()" (2022), with the e4m3 type of Micikevicius et
al., "FP8 Formats for Deep Learning" (2022).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagedllm_core.kv.storage import SCALE_BYTES

E4M3_MAX = tl.constexpr(448.0)


def split_fp8(kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The values and scales of one layer's cache.

    Args:
        kv: [2, kv_heads, blocks, block_size, head_dim]; as uint8 [2, kv_heads, blocks, block_size, head_dim + 4].

    Returns:
        For uint8 two views: float8_e4m3fn [2, kv_heads, blocks, block_size, head_dim], whose blocks lie further apart
        than their size, and float32 [2, kv_heads, blocks, block_size]. Else the cache itself and None.
    """
    if kv.dtype != torch.uint8:
        return kv, None
    block_size, dim = kv.shape[3], kv.shape[4] - SCALE_BYTES
    blocks = kv.flatten(3)
    values = blocks[..., : block_size * dim].view(torch.float8_e4m3fn).unflatten(3, (block_size, dim))
    return values, blocks[..., block_size * dim :].view(torch.float32)


@triton.jit
def quantise(x):
    """Round rows of numbers to e4m3; to be called from kernels.

    Args:
        x: float32 [rows, width].

    Returns:
        e4m3 [rows, width] and the scales that give the numbers back, float32 [rows].
    """
    scale = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30) / E4M3_MAX
    return (x / scale[:, None]).to(tl.float8e4nv), scale


@triton.jit
def _write_heads(x, cache, scales, cache_head, scale_head, heads, DIM: tl.constexpr, HEADS: tl.constexpr,
                 WIDTH: tl.constexpr, x_head):  # fmt: skip
    """One token's keys or values of all heads: `x` points to them, `cache` and `scales` to head 0 of its slot."""
    head = tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, WIDTH)[None, :]
    mask = (head < heads) & (dim < DIM)
    tile = tl.load(x + head * x_head + dim, mask=mask, other=0.0)
    at = cache + head.to(tl.int64) * cache_head + dim
    if scales is None:
        tl.store(at, tile.to(cache.dtype.element_ty), mask=mask)
    else:
        values, scale = quantise(tile.to(tl.float32))
        tl.store(at, values, mask=mask)
        head = tl.arange(0, HEADS)
        tl.store(scales + head.to(tl.int64) * scale_head, scale, mask=head < heads)


@triton.jit
def write_kernel(
    k, v, cache, scales, slots,
    k_head, k_row, v_head, v_row, cache_half, cache_head, cache_block, scale_half, scale_head, scale_block, heads,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program for each row of the step."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    keys = cache + block * cache_block + offset * DIM
    key_scales = scales
    value_scales = scales
    if scales is not None:
        key_scales = scales + block * scale_block + offset
        value_scales = key_scales + scale_half
    _write_heads(k + row * k_row, keys, key_scales, cache_head, scale_head, heads, DIM, HEADS, WIDTH, k_head)
    _write_heads(
        v + row * v_row, keys + cache_half, value_scales, cache_head, scale_head, heads, DIM, HEADS, WIDTH, v_head
    )


def write_cache(k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor) -> None:
    """Put each token's key and value into its slot. Bound by bytes: each is read and written once.

    Args:
        k: [kv_heads, T, head_dim], any strides but 1 in the last dimension.
        v: [kv_heads, T, head_dim], likewise.
        kv: One layer's cache, [2, kv_heads, blocks, block_size, head_dim] or its fp8 form (see the module).
        slots: int64 [T], block * block_size + offset; a row with a negative slot is not written.
    """
    values, scales = split_fp8(kv)
    heads, rows, dim = k.shape
    if values.shape[1] != heads or values.shape[4] != dim or v.shape != k.shape or slots.shape != (rows,):
        raise ValueError(f"k {tuple(k.shape)}, v {tuple(v.shape)} and {tuple(slots.shape)} slots do not fit the cache "
                         f"{tuple(values.shape)}")  # fmt: skip
    k, v = (one if one.stride(2) == 1 else one.contiguous() for one in (k, v))
    write_kernel[(rows,)](
        k, v, values, scales, slots,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), values.stride(0), values.stride(1), values.stride(2),
        *((0, 0, 0) if scales is None else scales.stride()[:3]), heads,
        BLOCK_SIZE=values.shape[3], DIM=dim, HEADS=triton.next_power_of_2(heads), WIDTH=triton.next_power_of_2(dim),
        num_warps=4 if heads * dim <= 4096 else 8,
    )  # fmt: skip
