"""What guided decoding costs a step: 32 requests with a schema each, against the same ones unguided, interleaved.

    python benchmarks/guided.py [--model] [--profile] [--output benchmarks/results/guided.md]

The real engine over a model that computes nothing: its logits want each request to write a document of its schema. The
vocabulary is the synthetic one of `grammar_engines.py`. With `--model`, steps of the 0.5B shape in bfloat16 with
random weights take their turn as well, so that a machine whose speed drifts does not decide what share guiding has.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import json
import os
import pstats
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import llguidance
import torch
from grammar_engines import WIDTH, array, processor, record, syllables, synthetic_tokenizer
from tqdm import tqdm

import pagedllm_core
from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.config import EngineConfig
from pagedllm_core.decode import advance, guided
from pagedllm_core.engine import Engine
from pagedllm_core.params import GuidedParams, SamplingParams

BATCH, WARM, PROMPT = 32, 15, 8


def documents(tokenizer: Any, least: int) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Endless: a schema of its own, and a document of it of at least that many tokens.

    Every array has more records than are written, so that no request ends while it is measured.
    """
    generator, parts = random.Random(5), syllables()

    def words(count: int) -> str:
        return " ".join("".join(generator.choices(parts, k=2)) for _ in range(count))

    kinds: list[tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], Any]]] = [
        (lambda: {"type": "string"}, lambda _: words(generator.randrange(1, 12))),
        (lambda: {"type": "integer"}, lambda _: generator.randrange(10_000)),
        (lambda: {"type": "number"}, lambda _: round(generator.random() * 100, 2)),
        (lambda: {"type": "boolean"}, lambda _: generator.random() < 0.5),
        (lambda: {"enum": [words(1) for _ in range(12)]}, lambda schema: generator.choice(schema["enum"])),
        (lambda: {"type": "string", "format": "date"}, lambda _: f"2026-11-{generator.randrange(10, 29)}"),
        (lambda: array({"type": "string"}), lambda _: [words(2) for _ in range(generator.randrange(1, 4))]),
    ]
    while True:
        chosen = [kinds[0], *generator.sample(kinds, k=generator.randrange(3, 7))]
        made = [(words(1).replace(" ", "_"), make(), write) for make, write in chosen]
        inner = record({name: schema for name, schema, _ in made[:2]})
        schema = array(record({**{name: schema for name, schema, _ in made[2:]}, "of": inner}), minItems=1)
        rows: list[dict[str, Any]] = []
        ids: list[int] = []
        while len(ids) < least:
            for _ in range(10):
                row = {name: write(one) for name, one, write in made}
                rows.append(
                    {**{name: row[name] for name, _, _ in made[2:]}, "of": {name: row[name] for name, _, _ in made[:2]}}
                )
            ids = tokenizer.encode(json.dumps(rows, ensure_ascii=False), add_special_tokens=False)
        yield schema, ids


class Writer:
    """A `Runner` whose logits are noise, and high where a request's document goes on.

    Args:
        tokenizer: Of the ids.
        texts: The documents' tokens; the first prompt token of request n is n + 1.
        wanted: The logit of the document's next token; 0 leaves noise.
    """

    num_blocks, block_size, num_host_blocks, max_model_len, sampler = 16_384, 16, 0, 8192, None
    generation_defaults: Mapping[str, Any] = {"do_sample": False}
    model_name, vocab_size = "none", WIDTH

    def __init__(self, tokenizer: Any, texts: list[list[int]], wanted: float) -> None:
        self.tokenizer, self.eos_token_ids = tokenizer, (int(tokenizer.eos_token_id),)
        self._texts, self._wanted = texts, wanted
        self._logits = torch.randn(len(texts), WIDTH, generator=torch.Generator().manual_seed(0))
        self._changed: list[tuple[int, int, float]] = []
        self._requests: dict[int, int] = {}  # by their first block

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits, at next to no cost."""
        for row, token, before in self._changed:
            self._logits[row, token] = before
        self._changed = []
        if self._wanted:
            for row, last in enumerate(batch.logits_rows.tolist()):
                start, block = int(batch.query_starts[row]), int(batch.block_tables[row, 0])
                if batch.positions[start] == 0:
                    self._requests[block] = int(batch.token_ids[start]) - 1
                text = self._texts[self._requests[block]]
                token = text[int(batch.positions[last]) + 1 - PROMPT]
                self._changed.append((row, token, float(self._logits[row, token])))
                self._logits[row, token] = self._wanted
        return self._logits[: len(batch.logits_rows)]

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Nothing is stored."""

    def swap_out(self, moves: list[tuple[int, int]]) -> None:
        """Never called."""

    def check_device(self) -> None:
        """No device fails."""

    def swap_in(self, moves: list[tuple[int, int]]) -> None:
        """Never called."""

    def close(self) -> None:
        """Nothing to free."""


@dataclass(frozen=True)
class Case:
    """One way to use it.

    Attributes:
        name: For the table.
        params: Of the sampling.
        wanted: How much the model wants its document.
        max_tokens: The budget; a small one makes the closing decide.
        steps: Steps that are measured.
    """

    name: str
    params: dict[str, Any]
    wanted: float = 30.0
    max_tokens: int = 6000
    steps: int = 60


CASES = (
    Case("greedy", {"temperature": 0}),
    Case("sampled", {"temperature": 0.8, "seed": 1}),
    Case("sampled, top-p 0.95", {"temperature": 0.8, "top_p": 0.95, "seed": 1}, steps=30),
    Case("greedy, streamed", {"temperature": 0}),
    Case("sampled from noise", {"temperature": 1.0, "seed": 1}, wanted=0.0, steps=30),
    Case("greedy, until the first of 150 tokens ends", {"temperature": 0}, max_tokens=150, steps=150),
)


@dataclass
class Clock:
    """Time within some functions, a step at a time.

    Attributes:
        steps: Seconds and calls by name, one dictionary per step.
    """

    steps: list[dict[str, float]] = field(default_factory=list)

    @contextmanager
    def watch(self, places: Mapping[str, tuple[Any, str]]) -> Iterator[None]:
        """Replace these functions by ones that are timed."""
        originals = {name: getattr(*place) for name, place in places.items()}
        for name, (owner, attribute) in places.items():
            setattr(owner, attribute, self._timed(name, originals[name]))
        try:
            yield
        finally:
            for name, (owner, attribute) in places.items():
                setattr(owner, attribute, originals[name])

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                now = self.steps[-1] if self.steps else {}
                now[name] = now.get(name, 0.0) + time.perf_counter() - started

        return timed

    def median(self, name: str) -> float:
        """Milliseconds of a step in this function."""
        return statistics.median(step.get(name, 0.0) for step in self.steps) * 1e3


PLACES: dict[str, tuple[Any, str]] = {
    "mask": (advance, "mask_logits"),
    "fill": (guided.Guide, "fill"),
    "apply": (guided, "_bits"),
    "budget": (advance, "_keep_to_budget"),
    "fits": (guided.Guide, "fits"),
    "search": (guided.Vocabulary, "closing"),
    "advance": (guided.Guide, "advance"),
    "forced": (guided.Guide, "_forced"),
}


def start(tokenizer: Any, work: list[tuple[dict[str, Any], list[int]]], case: Case, held: bool) -> Engine:
    """An engine whose requests all decode."""
    runner = Writer(tokenizer, [ids for _, ids in work], case.wanted)
    engine = Engine(EngineConfig(model="none"), runner=runner)
    for number, (schema, _) in enumerate(work):
        limits: dict[str, Any] = {"max_tokens": case.max_tokens if held else 6000}
        if held:
            limits["guided"] = GuidedParams(json=schema)
        params = SamplingParams(ignore_eos=not held, **limits, **case.params)
        engine.add([number + 1] * PROMPT, params, stream="streamed" in case.name)
    return engine


def generated(engine: Engine) -> int:
    """Tokens so far."""
    return int(engine.stats().tokens_generated)


@dataclass
class Result:
    """Milliseconds of each step, and where guiding spends them."""

    case: Case
    held: list[float]
    free: list[float]
    model: list[float]
    clock: Clock
    tokens: float


def measure(tokenizer: Any, work: list[tuple[dict[str, Any], list[int]]], case: Case, model: Engine | None) -> Result:
    """Steps of both engines and of the model in turn, as long as nearly all guided requests run."""
    engines = [start(tokenizer, work, case, held) for held in (True, False)]
    result = Result(case, [], [], [], Clock(), 0.0)
    warm = 2 if case.max_tokens < 1000 else WARM
    for _ in range(warm):
        for engine in engines:
            engine.step()
    before, rows = generated(engines[0]), 0
    for number in tqdm(range(case.steps), desc=case.name, leave=False):
        running = engines[0].stats().running
        if running < BATCH - 4:
            break
        rows += running
        result.clock.steps.append({})
        with result.clock.watch(PLACES):
            result.held.append(milliseconds(engines[0].step))
        result.free.append(milliseconds(engines[1].step))
        if model is not None and number % 6 == 0:
            result.model.append(milliseconds(model.step))
    result.tokens = (generated(engines[0]) - before) / max(rows, 1)
    return result


def milliseconds(action: Callable[[], Any]) -> float:
    """Time of one call."""
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1e3


def half_billion(folder: str) -> Engine:
    """The 0.5B shape with random weights, 32 sequences in decoding."""
    from compare import SHAPES

    config, dtype = SHAPES["0.5b"]
    config.save_pretrained(folder)
    engine = Engine(
        EngineConfig(model=folder, load_format="dummy", dtype=dtype, num_threads=1, kv_cache_memory=1 << 30)
    )
    generator = random.Random(0)
    for _ in range(BATCH):
        prompt = [generator.randrange(5, WIDTH) for _ in range(64)]
        engine.add(prompt, SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True))
    for _ in range(3):
        engine.step()
    return engine


def tenth(times: list[float]) -> float:
    """The time that one in ten stays under: what a machine does while nothing else runs on it."""
    return sorted(times)[len(times) // 10]


def table(results: list[Result]) -> list[str]:
    """The costs of a step, and where they arise."""
    steps = list(itertools.chain.from_iterable(result.model for result in results))
    model, fastest = (statistics.median(steps), tenth(steps)) if steps else (0.0, 0.0)
    lines = [
        "| | unguided, ms | guided, ms | guiding, ms | slowest step, ms | of a 0.5B step | the same of the fastest "
        "tenth | tokens a row and step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    split = [
        "| | masks filled | bits unpacked | rest of the mask | does it fit, and choosing again | of it "
        "closings searched | advance | of it forced text | rest |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        held, free = statistics.median(result.held), statistics.median(result.free)
        extra = statistics.median(a - b for a, b in zip(result.held, result.free, strict=True))
        quiet = tenth(result.held) - tenth(result.free)
        share = f"{extra / model:.1%} | {quiet / fastest:.1%}" if steps else "– | –"
        lines.append(
            f"| {result.case.name} | {free:.2f} | {held:.2f} | {extra:.2f} | {max(result.held):.1f} | {share} | "
            f"{result.tokens:.2f} |"
        )
        at = result.clock.median
        mask, budget, advanced = at("mask"), at("budget"), at("advance")
        cells = [at("fill"), at("apply"), mask - at("fill") - at("apply"), budget, at("search"), advanced, at("forced")]
        cells.append(extra - mask - budget - advanced)
        split.append(f"| {result.case.name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return ["\n".join(lines), "Where, ms of a step (medians, so that they need not add up):\n\n" + "\n".join(split)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="store_true", help="measure steps of the 0.5B shape as well")
    parser.add_argument("--profile", action="store_true", help="print where the greedy case spends its time")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = synthetic_tokenizer()
    work = list(itertools.islice(documents(tokenizer, 3000), BATCH))
    if arguments.profile:
        engine = start(tokenizer, work, CASES[0], held=True)
        for _ in range(WARM):
            engine.step()
        profile = cProfile.Profile()
        for _ in range(100):
            profile.runcall(engine.step)
        pstats.Stats(profile).sort_stats("tottime").print_stats(18)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = half_billion(folder) if arguments.model else None
        results = [measure(tokenizer, work, case, model) for case in tqdm(CASES, desc="cases")]
    steps = list(itertools.chain.from_iterable(result.model for result in results))
    taken = (
        f"A step of the 0.5B shape in bfloat16 at this batch takes {statistics.median(steps):.0f} ms in this run "
        f"(median of {len(steps)}, one thread, one in ten "
        f"under {tenth(steps):.0f})."
        if steps
        else "The 0.5B shape was not measured in this run (`--model`)."
    )
    head = (
        "# What guided decoding costs a step\n\n"
        f"`benchmarks/guided.py`, {datetime.now(UTC):%Y-%m-%d}, {processor()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}, llguidance {llguidance.__version__}, pagedllm-core {pagedllm_core.__version__}, one "
        f"thread. {BATCH} requests, each with a JSON schema of its own, {WIDTH:,} columns of logits; medians, guided "
        f"and unguided steps in turn. {taken}"
    )
    text = "\n\n".join([head, *table(results)]) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
