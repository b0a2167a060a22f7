"""The small work between a decoder's matrix products: rotary embedding with the cache write, add + RMSNorm, SiLU·mul.

All three read and write each number once, so bytes bound them: their roof is the memory's bandwidth. They compute in
float32 whatever the tensors' type is, and round once, where the result is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagedllm_core.kernels.cache import quantise, split_fp8

_TILE = 1024  # numbers that one program of `_rope_and_cache` holds at a time
_COLUMNS = 1024  # numbers that one program of `_silu_mul` computes


@triton.jit
def _rope_and_cache(
    qkv, q_out, data, scales, cosines, sines, positions, slots, q_norm, k_norm,
    qkv_stride, table_stride, data_half, data_head, data_block, data_slot, scale_half, scale_head, scale_block,
    block_size, epsilon,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    WIDTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    column = tl.arange(0, WIDTH)
    is_query, is_key, is_value = head < HEADS, (head >= HEADS) & (head < HEADS + KV_HEADS), head >= HEADS + KV_HEADS
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (column < DIM)[None, :]

    # A number and the one it is turned with lie half a rotation apart; numbers beyond ROTARY are not turned.
    source = qkv + token * qkv_stride + head[:, None] * DIM
    is_turned = column < ROTARY
    partner = tl.where(column < ROTARY // 2, column + ROTARY // 2, column - ROTARY // 2)
    x = tl.load(source + column[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + partner[None, :], mask=inside & is_turned[None, :], other=0.0).to(tl.float32)
    if q_norm is not None:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + epsilon)[:, None]
        query, key = is_query[:, None] & inside, is_key[:, None] & inside
        weight = tl.load(q_norm + column[None, :], mask=query, other=0.0).to(tl.float32)
        weight += tl.load(k_norm + column[None, :], mask=key, other=0.0).to(tl.float32)
        other = tl.load(q_norm + partner[None, :], mask=query & is_turned[None, :], other=0.0).to(tl.float32)
        other += tl.load(k_norm + partner[None, :], mask=key & is_turned[None, :], other=0.0).to(tl.float32)
        x = tl.where(is_value[:, None], x, x * inverse * weight)
        y = y * inverse * other
    position = tl.load(positions + token)
    cosine = tl.load(cosines + position * table_stride + column, mask=is_turned, other=1.0)[None, :]
    sine = tl.load(sines + position * table_stride + column, mask=is_turned, other=0.0)[None, :]
    sine = tl.where(column[None, :] < ROTARY // 2, -sine, sine)
    x = tl.where(is_value[:, None], x, x * cosine + y * sine)

    to_query = q_out + (token * HEADS + head[:, None]) * DIM + column[None, :]
    tl.store(to_query, x.to(q_out.dtype.element_ty), mask=inside & is_query[:, None])
    slot = tl.load(slots + token)
    if slot >= 0:
        block, offset = slot // block_size, slot % block_size
        half = is_value.to(tl.int64)
        kv_head = head - HEADS - half * KV_HEADS
        is_written = (head >= HEADS) & (head < HEADS + 2 * KV_HEADS)
        cell = half * data_half + kv_head * data_head + block * data_block + offset * data_slot
        to_cache = data + cell[:, None] + column[None, :]
        if scales is None:
            tl.store(to_cache, x.to(data.dtype.element_ty), mask=inside & is_written[:, None])
        else:
            rounded, scale = quantise(x)
            tl.store(to_cache, rounded, mask=inside & is_written[:, None])
            to_scale = scales + half * scale_half + kv_head * scale_head + block * scale_block + offset
            tl.store(to_scale, scale, mask=is_written)


def rope_and_cache(
    qkv: torch.Tensor,
    kv: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turn queries and keys by their positions, and write keys and values into their slots of the cache.

    The rotary embedding of Su et al., "RoFormer" (2021, arXiv 2104.09864), its pairs laid out as in GPT-NeoX and
    transformers' Llama. For i < r/2, with r = rotary_dim:

        x[i]         -> x[i] cos[i]              - x[i + r/2] sin[i]
        x[i + r/2]   -> x[i + r/2] cos[i + r/2]  + x[i] sin[i + r/2]

    Where norms are given, each head's query and key is first divided by its root mean square (RMSNorm, Zhang and
    Sennrich 2019), as in Qwen3.

    Args:
        qkv: [T, (heads + 2 * kv_heads) * head_dim], the merged product, contiguous rows: queries, keys, values.
        kv: The layer's cache, [2, kv_heads, blocks, block_size, head_dim], last dimension contiguous; or its uint8 form
            with scales (see `kernels/cache.py`).
        cosines: float32 [positions, rotary_dim], contiguous; rotary_dim <= head_dim, even.
        sines: float32 [positions, rotary_dim].
        positions: int64 [T], each below the tables' length.
        slots: int64 [T]; nothing is written where a slot is negative.
        q_norm: [head_dim], or None.
        k_norm: [head_dim], given where `q_norm` is.
        epsilon: Added to the mean of squares.
        out: [T, heads, head_dim], contiguous; made where None.

    Returns:
        Queries, [T, heads, head_dim].

    Raises:
        ValueError: Shapes do not belong together.
    """
    kv_heads, block_size = kv.shape[1], kv.shape[3]
    data, scales = split_fp8(kv)
    dim, rotary = data.shape[4], cosines.shape[1]
    tokens, heads = qkv.shape[0], qkv.shape[1] // dim - 2 * kv_heads
    if heads <= 0 or qkv.shape[1] != (heads + 2 * kv_heads) * dim or rotary > dim or rotary % 2:
        raise ValueError(f"qkv {tuple(qkv.shape)}, cache {tuple(kv.shape)} and rotary_dim {rotary} do not fit together")
    if qkv.stride(1) != 1 or data.stride(4) != 1 or cosines.stride() != sines.stride() or cosines.stride(1) != 1:
        raise ValueError("qkv, the cache and the tables of cosines and sines must have contiguous rows")
    q = torch.empty(tokens, heads, dim, dtype=qkv.dtype, device=qkv.device) if out is None else out
    width = triton.next_power_of_2(dim)
    group = max(1, min(_TILE // width, triton.next_power_of_2(heads + 2 * kv_heads)))
    if tokens:
        _rope_and_cache[(tokens, triton.cdiv(heads + 2 * kv_heads, group))](
            qkv, q, data, scales, cosines, sines, positions, slots, q_norm, k_norm,
            qkv.stride(0), cosines.stride(0), *data.stride()[:4],
            *((0, 0, 0) if scales is None else scales.stride()[:3]),
            block_size, epsilon, HEADS=heads, KV_HEADS=kv_heads, DIM=dim, ROTARY=rotary, WIDTH=width, GROUP=group,
        )  # fmt: skip
    return q


@triton.jit
def _add_rms_norm(
    x, residual, weight, out, columns, x_stride, residual_stride, out_stride, epsilon, ADD: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < columns
    hidden = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        place = residual + row * residual_stride + column
        hidden += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        rounded = hidden.to(residual.dtype.element_ty)
        tl.store(place, rounded, mask=inside)
        hidden = rounded.to(tl.float32)  # the norm is of what the next layer adds to
    inverse = tl.rsqrt(tl.sum(hidden * hidden, axis=0) / columns + epsilon)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    normed = hidden * inverse * scale
    tl.store(out + row * out_stride + column, normed.to(out.dtype.element_ty), mask=inside)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm of `residual + x`, where the sum takes the place of `residual`.

    Args:
        x: [T, hidden], contiguous rows.
        residual: [T, hidden], contiguous rows, updated in place; None gives the norm of `x` alone.
        weight: [hidden].
        epsilon: Added to the mean of squares.
        out: [T, hidden], other memory than `x` and `residual`; made where None.

    Returns:
        The norm, [T, hidden], in `x`'s type.

    Raises:
        ValueError: Shapes do not belong together.

    Source: RMSNorm, Zhang and Sennrich 2019 (arXiv 1910.07467).
    """
    rows, columns = x.shape
    if weight.shape != (columns,) or (residual is not None and residual.shape != x.shape):
        raise ValueError(f"rows of {columns} numbers with a weight of {tuple(weight.shape)} do not fit together")
    if x.stride(1) != 1 or (residual is not None and residual.stride(1) != 1):
        raise ValueError("rows must be contiguous")
    normed = torch.empty(rows, columns, dtype=x.dtype, device=x.device) if out is None else out
    width = triton.next_power_of_2(columns)
    if rows:
        _add_rms_norm[(rows,)](
            x, residual, weight, normed, columns, x.stride(0), 0 if residual is None else residual.stride(0),
            normed.stride(0), epsilon, ADD=residual is not None, WIDTH=width,
            num_warps=min(16, max(1, width // 512)),
        )  # fmt: skip
    return normed


@triton.jit
def _silu_mul(gate_up, out, columns, gate_up_stride, out_stride, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    gate = tl.load(gate_up + row * gate_up_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + columns + column, mask=inside, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * out_stride + column, product.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """SiLU of the first half of each row, times the second half (SwiGLU, Shazeer 2020, arXiv 2002.05202).

    Args:
        gate_up: [T, 2 * intermediate], contiguous rows.
        out: [T, intermediate]; made where None.

    Returns:
        [T, intermediate], in `gate_up`'s type.

    Raises:
        ValueError: Rows are not contiguous, or cannot be halved.
    """
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ValueError(f"gate_up {tuple(gate_up.shape)}: rows must be contiguous and of even length")
    product = torch.empty(rows, columns, dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    if rows:
        _silu_mul[(rows, triton.cdiv(columns, _COLUMNS))](
            gate_up, product, columns, gate_up.stride(0), product.stride(0), WIDTH=_COLUMNS
        )
    return product
