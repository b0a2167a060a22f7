"""Two reference models of the KV block pool, in plain lists and dictionaries, each beside a real pool.

`PoolModel` is lean: it predicts the pool alone and compares after every operation in constant time. `TableModel` works
through block tables and keeps what the slots hold, so that a wrong block is seen as a wrong token.
"""

from __future__ import annotations

import random
from collections import deque

from pagedllm_core.kv.hashing import chain_hash, root_hash
from pagedllm_core.kv.pool import BlockPool
from pagedllm_core.kv.table import BlockTable

POOL_SIZES = (2, 3, 7, 40, 300)
EPISODE = 100_000
"""Operations on one pool, before a new one of another size takes its place."""

STRETCH = 4_000
"""Operations between two full checks; the weights of the operations change as often."""


class PoolModel:
    """Random operations on one pool, each compared with what the pool promises.

    Args:
        seed: Of the operations, the pool's size and whether it retains blocks.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        total = self.random.choice(POOL_SIZES)
        self.retain = self.random.random() < 0.8
        self.pool = BlockPool(total, self.retain)
        self.hashes = [b"content %d" % number for number in range(total + 2)]
        self.held: list[int] = []  # one entry for each reference
        self.readers = [0] * total
        self.sealed: list[bytes | None] = [None] * total
        self.found: dict[bytes, int] = {}
        self.pending: set[int] = set()
        self.free = set(range(total))
        self.cached: dict[int, int] = {}  # block to the time at which its last reader left
        self.departures: deque[tuple[int, int]] = deque()  # (time, block), outdated entries included
        self.now = 0

    def run(self, operations: int) -> None:
        """Do that many random operations."""
        pool, free, cached = self.pool, self.free, self.cached
        actions = (self.allocate, self.share, self.acquire, self.seal, self.release, self.commit, self.withdraw)
        while operations > 0:
            count = min(operations, STRETCH)
            weights = (3, 1, 2, 4, self.random.choice((2, 4, 8)), 0.5, self.random.choice((0, 0, 0.05)))
            for action in self.random.choices(actions, weights, k=count):
                action()
                if pool.num_free != len(free) or pool.num_cached != len(cached):
                    raise AssertionError(f"{pool.num_free} free, {pool.num_cached} cached after {action.__name__}")
            operations -= count
            self.check()

    def _pick(self) -> int:
        return self.held[int(self.random.random() * len(self.held))]

    def allocate(self) -> None:
        """Next to a held block where that is free, else any free block, else the one unread for longest."""
        after = self._pick() if self.held and self.random.random() < 0.7 else None
        if not self.free and not self.cached:
            try:
                self.pool.allocate(after)
            except MemoryError:
                return
            raise AssertionError("a block was handed out although all are in use")
        block = self.pool.allocate(after)
        if after is not None and after + 1 in self.free:
            right = block == after + 1
        elif self.free:
            right = block in self.free
        else:
            right = block == self._oldest()
        if not right or not self.pool.writable(block):
            raise AssertionError(f"block {block} was handed out after {after}")
        self.free.discard(block)
        if self.cached.pop(block, None) is not None:
            self._forget(block)
        self.readers[block] = 1
        self.held.append(block)

    def _oldest(self) -> int:
        while self.cached.get(self.departures[0][1]) != self.departures[0][0]:
            self.departures.popleft()
        return self.departures[0][1]

    def share(self) -> None:
        """One more reader of a block in use."""
        if not self.held:
            return self.allocate()
        if len(self.held) > 3 * len(self.readers):
            return self.release()
        block = self._pick()
        self.pool.share(block)
        return self._read(block)

    def acquire(self) -> None:
        """Look some content up, and read it where it is found."""
        wanted = self.hashes[int(self.random.random() * len(self.hashes))]
        block = self.pool.acquire(wanted)
        if block != self.found.get(wanted):
            raise AssertionError(f"{wanted!r} is in {self.found.get(wanted)}, but {block} was found")
        if block is not None:
            self.cached.pop(block, None)
            self._read(block)

    def _read(self, block: int) -> None:
        self.held.append(block)
        self.readers[block] += 1
        if self.pool.ref(block) != self.readers[block]:
            raise AssertionError(f"block {block} has {self.readers[block]} readers, not {self.pool.ref(block)}")

    def seal(self) -> None:
        """Fill a writable block; only one that is read once and not sealed is."""
        if not self.held:
            return self.allocate()
        block = self.held[-1] if self.random.random() < 0.5 else self._pick()
        writable = self.readers[block] == 1 and self.sealed[block] is None
        if self.pool.writable(block) != writable:
            raise AssertionError(f"block {block} is writable: {not writable}")
        if writable:
            content = self.hashes[int(self.random.random() * len(self.hashes))]
            self.pool.seal(block, content)
            self.sealed[block] = content
            self.found.setdefault(content, block)
            self.pending.add(block)
            self._compare(content)
        return None

    def release(self) -> None:
        """One reader leaves; the last leaves a block that is found later, or a free one."""
        if not self.held:
            return self.allocate()
        place = int(self.random.random() * len(self.held))
        block, self.held[place] = self.held[place], self.held[-1]
        self.held.pop()
        self.pool.release(block)
        self.readers[block] -= 1
        content = self.sealed[block]
        if self.readers[block]:
            pass
        elif self.retain and self._found_from_now_on(block):
            self.now += 1
            self.cached[block] = self.now
            self.departures.append((self.now, block))
        else:
            self._forget(block)
            self.free.add(block)
        if content is not None:
            self._compare(content)
        return None

    def _found_from_now_on(self, block: int) -> bool:
        content = self.sealed[block]
        return content is not None and block not in self.pending and self.found.setdefault(content, block) == block

    def commit(self) -> None:
        """The step succeeded."""
        self.pool.commit()
        self.pending.clear()

    def withdraw(self) -> None:
        """The step failed."""
        self.pool.withdraw()
        contents = [content for block in self.pending if (content := self.sealed[block]) is not None]
        for block in list(self.pending):
            self._forget(block)
        for content in contents:
            self._compare(content)

    def _forget(self, block: int) -> None:
        content = self.sealed[block]
        self.sealed[block] = None
        self.pending.discard(block)
        if content is not None and self.found.get(content) == block:
            del self.found[content]

    def _compare(self, content: bytes) -> None:
        if self.pool.lookup(content) != self.found.get(content):
            raise AssertionError(
                f"{content!r} is in {self.found.get(content)}, but {self.pool.lookup(content)} is found"
            )

    def check(self) -> None:
        """Compare everything."""
        self.pool.check([self.held])
        for content in self.hashes:
            self._compare(content)

    def drain(self) -> None:
        """Release everything; the pool must be whole."""
        self.commit()
        while self.held:
            self.release()
        self.check()
        if self.pool.num_used or (not self.retain and self.pool.num_cached):
            raise AssertionError("the pool is not whole")


class Sequence:
    """Tokens, and the blocks that hold them."""

    def __init__(self, tokens: list[int], table: BlockTable) -> None:
        self.tokens = tokens
        self.table = table


class TableModel:
    """Sequences of tokens over real block tables; every slot's content is kept, as a model's KV storage would.

    Args:
        total: Blocks.
        block_size: Tokens in a block.
        retain: As in `BlockPool`.
    """

    def __init__(self, total: int, block_size: int, retain: bool) -> None:
        self.pool, self.size = BlockPool(total, retain), block_size
        self.sequences: list[Sequence] = []
        self.slots = [-1] * (total * block_size)
        self.unsure: set[int] = set()  # slots assigned in the step that is under way

    def hashes(self, tokens: list[int]) -> list[bytes]:
        """The address of each full block."""
        chain = [root_hash("model")]
        for start in range(0, len(tokens) - self.size + 1, self.size):
            chain.append(chain_hash(chain[-1], tokens[start : start + self.size]))
        return chain[1:]

    def start(self) -> Sequence:
        """A sequence without tokens."""
        self.sequences.append(Sequence([], BlockTable(self.pool, self.size)))
        return self.sequences[-1]

    def write(self, sequence: Sequence, new: list[int]) -> None:
        """Compute tokens at the end of a sequence, where there are blocks for them."""
        tokens, table = sequence.tokens, sequence.table
        start, end = len(tokens), len(tokens) + len(new)
        needed = -(-end // self.size) - len(table) + (table.shared_tail(start) is not None)
        if needed > self.pool.num_available:
            return
        copy = table.reserve(start, end)
        if copy is not None:
            source, destination = (block * self.size for block in copy)
            self.slots[destination : destination + self.size] = self.slots[source : source + self.size]
            self.unsure.update(range(destination, destination + self.size))
        tokens.extend(new)
        for position, slot in enumerate(table.slots(start, end).tolist(), start):
            if not self.pool.writable(slot // self.size):
                raise AssertionError("a slot was assigned in a block that others read or that is sealed")
            self.slots[slot] = tokens[position]
            self.unsure.add(slot)
        chain = self.hashes(tokens)
        for index in range(start // self.size, end // self.size):
            table.seal(index, chain[index])

    def hit(self, wanted: list[int]) -> None:
        """Start a sequence with what is found of some tokens."""
        sequence = self.start()
        for index, block_hash in enumerate(self.hashes(wanted)):
            if not sequence.table.append_cached(block_hash):
                break
            sequence.tokens.extend(wanted[index * self.size : (index + 1) * self.size])

    def fork(self, sequence: Sequence) -> None:
        """A second sequence with the same past."""
        self.sequences.append(Sequence(sequence.tokens.copy(), sequence.table.fork()))

    def release(self, sequence: Sequence) -> None:
        """Drop a sequence."""
        sequence.table.release()
        self.sequences.remove(sequence)

    def commit(self) -> None:
        """The step succeeded."""
        self.pool.commit()
        self.unsure.clear()

    def fail(self) -> None:
        """The step failed: what it was to write is anything, and everybody is rewound."""
        self.pool.withdraw()
        for slot in self.unsure:
            self.slots[slot] = -1
        self.unsure.clear()
        while self.sequences:
            self.release(self.sequences[-1])

    def check(self) -> None:
        """Every sequence reads what it wrote, and the pool's invariants hold."""
        self.pool.check(sequence.table.ids.tolist() for sequence in self.sequences)
        for sequence in self.sequences:
            if [self.slots[slot] for slot in sequence.table.slots(0, len(sequence.tokens))] != sequence.tokens:
                raise AssertionError("a sequence reads something else than it wrote")

    def drain(self) -> None:
        """Release everything; the pool must be whole."""
        self.commit()
        while self.sequences:
            self.release(self.sequences[-1])
        self.check()
        if self.pool.num_used:
            raise AssertionError("the pool is not whole")
