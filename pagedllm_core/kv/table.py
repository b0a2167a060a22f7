"""One sequence's map from token position to KV slot.

position   0 .. 15 | 16 .. 31 | 32 .. 36        block_size = 16
ids          7          8          3            slot of position p = ids[p // 16] * 16 + p % 16
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedllm_core.kv.pool import BlockPool


class BlockTable:
    """The blocks of one sequence, in order; every entry holds one reference in the pool."""

    __slots__ = ("_ids", "_length", "_pool", "block_size")

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self.block_size = block_size
        self._ids = np.zeros(8, dtype=np.int32)
        self._length = 0

    def __len__(self) -> int:
        """Number of blocks."""
        return self._length

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """Block ids, int32 [blocks]; a view, valid until the next change."""
        return self._ids[: self._length]

    def slots(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """KV slots of positions `start` .. `end` - 1, int64."""
        positions = np.arange(start, end)
        return self._ids[positions // self.block_size] * np.int64(self.block_size) + positions % self.block_size

    def slot(self, position: int) -> int:
        """KV slot of one position."""
        return int(self._ids[position // self.block_size]) * self.block_size + position % self.block_size

    def room(self) -> int:
        """Positions that the table's blocks have slots for."""
        return self._length * self.block_size

    def shared_tail(self, start: int) -> int | None:
        """The block that must be copied before position `start` is written, because others read it; else None."""
        index = start // self.block_size
        if index >= self._length or self._pool.writable(int(self._ids[index])):
            return None
        return int(self._ids[index])

    def reserve(self, start: int, end: int) -> tuple[int, int] | None:
        """Assign slots for positions `start` .. `end` - 1, the first of which is the next to be written.

        Returns:
            The (source, destination) blocks of a copy that must happen before the write, or None.

        Raises:
            MemoryError: The pool is exhausted. Blocks taken so far stay in the table.
        """
        copy = None
        source = self.shared_tail(start)
        if source is not None:
            index = start // self.block_size
            destination = self._pool.allocate()
            self._ids[index] = destination
            self._pool.release(source)
            copy = (source, destination)
        while self.room() < end:
            last = int(self._ids[self._length - 1]) if self._length else None
            self.append(self._pool.allocate(after=last))
        return copy

    def append(self, block: int) -> None:
        """Take a block as the next one, with a reference that the caller got from the pool."""
        if self._length == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
        self._ids[self._length] = block
        self._length += 1

    def append_cached(self, block_hash: bytes) -> bool:
        """Take over the sealed block of this hash as the next one; False if there is none."""
        block = self._pool.acquire(block_hash)
        if block is None:
            return False
        self.append(block)
        return True

    def seal(self, index: int, block_hash: bytes) -> None:
        """Seal the table's block number `index`."""
        self._pool.seal(int(self._ids[index]), block_hash)

    def fork(self) -> BlockTable:
        """A second table over the same blocks; whoever writes next copies the last partial block."""
        other = BlockTable(self._pool, self.block_size)
        other._ids = self._ids.copy()
        other._length = self._length
        for block in self.ids.tolist():
            self._pool.share(block)
        return other

    def empty(self) -> BlockTable:
        """A table of the same pool without blocks."""
        return BlockTable(self._pool, self.block_size)

    def release(self) -> None:
        """Give every block back, the last first, so that tails are evicted before heads."""
        blocks = self.ids.tolist()
        self._length = 0
        for block in reversed(blocks):
            self._pool.release(block)
