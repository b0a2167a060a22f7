"""The one interface of all attention backends, and what a step tells them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer's attention computes, read from the model's own call.

    Attributes:
        scale: Factor on the query-key products.
        window: Sliding window in tokens (a query at position p sees keys p - window + 1 .. p), or None.
        softcap: Scores become softcap * tanh(scores / softcap), or None.
        sinks: One extra logit per query head that takes probability and gives no value, float [heads], or None.
        kv_group: Index of the layer in the KV storage.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    kv_group: int = 0


@dataclass(frozen=True, slots=True)
class CarriedTokens:
    """Input ids that only the device knows yet: `token_ids[rows] = tokens[sources]`.

    Attributes:
        rows: int64 [C], rows of the step.
        sources: int64 [C], places in `tokens`.
        tokens: int64 [D] on the device, what the step before chooses.
    """

    rows: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    tokens: torch.Tensor


@dataclass(slots=True)
class ForwardBatch:
    """One step's ragged batch: S sequences, T tokens in one row, on the host.

        token_ids    | a a a a | b | c c |          T = 7, S = 3
        query_starts   0         4   5     7         sequence s owns rows query_starts[s] : query_starts[s + 1]
        context_lens   4         9   20              keys each sequence has after this step, its new ones included

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T], position of each token in its sequence.
        slot_mapping: int64 [T], slot (block * block_size + offset) that receives each token's key and value.
        query_starts: int32 [S + 1], first row of each sequence.
        context_lens: int32 [S].
        block_tables: int32 [S, longest table], block ids in order, 0 beyond a sequence's own.
        logits_rows: int64 [L], rows whose logits are needed, in ascending order.
        carried: Input ids that are not in `token_ids`, or None.
    """

    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    slot_mapping: npt.NDArray[np.int64]
    query_starts: npt.NDArray[np.int32]
    context_lens: npt.NDArray[np.int32]
    block_tables: npt.NDArray[np.int32]
    logits_rows: npt.NDArray[np.int64]
    carried: CarriedTokens | None = None


class AttentionBackend(Protocol):
    """Writes a step's keys and values into their slots, then attends over the paged cache."""

    def prepare(self, batch: ForwardBatch) -> Any:
        """Build once per step what every layer needs (index tensors on the device); the result is `meta` below."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, spec: LayerSpec, meta: Any
    ) -> torch.Tensor:
        """Attention of one layer.

        Args:
            q: [heads, T, head_dim].
            k: [kv_heads, T, head_dim], after rotary embedding.
            v: [kv_heads, T, head_dim].
            kv: The layer's cache, [2, kv_heads, blocks, block_size, head_dim]; 0 is keys, 1 values.
            spec: What this layer computes.
            meta: What `prepare` returned for this step.

        Returns:
            [T, heads, head_dim].
        """
