"""Who owns which KV block: reference counts, free list, and the index of sealed blocks.

A block is in one of three states, and `free + cached + used == total` always:

    free    ref == 0, no hash              next to be handed out
    cached  ref == 0, hashed, computed     kept for a later hit, evicted least recently used first
    used    ref  > 0                       named by `ref` block tables

The one rule for memory: a slot is assigned for writing only in a block with `ref == 1 and hash is None`. When its last
slot is assigned the block is sealed: it gets its hash and is *pending* until the step that fills it has succeeded. A
pending block may be shared at once (every layer writes keys and values before it attends). If the step fails, all
pending blocks are withdrawn, so that nobody finds them again. Of two steps under way (`begin`) each commits its own.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable

FREE, CACHED, USED, SHARED = range(4)
"""What a block is on the block map; SHARED is a used block that several block tables name."""


class BlockPool:
    """Hands out the ids 0 .. total - 1. Not thread-safe: only the engine's thread touches it.

    Args:
        total: Number of blocks.
        retain: Keep sealed blocks after their last reader has gone (prefix caching across requests).
    """

    def __init__(self, total: int, retain: bool = True) -> None:
        self.total = total
        self._retain = retain
        self._ref = [0] * total
        self._hash: list[bytes | None] = [None] * total
        self._index: dict[bytes, int] = {}
        self._pending: deque[set[int]] = deque([set()])  # of each step under way, the oldest first
        # Ordered dictionaries, because a block leaves the middle in O(1): by a hit, or as a sequence's next neighbour.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(total))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody reads but a later request may find."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks named by at least one block table."""
        return self.total - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._free) + len(self._cached)

    def ref(self, block: int) -> int:
        """Number of block tables that name the block."""
        return self._ref[block]

    def writable(self, block: int) -> bool:
        """True where a slot of the block may be assigned for writing."""
        return self._ref[block] == 1 and self._hash[block] is None

    def allocate(self, after: int | None = None) -> int:
        """Hand out a block with `ref == 1` and no hash, the one next to `after` if that is free.

        Raises:
            MemoryError: No block is available; callers check `num_available` first.
        """
        if after is not None and after + 1 in self._free:
            block = after + 1
            del self._free[block]
        elif self._free:
            block, _ = self._free.popitem(last=False)
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        else:
            raise MemoryError(f"no KV block is available; all {self.total} are in use")
        self._ref[block] = 1
        return block

    def share(self, block: int) -> None:
        """Let one more block table name a block that is in use."""
        self._ref[block] += 1

    def lookup(self, block_hash: bytes) -> int | None:
        """The block sealed under this hash, or None. Does not pin it."""
        return self._index.get(block_hash)

    def acquire(self, block_hash: bytes) -> int | None:
        """Find a sealed block and pin it for one more block table, or None."""
        block = self._index.get(block_hash)
        if block is not None:
            if self._ref[block] == 0:
                del self._cached[block]
            self._ref[block] += 1
        return block

    def release(self, block: int) -> None:
        """Drop one reference. The last one makes the block cached (if sealed and computed) or free."""
        self._ref[block] -= 1
        if self._ref[block] > 0:
            return
        if self._stays(block):
            self._cached[block] = None
        else:
            self._forget(block)
            self._free[block] = None

    def _stays(self, block: int) -> bool:
        """True where a block that nobody reads can be found again; if its twin was evicted, it is from now on."""
        block_hash = self._hash[block]
        if block_hash is None or not self._retain or self._is_pending(block):
            return False
        return self._index.setdefault(block_hash, block) == block

    def seal(self, block: int, block_hash: bytes) -> None:
        """Give a block whose last slot was just assigned its hash; it is pending until `commit`.

        Where the same content is sealed already, the earlier block stays the one that is found.
        """
        self._hash[block] = block_hash
        self._index.setdefault(block_hash, block)
        self._pending[-1].add(block)

    def begin(self) -> None:
        """Another step is scheduled while one is under way: what it seals is pending until its own commit."""
        self._pending.append(set())

    def commit(self) -> None:
        """The oldest step under way succeeded: its sealed blocks are computed."""
        self._pending.popleft()
        if not self._pending:
            self._pending.append(set())

    def withdraw(self) -> None:
        """A step failed: nobody may find again what any step under way sealed. The caller rewinds the readers."""
        for block in set().union(*self._pending):
            self._forget(block)
        self._pending = deque([set()])

    def _is_pending(self, block: int) -> bool:
        return any(block in step for step in self._pending)

    def _forget(self, block: int) -> None:
        block_hash = self._hash[block]
        if block_hash is not None:
            if self._index.get(block_hash) == block:
                del self._index[block_hash]
            self._hash[block] = None
        for step in self._pending:
            step.discard(block)

    def block_map(self) -> bytes:
        """FREE, CACHED, USED or SHARED for each block. O(total), for looking at."""
        states = bytearray([SHARED if ref > 1 else USED if ref else FREE for ref in self._ref])
        for block in self._cached:
            states[block] = CACHED
        return bytes(states)

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Prove the invariants against every live block table. For tests; O(total).

        Raises:
            RuntimeError: An invariant does not hold; the message says which.
        """
        named = Counter(block for table in tables for block in table)
        for block in range(self.total):
            if named[block] != self._ref[block]:
                raise RuntimeError(f"block {block}: ref is {self._ref[block]}, but {named[block]} tables name it")
            places = (block in self._free) + (block in self._cached) + (self._ref[block] > 0)
            if places != 1:
                raise RuntimeError(f"block {block}: in {places} of free, cached, used; must be in exactly one")
            if block in self._free and self._hash[block] is not None:
                raise RuntimeError(f"block {block}: free, but still hashed")
            if self._is_pending(block) and self._ref[block] == 0:
                raise RuntimeError(f"block {block}: pending, but nobody reads it")
        for block_hash, block in self._index.items():
            if self._hash[block] != block_hash:
                raise RuntimeError(f"block {block}: the index names it under a hash that it does not have")
        for block in self._cached:
            block_hash_or_none = self._hash[block]
            if block_hash_or_none is None or self._index.get(block_hash_or_none) != block:
                raise RuntimeError(f"block {block}: cached, but cannot be found")
        if self.num_free + self.num_cached + self.num_used != self.total:
            raise RuntimeError("free + cached + used != total")
