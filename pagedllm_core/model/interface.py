"""What the engine needs of a model; `ModelRunner` is the real one, tests bring their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from pagedllm_core.attention.base import ForwardBatch


class Runner(Protocol):
    """A loaded model with its KV storage.

    Attributes:
        vocab_size: Width of the logits.
        max_model_len: Context limit in tokens.
        num_blocks: KV blocks of the pool.
        eos_token_ids: The model's end tokens.
        generation_defaults: Values of the model's generation configuration.
        tokenizer: A transformers tokenizer, or None.
        model_name: Identity of the model, for the prefix cache.
    """

    vocab_size: int
    max_model_len: int
    num_blocks: int
    eos_token_ids: tuple[int, ...]
    generation_defaults: Mapping[str, Any]
    tokenizer: Any
    model_name: str

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """One forward pass; float32 [len(batch.logits_rows), vocab_size]."""

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination) each, as if all were read before any is written."""

    def close(self) -> None:
        """Free the weights and the KV storage."""
