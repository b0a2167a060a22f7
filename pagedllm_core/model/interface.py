"""What the engine needs of a model; `ModelRunner` is the real one, tests bring their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pagedllm_core.attention.base import ForwardBatch

if TYPE_CHECKING:
    from pagedllm_core.decode.device import DeviceSampler


class Runner(Protocol):
    """A loaded model with its KV storage."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""

    @property
    def max_model_len(self) -> int:
        """Context limit in tokens."""

    @property
    def num_blocks(self) -> int:
        """KV blocks of the pool."""

    @property
    def num_host_blocks(self) -> int:
        """Blocks of host memory for preempted requests; may be 0."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The model's end tokens."""

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """Values of the model's generation configuration."""

    @property
    def tokenizer(self) -> Any:
        """A transformers tokenizer, or None."""

    @property
    def model_name(self) -> str:
        """Identity of the model, for the prefix cache."""

    @property
    def sampler(self) -> DeviceSampler | None:
        """Chooses tokens on the device, so that steps overlap; None where the host is the device."""

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """One forward pass; float32 [len(batch.logits_rows), vocab_size]."""

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination) each, as if all were read before any is written."""

    def swap_out(self, moves: list[tuple[int, int]]) -> None:
        """Copy whole blocks to host memory, (device, host) each."""

    def swap_in(self, moves: list[tuple[int, int]]) -> None:
        """Copy whole blocks back from host memory, (host, device) each."""

    def check_device(self) -> None:
        """Called after a step failed.

        Raises:
            EngineClosedError: No step can succeed any more.
        """

    def close(self) -> None:
        """Free the weights and the KV storage."""
