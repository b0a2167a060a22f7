"""Paged attention in plain torch: right on any device, and quick where many sequences decode together.

Queries fall into two kinds of work, planned once per step (`prepare`) and reused by every layer:

    decode   sequences with one new token, padded to a common length and attended as one batch
    chunk    a run of rows of one sequence with several new tokens, attended over its own gathered keys

Padding repeats a sequence's own last slot, never a foreign one, so that whatever garbage other blocks hold (a NaN
times a weight of zero is still NaN) cannot reach it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pagedllm_core.attention.base import ForwardBatch, LayerSpec
from pagedllm_core.kv.storage import write_slots

# A decode group may mix lengths below this freely; above it, only lengths within a factor of two are padded together.
_FREE_PADDING = 512
# Most scores (query rows x keys) of one chunk, so that masks and soft-capped scores stay small.
_CHUNK_SCORES = 1 << 21


@dataclass(slots=True)
class DecodeGroup:
    """Sequences with one query each, padded to the same number of keys.

    Attributes:
        rows: Rows of the step, int64 [D], or a slice where they are contiguous.
        slots: int64 [D * longest], the keys of each sequence, its last one repeated.
        mask: [1, D, 1, longest], 0 or -inf, in the compute type; None where nothing is padded.
    """

    rows: torch.Tensor | slice
    slots: torch.Tensor
    mask: torch.Tensor | None


@dataclass(slots=True)
class Chunk:
    """Rows `first` .. `end` - 1 of one sequence over a run of its keys.

    Attributes:
        slots: int64 [N], where the keys lie; None where they are exactly rows `first` .. `end` - 1 of the step.
        mask: [rows, N], 0 or -inf, in the compute type; None for a plain causal square.
    """

    first: int
    end: int
    slots: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(slots=True)
class Plan:
    """All attention work of one step for layers of one window."""

    decodes: list[DecodeGroup]
    chunks: list[Chunk]


class StepMeta:
    """What every layer of one step shares; plans are made per window, when the first layer asks.

    Args:
        batch: The step.
        block_size: Tokens in a KV block.
        device: Where the model lies.
    """

    def __init__(self, batch: ForwardBatch, block_size: int, device: torch.device) -> None:
        self._batch = batch
        self._block_size = block_size
        self._device = device
        self._plans: dict[tuple[int | None, torch.dtype], Plan] = {}
        self.slots = torch.from_numpy(batch.slot_mapping).to(device, non_blocking=True)

    def plan(self, window: int | None, dtype: torch.dtype) -> Plan:
        """The step's work for layers with this window; masks are of type `dtype`."""
        plan = self._plans.get((window, dtype))
        if plan is None:
            plan = self._plans[window, dtype] = self._make_plan(window, dtype)
        return plan

    def _make_plan(self, window: int | None, dtype: torch.dtype) -> Plan:
        starts = self._batch.query_starts
        lengths = np.diff(starts)
        decodes = [
            self._decode_group(members, window, dtype)
            for members in _similar_lengths(np.flatnonzero(lengths == 1), self._batch.context_lens, window)
        ]
        chunks = [chunk for number in np.flatnonzero(lengths > 1) for chunk in self._chunks(int(number), window, dtype)]
        return Plan(decodes, chunks)

    def _decode_group(self, members: npt.NDArray[np.int64], window: int | None, dtype: torch.dtype) -> DecodeGroup:
        contexts = self._batch.context_lens[members].astype(np.int64)
        lowest = np.zeros_like(contexts) if window is None else np.maximum(contexts - window, 0)
        counts = contexts - lowest
        longest = int(counts.max())
        steps = np.arange(longest)
        positions = lowest[:, None] + np.minimum(steps[None, :], counts[:, None] - 1)
        blocks = self._batch.block_tables[members[:, None], positions // self._block_size].astype(np.int64)
        slots = blocks * self._block_size + positions % self._block_size
        mask = None
        if int(counts.min()) != longest:
            mask = self._mask(steps[None, :] < counts[:, None], dtype)[None, :, None, :]
        first_rows = self._batch.query_starts[members].astype(np.int64)
        rows: torch.Tensor | slice
        if int(first_rows[-1]) - int(first_rows[0]) == len(members) - 1 and bool((np.diff(first_rows) == 1).all()):
            rows = slice(int(first_rows[0]), int(first_rows[-1]) + 1)
        else:
            rows = torch.from_numpy(first_rows).to(self._device)
        return DecodeGroup(rows, torch.from_numpy(slots.reshape(-1)).to(self._device), mask)

    def _chunks(self, number: int, window: int | None, dtype: torch.dtype) -> Iterator[Chunk]:
        first, end = (int(row) for row in self._batch.query_starts[number : number + 2])
        context = int(self._batch.context_lens[number])
        offset = context - end  # position = row + offset
        fits = (end - first) * context <= _CHUNK_SCORES
        if first + offset == 0 and fits and (window is None or window >= context):
            yield Chunk(first, end, None, None)
            return
        table = self._batch.block_tables[number].astype(np.int64)
        rows = end - first if fits else max(1, _CHUNK_SCORES // context)
        for start in range(first, end, rows):
            stop = min(start + rows, end)
            queries = np.arange(start, stop) + offset
            lowest = 0 if window is None else max(0, int(queries[0]) - window + 1)
            keys = np.arange(lowest, int(queries[-1]) + 1)
            visible = keys[None, :] <= queries[:, None]
            if window is not None:
                visible &= keys[None, :] > queries[:, None] - window
            slots = table[keys // self._block_size] * self._block_size + keys % self._block_size
            yield Chunk(start, stop, torch.from_numpy(slots).to(self._device), self._mask(visible, dtype))

    def _mask(self, visible: npt.NDArray[np.bool_], dtype: torch.dtype) -> torch.Tensor:
        """0 where visible, -inf elsewhere."""
        return torch.from_numpy(np.where(visible, np.float32(0), np.float32(-np.inf))).to(self._device, dtype)


class TorchPagedAttention:
    """Gathers each sequence's keys and values, then one fused attention call per piece of work.

    Args:
        device: Where the model and the storage lie.
        block_size: Tokens in a KV block.
    """

    def __init__(self, device: torch.device, block_size: int) -> None:
        self._device = device
        self._block_size = block_size
        self._scratch: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def prepare(self, batch: ForwardBatch) -> StepMeta:
        """Index tensors that all layers of the step share."""
        return StepMeta(batch, self._block_size, self._device)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, spec: LayerSpec, meta: StepMeta
    ) -> torch.Tensor:
        """Attention of one layer; shapes as in `AttentionBackend.forward`."""
        write_slots(kv, k, v, meta.slots)
        plan = meta.plan(spec.window, q.dtype)
        keys, values = kv.flatten(2, 3).unbind(0)
        if len(plan.decodes) == 1 and not plan.chunks:
            rows = plan.decodes[0].rows
            if isinstance(rows, slice):
                return self._decode(q, keys, values, spec, plan.decodes[0])
        out = torch.empty(q.shape[1], q.shape[0], q.shape[2], dtype=q.dtype, device=q.device)
        for group in plan.decodes:
            out[group.rows] = self._decode(q[:, group.rows], keys, values, spec, group)
        for chunk in plan.chunks:
            rows = slice(chunk.first, chunk.end)
            if chunk.slots is None:
                seen_keys, seen_values = k[:, rows], v[:, rows]
            else:
                seen_keys, seen_values = self._gather("k", keys, chunk.slots), self._gather("v", values, chunk.slots)
            out[rows] = _chunk(q[:, rows], seen_keys, seen_values, spec, chunk.mask)
        return out

    def _decode(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: LayerSpec, group: DecodeGroup
    ) -> torch.Tensor:
        """One query per sequence: [heads, D, head_dim] -> [D, heads, head_dim].

        The query heads that share a key head take the place of query rows, so that keys are read once:
        batch = kv_heads, heads = D, rows = heads / kv_heads.
        """
        heads, count, width = q.shape
        kv_heads = keys.shape[0]
        seen_keys = self._gather("k", keys, group.slots).view(kv_heads, count, -1, width)
        seen_values = self._gather("v", values, group.slots).view(kv_heads, count, -1, width)
        sinks = None if spec.sinks is None else spec.sinks.view(kv_heads, 1, -1, 1)
        grouped = q.unflatten(0, (kv_heads, -1)).transpose(1, 2)
        out = _attend(grouped, seen_keys, seen_values, spec, group.mask, sinks, False)
        return out.transpose(0, 1).reshape(count, heads, width)

    def _gather(self, name: str, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Rows of a cache [kv_heads, slots, head_dim], into memory that is kept.

        Fresh memory of this size would be mapped and unmapped in every layer, at the price of its page faults.
        """
        kv_heads, _, width = cache.shape
        size = kv_heads * slots.numel() * width
        scratch = self._scratch.get((name, cache.dtype))
        if scratch is None or scratch.numel() < size:
            scratch = torch.empty(size + size // 4, dtype=cache.dtype, device=cache.device)
            self._scratch[name, cache.dtype] = scratch
        out = scratch[:size].view(kv_heads, slots.numel(), width)
        return torch.index_select(cache, 1, slots, out=out)


def _similar_lengths(
    members: npt.NDArray[np.int64], contexts: npt.NDArray[np.int32], window: int | None
) -> list[npt.NDArray[np.int64]]:
    """Split decode sequences into groups whose padding costs little; one group, in order, where all are short."""
    if members.size == 0:
        return []
    lengths = contexts[members]
    if window is not None:
        lengths = np.minimum(lengths, window)
    # 0 for short ones, then one group for each doubling.
    kinds = np.ceil(np.log2(np.maximum(lengths, _FREE_PADDING) / _FREE_PADDING)).astype(np.int64)
    return [members[kinds == kind] for kind in np.unique(kinds)]


def _chunk(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: LayerSpec, mask: torch.Tensor | None
) -> torch.Tensor:
    """Several queries of one sequence: [heads, Q, head_dim] -> [Q, heads, head_dim]. No mask means a causal square."""
    heads, rows, width = q.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    shared = (kv_heads, group, keys.shape[1], width)
    sinks = None if spec.sinks is None else spec.sinks.view(kv_heads, group, 1, 1)
    out = _attend(
        q.unflatten(0, (kv_heads, group)),
        keys[:, None].expand(shared),
        values[:, None].expand(shared),
        spec,
        mask,
        sinks,
        mask is None,
    )
    return out.permute(2, 0, 1, 3).reshape(rows, heads, width)


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    spec: LayerSpec,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    causal: bool,
) -> torch.Tensor:
    """Attention over batches [A, B]: q [A, B, Q, dim] over keys and values [A, B, N, dim] gives [A, B, Q, dim].

    Args:
        q: Queries.
        keys: Keys.
        values: Values.
        spec: Scale and soft-cap.
        mask: Added to the scores, broadcast to [A, B, Q, N], or None.
        sinks: Extra logits, broadcast to [A, B, Q, 1], or None.
        causal: Mask the upper triangle (Q == N); only without `mask`.
    """
    if spec.softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal, scale=spec.scale)
    scores = torch.matmul(q, keys.transpose(-1, -2)).float().mul_(spec.scale)
    if spec.softcap is not None:
        scores = scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
    if causal:
        upper = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(upper, float("-inf"))
    elif mask is not None:
        scores.add_(mask)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.matmul(weights.to(values.dtype), values)
