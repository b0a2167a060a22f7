"""Compiled tiles treat each row alone: what `deterministic=True` stands on, and what no interpreter can show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from pagedllm_core.attention.base import LayerSpec
from pagedllm_core.attention.triton_paged import TritonAttention
from pagedllm_core.kernels.cache import write_cache
from pagedllm_core.kernels.linear import linear
from pagedllm_core.kv.storage import KVStorage, LayerGeometry
from tests.gpu.helpers import DEVICE
from tests.kernels.test_attention import make_step
from tests.kernels.test_deterministic import TOLERANCES, attend

DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
LENGTHS = (700, 300, 1, 129)
SPECS = {
    "plain": LayerSpec(scale=0.09),
    "window": LayerSpec(scale=0.09, window=210),
    "everything": LayerSpec(scale=0.09, window=210, softcap=30.0, sinks=torch.linspace(-2, 2, 32)),
}


@DTYPES
@pytest.mark.parametrize(("inner", "columns"), [(4096, 6144), (14336, 4096), (896, 151936), (100, 331)])
def test_a_products_rows_are_the_same_alone_and_in_company(dtype: torch.dtype, inner: int, columns: int) -> None:
    """Sums that cancel, so that what is left is their rounding: any other order shows."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, weight = (
        torch.randn(count, inner, generator=generator, device=DEVICE).to(dtype) for count in (300, columns)
    )  # fmt: skip
    wanted = x[:5].float() @ weight.float().T
    scale = TOLERANCES[dtype] * inner**0.5
    torch.testing.assert_close(linear(x, weight)[:5].float(), wanted, rtol=scale, atol=scale)
    half = inner // 2
    x[:, half:], weight[:, half:] = x[:, :half], -weight[:, :half]
    together = linear(x, weight)
    assert together.any()
    for rows in ([0], [77], [299, 4], list(range(63)), list(range(230, 294)), list(range(299, 0, -1))):
        assert torch.equal(linear(x[rows], weight), together[rows])


@pytest.mark.parametrize("fp8", [False, True], ids=["plain cache", "fp8 cache"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("spec", SPECS)
@DTYPES
def test_attention_of_a_token_is_the_same_in_any_step(dtype: torch.dtype, spec: str, dim: int, fp8: bool) -> None:
    made = make_step(3, [(0, length) for length in LENGTHS], 16, (32, 8), dim, dtype)
    blocks = made.kv.shape[2]
    kv = KVStorage([LayerGeometry(8, dim, torch.float8_e4m3fn if fp8 else dtype)], blocks, 16, DEVICE).layer(0)
    q, k, v = (one.to(DEVICE) for one in (made.q, made.k, made.v))
    write_cache(k, v, kv, torch.from_numpy(made.batch.slot_mapping).to(DEVICE))
    step, one = replace(made, q=q, k=k, v=v, kv=kv), SPECS[spec]
    if one.sinks is not None:
        one = replace(one, sinks=one.sinks.to(DEVICE))
    backend, longest = TritonAttention(DEVICE, 16, deterministic=True), LENGTHS[0]
    alone = attend(backend, step, one, [(0, 0, longest)])
    company = attend(backend, step, one, [(number, 0, length) for number, length in enumerate(LENGTHS)][::-1])
    assert torch.equal(company[-longest:], alone)
    for start in (1, 127, 128, 300, longest - 1):
        parts = [attend(backend, step, one, [span]) for span in ((0, 0, start), (0, start, longest))]
        assert torch.equal(torch.cat(parts), alone), f"cut at {start}"
    for end in (1, 128, 129, 400, longest):
        decoding = attend(backend, step, one, [(1, 299, 300), (0, end - 1, end), (2, 0, 1)])
        assert torch.equal(decoding[1], alone[end - 1]), f"token {end} decodes"
