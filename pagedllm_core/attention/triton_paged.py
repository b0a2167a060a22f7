"""Paged attention on a CUDA device: Triton kernels straight over the pool, nothing gathered.

A step's sequences fall into two kinds, told apart once per step (`prepare`):

    decode   one new token: split-KV, so that few sequences fill the machine, too (kernels/decode_attention.py)
    chunk    several new tokens: tiles of query rows over the sequence's keys (kernels/prefill_attention.py)

In deterministic mode every sequence is a chunk, as splits add up in another order than tiles.

Keys and values of the step are in their slots before anything attends. `forward` writes them; a fused decoder that has
written them itself calls `attend`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pagedllm_core.attention.base import ForwardBatch, LayerSpec
from pagedllm_core.kernels.cache import write_cache
from pagedllm_core.kernels.decode_attention import SplitPlan, decode_attention, plan_splits
from pagedllm_core.kernels.prefill_attention import list_decode_tiles, list_tiles, prefill_attention, query_tile

_ALIGNMENT = 16  # bytes; Triton compiles for pointers that are aligned to it


@dataclass(slots=True)
class DecodeMeta:
    """Sequences of one new token each.

    The tensors may be static ones that a CUDA graph reads: what the kernels do follows from their contents alone, and
    the grid from their shapes. A padding sequence has context 0, whatever its block table holds: nothing is read for it
    and its output is zero.

    Attributes:
        block_tables: int32 [B, max_blocks].
        context_lens: int32 [B], keys that each sequence attends to, its new one included.
        rows: int32 [B], the row of the step that each sequence's token has; None where sequence b has row b.
        plans: Split plans by (window, kv_heads), made by the first layer that needs one. Leave it empty.
    """

    block_tables: torch.Tensor
    context_lens: torch.Tensor
    rows: torch.Tensor | None = None
    plans: dict[tuple[int | None, int], SplitPlan] = field(default_factory=dict)


@dataclass(slots=True)
class ChunkMeta:
    """Sequences of several new tokens each; in deterministic mode, of any number.

    Attributes:
        block_tables: int32 [C, max_blocks].
        context_lens: int32 [C].
        query_starts: int32 [C], first row of each sequence in the step.
        query_lens: int32 [C].
        host_lens: The same on the host, and the contexts, int32 [C] each: tile lists are made from them. None where
            every sequence has one new token, and the tensors may be static ones as in `DecodeMeta`.
        tiles: Tile lists by (query heads per kv head, rows per tile). Leave it empty.
    """

    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor
    query_lens: torch.Tensor
    host_lens: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None
    tiles: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class StepMeta:
    """What every layer of one step shares. One meta serves one forward pass.

    Attributes:
        slot_mapping: int64 [T], the slot of each row's key and value; a negative one is not written.
        decodes: The sequences of one new token, or None.
        chunks: The others, or None.
    """

    slot_mapping: torch.Tensor
    decodes: DecodeMeta | None
    chunks: ChunkMeta | None


class TritonAttention:
    """An `AttentionBackend` over Triton kernels.

    Args:
        device: A CUDA device; a CPU under TRITON_INTERPRET=1, for tests.
        block_size: Tokens in a KV block, any number.
        deterministic: Let no bit of a token's result depend on how many tokens are computed with it, and which.
    """

    def __init__(self, device: torch.device, block_size: int, deterministic: bool = False) -> None:
        self._device = device
        self._block_size = block_size
        self._deterministic = deterministic
        self._multiprocessors, self._hopper = 1, False
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self._multiprocessors, self._hopper = properties.multi_processor_count, properties.major == 9

    def prepare(self, batch: ForwardBatch) -> StepMeta:
        """Upload a step's index tensors, in one copy from pinned memory; nothing waits for the device."""
        query_lens = np.diff(batch.query_starts)
        one, several = np.flatnonzero(query_lens == 1), np.flatnonzero(query_lens > 1)
        if self._deterministic:
            one, several = one[:0], np.flatnonzero(query_lens)
        lens, contexts = query_lens[several], batch.context_lens[several]
        slots, tables, decode_contexts, rows, chunk_tables, chunk_contexts, starts, chunk_lens = self._upload(
            batch.slot_mapping, batch.block_tables[one], batch.context_lens[one], batch.query_starts[one],
            batch.block_tables[several], contexts, batch.query_starts[several], lens,
        )  # fmt: skip
        chunks = ChunkMeta(chunk_tables, chunk_contexts, starts, chunk_lens, (lens, contexts))
        decodes = DecodeMeta(tables, decode_contexts, rows)
        return StepMeta(slots, decodes if len(one) else None, chunks if len(several) else None)

    def decode_meta(
        self, block_tables: torch.Tensor, context_lens: torch.Tensor, slot_mapping: torch.Tensor
    ) -> StepMeta:
        """A step of one-token sequences over static tensors, row b of the step being sequence b.

        Call it anew in every forward pass, warm-up and capture included: the first layer then launches the kernel that
        plans the splits, inside the graph, and later layers share its result. Nothing is copied.

        Args:
            block_tables: int32 [B, max_blocks].
            context_lens: int32 [B]; 0 for padding.
            slot_mapping: int64 [B]; -1 for padding.
        """
        if not self._deterministic:
            return StepMeta(slot_mapping, DecodeMeta(block_tables, context_lens), None)
        rows = torch.arange(len(context_lens), dtype=torch.int32, device=self._device)
        return StepMeta(
            slot_mapping, None, ChunkMeta(block_tables, context_lens, rows, torch.ones_like(rows), host_lens=None)
        )

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, spec: LayerSpec, meta: StepMeta
    ) -> torch.Tensor:
        """Attention of one layer; shapes as in `AttentionBackend.forward`."""
        write_cache(k, v, kv, meta.slot_mapping)
        return self.attend(q, kv, spec, meta)

    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        spec: LayerSpec,
        meta: StepMeta,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention over keys and values that are already in their slots.

        Args:
            q: [heads, T, head_dim], any strides but 1 in the last dimension (so [T, heads, head_dim].transpose(0, 1)).
            kv: The layer's cache, [2, kv_heads, blocks, block_size, head_dim].
            spec: What this layer computes.
            meta: The step.
            out: [T, heads, head_dim] to write to, contiguous; made where None.

        Returns:
            [T, heads, head_dim]. Rows of no sequence are left as they were.
        """
        q = q if q.stride(2) == 1 else q.contiguous()
        heads, rows, dim = q.shape
        if out is None:
            out = q.new_empty(rows, heads, dim)
        if meta.decodes is not None:
            plan = self._plan(meta.decodes, kv.shape[1], spec.window)
            decode_attention(
                q, kv, out, meta.decodes.block_tables, meta.decodes.rows, plan,
                scale=spec.scale, softcap=spec.softcap, sinks=spec.sinks,
            )  # fmt: skip
        if meta.chunks is not None:
            self._attend_chunks(q, kv, spec, meta.chunks, out)
        return out

    def _attend_chunks(
        self, q: torch.Tensor, kv: torch.Tensor, spec: LayerSpec, chunks: ChunkMeta, out: torch.Tensor
    ) -> None:
        group = q.shape[0] // kv.shape[1]
        tile = query_tile(q.shape[2], q.dtype, kv.dtype == torch.uint8, self._hopper)
        key = (group, tile.rows)
        if key not in chunks.tiles:
            if chunks.host_lens is None:
                chunks.tiles[key] = list_decode_tiles(len(chunks.context_lens), group, tile.rows, self._device)
            else:
                (chunks.tiles[key],) = self._upload(list_tiles(*chunks.host_lens, group, tile.rows))
        prefill_attention(
            q, kv, out, chunks.block_tables, chunks.context_lens, chunks.query_starts, chunks.query_lens,
            chunks.tiles[key], tile, scale=spec.scale, window=spec.window, softcap=spec.softcap, sinks=spec.sinks,
            deterministic=self._deterministic,
        )  # fmt: skip

    def _plan(self, decodes: DecodeMeta, kv_heads: int, window: int | None) -> SplitPlan:
        """How the step's decoding is cut; layers of one window share it."""
        key = (window, kv_heads)
        if key not in decodes.plans:
            decodes.plans[key] = plan_splits(decodes.context_lens, kv_heads, window, self._multiprocessors)
        return decodes.plans[key]

    def _upload(self, *arrays: npt.NDArray[Any]) -> list[torch.Tensor]:
        """Arrays on the device, by one copy: in pinned memory it needs no waiting, and torch keeps it until then."""
        tensors = [torch.from_numpy(np.ascontiguousarray(one)) for one in arrays]
        ends = np.cumsum([-(-one.nbytes // _ALIGNMENT) * _ALIGNMENT for one in tensors]).tolist()
        staged = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=self._device.type == "cuda")

        def views(buffer: torch.Tensor) -> list[torch.Tensor]:
            starts = zip(tensors, [0, *ends], strict=False)
            return [buffer[at : at + one.nbytes].view(one.dtype).view(one.shape) for one, at in starts]

        for view, one in zip(views(staged), tensors, strict=True):
            view.copy_(one)
        return views(staged.to(self._device, non_blocking=True))
