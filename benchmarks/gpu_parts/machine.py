"""What all parts share: the device and its clock, rows for the tables, and the roofs that are measured first."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

Work = Callable[[], Any]
_LEAST_TIMED = 2e-3  # seconds between two marks
_MOST_TIMED = 60
_WRITING = threading.Lock()  # a part may find rows in several threads


@dataclass
class Context:
    """What a part is told.

    Attributes:
        smoke: Everything tiny, on a CPU.
        seconds: What the part may take; it does every case once, and then again while there is time.
        options: From the command line.
        roofs: What `measure_roofs` found: bytes a second "copy", operations a second "bf16".
    """

    smoke: bool
    seconds: float
    options: dict[str, Any]
    roofs: dict[str, float]
    started: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        """Where things run."""
        return torch.device("cpu" if self.smoke else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and caches; Triton's interpreter cannot do bfloat16."""
        return torch.float32 if self.smoke else torch.bfloat16

    def left(self) -> float:
        """Seconds."""
        return self.started + self.seconds - time.monotonic()

    def row(
        self, point: tuple[str, float, float] | None = None, bar: dict[str, Any] | None = None, **cells: Any
    ) -> None:
        """A row of the part's table, sent at once, so that it outlives whatever happens next.

        Args:
            point: Series, x and y in the chart.
            bar: From `bar`.
            cells: By column.
        """
        send({"cells": {name: str(value) for name, value in cells.items()}, "point": point, "bar": bar})

    def bar(self, name: str, wanted: float, found: float, unit: str = "%") -> dict[str, Any]:
        """One of the goals: `found` should be at least `wanted`."""
        return {"name": name, "wanted": wanted, "found": found, "unit": unit, "judged": not self.smoke}

    @contextmanager
    def case(self, **cells: Any) -> Iterator[None]:
        """What fails in it is a row, and not the end; memory is given back."""
        try:
            yield
        except Exception as error:
            self.row(**cells, error=f"{type(error).__name__}: {error}".partition("\n")[0][:200])
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def send(message: dict[str, Any]) -> None:
    """To the process that started this one: one line, in one piece."""
    line = json.dumps(message) + "\n"
    with _WRITING:
        sys.stdout.write(line)
        sys.stdout.flush()


def median_seconds(work: Work, device: torch.device, limit: float) -> float:
    """The median time of work, done again and again for about `limit` seconds, at least twice.

    On a GPU it is timed by events around as many repetitions as take two milliseconds.
    """
    end = time.monotonic() + limit
    seconds_of(work, device, 1)  # warms up
    first = seconds_of(work, device, 1)
    if time.monotonic() > end:
        return first
    inner = max(1, min(200, int(_LEAST_TIMED / max(first, 1e-7))))
    times: list[float] = []
    while not times or (len(times) < _MOST_TIMED and time.monotonic() < end):
        times.append(seconds_of(work, device, inner))
    return statistics.median(times)


def seconds_of(work: Work, device: torch.device, times: int) -> float:
    """Seconds that work takes, on average of some repetitions."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - started) / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / times


def replayable(work: Work, device: torch.device) -> Work:
    """Work as a CUDA graph, so that the host's launches are not what is timed."""
    if device.type != "cuda":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def installed(package: str) -> str:
    """A package and its version."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


COLUMNS = {"measure_roofs": ["roof", "measured"]}


def measure_roofs(context: Context) -> None:
    """Bytes a second of a large copy, read and written; operations a second of a large product of random numbers."""
    device, small = context.device, context.smoke
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    memory = f", {torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB" if gpu else ""
    packages = ", ".join(installed(package) for package in ("torch", "triton", "transformers"))
    send({"machine": f"{name}{memory}, {packages}, Python {platform.python_version()}"})
    with context.case(roof="copy"):
        source = torch.randn((1 << 18) if small else (1 << 30), device=device)
        target = torch.empty_like(source)
        copied = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, context.seconds / 4)
        send({"roofs": {"copy": copied}})
        context.row(roof="copy, bytes read and written", measured=f"{copied / 1e12:.2f} TB/s")
        read = source.nbytes / median_seconds(lambda: source.sum(), device, context.seconds / 8)
        context.row(roof="sum, bytes read (not used below)", measured=f"{read / 1e12:.2f} TB/s")
    with context.case(roof="bf16"):
        size = 128 if small else 8192
        a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
        rate = 2 * size**3 / median_seconds(lambda: a @ b, device, context.seconds / 4)
        send({"roofs": {"bf16": rate}})
        context.row(roof=f"bf16 product of {size} x {size} random numbers", measured=f"{rate / 1e12:.0f} TFLOP/s")
