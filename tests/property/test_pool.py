"""Random operations on the block pool against a model of plain dictionaries."""

from __future__ import annotations

import random

import pytest

from pagedllm_core.kv.hashing import chain_hash, root_hash
from pagedllm_core.kv.pool import BlockPool
from pagedllm_core.kv.table import BlockTable


class Model:
    """Sequences as lists of tokens over real block tables; what each block holds is kept beside the pool."""

    def __init__(self, seed: int, total: int, block_size: int, retain: bool) -> None:
        self.random = random.Random(seed)
        self.pool, self.size = BlockPool(total, retain), block_size
        self.sequences: list[tuple[list[int], BlockTable, list[bytes]]] = []
        self.content: dict[int, list[int]] = {}
        self.pending = False

    def hashes(self, tokens: list[int]) -> list[bytes]:
        chain = [root_hash("model")]
        for start in range(0, len(tokens) - self.size + 1, self.size):
            chain.append(chain_hash(chain[-1], tokens[start : start + self.size]))
        return chain

    def read(self, tokens: list[int], table: BlockTable) -> list[int]:
        found = [token for block in table.ids.tolist() for token in self.content[block]]
        return found[: len(tokens)]

    def write(self, tokens: list[int], table: BlockTable, new: list[int]) -> None:
        start, end = len(tokens), len(tokens) + len(new)
        needed = -(-end // self.size) - len(table) + (table.shared_tail(start) is not None)
        if needed > self.pool.num_available:
            return
        copy = table.reserve(start, end)
        if copy is not None:
            self.content[copy[1]] = list(self.content[copy[0]])
        tokens.extend(new)
        for position in range(start, end):
            block = int(table.ids[position // self.size])
            if not self.pool.writable(block):
                raise AssertionError("a slot was assigned in a block that others read or that is sealed")
            held = self.content.setdefault(block, [0] * self.size) if position % self.size else [0] * self.size
            held[position % self.size] = tokens[position]
            self.content[block] = held
        chain = self.hashes(tokens)
        for index in range(start // self.size, end // self.size):
            table.seal(index, chain[index + 1])
        self.pending = True

    def step(self) -> None:
        action = self.random.choice(["new", "append", "append", "fork", "free", "commit", "hit", "fail"])
        if action == "new" or not self.sequences:
            self.sequences.append(([], BlockTable(self.pool, self.size), []))
            return
        tokens, table, _ = chosen = self.random.choice(self.sequences)
        if action == "append":
            self.write(tokens, table, [self.random.randrange(2) for _ in range(self.random.randint(1, 2 * self.size))])
        elif action == "fork":
            self.sequences.append((tokens.copy(), table.fork(), []))
        elif action == "free":
            if self.pending:
                self.pool.commit()
                self.pending = False
            table.release()
            self.sequences.remove(chosen)
        elif action == "commit":
            self.pool.commit()
            self.pending = False
        elif action == "hit" and not tokens:
            wanted = [self.random.randrange(2) for _ in range(3 * self.size)]
            chain = self.hashes(wanted)
            for index in range(3):
                if not table.append_cached(chain[index + 1]):
                    break
                tokens.extend(wanted[index * self.size : (index + 1) * self.size])
        elif action == "fail" and self.random.random() < 0.1:
            self.pool.withdraw()
            self.pending = False
            for _, other, _ in self.sequences:
                other.release()
            self.sequences.clear()

    def check(self) -> None:
        self.pool.check(table.ids.tolist() for _, table, _ in self.sequences)
        for tokens, table, _ in self.sequences:
            if self.read(tokens, table) != tokens:
                raise AssertionError("a sequence reads something else than it wrote")


@pytest.mark.parametrize("seed", range(60))
def test_random_operations(seed: int) -> None:
    generator = random.Random(seed)
    model = Model(seed, generator.choice([2, 5, 16, 40]), generator.choice([1, 2, 4]), retain=seed % 3 != 0)
    for _ in range(600):
        model.step()
        model.check()
    model.pool.commit()
    for _, table, _ in model.sequences:
        table.release()
    model.pool.check([])
    assert model.pool.num_used == 0
    if seed % 3 == 0:
        assert model.pool.num_cached == 0


def test_least_recently_used_goes_first_and_tails_before_heads() -> None:
    pool = BlockPool(4)
    tables = [BlockTable(pool, 1) for _ in range(2)]
    for number, table in enumerate(tables):
        table.reserve(0, 2)
        for index in range(2):
            table.seal(index, bytes([number, index]))
    pool.commit()
    tables[1].release()
    tables[0].release()
    pool.allocate()
    assert pool.lookup(bytes([1, 1])) is None
    assert pool.lookup(bytes([1, 0])) is not None
    pool.allocate()
    assert pool.lookup(bytes([1, 0])) is None
    assert pool.lookup(bytes([0, 1])) is not None


def test_a_withdrawn_block_is_never_found() -> None:
    pool = BlockPool(4)
    table = BlockTable(pool, 2)
    table.reserve(0, 4)
    table.seal(0, b"first")
    assert pool.lookup(b"first") is not None  # found as soon as it is sealed
    pool.withdraw()
    assert pool.lookup(b"first") is None
    table.release()
    assert pool.num_free == 4


def test_neighbours_are_preferred() -> None:
    pool = BlockPool(10)
    first, second = BlockTable(pool, 1), BlockTable(pool, 1)
    first.reserve(0, 3)
    second.reserve(0, 1)
    assert first.ids.tolist() == [0, 1, 2]
    first.release()
    second.reserve(1, 4)
    assert second.ids.tolist() == [3, 4, 5, 6]


def test_an_exhausted_pool_raises() -> None:
    pool = BlockPool(1)
    pool.allocate()
    with pytest.raises(MemoryError, match="all 1 are in use"):
        pool.allocate()


def test_salt_and_parts_do_not_collide() -> None:
    roots = {root_hash("a", "b"), root_hash("ab", ""), root_hash("a", None), root_hash("a", ""), root_hash("ab", None)}
    assert len(roots) == 5
