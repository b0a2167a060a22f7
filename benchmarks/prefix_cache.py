"""What prefix caching costs where nothing is ever found: unrelated prompts through the real engine, three ways.

    python benchmarks/prefix_cache.py [--repeats 9] [--requests 64] [--output benchmarks/results/prefix_cache.md]

- caching on;
- caching off: blocks are still hashed and indexed (a preempted request finds its own again), but none is kept;
- no hashing at all: what seals, hashes and looks up blocks is taken out.

Each repeat runs the three on the same new prompts, in an order that rotates, and ratios are taken within a repeat, so
that a machine whose speed drifts does not decide. A ratio of two runs is noisy still; the share of the engine thread's
CPU time that is spent on hashing and the index is measured as well, by timers around the functions, whose own cost
makes it an upper bound.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

import pagedllm_core
from pagedllm_core.config import EngineConfig
from pagedllm_core.engine import Engine
from pagedllm_core.intake import Intake
from pagedllm_core.kv.pool import BlockPool
from pagedllm_core.kv.table import BlockTable
from pagedllm_core.params import SamplingParams
from pagedllm_core.request import Request, Sequence
from pagedllm_core.scheduler import Scheduler

PROMPT_TOKENS, NEW_TOKENS = 256, 32
POOL = 1.5  # of the blocks that one run fills, so that from the second run on blocks are evicted, as in a long run
ON, OFF, BARE = "caching on", "caching off", "no hashing at all"
# All that exists for the sake of finding blocks. Some of it would do something even so, which is counted here as well.
HASHING = [
    (Intake, "_root_hash"),
    (Scheduler, "_reuse"),
    (Scheduler, "_blocks_to_catch_up"),
    (Sequence, "block_hash"),
    (BlockTable, "seal"),
    (BlockPool, "commit"),
    (BlockPool, "_forget"),
]


def blocks_to_catch_up(scheduler: Scheduler, request: Request) -> int:
    """What `Scheduler._blocks_to_catch_up` comes to where nothing can be found."""
    return sum(-(-sequence.num_tokens // scheduler.block_size) for sequence in request.active)


@contextlib.contextmanager
def no_hashing() -> Iterator[None]:
    """Take out what hashes, seals and looks up."""
    replacements: dict[str, Any] = {
        "_root_hash": lambda *arguments: b"",
        "_blocks_to_catch_up": blocks_to_catch_up,
        "block_hash": lambda *arguments: b"",
    }
    with contextlib.ExitStack() as stack:
        for owner, name in HASHING:
            stack.enter_context(mock.patch.object(owner, name, replacements.get(name, lambda *arguments: None)))
        yield


class Timers:
    """Seconds of this thread's CPU time, and calls, in functions; of nested ones the outermost counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._inside = False

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            if self._inside:
                return function(*arguments, **named)
            self._inside = True
            started = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[function.__qualname__] += time.thread_time() - started
                self.calls[function.__qualname__] += 1
                self._inside = False

        return timed

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time everything that hashes, seals and looks up."""
        with contextlib.ExitStack() as stack:
            for owner, name in HASHING:
                stack.enter_context(mock.patch.object(owner, name, self.around(getattr(owner, name))))
            yield


def run(engine: Engine, prompts: list[list[int]]) -> None:
    """Answer every prompt."""
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    for prompt in prompts:
        engine.add(prompt, params, stream=False)
    while engine.has_unfinished:
        engine.step()


def measure(
    repeats: int, requests: int, threads: int | None
) -> tuple[dict[str, list[float]], dict[str, list[float]], float, Timers, Engine]:
    """Seconds and seconds of CPU time of each way in each repeat, and the timed runs' CPU seconds and timers."""
    kilobytes = 5 * requests * (PROMPT_TOKENS + NEW_TOKENS)  # 5 layers of 2 x 2 heads x 64 x 4 bytes
    memory = int(POOL * 1024 * kilobytes)
    fields: dict[str, Any] = {"model": "tiny", "dtype": "float32", "kv_cache_memory": memory, "num_threads": threads}
    on = Engine(EngineConfig(**fields))
    engines = {
        ON: on,
        OFF: Engine(EngineConfig(**fields, enable_prefix_caching=False)),
        BARE: Engine(EngineConfig(**fields)),
    }
    generator = random.Random(0)
    wall: dict[str, list[float]] = {name: [] for name in engines}
    cpu: dict[str, list[float]] = {name: [] for name in engines}
    timers, timed = Timers(), 0.0
    for repeat in range(-1, repeats):  # the first round is not measured
        prompts = [[generator.randrange(on.runner.vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(requests)]
        for place in range(3):
            name = list(engines)[(repeat + place) % 3]
            with no_hashing() if name == BARE else contextlib.nullcontext():
                started, started_cpu = time.perf_counter(), time.process_time()
                run(engines[name], prompts)
                if repeat >= 0:
                    wall[name].append(time.perf_counter() - started)
                    cpu[name].append(time.process_time() - started_cpu)
        unseen = [[(token + 1) % on.runner.vocab_size for token in prompt] for prompt in prompts]
        with timers.running():
            started_cpu = time.thread_time()
            run(on, unseen)
            timed += time.thread_time() - started_cpu
    return wall, cpu, timed, timers, on


def table(wall: dict[str, list[float]], cpu: dict[str, list[float]], timed: float, timers: Timers) -> str:
    """Markdown: medians and ratios to the run without hashing, then the timers."""

    def ratios(values: dict[str, list[float]], name: str) -> str:
        found = [value / base for value, base in zip(values[name], values[BARE], strict=True)]
        return f"{statistics.median(found):.3f} ({min(found):.3f} - {max(found):.3f})"

    lines = [
        "| | seconds | to no hashing (least - most) | CPU seconds | to no hashing (least - most) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in wall:
        seconds, cpu_seconds = statistics.median(wall[name]), statistics.median(cpu[name])
        lines.append(f"| {name} | {seconds:.2f} | {ratios(wall, name)} | {cpu_seconds:.2f} | {ratios(cpu, name)} |")
    share = sum(timers.seconds.values()) / timed
    lines += ["", f"With caching on, hashing and the index take {share:.2%} of the engine thread's CPU time:", ""]
    lines += ["| function | calls | microseconds each | share |", "| --- | --- | --- | --- |"]
    for name, seconds in sorted(timers.seconds.items(), key=lambda item: -item[1]):
        calls = timers.calls[name]
        lines.append(f"| `{name}` | {calls} | {seconds / calls * 1e6:.1f} | {seconds / timed:.3%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's default if left out")
    parser.add_argument("--note", default="", help="a sentence for the table's head")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    wall, cpu, timed, timers, engine = measure(arguments.repeats, arguments.requests, arguments.threads)
    stats = engine.stats()
    head = (
        "# Prefix caching where nothing is found\n\n"
        f"{arguments.requests} unrelated prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new tokens each, on the "
        f"bundled model, float32, a pool of {stats.kv_blocks_total} blocks of {engine.config.block_size} tokens; "
        f"{stats.prefix_cache_hits} of {stats.prefix_cache_queries} tokens found, {stats.preemptions} preemptions. "
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, pagedllm-core {pagedllm_core.__version__}, "
        f"{torch.get_num_threads()} threads, {arguments.repeats} interleaved repeats, medians. {arguments.note}"
    )
    text = f"{head.strip()}\n\n{table(wall, cpu, timed, timers)}"
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
