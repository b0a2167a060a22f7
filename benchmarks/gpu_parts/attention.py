"""Attention over the paged cache, with the heads of Llama 8B: 32 of 128 numbers, 8 for keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gpu_parts.machine import Context, median_seconds, replayable
from pagedllm_core.attention.base import ForwardBatch, LayerSpec
from pagedllm_core.attention.triton_paged import TritonAttention
from pagedllm_core.kernels.cache import write_cache
from pagedllm_core.kv.storage import KVStorage, LayerGeometry

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
SPEC = LayerSpec(scale=DIM**-0.5)
_BEYOND_CACHE = 512 << 20  # bytes of keys and values that are read in turn, several times an L2 cache
_MOST_LAYERS = 64
PROMPT_TOKENS = 16_384

COLUMNS = {
    "decode": ["batch", "keys", "cache", "microseconds", "TB/s", "of the copy roof", "bar"],
    "prefill": ["prompts", "tokens each", "milliseconds", "TFLOP/s", "of the bf16 roof", "bar"],
}


def ragged_batch(pasts: Sequence[int], new: int, blocks: int, seed: int = 0) -> ForwardBatch:
    """A step of sequences with so many tokens cached and `new` more each, their blocks all over the pool."""
    count = len(pasts)
    tables = np.zeros((count, -(-(max(pasts) + new) // BLOCK)), dtype=np.int32)
    order = np.random.default_rng(seed).permutation(blocks).astype(np.int32)
    positions, slots, used = [], [], 0
    for number, past in enumerate(pasts):
        length = -(-(past + new) // BLOCK)
        tables[number, :length] = order[used : used + length]
        used += length
        place = np.arange(past, past + new)
        positions.append(place)
        slots.append(tables[number, place // BLOCK].astype(np.int64) * BLOCK + place % BLOCK)
    starts = new * np.arange(count + 1)
    return ForwardBatch(
        token_ids=np.random.default_rng(seed).integers(5, 100, count * new),
        positions=np.concatenate(positions),
        slot_mapping=np.concatenate(slots),
        query_starts=starts.astype(np.int32),
        context_lens=np.array([past + new for past in pasts], dtype=np.int32),
        block_tables=tables,
        logits_rows=starts[1:] - 1,
    )


def random_storage(layers: int, blocks: int, context: Context, fp8: bool) -> KVStorage:
    """A pool full of random keys and values."""
    geometry = LayerGeometry(KV_HEADS, DIM, torch.float8_e4m3fn if fp8 else context.dtype)
    storage = KVStorage([geometry] * layers, blocks, BLOCK, context.device)
    if not fp8:
        storage._pools[0].normal_()
        return storage
    slots = torch.arange(blocks * BLOCK, device=context.device)
    for layer in range(layers):
        k, v = (torch.randn(KV_HEADS, len(slots), DIM, device=context.device, dtype=context.dtype) for _ in range(2))
        write_cache(k, v, storage.layer(layer), slots)
    return storage


def decode(context: Context) -> None:
    """One token for each of `batch` sequences, in as many layers as are beyond the L2 cache, replayed as one graph.

    The plan kernel is launched once in all layers, as in a model.
    """
    batches, lengths = ((1, 2), (40,)) if context.smoke else ((1, 4, 16, 64, 256), (512, 4096, 32_768))
    cases = [(batch, keys, False) for keys in lengths for batch in batches]
    cases.append((2, 40, True) if context.smoke else (64, 4096, True))
    for done, (batch, keys, fp8) in enumerate(cases):
        name = {"batch": batch, "keys": f"{keys:,}", "cache": "fp8" if fp8 else str(context.dtype)[6:]}
        with context.case(**name):
            blocks = batch * -(-keys // BLOCK)
            size = 2 * batch * keys * KV_HEADS * (DIM + 4 if fp8 else DIM * context.dtype.itemsize)
            layers = 1 if context.smoke else max(1, min(_MOST_LAYERS, -(-_BEYOND_CACHE // size)))
            storage = random_storage(layers, blocks, context, fp8)
            seconds = decode_seconds(context, storage, layers, batch, keys, context.left() / (len(cases) - done) / 2)
            moved = size + 2 * batch * HEADS * DIM * context.dtype.itemsize
            share = moved / seconds / context.roofs["copy"]
            goal = (batch, keys, fp8) == (64, 4096, False)
            context.row(
                **name, microseconds=f"{seconds * 1e6:.1f}",
                point=None if fp8 else (f"{keys:,} keys", batch, share),
                bar=context.bar("decode attention, 64 x 4,096 keys", 80, 100 * share) if goal else None,
                **{"TB/s": f"{moved / seconds / 1e12:.2f}", "of the copy roof": f"{share:.0%}"},
            )  # fmt: skip


def decode_seconds(context: Context, storage: KVStorage, layers: int, batch: int, keys: int, limit: float) -> float:
    """Median seconds of one layer."""
    device, backend = context.device, TritonAttention(context.device, BLOCK)
    step = ragged_batch([keys - 1] * batch, 1, storage.num_blocks)
    tables, contexts, slots = (
        torch.from_numpy(one).to(device) for one in (step.block_tables, step.context_lens, step.slot_mapping)
    )
    q = torch.randn(batch, HEADS, DIM, device=device, dtype=context.dtype)
    out = torch.full_like(q, float("nan"))

    def work() -> None:
        meta = backend.decode_meta(tables, contexts, slots)
        for layer in range(layers):
            backend.attend(q.transpose(0, 1), storage.layer(layer), SPEC, meta, out)

    seconds = median_seconds(replayable(work, device), device, limit) / layers
    if not bool(out.isfinite().all()):
        raise RuntimeError("some rows were not written, or are not finite")
    return seconds


def prefill(context: Context) -> None:
    """Whole prompts of one length, 16,384 tokens in all; half of all scores are computed."""
    lengths = (32,) if context.smoke else (2048, 4096, 8192, 16_384)
    for done, tokens in enumerate(lengths):
        count = 1 if context.smoke else PROMPT_TOKENS // tokens
        name = {"prompts": count, "tokens each": f"{tokens:,}"}
        with context.case(**name):
            blocks = count * -(-tokens // BLOCK)
            storage = random_storage(1, blocks, context, fp8=False)
            backend = TritonAttention(context.device, BLOCK)
            meta = backend.prepare(ragged_batch([0] * count, tokens, blocks))
            q = torch.randn(count * tokens, HEADS, DIM, device=context.device, dtype=context.dtype)
            out = torch.full_like(q, float("nan"))

            def work() -> None:
                backend.attend(q.transpose(0, 1), storage.layer(0), SPEC, meta, out)  # noqa: B023

            seconds = median_seconds(work, context.device, context.left() / (len(lengths) - done) / 2)
            if not bool(out.isfinite().all()):
                raise RuntimeError("some rows were not written, or are not finite")
            rate = count * 4 * HEADS * DIM * tokens * (tokens + 1) / 2 / seconds
            share = rate / context.roofs["bf16"]
            context.row(
                **name, milliseconds=f"{seconds * 1e3:.2f}", point=("prefill", tokens, share),
                bar=context.bar("prefill attention, 8,192 tokens", 55, 100 * share) if tokens == 8192 else None,
                **{"TFLOP/s": f"{rate / 1e12:.0f}", "of the bf16 roof": f"{share:.0%}"},
            )  # fmt: skip
