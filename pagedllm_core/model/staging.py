"""How a step's arrays come to the device: packed into one pinned buffer, by one copy that nobody waits for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pagedllm_core.attention.base import CarriedTokens, ForwardBatch

_ALIGNED = 16  # bytes; kernels read that much at a time
Arrays = Sequence[npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class StepTensors:
    """One step on the device, as a model's forward pass reads it.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T].
        rows: int64 [L], the rows whose logits are wanted; None for all, in order.
        meta: What the attention backend needs.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor | None
    meta: Any


class Event(Protocol):
    """A mark in the work of a device, as `torch.cuda.Event`."""

    def record(self) -> None:
        """Put the mark behind all work so far."""

    def synchronize(self) -> None:
        """Wait until the device comes to it."""


class _Buffer:
    """A pinned buffer, and the mark behind the last copy from it."""

    def __init__(self, event: Event | None) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.event = event
        self.is_read = False

    def wait(self) -> None:
        """Until the buffer may be written."""
        if self.is_read and self.event is not None:
            self.event.synchronize()
        self.is_read = False

    def mark(self) -> None:
        """The copy has been queued."""
        if self.event is not None:
            self.event.record()
        self.is_read = True


class Staging:
    """Two pinned buffers, used in turn: a step can be staged while the copy of the one before is still queued.

    Args:
        device: Where the arrays go.
        event: Makes a mark in the device's work; by default CUDA events, and none on other devices.
    """

    def __init__(self, device: torch.device, event: Callable[[], Event] | None = None) -> None:
        self._device = device
        if event is None and device.type == "cuda":
            event = torch.cuda.Event
        self._buffers = [_Buffer(None if event is None else event()) for _ in range(2)]
        self._turn = 0

    def upload(self, arrays: Arrays, into: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Copy arrays to the device, on the current stream.

        Args:
            arrays: Any types and shapes.
            into: uint8 [at least `packed_size(arrays)`] on the device; new memory where None. Arrays of the same sizes
                always take the same places in it.

        Returns:
            The arrays on the device, views of `into`.
        """
        size = packed_size(arrays)
        self._turn ^= 1
        buffer = self._buffers[self._turn]
        buffer.wait()
        if buffer.memory.numel() < size:
            pinned = self._device.type == "cuda"
            buffer.memory = torch.empty(2 * size, dtype=torch.uint8, pin_memory=pinned)
        for place, array in zip(_views(buffer.memory, arrays), arrays, strict=True):
            np.copyto(place.numpy(), array)
        if into is None:
            into = torch.empty(size, dtype=torch.uint8, device=self._device)
        into[:size].copy_(buffer.memory[:size], non_blocking=True)
        buffer.mark()
        return _views(into, arrays)

    def stage(self, batch: ForwardBatch, meta: Any) -> StepTensors:
        """A step of any kind, in new memory; `meta` as the attention backend prepared it."""
        whole = np.array_equal(batch.logits_rows, np.arange(len(batch.token_ids)))
        arrays = [batch.token_ids, batch.positions, batch.logits_rows, *_places(batch.carried)]
        token_ids, positions, rows, *places = self.upload(arrays)
        carry(token_ids, batch.carried, places)
        return StepTensors(token_ids, positions, None if whole else rows, meta)


def packed_size(arrays: Arrays) -> int:
    """Bytes that arrays take one after the other."""
    return sum(_aligned(array.nbytes) for array in arrays)


def carry(token_ids: torch.Tensor, carried: CarriedTokens | None, places: Sequence[torch.Tensor]) -> None:
    """Fill in the input ids that only the device knows.

    Args:
        token_ids: int64 [T] on the device, changed in place.
        carried: Where they come from, or None.
        places: The rows and sources of `carried` on the device.
    """
    if carried is not None:
        rows, sources = places
        token_ids.index_copy_(0, rows, carried.tokens.index_select(0, sources))


def stage_token_ids(batch: ForwardBatch, device: torch.device) -> torch.Tensor:
    """A step's input ids on a device, without pinned memory: int64 [T]."""
    token_ids = torch.from_numpy(batch.token_ids).to(device, non_blocking=True)
    if batch.carried is not None:
        token_ids = token_ids.clone() if token_ids.device.type == "cpu" else token_ids  # not the batch's own memory
        carry(token_ids, batch.carried, [torch.from_numpy(one).to(device) for one in _places(batch.carried)])
    return token_ids


def _places(carried: CarriedTokens | None) -> list[npt.NDArray[np.int64]]:
    return [] if carried is None else [carried.rows, carried.sources]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _views(memory: torch.Tensor, arrays: Arrays) -> list[torch.Tensor]:
    """The places of arrays in a buffer of bytes, typed and shaped like them."""
    views, start = [], 0
    for array in arrays:
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        views.append(memory[start : start + array.nbytes].view(dtype).view(array.shape))
        start += _aligned(array.nbytes)
    return views
