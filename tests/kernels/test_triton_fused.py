"""The kernels between a decoder's matrix products, interpreted, against plain torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import tests.kernels.interpreter  # noqa: F401
from pagedllm_core.kernels.cache import split_fp8
from pagedllm_core.kernels.fused import add_rms_norm, rope_and_cache, silu_mul
from pagedllm_core.kv.storage import KVStorage, LayerGeometry, write_slots

CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = TOLERANCES[found.dtype]
    torch.testing.assert_close(found.float(), wanted.float(), rtol=tolerance, atol=tolerance)


def rms(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def turned(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [T, heads, dim] as transformers writes it; tables [T, rotary_dim]."""
    width = cosines.shape[1]
    first, second = x[..., :width].chunk(2, dim=-1)
    half = torch.cat([-second, first], dim=-1)
    return torch.cat([x[..., :width] * cosines[:, None] + half * sines[:, None], x[..., width:]], dim=-1)


def tables(rotary: int, positions: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines whose halves differ, so that reading the wrong half shows."""
    angles = torch.rand(positions, rotary, generator=torch.Generator().manual_seed(1)) * 6
    return angles.cos(), angles.sin()


def storage(kv_heads: int, dim: int, dtype: torch.dtype, block_size: int, blocks: int = 9) -> KVStorage:
    """Two layers, so that a layer's cache is a strided view."""
    return KVStorage([LayerGeometry(kv_heads, dim, dtype)] * 2, blocks, block_size, CPU)


@DTYPES
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary", "block_size"),
    [(4, 2, 16, 16, 4), (3, 1, 24, 24, 3), (6, 2, 16, 8, 1), (40, 8, 32, 32, 16), (2, 2, 80, 32, 5)],
)
def test_rope_and_cache(
    dtype: torch.dtype, normed: bool, heads: int, kv_heads: int, dim: int, rotary: int, block_size: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, epsilon = 7, 1e-2
    width = (heads + 2 * kv_heads) * dim
    qkv = torch.randn(rows, width + 3, generator=generator).to(dtype)[:, :width]  # rows further apart than their length
    cosines, sines = tables(rotary)
    positions = torch.tensor([0, 1, 2, 49, 3, 7, 7])
    slots = torch.randperm(9 * block_size, generator=generator)[:rows]
    slots[3] = -1
    norms = [1 + 0.3 * torch.randn(dim, generator=generator).to(dtype) for _ in range(2)] if normed else [None, None]
    cache, wanted = storage(kv_heads, dim, dtype, block_size), storage(kv_heads, dim, dtype, block_size)

    q = rope_and_cache(qkv, cache.layer(1), cosines, sines, positions, slots, *norms, epsilon)

    split = [one.unflatten(1, (-1, dim)).float() for one in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)]
    if normed:
        split[:2] = [rms(one, norm.float(), epsilon) for one, norm in zip(split[:2], norms, strict=True)]
    wanted_q, wanted_k = (turned(one, cosines[positions], sines[positions]) for one in split[:2])
    written = slots >= 0
    k, v = (one.to(dtype).transpose(0, 1)[:, written] for one in (wanted_k, split[2]))
    write_slots(wanted.layer(1), k, v, slots[written])
    close(q, wanted_q)
    close(cache.layer(1), wanted.layer(1))
    assert not cache.layer(0).any()


def test_values_reach_the_cache_bit_for_bit() -> None:
    qkv = torch.randn(3, 4 * 16, generator=torch.Generator().manual_seed(0))
    cache = storage(1, 16, torch.float32, 4)
    rope_and_cache(qkv, cache.layer(0), *tables(16), torch.tensor([4, 5, 6]), torch.tensor([4, 5, 6]))
    assert torch.equal(cache.layer(0)[1, 0, 1, :3], qkv[:, 48:])


def test_an_eight_bit_cache_gets_numbers_and_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = 5 * torch.randn(6, (4 + 2 * 2) * 16, generator=generator)
    rounded, exact = (storage(2, 16, dtype, 4) for dtype in (torch.float8_e4m3fn, torch.float32))
    arguments = (*tables(16), torch.arange(6), torch.tensor([9, 2, -1, 30, 35, 0]))
    queries = [rope_and_cache(qkv, cache.layer(1), *arguments) for cache in (rounded, exact)]
    values, scales = split_fp8(rounded.layer(1))
    close(queries[0], queries[1])
    torch.testing.assert_close(scales, exact.layer(1).abs().amax(-1) / 448)
    torch.testing.assert_close(values.float() * scales[..., None], exact.layer(1), rtol=0.07, atol=0.05)
    assert not rounded.layer(0).any()


def test_rope_and_cache_of_no_rows() -> None:
    cache = storage(2, 16, torch.float32, 4)
    nothing = torch.empty(0, dtype=torch.int64)
    q = rope_and_cache(torch.empty(0, 8 * 16), cache.layer(0), *tables(16), nothing, nothing)
    assert q.shape == (0, 4, 16)


def test_a_query_lands_where_asked() -> None:
    out = torch.full((2, 4, 16), float("nan"))
    cache = storage(2, 16, torch.float32, 4)
    q = rope_and_cache(
        torch.randn(2, 8 * 16), cache.layer(0), *tables(16), torch.arange(2), torch.tensor([-1, -1]), out=out
    )
    assert q is out
    assert out.isfinite().all()
    assert not cache.layer(0).any()


@pytest.mark.parametrize("columns", [8 * 16 + 1, 4 * 16])
def test_shapes_that_do_not_belong_together_are_refused(columns: int) -> None:
    cache = storage(2, 16, torch.float32, 4)
    with pytest.raises(ValueError, match="fit together"):
        rope_and_cache(
            torch.empty(1, columns), cache.layer(0), *tables(16), torch.zeros(1).long(), torch.zeros(1).long()
        )


@DTYPES
@pytest.mark.parametrize("hidden", [1, 64, 100, 896])
def test_add_rms_norm_updates_the_residual(dtype: torch.dtype, hidden: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(5, hidden + 2, generator=generator).to(dtype)[:, :hidden] for _ in range(2))
    weight = 1 + 0.3 * torch.randn(hidden, generator=generator).to(dtype)
    total = (x.float() + residual.float()).to(dtype)
    found = add_rms_norm(x, residual, weight, 1e-3)
    assert torch.equal(residual, total)
    close(found, rms(total.float(), weight.float(), 1e-3))


@DTYPES
def test_rms_norm_alone_leaves_its_input(dtype: torch.dtype) -> None:
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, weight = x.clone(), torch.linspace(0.5, 2, 96).to(dtype)
    close(add_rms_norm(x, None, weight, 1e-6), rms(x.float(), weight.float(), 1e-6))
    assert torch.equal(x, before)


@DTYPES
@pytest.mark.parametrize("intermediate", [1, 96, 1024, 1100])
def test_silu_mul(dtype: torch.dtype, intermediate: int) -> None:
    gate_up = 4 * torch.randn(4, 2 * intermediate, generator=torch.Generator().manual_seed(0)).to(dtype)
    gate, up = gate_up.float().chunk(2, dim=1)
    close(silu_mul(gate_up), torch.nn.functional.silu(gate) * up)


def test_silu_of_large_numbers_is_finite() -> None:
    found = silu_mul(torch.tensor([[-1e4, 1e4, 2.0, 3.0]]))
    assert found.tolist() == [[0.0, 3e4]]
