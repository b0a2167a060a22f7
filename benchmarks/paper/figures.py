"""One function for each figure: runs the simulations, returns what is drawn, and fills the table."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.paper.baselines import Reservation, faster_transformer, orca
from benchmarks.paper.beams import beam_sharing
from benchmarks.paper.paged import Simulation
from benchmarks.paper.result import Result
from benchmarks.paper.workload import ALPACA, SHAREGPT, TRANSLATION, Dataset, Job, jobs

OVERLOAD = float("inf")
OURS = "PagedLLM"
SYSTEMS: dict[str, Callable[[list[Job]], Result]] = {
    "FasterTransformer": faster_transformer,
    **{f"Orca ({one.value})": lambda work, one=one: orca(work, one) for one in Reservation},  # type: ignore[misc]
    OURS: lambda work: Simulation().run(work),
}
SUSTAINED = 0.5  # seconds a token: beyond that, queues grow without end


@dataclass
class Row:
    """One line of the table; `met` is None where there is no bar."""

    figure: str
    what: str
    ours: float
    paper: str
    bar: str = ""
    met: bool | None = None


@dataclass
class Report:
    """The table and what the drawings need.

    Attributes:
        scale: Factor on the number of requests; below 1 for a quick look.
        beam_model: A second model for the beam searches, beside the bundled one.
        rows: The table.
        data: By figure.
    """

    scale: float = 1.0
    beam_model: str | None = None
    rows: list[Row] = field(default_factory=list)
    data: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def count(self, requests: int) -> int:
        """Requests of a trace."""
        return max(20, round(requests * self.scale))

    def add(self, figure: str, what: str, ours: float, paper: str, low: float | None = None, high: float = 1e9) -> None:
        """Add a line; `low` .. `high` is the bar."""
        bar = "" if low is None else f"≥ {low:g}" if high >= 1e9 else f"{low:g} to {high:g}"
        self.rows.append(Row(figure, what, round(ours, 2), paper, bar, None if low is None else low <= ours <= high))


def figure_2(report: Report) -> None:
    """Where the KV memory goes while requests wait for it."""
    published = {
        "Orca (Max)": (20.4, 13.3, 57.3, 8.9),
        "Orca (Pow2)": (26.8, 17.9, 13.6, 41.6),
        "Orca (Oracle)": (38.2, 25.2, 0.0, 36.6),
    }
    work = jobs(SHAREGPT, report.count(1500), OVERLOAD)
    for name, numbers in published.items():
        shares = SYSTEMS[name](work).memory.shares()
        report.data.setdefault("2", {})[name] = list(shares)
        for part, ours, paper in zip(("tokens", "reserved", "internal", "external"), shares, numbers, strict=True):
            report.add("2", f"{name}: {part}, %", ours, f"{paper:g}", paper - 4, paper + 4)
    for dataset, least, count in ((SHAREGPT, 96, 1000), (ALPACA, 90, 4000)):
        shares = SYSTEMS[OURS](jobs(dataset, report.count(count), OVERLOAD)).memory.shares()
        report.add("2", f"{OURS}: tokens, {dataset.name}, %", shares[0], "96.3", least)
        if dataset is SHAREGPT:
            report.data["2"][OURS] = list(shares)


def figure_12(report: Report) -> None:
    """Latency against the request rate, and the rate that each system sustains."""
    rates = [0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5]
    sustained = {}
    for name, serve in SYSTEMS.items():
        curve = [serve(jobs(SHAREGPT, report.count(round(600 * rate)), rate)).latency for rate in rates]
        report.data.setdefault("12", {})[name] = curve
        sustained[name] = sustained_rate(rates, curve)
        report.add("12", f"{name}: sustained requests a second", sustained[name], "–")
    report.data["12"]["rates"] = rates
    for name, paper, low, high in (
        ("Orca (Oracle)", "1.7–2.7", 1.7, 2.7),
        ("Orca (Max)", "2.7–8", 2.7, 8),
        ("FasterTransformer", "up to 22", 2.7, 22),
    ):
        report.add("12", f"{OURS} ÷ {name}", sustained[OURS] / sustained[name], paper, low, high)


def sustained_rate(rates: list[float], latencies: list[float]) -> float:
    """The rate at which the latency passes `SUSTAINED`, between two measured rates in a straight line."""
    for number, latency in enumerate(latencies):
        if latency > SUSTAINED:
            if number == 0:
                return rates[0]
            part = (SUSTAINED - latencies[number - 1]) / (latency - latencies[number - 1])
            return rates[number - 1] + part * (rates[number] - rates[number - 1])
    return rates[-1]


def figure_13(report: Report) -> None:
    """Requests in a batch."""
    published: list[tuple[Dataset, float, int, tuple[float, ...]]] = [
        (SHAREGPT, 2.0, 1200, (7.00, 9.81, 13.62, 30.42)),
        (ALPACA, 30.0, 6000, (7.00, 43.24, 72.75, 132.44)),
    ]
    for dataset, rate, count, numbers in published:
        work = jobs(dataset, report.count(count), rate)
        names = [name for name in SYSTEMS if name != "FasterTransformer"]
        for name, paper in zip(names, numbers, strict=True):
            batch = SYSTEMS[name](work).mean_batch
            report.data.setdefault("13", {}).setdefault(name, []).append(batch)
            report.add("13", f"{name}: mean batch, {dataset.name} at {rate:g}/s", batch, f"{paper:g}")


def figure_15(report: Report) -> None:
    """Blocks that sharing saves, in percent of those without it."""
    parallel = {2: 6.09, 4: 8.53, 6: 9.79}
    beams = {2: 37.56, 4: 53.13, 6: 55.16}
    for width, paper in parallel.items():
        simulation = Simulation(params={"n": width, "temperature": 1.0})
        simulation.run(jobs(ALPACA, report.count(1500), 8.0))
        saved = simulation.sharing.saved
        report.data.setdefault("15", {}).setdefault("parallel sampling", []).append(saved)
        report.add("15", f"parallel sampling, n={width}, Alpaca, %", saved, f"{paper:g}", paper - 1.5, paper + 1.5)
    for width in parallel:
        simulation = Simulation(params={"n": width, "temperature": 1.0})
        simulation.run(jobs(SHAREGPT, report.count(600), 0.3))
        saved = simulation.sharing.saved
        report.add("15", f"parallel sampling, n={width}, ShareGPT, %", saved, "16.2–30.5", 16.2 - 1.5, 30.5 + 1.5)
    for model in filter(None, ("tiny", report.beam_model)):
        for dataset, low, high in ((ALPACA, 37.56, 55.16), (SHAREGPT, 44.3, 66.3)):
            for width, paper in beams.items():
                count = max(4, round((240 if dataset is ALPACA else 24) * report.scale))
                saved = beam_sharing(width, dataset, count, model).saved
                if dataset is ALPACA and model == "tiny":
                    report.data["15"].setdefault("beam search", []).append(saved)
                shown = f"{paper:g}" if dataset is ALPACA else f"{low:g}–{high:g}"
                what = f"beam search, width {width}, {dataset.name}, {Path(model).name}, %"
                report.add("15", what, saved, shown, low - 5, high + 5)


def figure_16(report: Report) -> None:
    """Throughput where all requests start with the same translation examples."""
    for prefix, paper in ((80, "1.67"), (341, "3.58")):
        work = jobs(TRANSLATION, report.count(1500), OVERLOAD, shared_prefix=prefix)
        ids = list(range(2, prefix + 2))
        generator = random.Random(0)
        salt = [[generator.randrange(2, 1 << 20) for _ in range(8)] for _ in work]

        def prompt(number: int, job: Job, ids: list[int] = ids, salt: list[list[int]] = salt) -> list[int]:
            return (ids + (salt[number] * job.prompt)[: job.prompt - len(ids)])[: job.prompt]

        ours = Simulation(prefix_caching=True, prompt=prompt, vocabulary=1 << 20).run(work)
        baseline = orca(work, Reservation.ORACLE)
        ratio = baseline.seconds / ours.seconds
        report.data.setdefault("16", {})[f"{prefix} tokens"] = [ratio]
        report.add("16", f"throughput ÷ Orca (Oracle), shared prefix of {prefix} tokens", ratio, paper)


def figure_18b(report: Report) -> None:
    """Latency against the block size. The cost model knows nothing of kernels, so small blocks cost nothing."""
    sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    report.data["18b"] = {"sizes": [float(size) for size in sizes]}
    for dataset, rate, count in ((SHAREGPT, 1.8, 600), (ALPACA, 33.0, 3000)):
        work = jobs(dataset, report.count(count), rate)
        results = [Simulation(block_size=size).run(work) for size in sizes]
        report.data["18b"][dataset.name] = [one.latency for one in results]
        best = min(one.latency for one in results)
        good = [size for size, one in zip(sizes, results, strict=True) if one.latency <= 1.05 * best]
        paper = "best 16–128" if dataset is SHAREGPT else "best 16–32"
        report.add("18b", f"largest block size within 5 % of the best latency, {dataset.name}", max(good), paper)


FIGURES: dict[str, Callable[[Report], None]] = {
    "2": figure_2,
    "12": figure_12,
    "13": figure_13,
    "15": figure_15,
    "16": figure_16,
    "18b": figure_18b,
}
