"""Five workloads on two model shapes: PagedLLM against what its users would pick instead, interleaved in one run.

    python benchmarks/compare.py --shape 10m --threads 2 --output benchmarks/results/cpu_10m
    python benchmarks/compare.py --shape 0.5b --threads 1 --int8 --peer openvino=/envs/openvino/bin/python

Always there: PagedLLM and transformers (`generate` on a padded batch and one at a time, continuous batching). Others
run in an environment that the caller names: `--peer NAME=PYTHON` starts `benchmarks/peers/NAME.py` with that Python.
Each system is a process of its own that answers workloads line by line. All read the same random weights. Prompts are
token ids, decoding is greedy, end tokens are ignored. Each repeat runs every system once, in an order that rotates, on
prompts that nobody has seen; ratios are taken within a repeat.

    W1  8 requests at once, lognormal lengths, about 96 tokens in and 24 out
    W2  6 requests at once that share 512 tokens, 32 more in, 12 out
    W3  a single stream, 128 in and 16 out
    W4  2 requests with 4 beams, 32 in and 12 out
    W5  6 requests that come at 0.7 a second, 64 in and 16 out: median latency, and time to the first token
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peers.protocol import Work
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

PEERS = Path(__file__).resolve().parent / "peers"
BASE = "generate"
SHAPES: dict[str, tuple[Any, str]] = {
    "10m": (
        LlamaConfig(
            hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=8000, max_position_embeddings=4096, tie_word_embeddings=False,
        ),
        "float32",
    ),
    "0.5b": (
        Qwen2Config(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, vocab_size=151_936, max_position_embeddings=4096, tie_word_embeddings=True,
        ),
        "bfloat16",
    ),
}  # fmt: skip


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


class System:
    """A peer's process.

    Args:
        script: In `benchmarks/peers/`, without its ending.
        python: The environment's Python.
        folder: The model.
        options: For the script.
        threads: Threads it may compute with.
        errors: Where its stderr goes.

    Attributes:
        name: What it calls itself.
        started_s: From its start until it was ready, imports and all.
        results: The answers of a workload's repeats.
    """

    def __init__(
        self, script: str, python: str, folder: str, options: list[str], threads: int, errors: Any = subprocess.DEVNULL
    ) -> None:
        command = [python, str(PEERS / f"{script}.py"), folder, "--threads", str(threads), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        own = os.environ.get("PYTHONPATH", "") if python == sys.executable else ""  # of another environment, none of it
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PEERS.parents[1]), own]))
        started = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
        )  # fmt: skip
        self.script = script
        self.name = str(self._read()["system"])
        self.started_s = time.perf_counter() - started
        self.results: list[dict[str, Any]] = []

    def serve(self, work: Work) -> dict[str, Any]:
        """Run one workload; the answer has `total`, `latencies` and `first` in seconds, or `unsupported`."""
        if self._process.stdin is None:
            raise RuntimeError("it has no input")
        self._process.stdin.write(json.dumps(asdict(work)) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        if "tokens" in answer and answer["tokens"] != work.lengths:
            raise RuntimeError(f"{self.name} gave {answer['tokens']} tokens instead of {work.lengths}")
        return answer

    def peak_memory(self) -> float:
        """The most memory it held, GiB."""
        status = Path(f"/proc/{self._process.pid}/status")
        lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
        return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM")), float("nan"))

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def kill(self) -> None:
        """End the process now, whatever it does."""
        self._process.kill()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class Roof:
    """What one run measured of this machine: bytes a second from memory, float32 operations a second."""

    bandwidth: float
    operations: float

    @classmethod
    def measure(cls, dtype: torch.dtype) -> Roof:
        """With torch's present number of threads; the best of some tries, multiplying in float32 or in `dtype`."""
        memory = torch.ones(1 << 28)
        bandwidth = max(memory.nbytes / seconds(lambda: memory.sum()) for _ in range(5))
        squares = [torch.randn(2048, 2048).to(kind) for kind in {torch.float32, dtype}]
        operations = max(2 * 2048**3 / seconds(lambda one=one: one @ one) for one in squares for _ in range(5))
        return cls(bandwidth, operations)

    def least_seconds(self, work: Work, config: Any, weight_bytes: int) -> float:
        """Less than any step loop can take: weights are read once a step, or multiplied, whichever takes longer.

        Prompts share one step; the head, and the last layer but for its keys and values, is computed for the rows that
        choose a token. int8 weights would have another roof.
        """
        hidden, inner = config.hidden_size, config.intermediate_size
        kv = config.num_key_value_heads * hidden // config.num_attention_heads
        after = 2 * hidden * hidden + 3 * hidden * inner  # of a layer, what its keys and values do not need
        layers = config.num_hidden_layers * (2 * hidden * kv + after)
        head = hidden * config.vocab_size
        equal = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*work.prompts, strict=False))
        shared = sum(1 for _ in equal) if len(work.prompts) > 1 else 0
        prefill = sum(map(len, work.prompts)) - shared * (len(work.prompts) - 1)
        total = 0.0
        for step in range(max(work.lengths)):
            chosen = sum(length > step for length in work.lengths) * (work.beams if step else 1)
            rows = chosen if step else prefill
            operations = 2 * (rows * (layers - after) + chosen * (after + head))
            total += max((layers + head) * weight_bytes / self.bandwidth, operations / self.operations)
        return total


def seconds(action: Callable[[], Any]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(name: str, systems: list[System], vocab: int, repeats: int) -> None:
    """Run one workload on every system; the first round is not counted."""
    for system in systems:
        system.results = []
    for repeat in range(-1, repeats):
        for place in range(len(systems)):
            system = systems[(repeat + place) % len(systems)]
            answer = system.serve(workload(name, vocab, seed=1000 * int(name[1]) + repeat))
            if repeat >= 0:
                system.results.append(answer)


def value(name: str, answer: dict[str, Any]) -> float:
    """What is compared: the whole workload's seconds, for W5 the median latency."""
    return float(statistics.median(answer["latencies"]) if name == "W5" else answer["total"])


def rows(name: str, systems: list[System], roof: Roof, config: Any, weight_bytes: int) -> tuple[list[str], list[float]]:
    """The table's lines for one workload, and each system's median ratio (0 where it cannot)."""
    base = [value(name, answer) for answer in next(one for one in systems if one.script == BASE).results]
    lines, medians = [], []
    for system in systems:
        if "unsupported" in system.results[0]:
            lines.append(f"| {name} | {system.name} | – | {system.results[0]['unsupported']} | – | – |")
            medians.append(0.0)
            continue
        times = [value(name, answer) for answer in system.results]
        ratios = [other / mine for mine, other in zip(times, base, strict=True)]
        medians.append(statistics.median(ratios))
        first = statistics.median(statistics.median(answer["first"]) for answer in system.results)
        limits = [
            roof.least_seconds(workload(name, config.vocab_size, 1000 * int(name[1]) + repeat), config, weight_bytes)
            for repeat in range(len(times))
        ]
        share = statistics.median(limit / mine for limit, mine in zip(limits, times, strict=True))
        lines.append(
            f"| {name} | {system.name} | {statistics.median(times):.3f} | {medians[-1]:.2f} ({min(ratios):.2f} - "
            f"{max(ratios):.2f}) | {first:.3f} | {'–' if name == 'W5' else f'{share:.0%}'} |"
        )
    return lines, medians


def draw(path: Path, title: str, names: list[str], workloads: list[str], ratios: dict[str, list[float]]) -> None:
    """Bars: times faster than the padded batch, a group for each workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4.5))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        at = [group + (place - (len(names) - 1) / 2) * width for group in range(len(workloads))]
        bars = axes.bar(at, [ratios[one][place] for one in workloads], width, label=name, color=f"C{place}")
        axes.bar_label(bars, fmt=lambda height: f"{height:.1f}" if height else "", fontsize=6)
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_ylabel("times faster than generate's padded batch")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="10m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workloads", nargs="*", default=["W1", "W2", "W3", "W4", "W5"])
    parser.add_argument("--int8", action="store_true", help='also ours with quantization="int8"')
    parser.add_argument("--alone", action="store_true", help="also `generate` one at a time")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON", help="a script of benchmarks/peers"
    )
    parser.add_argument("--output", type=Path, help="the table as .md and the chart as .png")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config, dtype = SHAPES[arguments.shape]
    here = sys.executable
    wanted = [("pagedllm", here, []), (BASE, here, []), ("continuous", here, [])]
    wanted += [("pagedllm", here, ["--int8"])] * arguments.int8 + [(BASE, here, ["--alone"])] * arguments.alone
    wanted += [(name, python, []) for name, _, python in (peer.partition("=") for peer in arguments.peer)]
    systems: list[System] = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
        del model
        try:
            for script, python, options in wanted:
                systems.append(System(script, python, folder, ["--dtype", dtype, *options], arguments.threads))
                print(f"{systems[-1].name}: ready after {systems[-1].started_s:.1f} s", flush=True)
            text, ratios = run(arguments, systems, config, dtype)
        finally:
            for system in systems:
                system.close()
    print(text)
    if arguments.output:
        Path(f"{arguments.output}.md").write_text(text, encoding="utf-8")
        title = f"{arguments.shape}, {dtype}, {arguments.threads} thread(s), {processor()}"
        draw(Path(f"{arguments.output}.png"), title, [one.name for one in systems], arguments.workloads, ratios)


def run(
    arguments: argparse.Namespace, systems: list[System], config: Any, dtype: str
) -> tuple[str, dict[str, list[float]]]:
    """All workloads; the report, and the ratios by workload."""
    roof, ratios = Roof.measure(getattr(torch, dtype)), {}
    lines = ["| | system | seconds | × | first token, s | of the roof |", "| --- | --- | ---: | --- | ---: | ---: |"]
    for name in arguments.workloads:
        measure(name, systems, config.vocab_size, arguments.repeats)
        found, ratios[name] = rows(name, systems, roof, config, getattr(torch, dtype).itemsize)
        print("\n".join(found), flush=True)
        lines += found
    lines += ["", "| system | ready after, s | most memory, GiB |", "| --- | ---: | ---: |"]
    lines += [f"| {one.name} | {one.started_s:.1f} | {one.peak_memory():.2f} |" for one in systems]
    head = (
        f"# {arguments.shape} ({dtype}), {arguments.threads} thread(s), on a CPU\n\n"
        f"`benchmarks/compare.py`, {datetime.now(UTC):%Y-%m-%d}, {processor()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}, Python {platform.python_version()}, {arguments.repeats} interleaved repeats, medians. "
        "`×` is times faster than `generate`'s padded batch in the same repeat (W5: its median latency divided by this "
        "one), with the least and the most of the repeats. The roof is what this run measured: "
        f"{roof.bandwidth / 1e9:.1f} GB/s from memory, {roof.operations / 1e9:.0f} GFLOP/s in torch's products, for "
        f"weights in {dtype}.\n\n"
    )
    return head + "\n".join(lines) + "\n", ratios


def processor() -> str:
    """What this machine's processor calls itself."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


if __name__ == "__main__":
    main()
