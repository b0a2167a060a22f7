"""The kernels that are compiled without a GPU: for each a call of its real launcher, with tensors that hold no data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import triton

from pagedllm_core.decode.staging import ROW, Staged
from pagedllm_core.kernels.beams import select_best
from pagedllm_core.kernels.blocks import copy_blocks
from pagedllm_core.kernels.cache import write_cache
from pagedllm_core.kernels.decode_attention import decode_attention, plan_splits
from pagedllm_core.kernels.fused import add_rms_norm, rope_and_cache, silu_mul
from pagedllm_core.kernels.linear import linear
from pagedllm_core.kernels.prefill_attention import prefill_attention, query_tile
from pagedllm_core.kernels.rules import apply_rules
from pagedllm_core.kernels.sampling import Workspace, sample_rows, score_rows
from pagedllm_core.kv.storage import KVStorage, LayerGeometry

META = torch.device("meta")


class Case(NamedTuple):
    """A launcher's call, and the least compute capability it is meant for."""

    name: str
    launch: Callable[[], Any]
    least: int = 80


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A tensor without data."""
    return torch.empty(*shape, dtype=dtype, device=META)


def attention(
    prefill: bool, dtype: torch.dtype, dim: int, block_size: int, cache: torch.dtype | None = None, **spec: Any
) -> None:
    """A step of 64 sequences, 32 query heads over 8 kv heads; `spec` is what the launchers take."""
    kv = KVStorage([LayerGeometry(8, dim, cache or dtype)] * 2, 1000, block_size, META).layer(0)
    q, out = empty(512, 32, dim, dtype=dtype).transpose(0, 1), empty(512, 32, dim, dtype=dtype)
    tables, contexts = empty(64, 48), empty(64)
    if prefill:
        hopper = triton.runtime.driver.active.get_current_target().arch == 90
        tile = query_tile(dim, dtype, cache is not None, hopper)
        prefill_attention(q, kv, out, tables, contexts, contexts, contexts, empty(200, 2), tile, scale=0.1, **spec)
    else:
        plan = plan_splits(contexts, 8, spec.pop("window", None), 132)
        decode_attention(q, kv, out, tables, None, plan, scale=0.1, **spec)


def attention_cases() -> Iterator[Case]:
    """Each head size, type, block size and feature at least once."""
    bf16, fp16, fp8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
    features = {"window": 1000, "softcap": 50.0, "sinks": empty(32, dtype=torch.float32)}
    for prefill, name in ((False, "decode"), (True, "prefill")):
        for dtype, dim, size in ((bf16, 64, 128), (bf16, 128, 16), (fp16, 256, 16), (bf16, 80, 3)):
            yield Case(f"{name} {str(dtype)[6:]} {dim} {size}", partial(attention, prefill, dtype, dim, size))
        yield Case(f"{name} float32", partial(attention, prefill, torch.float32, 128, 16))
        for dim in (64, 128, 256):
            yield Case(f"{name} features {dim}", partial(attention, prefill, bf16, dim, 16, **features))
            yield Case(f"{name} fp8 {dim}", partial(attention, prefill, bf16, dim, 16, cache=fp8), 89)
        yield Case(f"{name} fp8 features", partial(attention, prefill, bf16, 256, 16, cache=fp8, **features), 89)


def more_attention_cases() -> Iterator[Case]:
    """The whole matrix: head sizes, types, block sizes, with and without features."""
    fp8 = torch.float8_e4m3fn
    features = {"window": 1000, "softcap": 50.0, "sinks": empty(32, dtype=torch.float32)}
    for prefill, name in ((False, "decode"), (True, "prefill")):
        for dim, size in product((64, 128, 256), (16, 128)):
            for dtype, spec in product((torch.bfloat16, torch.float16, torch.float32), ({}, features)):
                label = f"{name} {str(dtype)[6:]} {dim} {size}{' features' if spec else ''}"
                yield Case(label, partial(attention, prefill, dtype, dim, size, **spec))
            for spec in ({}, features):
                label = f"{name} fp8 {dim} {size}{' features' if spec else ''}"
                yield Case(label, partial(attention, prefill, torch.bfloat16, dim, size, cache=fp8, **spec), 89)


def cache_cases() -> Iterator[Case]:
    """The plain write of keys and values."""
    for name, dtype, least in (("bf16", torch.bfloat16, 80), ("fp8", torch.float8_e4m3fn, 89)):
        kv = KVStorage([LayerGeometry(8, 128, dtype)], 1000, 16, META).layer(0)
        k = empty(512, 8, 128, dtype=torch.bfloat16).transpose(0, 1)
        yield Case(f"write {name}", partial(write_cache, k, k, kv, empty(512, dtype=torch.int64)), least)


def fused_cases() -> Iterator[Case]:
    """What lies between the matrix products of a decoder, for common sizes of models."""
    longs = empty(512, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype)[6:]
        for heads, dim, rotary, normed in (
            (32, 128, 128, False),
            (32, 128, 128, True),
            (14, 64, 64, False),
            (32, 96, 72, False),
        ):
            kv = KVStorage([LayerGeometry(8, dim, dtype)] * 2, 1000, 16, META).layer(1)
            qkv, tables = empty(512, (heads + 16) * dim, dtype=dtype), empty(4096, rotary, dtype=torch.float32)
            norms = (empty(dim, dtype=dtype),) * 2 if normed else (None, None)
            label = f"rope {name} {dim} {rotary}{' normed' if normed else ''}"
            yield Case(label, partial(rope_and_cache, qkv, kv, tables, tables, longs, longs, *norms, 1e-6))
        for hidden in (896, 4096, 12288):
            x, weight = empty(512, hidden, dtype=dtype), empty(hidden, dtype=dtype)
            yield Case(f"norm {name} {hidden}", partial(add_rms_norm, x, x, weight, 1e-6))
            yield Case(f"norm alone {name} {hidden}", partial(add_rms_norm, x, None, weight, 1e-6))
        yield Case(f"silu {name}", partial(silu_mul, empty(512, 2 * 14336, dtype=dtype)))
    kv = KVStorage([LayerGeometry(8, 128, torch.float8_e4m3fn)] * 2, 1000, 16, META).layer(1)
    qkv, tables = empty(512, 48 * 128, dtype=torch.bfloat16), empty(4096, 128, dtype=torch.float32)
    yield Case("rope fp8", partial(rope_and_cache, qkv, kv, tables, tables, longs, longs), 89)


def deterministic_cases() -> Iterator[Case]:
    """What the deterministic mode adds: products for one row and many, odd sizes and a bias; attention in one loop."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, inner, columns in ((1, 4096, 6144), (512, 14336, 4096), (3, 100, 331)):
            x, weight, bias = empty(rows, inner, dtype=dtype), empty(columns, inner, dtype=dtype), None
            if inner != 14336:
                bias = empty(columns, dtype=dtype)
            yield Case(f"linear {str(dtype)[6:]} {rows} {inner} {columns}", partial(linear, x, weight, bias))
    attend = partial(attention, True, block_size=16, deterministic=True)
    features = {"window": 1000, "softcap": 50.0, "sinks": empty(32, dtype=torch.float32)}
    yield Case("prefill in one loop float32", partial(attend, torch.float32, 128))
    for dim in (64, 128, 256):
        for spec in ({}, features):
            label = f"{dim}{' features' if spec else ''}"
            yield Case(f"prefill in one loop {label}", partial(attend, torch.bfloat16, dim, **spec))
            fp8 = partial(attend, torch.bfloat16, dim, cache=torch.float8_e4m3fn, **spec)
            yield Case(f"prefill in one loop fp8 {label}", fp8, 89)


def block_cases() -> Iterator[Case]:
    """Copies in the pool, and to the host."""
    for width, dtype in ((128, torch.bfloat16), (132, torch.uint8), (7, torch.uint8)):
        pool, host = (empty(2, 32, 8, blocks, 16, width, dtype=dtype) for blocks in (1000, 64))
        yield Case(f"copy {width}", partial(copy_blocks, pool, pool, empty(3, 2, dtype=torch.int64)))
        yield Case(f"swap {width}", partial(copy_blocks, pool, host, empty(3, 2, dtype=torch.int64)))


def staged(rows: int, lists: int) -> Staged:
    """Rows of a step, as the sampling kernels read them."""
    longs = [empty(max(4, lists)) for _ in range(3)]
    biases = empty(max(4, lists), dtype=torch.float32)
    return Staged(empty(rows, dtype=torch.float64), empty(rows, ROW.itemsize // 4), longs[0], biases, *longs[1:])


def sample_step(vocabulary: int, changed: bool) -> None:
    """32 rows, every kernel of a step once."""
    logits, step = empty(32, vocabulary, dtype=torch.float32), staged(32, 600)
    work = Workspace.allocate(64, vocabulary, META)
    tokens, summary = empty(32, dtype=torch.int64), empty(32, 4)
    rows = apply_rules(logits, step, 32, tokens) if changed else None
    sample_rows(logits, rows, 8 if changed else 0, step, work, tokens, summary)
    score_rows(logits, step, work, tokens, summary)


def best_of(vocabulary: int, width: int, count: int, shifted: bool) -> None:
    """Eight groups of rows."""
    rows = empty(8 * width, dtype=torch.float32)
    shifts = {"subtract": rows, "add": rows} if shifted else {}
    select_best(empty(8 * width, vocabulary, dtype=torch.float32), count, empty(9), width, **shifts)


def sampling_cases() -> Iterator[Case]:
    """The choice of tokens, for vocabularies of common models and odd ones."""
    for vocabulary in (331, 50257, 151936, 262144):
        for changed in (False, True):
            label = f"sample {vocabulary}{' changed' if changed else ''}"
            yield Case(label, partial(sample_step, vocabulary, changed))
    for width, count, shifted in ((1, 20, False), (4, 8, True), (64, 128, True)):
        yield Case(f"best {width} {count}", partial(best_of, 151936, width, count, shifted))


CASES = [attention_cases, cache_cases, fused_cases, deterministic_cases, block_cases, sampling_cases]
MORE_CASES = [more_attention_cases]  # too many to compile in every run of the tests
