"""What the decode and the prefill kernel share: reading a tile of the paged cache, scores, the running softmax.

Scores are kept in units of log2, so that every exponential is one exp2: the factor log2(e) is folded into the scale on
the host (`score_factors`).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from pagedllm_core.errors import UnsupportedModelError

LOG2_E = math.log2(math.e)
MOST_DIM = 256


def padded_width(dim: int) -> int:
    """The head size as the kernels hold it: a power of two, at least what `tl.dot` takes.

    Raises:
        UnsupportedModelError: Wider heads do not fit.
    """
    if dim > MOST_DIM:
        raise UnsupportedModelError(f"head_dim={dim}: attention on a GPU takes at most {MOST_DIM}")
    return max(16, int(triton.next_power_of_2(dim)))


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """What scores are multiplied by before and after the soft-cap, so that they come out in units of log2.

    Without a soft-cap the second is not used. With one, c * tanh(s / c) = c - 2 c / (1 + exp(2 s / c)).

    Raises:
        ValueError: The scale is not positive; the largest product is taken before it is scaled.
    """
    if scale <= 0:
        raise ValueError(f"scale={scale}: must be positive")
    if softcap is None:
        return scale * LOG2_E, 0.0
    return 2 * scale / softcap * LOG2_E, softcap * LOG2_E


def check_shapes(q: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> int:
    """Query heads for each kv head of q [heads, T, dim], cache [2, kv_heads, blocks, size, dim], out [T, heads, dim].

    Raises:
        ValueError: They do not belong together, or the cache's blocks are no runs of keys.
    """
    heads, rows, dim = q.shape
    kv_heads = values.shape[1]
    if values.shape[4] != dim or heads % kv_heads or out.shape != (rows, heads, dim) or values.stride(3) != dim:
        raise ValueError(f"q {tuple(q.shape)}, cache {tuple(values.shape)} and out {tuple(out.shape)} do not fit")
    return heads // kv_heads


def launch_strides(
    q: torch.Tensor, out: torch.Tensor, values: torch.Tensor, scales: torch.Tensor | None, tables: torch.Tensor
) -> tuple[int, ...]:
    """Strides of q, out, the cache, its scales (0 where there are none) and the block tables, in the kernels' order."""
    of_scales = (0, 0, 0) if scales is None else scales.stride()[:3]
    return (*q.stride()[:2], *out.stride()[:2], *values.stride()[:3], *of_scales, tables.stride(0))


@triton.jit
def load_tile(cache, at, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Keys (or values) whose numbers begin at `at` [tile], as [tile, WIDTH]; 0 beyond DIM."""
    dim = tl.arange(0, WIDTH)
    pointers = cache + at[:, None] + dim[None, :]
    if DIM == WIDTH:
        return tl.load(pointers)
    return tl.load(pointers, mask=dim[None, :] < DIM, other=0.0)


@triton.jit
def attend_tile(
    acc, top, total, q_tile, cache, scales, table, key, last, visible_from, visible_to,
    cache_half, cache_block, scale_half, scale_block, inner, outer,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attend over one tile of keys, and carry the softmax on.

    Masked keys still read a key that exists, the sequence's `last`: what other blocks hold may be NaN, and NaN times a
    probability of zero is NaN.

    `acc` [rows, WIDTH], `top` and `total` [rows] are float32: the weighted sum of values so far, relative to
    exp2(top), the largest score so far, and the sum of weights. `q_tile` is [rows, WIDTH]. `cache` points to the keys
    of this kv head, the values lie `cache_half` further, and `scales` likewise (None where the cache is not fp8).
    `key` [tile] are the positions of the keys. Where MASKED, each row sees those of `visible_from` .. `visible_to`
    [rows]. `inner` and `outer` are what `score_factors` gives.
    """
    at_key = key
    if MASKED:
        at_key = tl.minimum(key, last)
    block = tl.load(table + at_key // BLOCK_SIZE).to(tl.int64)
    offset = at_key % BLOCK_SIZE
    at = block * cache_block + offset * DIM
    k_tile = load_tile(cache, at, DIM, WIDTH)
    scores = tl.dot(q_tile, tl.trans(k_tile.to(q_tile.dtype)), input_precision="ieee")
    factor = inner
    if scales is not None:
        at_scale = scales + block * scale_block + offset
        scores *= tl.load(at_scale)[None, :]
    if SOFTCAP:
        scores = outer - 2 * outer / (1 + tl.exp2(scores * inner))
        factor = 1.0
    if MASKED:
        seen = (key[None, :] >= visible_from[:, None]) & (key[None, :] <= visible_to[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, axis=1) * factor)
    base = highest
    if MASKED:  # a row may have seen no key yet
        base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores * factor - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weights, axis=1)
    acc = acc * fade[:, None]
    kind = q_tile.dtype
    if scales is not None:
        weights *= tl.load(at_scale + scale_half)[None, :]
        if kind == tl.float16:  # which cannot hold a small weight times a small scale
            kind = tl.bfloat16
    v_tile = load_tile(cache + cache_half, at, DIM, WIDTH)
    acc = tl.dot(weights.to(kind), v_tile.to(kind), acc, input_precision="ieee")
    return acc, highest, total


@triton.jit
def finish(acc, top, total, sinks, head, valid):
    """The attention's output and the logarithm (base 2) of its sum of weights.

    A sink is one more logit, with no value. Where nothing was seen, the output is zero. `acc`, `top` and `total` are as
    in `attend_tile`; `sinks` [heads] may be None; `head` [rows] is each row's query head, and `valid` [rows] tells rows
    from padding.
    """
    if sinks is not None:
        sink = tl.load(sinks + head, mask=valid, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        highest = tl.maximum(top, sink)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        fade = tl.exp2(top - base)
        acc = acc * fade[:, None]
        total = total * fade + tl.exp2(sink - base)
        top = highest
    total = tl.where(total == 0.0, 1.0, total)
    return acc / total[:, None], top + tl.log2(total)
