"""Where keys and values lie: paged, head-major, taken from one allocation per layer geometry.

    layers of one geometry share    [2, layers, kv_heads, blocks, block_size, head_dim]
    layer(i) is the view            [2,         kv_heads, blocks, block_size, head_dim]     0 is keys, 1 values

Head-major, because attention reads one head's keys at a time and a block of one head is then contiguous. One
allocation, because a block can then be copied in all layers by one operation.

Where keys and values are rounded to eight bits, a pool is one of bytes, wider by one scale for each token and head, and
whoever reads it knows where in a block the scales lie (kernels/cache.py). Copies move them with their block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from pagedllm_core.errors import CapacityError
from pagedllm_core.kernels import has_triton

SCALE_BYTES = 4
"""Bytes of the float32 scale of one token's key, or value, in one head of an fp8 cache."""


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """What one layer stores for each token: a key and a value of `head_dim` for each of `kv_heads` heads.

    With `dtype=torch.float8_e4m3fn` each has a scale, too, and the pool's type is uint8.
    """

    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def stored(self) -> tuple[torch.dtype, int]:
        """Type of the pool, and its elements for one token's key (or value) in one head."""
        if self.dtype == torch.float8_e4m3fn:
            return torch.uint8, self.head_dim + SCALE_BYTES
        return self.dtype, self.head_dim

    def slot_bytes(self) -> int:
        """Bytes that one token's key and value take in this layer."""
        dtype, width = self.stored
        return 2 * self.kv_heads * width * dtype.itemsize


def block_bytes(layers: Sequence[LayerGeometry], block_size: int) -> int:
    """Bytes that one block takes in all layers together."""
    return block_size * sum(layer.slot_bytes() for layer in layers)


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A zeroed tensor; on a CPU its pages are not touched until they are written.

    `torch.zeros` may fill the memory by hand; numpy asks calloc, which gets untouched zero pages for large sizes.
    """
    if device.type != "cpu":
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    alignment = 64
    size = math.prod(shape) * dtype.itemsize
    raw = torch.from_numpy(np.zeros(size + alignment, dtype=np.uint8))
    start = -raw.data_ptr() % alignment
    return raw[start : start + size].view(dtype).view(tuple(shape))


def pin(memory: torch.Tensor) -> None:
    """Lock host memory, so that a GPU reads and writes it directly; to be undone with `unpin`.

    torch's own pinned memory is rounded up to a power of two and kept by the process when a tensor is gone.

    Raises:
        CapacityError: The system does not lock that much.
    """
    status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if status:
        with suppress(RuntimeError):  # the error stays until torch takes it for that of the next kernel
            torch.ones(1, device="cuda")
        raise CapacityError(
            f"swap_space: {memory.nbytes / 2**30:.1f} GiB of host memory cannot be locked for the GPU (CUDA error "
            f"{status}); give less, or 0 to recompute what is preempted"
        )


def unpin(memory: torch.Tensor) -> None:
    """Give locked memory back to the system."""
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())))


class KVStorage:
    """The paged keys and values of every layer.

    Args:
        layers: One geometry per attention layer, in the order in which the model calls them.
        num_blocks: Blocks in the pool.
        block_size: Tokens in a block.
        device: Where the storage lies.
        num_host_blocks: Blocks in host memory, for swapping; pinned where the device is a CUDA device.
    """

    def __init__(
        self,
        layers: Sequence[LayerGeometry],
        num_blocks: int,
        block_size: int,
        device: torch.device,
        num_host_blocks: int = 0,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._pinned: list[torch.Tensor] = []
        self._pools: list[torch.Tensor] = []
        self._host: list[torch.Tensor] = []
        self._layers: list[torch.Tensor] = [torch.empty(0)] * len(layers)
        for geometry in dict.fromkeys(layers):
            members = [number for number, layer in enumerate(layers) if layer == geometry]
            dtype, width = geometry.stored
            shape = (2, len(members), geometry.kv_heads, num_blocks, block_size, width)
            pool = lazy_zeros(shape, dtype, device)
            self._pools.append(pool)
            if num_host_blocks:
                shape = (2, len(members), geometry.kv_heads, num_host_blocks, block_size, width)
                self._host.append(lazy_zeros(shape, dtype, torch.device("cpu")))
                if device.type == "cuda":
                    pin(self._host[-1])
                    self._pinned.append(self._host[-1])
            for place, number in enumerate(members):
                self._layers[number] = pool[:, place]

    def layer(self, number: int) -> torch.Tensor:
        """One layer's cache, [2, kv_heads, blocks, block_size, head_dim]; of fp8, bytes with head_dim + 4."""
        return self._layers[number]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination) each, keys and values of all layers.

        All sources are read before any destination is written.
        """
        if not copies:
            return
        disjoint = not {source for source, _ in copies} & {destination for _, destination in copies}
        for pool in self._pools:
            if disjoint:
                _copy(pool, pool, copies)
            else:  # a kernel's programs could read what others have written
                _copy_by_torch(pool, pool, copies)

    def swap_out(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks to host memory, (device, host) each, keys and values of all layers.

        On a CUDA device the copy is queued on the current stream.
        """
        for pool, host in zip(self._pools, self._host, strict=True):
            _copy(pool, host, moves)

    def swap_in(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks back from host memory, (host, device) each; queued like `swap_out`."""
        for pool, host in zip(self._pools, self._host, strict=True):
            _copy(host, pool, moves)

    @property
    def nbytes(self) -> int:
        """Bytes of all pools (on a CPU: reserved, not necessarily touched)."""
        return sum(pool.nbytes for pool in self._pools)

    def __del__(self, suppress: type[suppress[None]] = suppress) -> None:  # type: ignore[type-arg]
        with suppress(Exception):  # the interpreter may be going, and this module's names with it
            self.free()

    def free(self) -> None:
        """Drop the tensors, and unlock what was locked. The storage cannot be used afterwards."""
        with suppress(RuntimeError):  # of a device that computes no more
            while self._pinned:
                torch.cuda.synchronize(self._pools[0].device)  # nothing may be under way
                unpin(self._pinned.pop())
        self._pools.clear()
        self._host.clear()
        self._layers.clear()


def _copy(source: torch.Tensor, destination: torch.Tensor, copies: Sequence[tuple[int, int]]) -> None:
    """Copy blocks between pools (or in one), (source, destination) each; no block may be both read and written."""
    device = source.device if source.is_cuda else destination.device
    if device.type != "cuda" or not has_triton():
        return _copy_by_torch(source, destination, copies)
    from pagedllm_core.kernels.blocks import copy_blocks

    pairs = torch.tensor(copies, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
    copy_blocks(source, destination, pairs)


def _copy_by_torch(source: torch.Tensor, destination: torch.Tensor, copies: Sequence[tuple[int, int]]) -> None:
    """All sources are read before any destination is written."""
    sources, destinations = torch.tensor(copies, dtype=torch.int64).unbind(1)
    taken = source.index_select(3, sources.to(source.device)).to(destination.device)
    destination.index_copy_(3, destinations.to(destination.device), taken)


def write_slots(kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """Put each token's key and value into its slot.

    Args:
        kv: One layer's cache, [2, kv_heads, blocks, block_size, head_dim].
        k: [kv_heads, T, head_dim].
        v: [kv_heads, T, head_dim].
        slots: int64 [T], block * block_size + offset, on the device of `kv`.
    """
    keys, values = kv.flatten(2, 3).unbind(0)
    keys.index_copy_(1, slots, k)
    values.index_copy_(1, slots, v)
