"""The block pool and its tables: random operations against reference models, and the rules one by one."""

from __future__ import annotations

import random

import pytest

from pagedllm_core.kv.hashing import root_hash
from pagedllm_core.kv.pool import BlockPool
from pagedllm_core.kv.table import BlockTable
from tests.pool_model import TableModel
from tests.soak import pool_episode


@pytest.mark.parametrize("part", range(5))
def test_ten_million_operations(part: int) -> None:
    """Pools of 2 to 300 blocks, 100 of them, in about 13 seconds; `python -m tests.soak pool` goes on from here."""
    for seed in range(part * 20, part * 20 + 20):
        assert pool_episode(seed) == 100_000


@pytest.mark.parametrize("seed", range(60))
def test_random_tables(seed: int) -> None:
    generator = random.Random(seed)
    model = TableModel(generator.choice([2, 5, 16, 40]), generator.choice([1, 2, 4]), retain=seed % 3 != 0)
    for _ in range(600):
        action = generator.choice(["start", "write", "write", "fork", "release", "commit", "hit", "fail"])
        tokens = generator.choices([0, 1], k=generator.randint(1, 3 * model.size))
        if action == "hit":
            model.hit(tokens)
        elif action == "commit":
            model.commit()
        elif action == "fail" and generator.random() < 0.1:
            model.fail()
        elif action == "start" or not model.sequences:
            model.write(model.start(), tokens)
        elif action == "write":
            model.write(generator.choice(model.sequences), tokens)
        elif action == "fork":
            model.fork(generator.choice(model.sequences))
        elif action == "release":
            model.release(generator.choice(model.sequences))
        model.check()
    model.drain()
    assert model.pool.num_cached == 0 or seed % 3 != 0


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
