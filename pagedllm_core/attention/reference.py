"""The slow, obvious attention that every other backend is tested against."""

from __future__ import annotations

import torch

from pagedllm_core.attention.base import ForwardBatch, LayerSpec
from pagedllm_core.kv.storage import write_slots


class ReferenceAttention:
    """One query at a time, in float64, straight from the definition.

    Args:
        device: Where the model and the storage lie.
        block_size: Tokens in a KV block.
    """

    def __init__(self, device: torch.device, block_size: int) -> None:
        self.device = device
        self.block_size = block_size

    def prepare(self, batch: ForwardBatch) -> ForwardBatch:
        """Nothing to build: the batch itself is what every layer needs."""
        return batch

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, spec: LayerSpec, meta: ForwardBatch
    ) -> torch.Tensor:
        """Attention of one layer; shapes as in `AttentionBackend.forward`."""
        write_slots(kv, k, v, torch.from_numpy(meta.slot_mapping).to(self.device))
        out = torch.empty(q.shape[1], q.shape[0], q.shape[2], dtype=q.dtype, device=q.device)
        for number, context in enumerate(meta.context_lens.tolist()):
            first, end = int(meta.query_starts[number]), int(meta.query_starts[number + 1])
            for row in range(first, end):
                position = context - (end - row)
                keys, values = self._visible(kv, meta.block_tables[number].tolist(), position, spec.window)
                out[row] = attend_one(q[:, row], keys, values, spec).to(q.dtype)
        return out

    def _visible(
        self, kv: torch.Tensor, table: list[int], position: int, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that a query at `position` sees, [kv_heads, N, head_dim] each."""
        lowest = 0 if window is None else max(0, position - window + 1)
        slots = [(table[p // self.block_size], p % self.block_size) for p in range(lowest, position + 1)]
        seen = torch.stack([kv[:, :, block, offset] for block, offset in slots], dim=2)
        return seen[0], seen[1]


def attend_one(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """One query over the keys it sees, in float64.

    Args:
        q: [heads, head_dim].
        keys: [kv_heads, N, head_dim].
        values: [kv_heads, N, head_dim].
        spec: Scale, soft-cap and sinks.

    Returns:
        float64 [heads, head_dim].
    """
    group = q.shape[0] // keys.shape[0]
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for head in range(q.shape[0]):
        scores = keys[head // group].double() @ q[head].double() * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        if spec.sinks is not None:
            scores = torch.cat([scores, spec.sinks[head : head + 1].double()])
        weights = torch.softmax(scores, dim=0)[: keys.shape[1]]
        out[head] = weights @ values[head // group].double()
    return out
