"""Every attention backend against the slow reference, on random steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedllm_core.attention.base import AttentionBackend, ForwardBatch, LayerSpec
from pagedllm_core.attention.native import NativeAttention
from pagedllm_core.attention.reference import ReferenceAttention
from pagedllm_core.attention.torch_paged import TorchPagedAttention
from pagedllm_core.kv.storage import KVStorage, LayerGeometry, block_bytes, lazy_zeros, write_slots
from tests.native import LIBRARIES

CPU = torch.device("cpu")
BACKENDS: dict[str, Callable[[torch.device, int], AttentionBackend]] = {
    "torch": TorchPagedAttention,
    **{tier: partial(NativeAttention, library=library) for tier, library in LIBRARIES.items()},
}
if find_spec("triton"):
    from pagedllm_core.attention.triton_paged import TritonAttention
    from tests.kernels import interpreter  # noqa: F401

    BACKENDS["triton"] = TritonAttention


@dataclass
class Step:
    """A random step over a cache whose unused slots hold NaN."""

    batch: ForwardBatch
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv: torch.Tensor


def make_step(
    seed: int,
    lengths: list[tuple[int, int]],
    block_size: int,
    heads: tuple[int, int],
    width: int,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """A step of sequences with (tokens already cached, new tokens) each; tables are shuffled, padded with block 0."""
    order = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-(past + new) // block_size) for past, new in lengths]
    blocks = list(range(sum(needed) + 3))
    order.shuffle(blocks)
    kv = torch.full((2, heads[1], len(blocks), block_size, width), float("nan"), dtype=dtype)
    tables = np.zeros((len(lengths), max(needed)), dtype=np.int32)
    positions, slots = [], []
    for number, (past, new) in enumerate(lengths):
        table = [blocks.pop() for _ in range(needed[number])]
        tables[number, : len(table)] = table
        for p in range(past):
            kv[:, :, table[p // block_size], p % block_size] = torch.randn(2, heads[1], width, generator=generator).to(
                dtype
            )
        positions += range(past, past + new)
        slots += [table[p // block_size] * block_size + p % block_size for p in range(past, past + new)]
    total = len(positions)
    new_lengths = [new for _, new in lengths]
    batch = ForwardBatch(
        token_ids=np.zeros(total, dtype=np.int64),
        positions=np.array(positions, dtype=np.int64),
        slot_mapping=np.array(slots, dtype=np.int64),
        query_starts=np.cumsum([0, *new_lengths]).astype(np.int32),
        context_lens=np.array([past + new for past, new in lengths], dtype=np.int32),
        block_tables=tables,
        logits_rows=np.arange(total),
    )
    # Transposed, as models hand them over.
    q, k, v = (torch.randn(total, n, width, generator=generator).to(dtype).transpose(0, 1) for n in (*heads, heads[1]))
    return Step(batch, 2 * q, k, v, kv)


def run(
    make: Callable[[torch.device, int], AttentionBackend], step: Step, spec: LayerSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and the cache afterwards."""
    kv = step.kv.clone()
    backend = make(CPU, kv.shape[3])
    meta: Any = backend.prepare(step.batch)
    with torch.inference_mode():
        return backend.forward(step.q, step.k, step.v, kv, spec, meta), kv


def check(
    make: Callable[[torch.device, int], AttentionBackend], step: Step, spec: LayerSpec, tolerance: float = 2e-5
) -> None:
    """The backend's output and cache equal the reference's."""
    wanted, wanted_kv = run(ReferenceAttention, step, spec)
    got, got_kv = run(make, step, spec)
    assert wanted.isfinite().all()
    assert got.shape == wanted.shape == (step.q.shape[1], step.q.shape[0], step.q.shape[2])
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got_kv, wanted_kv, rtol=0, atol=0, equal_nan=True)


SPECS = {
    "plain": LayerSpec(scale=0.3),
    "window": LayerSpec(scale=0.3, window=5),
    "window of one": LayerSpec(scale=0.3, window=1),
    "softcap": LayerSpec(scale=0.5, softcap=3.0),
    "softcap and window": LayerSpec(scale=0.5, softcap=3.0, window=6),
    "sinks": LayerSpec(scale=0.3, sinks=torch.linspace(-2, 2, 8)),
    "sinks and window": LayerSpec(scale=0.3, sinks=torch.linspace(-2, 2, 8), window=4),
}
HEADS = {"gqa": (8, 2), "mha": (8, 8), "mqa": (8, 1)}
STEPS = {
    "one decode": [(9, 1)],
    "first token": [(0, 1)],
    "decodes": [(9, 1), (0, 1), (30, 1), (7, 1), (8, 1)],
    "equal decodes": [(7, 1), (7, 1)],
    "prompt": [(0, 11)],
    "prompts": [(0, 11), (0, 4), (0, 16)],
    "chunks": [(4, 4), (3, 9), (16, 2)],
    "mixed": [(0, 5), (9, 1), (6, 7), (21, 1), (0, 1), (5, 3), (12, 1)],
}


# Triton's interpreter takes a hundredth of a second for every program: the whole matrix takes minutes.
INTERPRETED = {"first token", "decodes", "prompts", "chunks", "mixed"}
MATRIX = [
    (backend, heads, spec, step)
    for backend, heads, spec, step in product(BACKENDS, HEADS, SPECS, STEPS)
    if backend != "triton"
    or (heads == "gqa" and step in INTERPRETED)
    or (heads != "gqa" and spec == "sinks and window" and step == "mixed")
]


@pytest.mark.parametrize(("backend", "heads", "spec", "step"), MATRIX)
def test_equals_reference(backend: str, heads: str, spec: str, step: str) -> None:
    check(BACKENDS[backend], make_step(1, STEPS[step], 4, HEADS[heads], 8), SPECS[spec])


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "triton"])
@settings(max_examples=60)
@given(data=st.data())
def test_equals_reference_on_random_steps(backend: str, data: st.DataObject) -> None:
    check_random_step(BACKENDS[backend], data)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs triton")
@settings(max_examples=10)
@given(data=st.data())
def test_triton_equals_reference_on_random_steps(data: st.DataObject) -> None:
    check_random_step(BACKENDS["triton"], data)


def check_random_step(make: Callable[[torch.device, int], AttentionBackend], data: st.DataObject) -> None:
    kv_heads = data.draw(st.sampled_from([1, 2, 3]))
    group = data.draw(st.sampled_from([1, 2, 4]))
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=6))
    step = make_step(
        data.draw(st.integers(0, 1000)),
        lengths,
        data.draw(st.sampled_from([1, 3, 4, 8])),
        (kv_heads * group, kv_heads),
        data.draw(st.sampled_from([4, 16, 40, 128])),
    )
    spec = LayerSpec(
        scale=0.25,
        window=data.draw(st.none() | st.integers(1, 12)),
        softcap=data.draw(st.none() | st.just(4.0)),
        sinks=data.draw(st.none() | st.just(torch.linspace(-1, 1, kv_heads * group))),
    )
    check(make, step, spec)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", ["plain", "softcap", "window"])
def test_long_steps_are_split(backend: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks larger than the scores allowed at once, and decodes of very different lengths."""
    monkeypatch.setattr("pagedllm_core.attention.torch_paged._CHUNK_SCORES", 64)
    monkeypatch.setattr("pagedllm_core.attention.torch_paged._FREE_PADDING", 8)
    lengths = [(0, 30), (40, 1), (3, 1), (10, 17), (70, 1), (9, 1), (20, 1)]
    check(BACKENDS[backend], make_step(3, lengths, 4, (4, 2), 8), SPECS[spec])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(backend: str, dtype: torch.dtype) -> None:
    check(BACKENDS[backend], make_step(2, STEPS["mixed"], 4, (8, 2), 16, dtype), SPECS["softcap and window"], 0.03)
    check(BACKENDS[backend], make_step(2, STEPS["mixed"], 4, (8, 2), 16, dtype), SPECS["plain"], 0.03)


BREAKABLE = [
    (backend, spec, bad)
    for backend, spec, bad in product(BACKENDS, SPECS, (float("nan"), float("inf")))
    if backend != "triton" or (spec, str(bad)) in (("softcap", "inf"), ("sinks and window", "nan"))
]


@pytest.mark.parametrize(("backend", "spec", "bad"), BREAKABLE)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_broken_sequence_breaks_alone(backend: str, spec: str, bad: float) -> None:
    step = make_step(4, STEPS["mixed"], 4, (8, 2), 8)
    clean, _ = run(BACKENDS[backend], step, SPECS[spec])
    for victim in range(len(STEPS["mixed"])):
        first, end = step.batch.query_starts[victim : victim + 2]
        k, v = step.k.clone(), step.v.clone()
        k[:, first:end], v[:, first:end] = bad, bad
        broken, _ = run(BACKENDS[backend], replace(step, k=k, v=v), SPECS[spec])
        others = [row for row in range(len(clean)) if not first <= row < end]
        torch.testing.assert_close(broken[others], clean[others], rtol=0, atol=0)
        assert not broken[first:end].isfinite().all()


def test_storage_shares_one_allocation_and_copies_all_layers() -> None:
    layers = [
        LayerGeometry(2, 8, torch.float32),
        LayerGeometry(1, 4, torch.bfloat16),
        LayerGeometry(2, 8, torch.float32),
    ]
    storage = KVStorage(layers, 5, 4, CPU)
    assert storage.nbytes == 5 * block_bytes(layers, 4)
    shapes = [tuple(storage.layer(number).shape) for number in range(3)]
    assert shapes == [(2, 2, 5, 4, 8), (2, 1, 5, 4, 4), (2, 2, 5, 4, 8)]
    assert storage.layer(0).untyped_storage().data_ptr() == storage.layer(2).untyped_storage().data_ptr()
    for number in range(3):
        storage.layer(number).copy_(torch.randn(shapes[number]))
    before = [storage.layer(number).clone() for number in range(3)]
    storage.copy_blocks([(0, 3), (4, 1), (1, 2)])  # block 1 is read before it is written
    for number in range(3):
        now, old = storage.layer(number), before[number]
        for source, destination in ((0, 3), (4, 1), (1, 2), (0, 0), (4, 4)):
            assert torch.equal(now[:, :, destination], old[:, :, source])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lazy_zeros_touch_no_pages(dtype: torch.dtype) -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    tensor = lazy_zeros((64, 1 << 20), dtype, CPU)
    assert tensor.data_ptr() % 64 == 0
    assert resident() - before < 4 << 20
    assert float(tensor[5, 1000]) == 0.0


def test_write_slots_reaches_exactly_its_slots() -> None:
    kv = torch.zeros(2, 2, 3, 4, 5)
    k, v = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    write_slots(kv, k, v, torch.tensor([9, 0, 4]))
    flat = kv.view(2, 2, 12, 5)
    assert torch.equal(flat[:, :, [9, 0, 4]], torch.stack([k, v]))
    assert int((flat != 0).any(-1).sum()) == 2 * 2 * 3
