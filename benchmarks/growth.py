"""How cost grows with the batch and with the context, and what int8 and `deterministic=True` change.

    python benchmarks/growth.py --shape 0.5b --threads 1 [--output benchmarks/results/growth_0.5b]
    python benchmarks/growth.py --shape 10m --threads 2 [--output benchmarks/results/growth_10m]

The engine is stepped by hand, on random weights. A batch decodes over short contexts; a single request is prefilled,
and then decodes, over longer and longer ones. The ways take turns, a few steps or one prefill each, and ratios are
taken between their medians. Greedy; nothing is found in the prefix cache.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from compare import SHAPES, Roof, processor
from peers.protocol import Work

import pagedllm_core
from pagedllm_core.config import EngineConfig
from pagedllm_core.engine import Engine
from pagedllm_core.params import SamplingParams

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
SHORT = 16  # tokens of context where the batch grows
ROUNDS, STEPS = 3, 4
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "int8": {"quantization": "int8"},
    "deterministic": {"deterministic": True},
}
Times = dict[str, list[float]]  # of each way, in the order of BATCHES or CONTEXTS


def prefill(engine: Engine, prompts: list[list[int]]) -> float:
    """Queue requests that decode without end, and step until each has its first token; returns the seconds."""
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    for prompt in prompts:
        engine.add(prompt, params)
    begun: set[str] = set()
    started = time.perf_counter()
    while len(begun) < len(prompts):
        begun |= {output.request_id for output in engine.step()}
    return time.perf_counter() - started


def fill(engines: dict[str, Engine], prompts: Callable[[], list[list[int]]]) -> dict[str, float]:
    """Median seconds of a prefill of each engine: three in turn where they are short. The last ones' requests go on."""
    seconds: Times = {way: [] for way in engines}
    while True:
        for way, engine in engines.items():
            seconds[way].append(prefill(engine, prompts()))
        if sum(map(sum, seconds.values())) > 10 or len(next(iter(seconds.values()))) == 3:
            return {way: statistics.median(found) for way, found in seconds.items()}
        for engine in engines.values():
            end(engine)


def end(engine: Engine) -> None:
    """Abort all that an engine runs."""
    for output in engine.step():
        engine.abort(output.request_id)
    engine.take_outputs()
    if engine.has_unfinished:
        raise RuntimeError("requests were left")


def decode(engines: dict[str, Engine]) -> dict[str, float]:
    """Median seconds of a step of each engine, some steps of each in turn; ends their requests."""
    seconds: Times = {way: [] for way in engines}
    ways = list(engines)
    for turn in range(ROUNDS):
        for place in range(len(ways)):
            way = ways[(turn + place) % len(ways)]
            for step in range(STEPS + 1):  # the first finds the processor's cache full of another's weights
                started = time.perf_counter()
                engines[way].step()
                if step:
                    seconds[way].append(time.perf_counter() - started)
    for engine in engines.values():
        end(engine)
    return {way: statistics.median(found) for way, found in seconds.items()}


def measure(engines: dict[str, Engine], vocab: int) -> tuple[Times, Times, Times]:
    """Seconds of a decode step by batch; of a whole prefill, and of a decode step after it, by context."""
    generator = random.Random(0)

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[generator.randrange(5, vocab) for _ in range(length)] for _ in range(count)]

    by_batch, first, by_context = ({way: [] for way in engines} for _ in range(3))  # type: tuple[Times, Times, Times]
    for engine in engines.values():
        prefill(engine, prompts(2, 32))  # unmeasured
    decode(engines)
    for batch in BATCHES:
        for engine in engines.values():
            prefill(engine, prompts(batch, SHORT))
        for way, seconds in decode(engines).items():
            by_batch[way].append(seconds)
        print(f"batch {batch}: " + ", ".join(f"{way} {times[-1] * 1e3:.2f} ms" for way, times in by_batch.items()))
    for context in CONTEXTS:
        for way, seconds in fill(engines, lambda size=context: prompts(1, size)).items():
            first[way].append(seconds)
        for way, seconds in decode(engines).items():
            by_context[way].append(seconds)
        print(
            f"context {context}: "
            + ", ".join(f"{way} {first[way][-1]:.3f} s, {by_context[way][-1] * 1e3:.2f} ms" for way in engines),
            flush=True,
        )
    return by_batch, first, by_context


def table(title: str, sizes: tuple[int, ...], times: Times, tokens: tuple[int, ...], roofs: list[float]) -> list[str]:
    """Lines of Markdown: milliseconds, tokens a second and share of the roof, and how the other ways compare."""
    own = times["default"]
    others = [way for way in times if way != "default"]
    lines = [
        f"| {title} | ms | tokens/s | of the roof | " + " | ".join(f"{way}, ms (× faster)" for way in others) + " |",
        "| ---: " * (4 + len(others)) + "|",
    ]
    for place, size in enumerate(sizes):
        compared = " | ".join(f"{times[way][place] * 1e3:.2f} ({own[place] / times[way][place]:.2f})" for way in others)
        share, speed = roofs[place] / own[place], tokens[place] / own[place]
        lines.append(f"| {size:,} | {own[place] * 1e3:.2f} | {speed:,.0f} | {share:.0%} | {compared} |")
    return lines


def draw(path: Path, title: str, by_batch: Times, by_context: Times) -> None:
    """Tokens a second over the batch, and a decode step's time over the context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for way, times in by_batch.items():
        left.plot(BATCHES, [batch / seconds for batch, seconds in zip(BATCHES, times, strict=True)], "o-", label=way)
        right.plot(CONTEXTS, [seconds * 1e3 for seconds in by_context[way]], "o-", label=way)
    left.set(xscale="log", xlabel="sequences in the batch", ylabel="tokens a second")
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter("{x:,.0f}")
    right.set(xscale="log", xlabel="tokens of context, one sequence", ylabel="ms for a decode step", ylim=(0, None))
    for axes, sizes in ((left, BATCHES), (right, CONTEXTS)):
        axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="10m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="the tables as .md and the chart as .png")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config, dtype = SHAPES[arguments.shape]
    config.max_position_embeddings = max(CONTEXTS) + 64
    roof = Roof.measure(getattr(torch, dtype))
    fields: dict[str, Any] = {
        "load_format": "dummy", "dtype": dtype, "num_threads": arguments.threads, "kv_cache_memory": "512MiB",
        "enable_prefix_caching": False, "generation_config": "none",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        engines = {way: Engine(EngineConfig(model=folder, **fields, **more)) for way, more in WAYS.items()}
    by_batch, first, by_context = measure(engines, config.vocab_size)
    for engine in engines.values():
        engine.close()
    width = getattr(torch, dtype).itemsize
    # A decode step is the work of one token for each of so many sequences; a prefill that of one step.
    steps = [roof.least_seconds(Work([[number] for number in range(batch)], [1] * batch, [0.0] * batch), config, width)
             for batch in BATCHES]  # fmt: skip
    fills = [roof.least_seconds(Work([list(range(size))], [1], [0.0]), config, width) for size in CONTEXTS]
    head = (
        f"# How cost grows: {arguments.shape} ({dtype}), {arguments.threads} thread(s), on a CPU\n\n"
        f"`benchmarks/growth.py`, {datetime.now(UTC):%Y-%m-%d}, {processor()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}, Python {platform.python_version()}, pagedllm-core {pagedllm_core.__version__}. Medians "
        f"of {ROUNDS * STEPS} steps, in turn; of three prefills where they are short, else one. The roof counts "
        "reading and multiplying weights, no attention: "
        f"{roof.bandwidth / 1e9:.1f} GB/s, {roof.operations / 1e9:.0f} GFLOP/s by torch, measured in this run.\n"
    )
    ones = (1,) * len(CONTEXTS)
    parts = [
        [head],
        [f"A decode step, contexts of {SHORT} tokens and more:\n", *table("batch", BATCHES, by_batch, BATCHES, steps)],
        ["\nThe prefill of one prompt:\n", *table("tokens", CONTEXTS, first, CONTEXTS, fills)],
        ["\nA decode step of one sequence:\n", *table("context", CONTEXTS, by_context, ones, [steps[0]] * len(ones))],
    ]  # fmt: skip
    text = "\n".join(line for part in parts for line in part) + "\n"
    print(text)
    if arguments.output:
        Path(f"{arguments.output}.md").write_text(text, encoding="utf-8")
        title = f"{arguments.shape}, {dtype}, {arguments.threads} thread(s), {processor()}"
        draw(Path(f"{arguments.output}.png"), title, by_batch, by_context)


if __name__ == "__main__":
    main()
