"""Where keys and values lie: paged, head-major, taken from one allocation per layer geometry.

    layers of one geometry share    [2, layers, kv_heads, blocks, block_size, head_dim]
    layer(i) is the view            [2,         kv_heads, blocks, block_size, head_dim]     0 is keys, 1 values

Head-major, because attention reads one head's keys at a time and a block of one head is then contiguous. One
allocation, because a block can then be copied in all layers by one operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """What one layer stores for each token: a key and a value of `head_dim` for each of `kv_heads` heads."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def slot_bytes(self) -> int:
        """Bytes that one token's key and value take in this layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


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


def host_zeros(shape: Sequence[int], dtype: torch.dtype, pinned: bool) -> torch.Tensor:
    """A zeroed tensor in host memory; pinned memory is taken at once, and copied faster to and from a GPU."""
    if pinned:
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)
    return lazy_zeros(shape, dtype, torch.device("cpu"))


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
        self._pools: list[torch.Tensor] = []
        self._host: list[torch.Tensor] = []
        self._layers: list[torch.Tensor] = [torch.empty(0)] * len(layers)
        for geometry in dict.fromkeys(layers):
            members = [number for number, layer in enumerate(layers) if layer == geometry]
            shape = (2, len(members), geometry.kv_heads, num_blocks, block_size, geometry.head_dim)
            pool = lazy_zeros(shape, geometry.dtype, device)
            self._pools.append(pool)
            if num_host_blocks:
                shape = (2, len(members), geometry.kv_heads, num_host_blocks, block_size, geometry.head_dim)
                self._host.append(host_zeros(shape, geometry.dtype, pinned=device.type == "cuda"))
            for place, number in enumerate(members):
                self._layers[number] = pool[:, place]

    def layer(self, number: int) -> torch.Tensor:
        """One layer's cache, [2, kv_heads, blocks, block_size, head_dim]."""
        return self._layers[number]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination) each, keys and values of all layers.

        All sources are read before any destination is written.
        """
        if not copies:
            return
        pairs = torch.tensor(copies, dtype=torch.int64)
        for pool in self._pools:
            sources, destinations = pairs.to(pool.device).unbind(1)
            pool.index_copy_(3, destinations, pool.index_select(3, sources))

    def swap_out(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks to host memory, (device, host) each, keys and values of all layers."""
        sources, destinations = torch.tensor(moves, dtype=torch.int64).unbind(1)
        for pool, host in zip(self._pools, self._host, strict=True):
            host.index_copy_(3, destinations, pool.index_select(3, sources.to(pool.device)).to(host.device))

    def swap_in(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks back from host memory, (host, device) each."""
        sources, destinations = torch.tensor(moves, dtype=torch.int64).unbind(1)
        for pool, host in zip(self._pools, self._host, strict=True):
            pool.index_copy_(3, destinations.to(pool.device), host.index_select(3, sources).to(pool.device))

    @property
    def nbytes(self) -> int:
        """Bytes of all pools (on a CPU: reserved, not necessarily touched)."""
        return sum(pool.nbytes for pool in self._pools)

    def free(self) -> None:
        """Drop the tensors. The storage cannot be used afterwards."""
        self._pools.clear()
        self._host.clear()
        self._layers.clear()


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
