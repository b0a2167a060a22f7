"""What is special about attention in Triton: splits, static tensors, padding, tiles, fp8. In the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from pagedllm_core.attention.base import LayerSpec
from pagedllm_core.attention.reference import ReferenceAttention
from pagedllm_core.attention.triton_paged import TritonAttention
from pagedllm_core.errors import UnsupportedModelError
from pagedllm_core.kernels import decode_attention, prefill_attention
from pagedllm_core.kernels.cache import split_fp8, write_cache
from pagedllm_core.kernels.decode_attention import plan_splits
from pagedllm_core.kernels.prefill_attention import QueryTile, list_tiles
from pagedllm_core.kv.storage import KVStorage, LayerGeometry, block_bytes, lazy_zeros
from tests.kernels import interpreter  # noqa: F401
from tests.kernels.test_attention import CPU, SPECS, Step, check, make_step, run

FEATURES = LayerSpec(scale=0.3, window=70, softcap=4.0, sinks=torch.linspace(-2, 2, 4))
PLAIN = LayerSpec(scale=0.3)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 16 keys or more, tiles of 16, and two parts joined at once."""
    monkeypatch.setattr(decode_attention, "_COMBINED", 2)
    monkeypatch.setattr(decode_attention, "_LEAST_PART", 16)
    monkeypatch.setattr(decode_attention, "_TILE_BYTES", 1)
    monkeypatch.setattr(decode_attention, "_PROGRAMS_PER_MULTIPROCESSOR", 1)


def parts_of(contexts: list[int], window: int | None, multiprocessors: int) -> list[list[tuple[int, int]]]:
    """The runs of keys that a plan has for each sequence."""
    plan = plan_splits(torch.tensor(contexts, dtype=torch.int32), 1, window, multiprocessors)
    count = plan.parts.shape[1]
    assert count == len(contexts) + multiprocessors  # whatever the contexts are
    used = int(plan.firsts[-1])
    assert (plan.parts[0, used:] == -1).all()
    found: list[list[tuple[int, int]]] = [[] for _ in contexts]
    for sequence, begin, end, siblings in plan.parts[:, :used].T.tolist():
        found[sequence].append((begin, end))
        assert siblings == int(plan.firsts[sequence + 1]) - int(plan.firsts[sequence])
    assert [len(one) for one in found] == plan.firsts.diff().tolist()
    return found


@pytest.mark.usefixtures("small_parts")
@settings(max_examples=25)
@given(
    contexts=st.lists(st.integers(0, 400), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 300),
    multiprocessors=st.integers(1, 20),
)
def test_a_plan_covers_every_key_once(contexts: list[int], window: int | None, multiprocessors: int) -> None:
    for context, parts in zip(contexts, parts_of(contexts, window, multiprocessors), strict=True):
        keys = [key for begin, end in parts for key in range(begin, end)]
        assert keys == list(range(max(0, context - (window or context)), context))
        assert len(parts) >= 1


@pytest.mark.usefixtures("small_parts")
def test_a_plan_gives_long_sequences_more_parts() -> None:
    short, long, padding = parts_of([20, 4000, 0], None, 8)
    assert (len(short), len(long), padding) == (1, 8, [(0, 0)])
    assert max(end - begin for begin, end in long) <= 512


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("spec", [PLAIN, FEATURES], ids=["plain", "features"])
@pytest.mark.parametrize("multiprocessors", [1, 3, 7, 30])
def test_any_number_of_splits_gives_the_same(
    spec: LayerSpec, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(device: torch.device, block_size: int) -> TritonAttention:
        backend = TritonAttention(device, block_size)
        monkeypatch.setattr(backend, "_multiprocessors", multiprocessors)
        return backend

    step = make_step(5, [(99, 1), (0, 1), (140, 1), (15, 1)], 16, (4, 1), 16)
    check(make, step, spec)
    longest = max(len(one) for one in parts_of([100, 1, 141, 16], spec.window, multiprocessors))
    assert longest == {1: 1, 3: 2, 7: 3, 30: 5 if spec.window else 9}[multiprocessors]


@pytest.mark.usefixtures("small_parts")
def test_a_broken_part_breaks_its_sequence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_attention, "_PROGRAMS_PER_MULTIPROCESSOR", 12)
    step = make_step(6, [(60, 1), (70, 1)], 4, (4, 1), 8)
    clean, _ = run(TritonAttention, step, PLAIN)
    step.kv[:, :, int(step.batch.block_tables[0, 3])] = float("nan")
    broken, _ = run(TritonAttention, step, PLAIN)
    assert broken[0].isnan().all()
    assert torch.equal(broken[1], clean[1])


def static_step(backend: TritonAttention, step: Step, tensors: tuple[torch.Tensor, ...], spec: LayerSpec) -> Any:
    """Fill static tensors as a graph's owner would, pad the rest, and run a forward over all their rows."""
    tables, contexts, slots = tables_contexts_slots = tensors
    for one, padding in zip(tables_contexts_slots, (1 << 30, 0, -1), strict=True):
        one.fill_(padding)
    count = len(step.batch.context_lens)
    tables[:count, : step.batch.block_tables.shape[1]] = torch.from_numpy(step.batch.block_tables)
    contexts[:count] = torch.from_numpy(step.batch.context_lens)
    slots[:count] = torch.from_numpy(step.batch.slot_mapping)
    rows = len(contexts)
    q, k, v = (torch.full((rows, *one.shape[::2]), float("nan")).transpose(0, 1) for one in (step.q, step.k, step.v))
    for padded, one in ((q, step.q), (k, step.k), (v, step.v)):
        padded[:, :count] = one
    kv = step.kv.clone()
    meta = backend.decode_meta(tables, contexts, slots)
    write_cache(k, v, kv, meta.slot_mapping)
    return backend.attend(q, kv, spec, meta), kv, meta


@pytest.mark.parametrize("spec", ["plain", "sinks and window"])
def test_padding_rows_give_zeros_and_write_nothing(spec: str) -> None:
    """And the same tensors serve step after step: what would be launched is the same whatever they hold."""
    backend = TritonAttention(CPU, 4)
    tensors = (torch.empty(5, 12, dtype=torch.int32), torch.empty(5, dtype=torch.int32), torch.empty(5).long())
    shapes = []
    for seed, lengths in enumerate(([(9, 1), (30, 1)], [(0, 1), (3, 1), (40, 1)])):
        step = make_step(seed, lengths, 4, (8, 2), 8)
        got, kv, meta = static_step(backend, step, tensors, SPECS[spec])
        wanted, wanted_kv = run(ReferenceAttention, step, SPECS[spec])
        torch.testing.assert_close(got[: len(lengths)], wanted, rtol=2e-5, atol=2e-5)
        assert (got[len(lengths) :] == 0).all()
        torch.testing.assert_close(kv, wanted_kv, rtol=0, atol=0, equal_nan=True)
        shapes.append([tuple(one.shape) for plan in meta.decodes.plans.values() for one in plan])
    assert shapes[0] == shapes[1]


def test_layers_share_a_plan_and_tiles_and_windows_do_not() -> None:
    step = make_step(3, [(9, 1), (2, 5)], 4, (4, 2), 8)
    backend = TritonAttention(CPU, 4)
    meta = backend.prepare(step.batch)
    for spec in (PLAIN, PLAIN, replace(PLAIN, window=3)):
        backend.forward(step.q, step.k, step.v, step.kv, spec, meta)
    assert meta.decodes is not None
    assert meta.chunks is not None
    assert list(meta.decodes.plans) == [(None, 2), (3, 2)]
    assert list(meta.chunks.tiles) == [(2, 16)]


@given(
    lengths=st.lists(st.tuples(st.integers(0, 50), st.integers(2, 90)), min_size=1, max_size=6),
    group=st.sampled_from([1, 3, 7, 8]),
    rows=st.sampled_from([16, 64]),
)
def test_tiles_cover_every_row_once_longest_first(lengths: list[tuple[int, int]], group: int, rows: int) -> None:
    new = np.array([one for _, one in lengths], dtype=np.int32)
    contexts = np.array([sum(one) for one in lengths], dtype=np.int32)
    tiles = list_tiles(new, contexts, group, rows)
    assert sorted(map(tuple, tiles.tolist())) == [
        (number, first) for number, one in enumerate(new) for first in range(0, int(one) * group, rows)
    ]
    keys = [min((first + rows) // group, new[one]) + contexts[one] - new[one] for one, first in tiles.tolist()]
    assert keys == sorted(keys, reverse=True)


@pytest.mark.parametrize("tile", [QueryTile(16, 64, 4, 2), QueryTile(64, 16, 4, 2), QueryTile(32, 32, 4, 2)])
@pytest.mark.parametrize("spec", [PLAIN, FEATURES], ids=["plain", "features"])
def test_tiles_of_any_shape(tile: QueryTile, spec: LayerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys before, inside and after the runs that need no mask."""
    if spec.sinks is not None:
        spec = replace(spec, sinks=spec.sinks[:2])
    monkeypatch.setattr(prefill_attention, "_FLOAT32", tile)
    check(TritonAttention, make_step(7, [(83, 30), (0, 40), (130, 3)], 16, (2, 1), 16), spec)


@pytest.mark.parametrize(
    ("block_size", "heads", "width"),
    [(1, (2, 2), 8), (3, (7, 1), 24), (16, (14, 2), 64), (32, (3, 1), 80), (128, (2, 1), 256), (100, (5, 1), 96)],
)
def test_odd_shapes(block_size: int, heads: tuple[int, int], width: int) -> None:
    check(TritonAttention, make_step(8, [(21, 1), (5, 4)], block_size, heads, width), LayerSpec(scale=0.1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_over_large_tiles(dtype: torch.dtype) -> None:
    step = make_step(9, [(100, 60), (140, 1)], 16, (4, 2), 32, dtype)
    check(TritonAttention, step, replace(FEATURES, scale=0.1), 0.02)


def test_a_pool_beyond_the_reach_of_32_bits() -> None:
    """Of 4 GiB, of which little is touched. Its bytes are counted from the head's first block."""
    step = make_step(10, [(20, 1), (3, 4)], 4, (1, 1), 64)
    blocks = (1 << 31) // (4 * 68) + 10
    cached = step.kv.nan_to_num().flatten(2, 3)
    outputs = []
    for first, count in ((0, step.kv.shape[2]), (blocks - step.kv.shape[2], blocks)):
        kv = lazy_zeros((2, 1, count, 4, 68), torch.uint8, CPU)
        write_cache(cached[0], cached[1], kv, torch.arange(cached.shape[2]) + 4 * first)
        batch = replace(
            step.batch, block_tables=step.batch.block_tables + first, slot_mapping=step.batch.slot_mapping + 4 * first
        )
        backend = TritonAttention(CPU, 4)
        outputs.append(backend.forward(step.q, step.k, step.v, kv, PLAIN, backend.prepare(batch)))
    assert torch.equal(*outputs)


def test_what_does_not_fit_is_refused() -> None:
    wide = make_step(11, [(3, 1)], 4, (1, 1), 264)
    with pytest.raises(UnsupportedModelError, match="head_dim=264"):
        run(TritonAttention, wide, PLAIN)
    step = make_step(11, [(3, 1)], 4, (4, 2), 8)
    with pytest.raises(ValueError, match="do not fit"):
        run(TritonAttention, replace(step, k=step.k[:1], v=step.v[:1]), PLAIN)
    with pytest.raises(ValueError, match="do not fit"):
        run(TritonAttention, replace(step, q=step.q[:3]), PLAIN)


def fp8_storage(blocks: int, host: int = 0) -> KVStorage:
    """Two layers of two heads of 16 numbers, blocks of 8 tokens."""
    return KVStorage([LayerGeometry(2, 16, torch.float8_e4m3fn)] * 2, blocks, 8, CPU, host)


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What torch makes of it: e4m3 values and one scale for each row of numbers."""
    scales = x.abs().amax(-1) / 448
    return (x / scales[..., None]).to(torch.float8_e4m3fn), scales


def test_fp8_slots_hold_rounded_values_and_their_scales() -> None:
    storage = fp8_storage(3)
    assert storage.nbytes == 3 * block_bytes([LayerGeometry(2, 16, torch.float8_e4m3fn)] * 2, 8) == 3 * 2 * 2 * 2 * 160
    kv = storage.layer(1)
    k, v = torch.randn(2, 4, 16) * torch.logspace(-3, 3, 4)[None, :, None], torch.randn(2, 4, 16)
    write_cache(k, v, kv, torch.tensor([9, 0, -1, 23]))
    values, scales = split_fp8(kv)
    assert scales is not None
    assert (values.shape, scales.shape) == ((2, 2, 3, 8, 16), (2, 2, 3, 8))
    for row, block, offset in ((0, 1, 1), (1, 0, 0), (3, 2, 7)):
        for half, x in enumerate((k, v)):
            wanted, wanted_scales = rounded(x[:, row])
            assert torch.equal(values[half, :, block, offset].view(torch.uint8), wanted.view(torch.uint8))
            torch.testing.assert_close(scales[half, :, block, offset], wanted_scales, rtol=1e-6, atol=0)
    assert int((scales != 0).sum()) == 2 * 2 * 3
    assert not storage.layer(0).any()


def attend_fp8(backend: TritonAttention, step: Step, spec: LayerSpec) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Attention over a rounded cache, the reference's over what that cache holds, and the step's plans."""
    kv = fp8_storage(step.kv.shape[2]).layer(0)
    everything = step.kv.nan_to_num().flatten(2, 3)
    write_cache(everything[0], everything[1], kv, torch.arange(everything.shape[2]))
    meta = backend.prepare(step.batch)
    got = backend.forward(step.q, step.k, step.v, kv, spec, meta)
    values, scales = split_fp8(kv)
    assert scales is not None
    dequantised = values.float() * scales[..., None]
    slots = torch.from_numpy(step.batch.slot_mapping)
    k, v = dequantised.flatten(2, 3)[:, :, slots]
    wanted, _ = run(ReferenceAttention, replace(step, k=k, v=v, kv=dequantised), spec)
    return got, wanted, meta


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("spec", [PLAIN, FEATURES], ids=["plain", "features"])
@pytest.mark.parametrize(("multiprocessors", "longest"), [(4, 2), (60, 5)])
def test_fp8_attention_in_several_splits(
    spec: LayerSpec, multiprocessors: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TritonAttention(CPU, 8)
    monkeypatch.setattr(backend, "_multiprocessors", multiprocessors)
    step = make_step(14, [(40, 1), (0, 1), (75, 1)], 8, (4, 2), 16)
    got, wanted, meta = attend_fp8(backend, step, spec)
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
    (plan,) = meta.decodes.plans.values()
    assert int(plan.firsts.diff().max()) == longest


@pytest.mark.parametrize("spec", ["plain", "softcap and window"])
def test_fp8_attention_is_attention_over_the_rounded_cache(spec: str) -> None:
    step = make_step(12, [(20, 1), (9, 6)], 8, (4, 2), 16)
    got, wanted, _ = attend_fp8(TritonAttention(CPU, 8), step, SPECS[spec])
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
    exact, _ = run(ReferenceAttention, step, SPECS[spec])
    assert 0 < (got - exact).abs().max() < 0.3
    assert (got - exact).pow(2).mean().sqrt() < 0.04


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp8_attention_over_small_and_large_values(dtype: torch.dtype) -> None:
    """The scales of values span more than float16 does."""
    step = make_step(13, [(12, 1), (5, 3)], 8, (2, 2), 16, dtype)
    for factor in (1e-4, 1.0, 1e3):
        values = step.kv.nan_to_num().flatten(2, 3)
        kv = fp8_storage(step.kv.shape[2]).layer(0)
        write_cache(values[0], factor * values[1], kv, torch.arange(values.shape[2]))
        backend = TritonAttention(CPU, 8)
        got = backend.forward(step.q, step.k, factor * step.v, kv, PLAIN, backend.prepare(step.batch)) / factor
        wanted, _ = run(ReferenceAttention, step, PLAIN)
        assert (got - wanted).float().pow(2).mean().sqrt() < 0.05


def test_fp8_blocks_are_copied_and_swapped_with_their_scales() -> None:
    storage = fp8_storage(4, host=2)
    k, v = torch.randn(2, 8, 16), 100 * torch.randn(2, 8, 16)
    for number in range(2):
        write_cache(k, v, storage.layer(number), torch.arange(8, 16))
    before = [storage.layer(number)[:, :, 1].clone() for number in range(2)]
    storage.copy_blocks([(1, 3)])
    storage.swap_out([(3, 1)])
    storage.copy_blocks([(2, 3), (2, 1)])
    storage.swap_in([(1, 0)])
    for number in range(2):
        assert torch.equal(storage.layer(number)[:, :, 0], before[number])
        assert not storage.layer(number)[:, :, 1:].any()
    values, scales = split_fp8(storage.layer(1))
    assert scales is not None
    torch.testing.assert_close(values[1, :, 0].float() * scales[1, :, 0, :, None], v, rtol=0.07, atol=1.0)
