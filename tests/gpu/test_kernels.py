"""Compiled kernels at the sizes of real models, against the slow reference and plain torch in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from pagedllm_core.attention.base import LayerSpec
from pagedllm_core.attention.reference import ReferenceAttention
from pagedllm_core.attention.triton_paged import TritonAttention
from pagedllm_core.kernels.beams import select_best
from pagedllm_core.kernels.cache import split_fp8, write_cache
from pagedllm_core.kernels.fused import add_rms_norm, rope_and_cache, silu_mul
from pagedllm_core.kv.storage import KVStorage, LayerGeometry, write_slots
from tests.gpu.helpers import DEVICE
from tests.kernels.test_attention import CPU, Step, make_step
from tests.kernels.test_triton_fused import rms, turned

TOLERANCES = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FP8 = torch.float8_e4m3fn
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
SPECS = {
    "plain": LayerSpec(scale=0.09),
    "window": LayerSpec(scale=0.09, window=700),
    "softcap": LayerSpec(scale=0.09, softcap=30.0),
    "everything": LayerSpec(scale=0.09, window=900, softcap=30.0, sinks=torch.linspace(-2, 2, 32)),
}
STEPS = {
    "decodes": [(1500, 1), (0, 1), (17, 1), (4090, 1), (255, 1), (2048, 1)],
    "mixed": [(0, 130), (1200, 1), (700, 60), (33, 1), (0, 7), (2300, 1), (1, 16)],
}


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = TOLERANCES[found.dtype]
    torch.testing.assert_close(found.float().cpu(), wanted.float().cpu(), rtol=tolerance, atol=tolerance)


def on_gpu(step: Step, spec: LayerSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels give, and the cache afterwards."""
    if spec.sinks is not None:
        spec = replace(spec, sinks=spec.sinks.to(DEVICE))
    kv = step.kv.to(DEVICE)
    backend = TritonAttention(DEVICE, kv.shape[3])
    q, k, v = (one.to(DEVICE) for one in (step.q, step.k, step.v))
    return backend.forward(q, k, v, kv, spec, backend.prepare(step.batch)).cpu(), kv.cpu()


def reference(step: Step, spec: LayerSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the slow reference, from the same rounded numbers."""
    kv = step.kv.float().clone()
    backend = ReferenceAttention(CPU, kv.shape[3])
    q, k, v = (one.float() for one in (step.q, step.k, step.v))
    return backend.forward(q, k, v, kv, spec, backend.prepare(step.batch)), kv


@DTYPES
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("step", STEPS)
def test_attention_equals_the_reference(step: str, spec: str, dtype: torch.dtype) -> None:
    made = make_step(1, STEPS[step], 16, (32, 8), 128, dtype)
    wanted, wanted_kv = reference(made, SPECS[spec])
    found, found_kv = on_gpu(made, SPECS[spec])
    close(found, wanted)
    assert torch.equal(found_kv.nan_to_num(), wanted_kv.to(dtype).nan_to_num())


@DTYPES
@pytest.mark.parametrize(
    ("heads", "dim", "block_size"),
    [((14, 2), 64, 16), ((12, 2), 128, 128), ((8, 1), 256, 32), ((32, 32), 96, 16), ((5, 5), 80, 3), ((64, 8), 64, 16)],
)
def test_attention_of_other_shapes(heads: tuple[int, int], dim: int, block_size: int, dtype: torch.dtype) -> None:
    made = make_step(2, [(0, 40), (700, 1), (300, 20), (5, 1)], block_size, heads, dtype=dtype, width=dim)
    close(on_gpu(made, SPECS["window"])[0], reference(made, SPECS["window"])[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("past", "new"), [(0, 8192), (6000, 2048), (32_000, 1)])
def test_attention_of_long_sequences(past: int, new: int, dtype: torch.dtype) -> None:
    """Two of them, against torch's attention in float32 on gathered keys."""
    made = make_step(3, [(0, new), (past, new)], 16, (8, 2), 128, dtype)
    found, kv = on_gpu(made, SPECS["plain"])
    for number, context in enumerate(made.batch.context_lens.tolist()):
        table = torch.from_numpy(made.batch.block_tables[number]).long()
        keys, values = kv[:, :, table].flatten(2, 3)[:, :, :context].float().to(DEVICE)
        rows = slice(*made.batch.query_starts[number : number + 2].tolist())
        q = made.q[:, rows].float().to(DEVICE)
        mask = torch.ones(new, context, dtype=torch.bool, device=DEVICE).tril(context - new)
        k, v = (one.repeat_interleave(4, dim=0)[None] for one in (keys, values))
        wanted = F.scaled_dot_product_attention(q[None], k, v, attn_mask=mask, scale=SPECS["plain"].scale)[0]
        close(found[rows], wanted.transpose(0, 1))


@pytest.mark.parametrize("step", STEPS)
def test_an_eight_bit_cache_is_attention_over_rounded_keys(step: str) -> None:
    if torch.cuda.get_device_capability(DEVICE) < (8, 9):
        pytest.skip("needs a GPU with 8-bit floats")
    made = make_step(4, STEPS[step], 16, (32, 8), 128)
    blocks = made.kv.shape[2]
    kv = KVStorage([LayerGeometry(8, 128, FP8)] * 2, blocks, 16, DEVICE).layer(1)
    past = made.kv.nan_to_num().flatten(2, 3).to(DEVICE)
    write_cache(past[0], past[1], kv, torch.arange(blocks * 16, device=DEVICE))
    backend = TritonAttention(DEVICE, 16)
    q, k, v = (one.to(DEVICE) for one in (made.q, made.k, made.v))
    found = backend.forward(q, k, v, kv, SPECS["plain"], backend.prepare(made.batch))
    values, scales = split_fp8(kv)
    assert scales is not None
    rounded = (values.float() * scales[..., None]).cpu()
    slots = torch.from_numpy(made.batch.slot_mapping)
    torch.testing.assert_close(rounded.flatten(2, 3)[0][:, slots], made.k, rtol=0.07, atol=0.05)
    k, v = rounded.flatten(2, 3)[:, :, slots]
    close(found, reference(replace(made, k=k, v=v, kv=rounded), SPECS["plain"])[0])


@DTYPES
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary"), [(32, 8, 128, 128), (14, 2, 64, 64), (32, 32, 96, 72)])
def test_rope_and_cache(heads: int, kv_heads: int, dim: int, rotary: int, normed: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, size = 300, 16
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, generator=generator).to(dtype).to(DEVICE)
    angles = (torch.rand(4096, rotary, generator=generator) * 6).to(DEVICE)
    cosines, sines = angles.cos(), angles.sin()
    positions = torch.randint(0, 4096, (rows,), generator=generator).to(DEVICE)
    slots = torch.randperm(40 * size, generator=generator)[:rows].to(DEVICE)
    slots[::7] = -1
    weights = [(1 + 0.3 * torch.randn(dim, generator=generator)).to(dtype).to(DEVICE) for _ in range(2)]
    norms: list[Any] = list(weights) if normed else [None, None]
    cache, wanted = (KVStorage([LayerGeometry(kv_heads, dim, dtype)] * 2, 40, size, DEVICE) for _ in range(2))
    q = rope_and_cache(qkv, cache.layer(1), cosines, sines, positions, slots, norms[0], norms[1], 1e-5)
    split = [one.unflatten(1, (-1, dim)).float() for one in qkv.split([heads * dim, *[kv_heads * dim] * 2], 1)]
    if normed:
        split[:2] = [rms(one, norm.float(), 1e-5) for one, norm in zip(split[:2], weights, strict=True)]
    wanted_q, wanted_k = (turned(one, cosines[positions], sines[positions]) for one in split[:2])
    written = slots >= 0
    k, v = (one.to(dtype).transpose(0, 1)[:, written] for one in (wanted_k, split[2]))
    write_slots(wanted.layer(1), k, v, slots[written])
    close(q, wanted_q)
    close(cache.layer(1), wanted.layer(1))
    assert not cache.layer(0).any()


@DTYPES
@pytest.mark.parametrize("hidden", [896, 4096, 12288])
def test_add_rms_norm(hidden: int, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(300, hidden, device=DEVICE).to(dtype) for _ in range(2))
    weight = (1 + 0.3 * torch.randn(hidden, device=DEVICE)).to(dtype)
    total = (x.float() + residual.float()).to(dtype)
    found = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    close(found, rms(total.float(), weight.float(), 1e-5))


@DTYPES
@pytest.mark.parametrize("inner", [4864, 14336])
def test_silu_mul(inner: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(300, 2 * inner, device=DEVICE).to(dtype)
    gate, up = gate_up.float().chunk(2, dim=1)
    close(silu_mul(gate_up), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
def test_blocks_are_copied_and_swapped_in_all_layers(dtype: torch.dtype) -> None:
    storage = KVStorage([LayerGeometry(8, 128, dtype)] * 4, 64, 16, DEVICE, num_host_blocks=32)
    (pool,) = storage._pools
    pool.view(torch.uint8).random_(0, 120)
    before = pool.clone()
    storage.copy_blocks([(1, 40), (1, 41), (30, 42)])
    storage.copy_blocks([(5, 6), (6, 7)])  # block 6 is read before it is written
    storage.swap_out([(40, 3), (9, 31)])
    pool[:, :, :, [9, 40]] = 0
    storage.swap_in([(3, 50), (31, 51)])
    torch.cuda.synchronize()
    for source, place in ((1, 41), (30, 42), (5, 6), (6, 7), (1, 50), (9, 51), (2, 2)):
        assert torch.equal(pool[:, :, :, place], before[:, :, :, source])
    storage.free()


@pytest.mark.parametrize(("width", "count"), [(1, 20), (4, 8), (16, 40), (64, 128)])
def test_the_best_continuations(width: int, count: int) -> None:
    scores = torch.randn(3 * width, 151_936, device=DEVICE).log_softmax(dim=1)
    running = -torch.rand(3 * width, device=DEVICE)
    starts = torch.arange(4, dtype=torch.int32, device=DEVICE) * width
    values, places = select_best(scores, count, starts, width, add=running)
    wanted = (scores + running[:, None]).view(3, -1).topk(count)
    assert torch.equal(values, wanted.values)
    assert torch.equal((scores + running[:, None]).view(3, -1).gather(1, places), wanted.values)
