"""The property tests for as long as you like; the default suite runs a part of each.

    python -m tests.soak pool --operations 10000000     # random operations against `tests/pool_model.py`
    python -m tests.soak simulator --seeds 10000        # random traffic of 200 requests each, `tests/traffic.py`
    PAGEDLLM_EXAMPLES=5000 python -m pytest --timeout 0 tests/property/test_state_machines.py

`--first` starts at another seed, to repeat a failure or to go on. Exits with 1 at the first failure.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time
import traceback
from collections.abc import Callable

from tests.pool_model import EPISODE, PoolModel
from tests.traffic import simulate

EVERY = 30.0  # seconds between two lines of progress


def pool_episode(seed: int, operations: int = EPISODE) -> int:
    """Random operations on one pool, which is whole at the end; returns how many there were."""
    model = PoolModel(seed)
    model.run(operations)
    model.drain()
    return operations


def soak(what: str, name: str, goal: int, first: int, episode: Callable[[int], int]) -> int:
    """Run episodes seed by seed until their counts reach `goal`; returns an exit status."""
    started = told = time.monotonic()
    done = 0
    for seed in itertools.count(first):
        if done >= goal:
            break
        try:
            done += episode(seed)
        except Exception:
            traceback.print_exc()
            print(f"{what}: seed {seed} failed after {done} {name}")
            return 1
        if time.monotonic() - told > EVERY:
            told = time.monotonic()
            print(f"{what}: {done} {name}, next seed {seed + 1}, {told - started:.0f} s", flush=True)
    wall, cpu = time.monotonic() - started, time.process_time()
    print(f"{what}: {done} {name} without a failure in {wall:.0f} s ({cpu:.0f} s of CPU time)")
    return 0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parts = parser.add_subparsers(dest="part", required=True)
    pool = parts.add_parser("pool", help="random operations on the block pool")
    pool.add_argument("--operations", type=int, default=10_000_000)
    simulator = parts.add_parser("simulator", help="random traffic through the scheduler")
    simulator.add_argument("--seeds", type=int, default=10_000)
    simulator.add_argument("--requests", type=int, default=200)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # requests that end for want of blocks are part of the traffic
    if arguments.part == "pool":
        return soak("pool", "operations", arguments.operations, arguments.first, pool_episode)
    return soak(
        "simulator",
        "seeds",
        arguments.seeds,
        arguments.first,
        lambda seed: min(1, simulate(seed, seed % 2 == 1, arguments.requests)),
    )


if __name__ == "__main__":
    sys.exit(main())
