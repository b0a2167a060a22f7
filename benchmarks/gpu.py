"""A GPU's roofs, and how near PagedLLM comes: every kernel, decode steps, and W1 to W5 against transformers.

    python benchmarks/gpu.py                # at most nine minutes on one GPU; needs no network and no installation
    python benchmarks/gpu.py --parts roofs decode prefill kernels
    python benchmarks/gpu.py --smoke        # everything tiny on a CPU, to try the script itself

Each part runs in a process of its own, so that a part that fails, or breaks the device for its process, is a row in its
table. A part does everything once, and then again while its share of the time lasts. Parts whose packages are missing
are named at once, and the others run. The table and the chart go to benchmarks/results/gpu.md and .svg, or to the
folder $OUT; the table is written anew after every part.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
_GRACE = 15.0  # seconds that a part may take longer than it was given
_SCRATCH = 40 << 30  # bytes that a model of 8B takes on its way to the systems, and more
_PATIENCE = 600.0  # the same in a smoke run, whose parts do everything once
PARTS = ("roofs", "decode", "prefill", "kernels", "start", "steps", "serving")
_SAID = {"cells", "point", "bar", "columns", "note", "machine", "roofs"}  # in messages of the parts
_PYDANTIC = ("pydantic", "pydantic_core", "annotated_types", "typing_inspection")
_KERNELS = ("torch", "numpy", "triton")
_ENGINE = (*_KERNELS, "transformers", *_PYDANTIC)
WHEELS = (  # as in docs/gpu.md
    "python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_17_x86_64 "
    "--platform manylinux2014_x86_64 -d wheels pydantic==2.14.3 pydantic-core==2.50.4 annotated-types "
    "typing-inspection pytest-asyncio",
    "python -m pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=site",
)


class Part(NamedTuple):
    """A part: its title, the function that does it, its share of the time, what it is told, and what it imports."""

    title: str
    function: str
    weight: float
    options: dict[str, Any]
    needs: tuple[str, ...]

    @property
    def missing(self) -> list[str]:
        """Modules that are not there."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def parts(arguments: argparse.Namespace) -> dict[str, Part]:
    """All parts, in order."""
    served = "tiny" if arguments.smoke else arguments.shape
    shapes = ["tiny"] if arguments.smoke else ["0.5b", "1.5b", "8b"]
    found = {"roofs": Part("Roofs", "machine:measure_roofs", 3, {}, ("torch",))}
    found["decode"] = Part("Decode attention", "attention:decode", 6, {}, _KERNELS)
    found["prefill"] = Part("Prefill attention", "attention:prefill", 4, {}, _KERNELS)
    found["kernels"] = Part("Other kernels", "kernels:kernels", 6, {}, _KERNELS)
    found["kernels sampling"] = Part("Sampling kernels", "sampling:sampling", 4, {}, (*_KERNELS, *_PYDANTIC))
    found["start"] = Part("Start of an engine", "start:start", 9, {"shapes": shapes}, _ENGINE)
    for shape in shapes:
        weight = 16 if shape == served else 6
        options = {"shape": shape, "served": served}
        found[f"steps {shape}"] = Part(f"Decode step, {shape}", "steps:steps", weight, options, _ENGINE)
    found["serving"] = Part(f"Workloads, {served}", "serving:serving", 62, {"served": served}, _ENGINE)
    return {name: part for name, part in found.items() if not arguments.parts or name.split()[0] in arguments.parts}


class Report:
    """What was found so far, as a table for each part.

    Args:
        folder: Where to write, or None.
        head: The first lines.
    """

    def __init__(self, folder: Path | None, head: str) -> None:
        self._folder, self._head, self.machine = folder, head, ""
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.titles: dict[str, tuple[str, str, list[str]]] = {}
        self.points: dict[str, list[tuple[str, float, float]]] = {}
        self.bars: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Something to be said above all tables."""
        self.notes.append(text)
        print(text, flush=True)

    def begin(self, name: str, title: str) -> None:
        """Start a part's table."""
        self.titles[name], self.rows[name], self.points[name] = (title, "", []), [], []

    def take(self, name: str, message: dict[str, Any]) -> None:
        """A message of a part."""
        title = self.titles[name][0]
        self.machine = message.get("machine", self.machine)
        if "columns" in message:
            self.titles[name] = (title, message["note"], message["columns"])
        if "cells" in message:
            cells, bar = message["cells"], message.get("bar")
            if bar is not None:
                self.bars.append(bar)
                cells["bar"] = judged(bar)
            if message.get("point"):
                self.points[name].append(tuple(message["point"]))
            self.rows[name].append(cells)
            print(f"{title}: " + ", ".join(f"{key} {value}".strip() for key, value in cells.items()), flush=True)

    def text(self) -> str:
        """The whole report in Markdown."""
        lines = [self._head.format(machine=self.machine), ""]
        for note in self.notes:
            lines += [note, ""]
        if self.bars:
            lines += ["| goal | found | |", "| --- | ---: | --- |"]
            for bar in self.bars:
                lines.append(
                    f"| {bar['name']} ≥ {bar['wanted']:g} {bar['unit']} | {bar['found']:.3g} | {judged(bar)} |"
                )
            lines.append("")
        for name, (title, note, columns) in self.titles.items():
            shown = columns + ["error"] * any("error" in row for row in self.rows[name])
            lines += [f"## {title}", "", note, ""]
            if shown and self.rows[name]:
                lines += ["| " + " | ".join(shown) + " |", "| " + " | ".join("---" for _ in shown) + " |"]
                for row in self.rows[name]:
                    cells = [row.get(column, "").replace("|", "/") for column in shown]
                    lines.append("| " + " | ".join(cells) + " |")
                lines.append("")
        return "\n".join(lines)

    def write(self, title: str = "") -> None:
        """The table, and with a title the chart."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "gpu.md").write_text(self.text(), encoding="utf-8")
        if title:
            try:
                from gpu_parts.chart import draw

                draw(self._folder / "gpu.svg", title, self.points)
            except ImportError as error:
                print(f"no chart: {error}")


def judged(bar: dict[str, Any]) -> str:
    """Whether a goal was reached."""
    if not bar["judged"]:
        return "not judged"
    return "reached" if bar["found"] >= bar["wanted"] else "missed"


def read_message(line: str) -> dict[str, Any] | None:
    """What a part says in one line, or None where the line is something else."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) and message.keys() <= _SAID else None


def run_part(name: str, part: Part, seconds: float, smoke: bool, roofs: dict[str, float], report: Report) -> None:
    """Start a part, and take what it says until it ends; it is ended where it takes much longer than it was given."""
    order = {"function": part.function, "seconds": seconds, "smoke": smoke, "options": part.options, "roofs": roofs}
    report.begin(name, part.title)
    strange: list[str] = []
    memory = "/dev/shm" if Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free > _SCRATCH else None
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryDirectory(dir=memory) as scratch:
        command = [sys.executable, str(HERE / "gpu.py"), "--do", json.dumps(order)]
        environment = os.environ | {"TMPDIR": scratch}
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        )
        watch = threading.Timer(seconds + (_PATIENCE if smoke else _GRACE), end_session, [child])
        watch.start()
        try:
            for line in child.stdout or ():
                message = read_message(line)
                if message is None:  # something that a library prints, or a row that it broke
                    print(f"{part.title}: no row: {line.rstrip()}", flush=True)
                    strange.append(line.strip())
                    continue
                roofs.update(message.get("roofs", {}))
                report.take(name, message)
            status = child.wait()
        finally:
            watch.cancel()
            end_session(child)
        if strange:
            report.note(
                f"{part.title}: {len(strange)} lines could not be read as rows. The first: `{strange[0][:200]}`"
            )
        if status:
            errors.seek(0)
            lines = [line for line in errors.read().splitlines() if line.strip()]
            told = ([line for line in lines if "Error" in line] or lines)[-1:]
            report.take(name, {"cells": {"error": f"the part ended with status {status}: {told}"[:300]}})


def end_session(leader: subprocess.Popen[str]) -> None:
    """End a process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)


def what_is_missing(absent: dict[str, list[str]]) -> str:
    """One line: the modules, the parts that cannot run without them, and what to do."""
    modules = ", ".join(dict.fromkeys(name for names in absent.values() for name in names))
    return (
        f"Missing here: {modules}. Not run: {', '.join(absent)}. Where there is a network, `{WHEELS[0]}`, or whatever "
        f"else is missing; then here `{WHEELS[1]}` (docs/gpu.md)."
    )


def do(order: dict[str, Any]) -> None:
    """A part, in its own process."""
    sys.path.insert(0, str(HERE.parent))  # the package need not be installed
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRITON_INTERPRET"] = "1" if order["smoke"] else "0"
    from importlib import import_module

    module_name, function_name = order.pop("function").split(":")
    module: Any = import_module(f"gpu_parts.{module_name}")
    machine = import_module("gpu_parts.machine")
    function = getattr(module, function_name)
    note = module.__doc__ if module_name == "serving" else function.__doc__
    machine.send(
        {
            "columns": module.COLUMNS[function_name],
            "note": "\n".join(line.strip() for line in note.strip().splitlines()),
        }
    )
    function(machine.Context(**order))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; repetitions are dropped, not parts")
    parser.add_argument("--shape", choices=["0.5b", "1.5b", "8b"], default="8b", help="the model of W1 to W5")
    parser.add_argument("--parts", nargs="*", choices=PARTS)
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--output", type=Path, help="folder; by default $OUT, or benchmarks/results (nothing: --smoke)")
    parser.add_argument("--do", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.do:
        return do(arguments.do)
    given = os.environ.get("OUT") or (None if arguments.smoke else str(HERE / "results"))
    folder = arguments.output or (Path(given) if given else None)
    head = "# Smoke run on a CPU: its numbers mean nothing" if arguments.smoke else "# On a GPU"
    told = f"`benchmarks/gpu.py --minutes {arguments.minutes:g}`, {datetime.now(UTC):%Y-%m-%d}, {{machine}}."
    report = Report(folder, f"{head}\n\n{told}")
    roofs = {"copy": 4.3e12, "bf16": 780e12}  # where the first part measures none: an H200's, as measured elsewhere
    end = time.monotonic() + 60 * arguments.minutes - _GRACE
    chosen = parts(arguments)
    absent = {name: part.missing for name, part in chosen.items() if part.missing}
    if absent:
        report.note(what_is_missing(absent))
    left = {name: part for name, part in chosen.items() if name not in absent}
    for name, part in chosen.items():
        if name in absent:
            report.begin(name, part.title)
            report.take(name, {"cells": {"error": f"not run: {', '.join(absent[name])} missing"}})
            continue
        share = part.weight / sum(one.weight for one in left.values())
        seconds = max(5.0, share * (end - time.monotonic()))
        if arguments.smoke:
            seconds = _PATIENCE if name == "serving" else 1.0
        run_part(name, part, seconds, arguments.smoke, roofs, report)
        left.pop(name)
        report.write()
    report.write("PagedLLM on " + (report.machine.partition(",")[0] or "a GPU"))
    print(report.text())


if __name__ == "__main__":
    main()
