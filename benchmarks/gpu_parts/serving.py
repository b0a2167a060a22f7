"""W1 to W5: PagedLLM against transformers' `generate` and its continuous batching, each a process of its own.

    W1  64 requests at once, lognormal lengths, about 160 tokens in and 128 out
    W2  32 requests at once that share 512 tokens, 64 more in, 64 out
    W3  a single stream, 128 in and 128 out
    W4  8 requests with 4 beams, 64 in and 64 out
    W5  32 requests that come at 8 a second, 160 in and 96 out: median latency

Token ids, greedy, end tokens ignored. Each repetition runs every system once, in an order that rotates, on prompts that
nobody has seen; before the first one each serves a fourth of every workload, which is not counted.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from compare import System
from peers.protocol import Work

from gpu_parts.machine import Context
from gpu_parts.shapes import CONFIGS, save

COLUMNS = {"serving": ["", "system", "seconds", "tokens/s", "first token, s", "PagedLLM is faster by", "bar"]}
WORKLOADS = ("W1", "W2", "W3", "W4", "W5")
OURS, CONTINUOUS = "pagedllm", "continuous"
SYSTEMS: list[tuple[str, list[str]]] = [(OURS, []), ("generate", []), (CONTINUOUS, []), (CONTINUOUS, ["--graphs"])]
GOALS = {"W1": 2.0, "W2": 2.0, "W3": 1.5}
_MOST_REPETITIONS = 5


def workload(name: str, vocabulary: int, seed: int, smoke: bool) -> Work:
    """The prompts of one repetition."""
    generator = random.Random(1000 * int(name[1]) + seed)
    small = 8 if smoke else 1

    def tokens(count: int) -> list[int]:
        return [generator.randrange(5, vocabulary) for _ in range(max(4, count // small))]

    def lognormal(mean: float, sigma: float) -> int:
        return max(4, round(mean * generator.lognormvariate(-sigma * sigma / 2, sigma)) // small)

    if name == "W1":
        count = 64 // small
        prompts = [tokens(small * lognormal(160, 0.5)) for _ in range(count)]
        return Work(prompts, [lognormal(128, 0.4) for _ in range(count)], [0.0] * count)
    if name == "W2":
        count, shared = 32 // small, tokens(512)
        return Work([shared + tokens(64) for _ in range(count)], [64 // small] * count, [0.0] * count)
    if name == "W3":
        return Work([tokens(128)], [128 // small], [0.0])
    if name == "W4":
        count = max(2, 8 // small)
        return Work([tokens(64) for _ in range(count)], [64 // small] * count, [0.0] * count, beams=4)
    count = 32 // small
    arrivals = list(itertools.accumulate((generator.expovariate(8.0) for _ in range(count - 1)), initial=0.0))
    return Work([tokens(160) for _ in range(count)], [96 // small] * count, arrivals)


def value(name: str, answer: dict[str, Any]) -> float:
    """What is compared: seconds of the whole, for W5 the median latency."""
    return float(statistics.median(answer["latencies"]) if name == "W5" else answer["total"])


def serving(context: Context) -> None:
    """All workloads on all systems, again and again while there is time."""
    shape: str = context.options["served"]
    config = CONFIGS[shape]()
    with tempfile.TemporaryDirectory() as folder:
        save(shape, Path(folder), context.dtype, context.device)
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
        systems = start(context, folder)
        try:
            answers = rounds(context, systems, config.vocab_size)
        finally:
            for system in systems:
                system.kill()  # nothing is left to do, and threads of some would go on
    for name in WORKLOADS:
        report(context, name, systems, answers)


def start(context: Context, folder: str) -> list[System]:
    """Ours on its own, so that its start is measured; then all others at once."""
    dtype, threads = str(context.dtype)[6:], 1 if context.smoke else 8

    def make(script: str, flags: list[str]) -> System | None:
        options = ["--dtype", dtype, "--device", context.device.type, *flags]
        log = Path(folder) / f"{script}{len(flags)}.log"
        with log.open("wb") as errors:
            try:
                system = System(script, sys.executable, folder, options, threads, errors)
            except Exception as error:
                told = log.read_text(errors="replace").strip().splitlines()[-1:]
                context.row(**{"": "start", "system": " ".join([script, *flags])}, error=f"{error}: {told}"[-300:])
                return None
        together = "" if script == OURS else " (together)"
        context.row(**{"": "start", "system": system.name, "seconds": f"{system.started_s:.1f}{together}"})
        return system

    first = make(*SYSTEMS[0])
    with ThreadPoolExecutor() as pool:
        others = list(pool.map(lambda one: make(*one), SYSTEMS[1:]))
    return [system for system in [first, *others] if system is not None]


Answers = dict[tuple[str, System], list[dict[str, Any]]]


def rounds(context: Context, systems: list[System], vocabulary: int) -> Answers:
    """Every system's answers to every workload; rounds that do not fit into the time are left out."""
    answers: Answers = {(name, system): [] for name in WORKLOADS for system in systems}
    longest = 0.0
    for repetition in range(-1, 1 if context.smoke else _MOST_REPETITIONS):
        if repetition > 0 and context.left() < 1.2 * longest:
            break
        begun = time.monotonic()
        for name, place in itertools.product(WORKLOADS, range(len(systems))):
            system = systems[(repetition + place) % len(systems)]
            work = workload(name, vocabulary, repetition, context.smoke)
            if repetition < 0:
                work.lengths = [max(2, length // 4) for length in work.lengths]
                work.arrivals = [0.0] * len(work.arrivals)
            answer = ask(context, system, work)
            if repetition >= 0:
                answers[name, system].append(answer)
        if repetition >= 0:
            longest = max(longest, time.monotonic() - begun)
    return answers


def ask(context: Context, system: System, work: Work) -> dict[str, Any]:
    """An answer, or why there is none. A system that does not answer in the time that is left is ended."""
    if context.left() <= 0:
        return {"unsupported": "no time was left"}
    watch = threading.Timer(max(5.0, context.left()), system.kill)
    watch.start()
    try:
        return system.serve(work)
    except Exception as error:
        return {"unsupported": f"{type(error).__name__}: {error}"[:200]}
    finally:
        watch.cancel()


def report(context: Context, name: str, systems: list[System], answers: Answers) -> None:
    """The rows of one workload: medians, and ratios within a repetition."""
    ours = next((answers[name, system] for system in systems if system.script == OURS), [])
    best: list[float] = []
    for system in systems:
        given = answers[name, system]
        pairs = [
            (one, value(name, one), value(name, mine) if "total" in mine else None)
            for one, mine in zip(given, ours or given, strict=True)
            if "total" in one
        ]
        if not pairs:
            why = given[0].get("unsupported", "") if given else "never asked"
            context.row(**{"": name, "system": system.name}, error=why)
            continue
        ratios = [theirs / mine for _, theirs, mine in pairs if mine]
        ratio = statistics.median(ratios) if ratios and system.script != OURS else None
        if system.script == CONTINUOUS and ratio is not None:
            best.append(ratio)
        tokens = statistics.median(sum(one["tokens"]) / one["total"] for one, _, _ in pairs)
        first = statistics.median(statistics.median(one["first"]) for one, _, _ in pairs)
        context.row(
            point=(system.name, int(name[1]), ratio or 1.0),
            **{
                "": name, "system": system.name, "tokens/s": f"{tokens:,.0f}", "first token, s": f"{first:.3f}",
                "seconds": f"{statistics.median(one for _, one, _ in pairs):.3f} ({len(pairs)} times)",
                "PagedLLM is faster by": f"{ratio:.2f} ({min(ratios):.2f} - {max(ratios):.2f})" if ratio else "–",
            },
        )  # fmt: skip
    if name in GOALS and best:
        goal = context.bar(f"{name} against continuous batching", GOALS[name], min(best), "×")
        context.row(**{"": name, "system": "the faster continuous batching"}, bar=goal)
