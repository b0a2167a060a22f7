"""Five workloads on two model shapes: PagedLLM against `transformers` in one process, interleaved.

    python benchmarks/compare.py --shape 10m --threads 2 --output benchmarks/results/cpu_10m.md
    python benchmarks/compare.py --shape 0.5b --threads 1 --output benchmarks/results/cpu_0.5b.md

Both read the same random weights. Prompts are token ids, decoding is greedy, end tokens are ignored. Each repeat runs
every system once, in an order that rotates, on prompts that nobody has seen; ratios are taken within a repeat.

    W1  8 requests at once, lognormal lengths, about 96 tokens in and 24 out
    W2  6 requests at once that share 512 tokens, 32 more in, 12 out
    W3  a single stream, 128 in and 16 out
    W4  2 requests with 4 beams, 32 in and 12 out
    W5  6 requests that come at 0.7 a second, 64 in and 16 out: median latency, and time to the first token

The padded batch of W5 takes, whenever it is free, all requests that have come.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config
from transformers.generation.streamers import BaseStreamer

import pagedllm_core
from pagedllm_core.config import EngineConfig
from pagedllm_core.engine import Engine
from pagedllm_core.params import SamplingParams

SHAPES: dict[str, tuple[Any, torch.dtype]] = {
    "10m": (
        LlamaConfig(
            hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=8000, max_position_embeddings=4096, tie_word_embeddings=False,
        ),
        torch.float32,
    ),
    "0.5b": (
        Qwen2Config(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, vocab_size=151_936, max_position_embeddings=4096, tie_word_embeddings=True,
        ),
        torch.bfloat16,
    ),
}  # fmt: skip


@dataclass
class Work:
    """One workload: prompts, output lengths, and when each request comes (seconds)."""

    prompts: list[list[int]]
    lengths: list[int]
    arrivals: list[float]
    beams: int = 1


@dataclass
class Times:
    """Seconds: of the whole, of each request from its arrival to its end, and to its first token."""

    total: float
    latencies: list[float]
    first: list[float]


def workload(name: str, vocab: int, seed: int) -> Work:
    """The prompts of one repeat."""
    generator = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(5, vocab) for _ in range(count)]

    if name == "W1":
        sizes = [
            (round(generator.lognormvariate(4.45, 0.5)), round(generator.lognormvariate(3.1, 0.4))) for _ in range(8)
        ]
        return Work([tokens(max(8, size)) for size, _ in sizes], [max(4, out) for _, out in sizes], [0.0] * 8)
    if name == "W2":
        shared = tokens(512)
        return Work([shared + tokens(32) for _ in range(6)], [12] * 6, [0.0] * 6)
    if name == "W3":
        return Work([tokens(128)], [16], [0.0])
    if name == "W4":
        return Work([tokens(32) for _ in range(2)], [12] * 2, [0.0] * 2, beams=4)
    arrivals = list(itertools.accumulate((generator.expovariate(0.7) for _ in range(5)), initial=0.0))
    return Work([tokens(64) for _ in range(6)], [16] * 6, arrivals)


def serve_ours(engine: Engine, work: Work) -> Times:
    """All requests through one engine, submitted when they come."""
    waiting = list(range(len(work.prompts)))
    times = Times(0.0, [0.0] * len(waiting), [0.0] * len(waiting))
    started = time.perf_counter()
    while waiting or engine.has_unfinished:
        now = time.perf_counter() - started
        while waiting and work.arrivals[waiting[0]] <= now:
            number = waiting.pop(0)
            beams = {"use_beam_search": True, "n": work.beams} if work.beams > 1 else {}
            params = SamplingParams(temperature=0, max_tokens=work.lengths[number], ignore_eos=True, **beams)
            engine.add(work.prompts[number], params, request_id=str(number), stream=work.beams == 1)
        if not engine.has_unfinished:
            time.sleep(max(0.0, work.arrivals[waiting[0]] - (time.perf_counter() - started)))
            continue
        for output in engine.step():
            number, now = int(output.request_id), time.perf_counter() - started
            times.first[number] = times.first[number] or now - work.arrivals[number]
            if output.finished:
                times.latencies[number] = now - work.arrivals[number]
    times.total = time.perf_counter() - started
    return times


class FirstToken(BaseStreamer):
    """Notes when the first new token of a batch is there."""

    def __init__(self) -> None:
        self.calls, self.at = 0, 0.0

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call is the prompt
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


def generate(model: Any, work: Work, chosen: list[int]) -> float:
    """One padded batch by `transformers`; returns when its first tokens were there."""
    longest = max(len(work.prompts[number]) for number in chosen)
    padding = [longest - len(work.prompts[number]) for number in chosen]
    ids = torch.tensor([[0] * pad + work.prompts[number] for pad, number in zip(padding, chosen, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
    streamer = FirstToken() if len(chosen) == 1 and work.beams == 1 else None
    settings: dict[str, Any] = {"num_beams": work.beams, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(
        ids, attention_mask=mask, max_new_tokens=max(work.lengths[number] for number in chosen), streamer=streamer,
        **settings,
    )  # fmt: skip
    return streamer.at if streamer else 0.0


def serve_generate(model: Any, work: Work, together: bool) -> Times:
    """`generate` on all requests that have come, as a padded batch or one at a time."""
    waiting = list(range(len(work.prompts)))
    times = Times(0.0, [0.0] * len(waiting), [0.0] * len(waiting))
    started = time.perf_counter()
    while waiting:
        now = time.perf_counter() - started
        chosen = [number for number in waiting if work.arrivals[number] <= now]
        if not chosen:
            time.sleep(work.arrivals[waiting[0]] - now)
            continue
        chosen = chosen if together else chosen[:1]
        first = generate(model, work, chosen)
        for number in chosen:
            waiting.remove(number)
            end = time.perf_counter()
            times.latencies[number] = end - started - work.arrivals[number]
            # A padded batch hands everything out at its end.
            times.first[number] = (first or end) - started - work.arrivals[number]
    times.total = time.perf_counter() - started
    return times


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="10m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workloads", nargs="*", default=["W1", "W2", "W3", "W4", "W5"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config, dtype = SHAPES[arguments.shape]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        model.save_pretrained(folder)
        fields: dict[str, Any] = {"num_threads": arguments.threads, "kv_cache_memory": "256MiB"}
        engine = Engine(EngineConfig(model=folder, **fields))
    systems: dict[str, Callable[[Work], Times]] = {
        "PagedLLM": lambda work: serve_ours(engine, work),
        "generate, padded batch": lambda work: serve_generate(model, work, together=True),
        "generate, one at a time": lambda work: serve_generate(model, work, together=False),
    }
    lines = measure(arguments.workloads, systems, config.vocab_size, arguments.repeats)
    head = (
        f"# {arguments.shape} ({dtype}), {arguments.threads} threads, against transformers\n\n"
        f"`benchmarks/compare.py`, {datetime.now(UTC):%Y-%m-%d}, {processor()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, pagedllm-core "
        f"{pagedllm_core.__version__}, fused: {getattr(engine.runner, 'is_fused', False)}, {arguments.repeats} "
        "interleaved repeats, medians. `×` is times faster than the padded batch in the same repeat (for W5: its "
        "median latency divided by this one), with the least and the most of the repeats.\n\n"
    )
    print(head + "\n".join(lines))
    if arguments.output:
        arguments.output.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def processor() -> str:
    """What this machine's processor calls itself."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def measure(names: list[str], systems: dict[str, Callable[[Work], Times]], vocab: int, repeats: int) -> list[str]:
    """The table, a line per workload and system."""
    lines = ["| | system | seconds | × | first token, s |", "| --- | --- | ---: | --- | ---: |"]
    for name in names:
        found: dict[str, list[Times]] = {system: [] for system in systems}
        for repeat in range(-1, repeats):  # the first is not counted
            order = list(systems)
            for place in range(len(order)):
                system = order[(repeat + place) % len(order)]
                times = systems[system](workload(name, vocab, seed=repeat))
                if repeat >= 0:
                    found[system].append(times)
        value: Callable[[Times], float] = (
            (lambda one: statistics.median(one.latencies)) if name == "W5" else (lambda one: one.total)
        )
        base = [value(one) for one in found["generate, padded batch"]]
        for system, all_times in found.items():
            ratios = [other / value(one) for one, other in zip(all_times, base, strict=True)]
            first = statistics.median(statistics.median(one.first) for one in all_times)
            lines.append(
                f"| {name} | {system} | {statistics.median(map(value, all_times)):.3f} | "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) | {first:.3f} |"
            )
        print("\n".join(lines[-len(systems) :]), flush=True)
    return lines


if __name__ == "__main__":
    main()
