"""The simulations behind `docs/paper.md`: they run what the real engine runs, and their parts are right."""

from __future__ import annotations

import itertools
import random

import pytest

from benchmarks.paper.baselines import Reservation, faster_transformer, orca
from benchmarks.paper.buddy import BuddyAllocator
from benchmarks.paper.paged import Simulation, TimedModel
from benchmarks.paper.workload import ALPACA, SHAREGPT, Job, jobs, lengths
from pagedllm_core.config import EngineConfig
from pagedllm_core.engine import Engine
from pagedllm_core.params import SamplingParams

BLOCKS = 24
Blocks = list[list[int]]


def block_tables(engine: Engine, work: list[Job], n: int, seed: int) -> list[tuple[int, Blocks]]:
    """Blocks in use, and every block table, after each step; a third of the jobs is there at first."""
    steps: list[tuple[int, Blocks]] = []
    waiting = list(work)
    while waiting or engine.has_unfinished:
        arrived, waiting = waiting[: len(work) // 3 if not steps else 1], waiting[len(work) // 3 if not steps else 1 :]
        for job in arrived:
            generator = random.Random(job.length + seed)
            prompt = [generator.randrange(2, 7) for _ in range(job.prompt)]
            temperature = 2.0 if n > 1 else 0.0  # samples that coincide would share blocks when they are recomputed
            params = SamplingParams(n=n, temperature=temperature, seed=seed, max_tokens=job.output, ignore_eos=True)
            engine.add(prompt, params, stream=False)
        engine.step()
        tables = [one.table.ids.tolist() for request in engine.scheduler.running for one in request.sequences]
        steps.append((engine.pool.num_used, tables))
    return steps


@pytest.mark.parametrize(("n", "block_size", "caching"), [(1, 16, False), (3, 4, False), (3, 8, True)])
def test_simulated_blocks_are_the_executed_ones(n: int, block_size: int, caching: bool) -> None:
    """The same work on the bundled model and on the one that only costs time, in a pool that is too small for it."""
    config = EngineConfig(
        model="tiny",
        block_size=block_size,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        enable_prefix_caching=caching,
        kv_cache_memory=BLOCKS * block_size * 5 * 2 * 2 * 64 * 4,  # layers, K and V, heads, head size, float32
        dtype="float32",
    )
    work = [Job(0, 3 * block_size + number % 7, 2 * block_size + number % 11) for number in range(9)]
    real = Engine(config)
    assert real.pool.total == BLOCKS
    model = TimedModel(BLOCKS, block_size)
    simulated = Engine(config, runner=model, clock=lambda: model.now)
    executed = block_tables(real, work, n, seed=n)
    assert block_tables(simulated, work, n, seed=n) == executed
    assert simulated.stats().preemptions == real.stats().preemptions > 0
    assert max(used for used, _ in executed) >= BLOCKS - 1
    real.close()


def test_buddies_never_overlap_and_come_together_again() -> None:
    generator = random.Random(0)
    pool, held = BuddyAllocator(1000), dict[int, int]()
    for _ in range(4000):
        if held and generator.random() < 0.5:
            start = generator.choice(list(held))
            del held[start]
            pool.release(start)
        else:
            size = generator.randint(1, 200)
            start = pool.allocate(size)
            if start is not None:
                held[start] = 1 << (size - 1).bit_length()
        ranges = sorted(held.items())
        assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(ranges))
        assert all(start % size == 0 and start + size <= 1000 for start, size in ranges)
        assert pool.free == 1000 - sum(held.values())
    for start in held:
        pool.release(start)
    assert [pool.allocate(size) for size in (512, 256, 128, 64, 32, 8)] == [0, 512, 768, 896, 960, 992]
    assert pool.allocate(1) is None


def test_lengths_have_the_published_means() -> None:
    found = lengths(338.0, 0.7, 2000, random.Random(0))
    assert sum(found) / len(found) == pytest.approx(338, rel=0.02)


def test_every_system_serves_everything_and_ours_holds_the_most() -> None:
    work = jobs(SHAREGPT, 120, 2.0)
    ours = Simulation().run(work)
    baselines = [orca(work, reservation) for reservation in Reservation] + [faster_transformer(work)]
    assert all(len(one.latencies) == 120 for one in [ours, *baselines])
    assert ours.latency < min(one.latency for one in baselines)
    assert ours.mean_batch > max(one.mean_batch for one in baselines)
    for one in baselines[:3]:
        assert sum(one.memory.shares()) == pytest.approx(100)


def test_ours_wastes_less_than_a_block_per_sequence() -> None:
    simulation = Simulation()
    shares = simulation.run(jobs(SHAREGPT, 150, float("inf"))).memory.shares()
    assert shares[0] >= 96
    assert simulation.sharing.saved == 0


def test_samples_share_their_prompt() -> None:
    simulation = Simulation(params={"n": 4, "temperature": 1.0})
    simulation.run([Job(0, 160, 16)] * 4)
    assert simulation.sharing.saved > 60
    assert Simulation().run(jobs(ALPACA, 40, 8.0)).seconds > 0
