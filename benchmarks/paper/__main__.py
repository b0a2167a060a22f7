"""Command line: `python -m benchmarks.paper`."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.paper.figures import FIGURES, Report

ROOT = Path(__file__).resolve().parents[2]
log = logging.getLogger("benchmarks.paper")


def table(report: Report) -> str:
    """The report as a Markdown table."""
    lines = ["| figure | what | ours | paper | bar | met |", "| --- | --- | ---: | ---: | --- | --- |"]
    met = {True: "yes", False: "**no**", None: ""}
    lines += [
        f"| {row.figure} | {row.what} | {row.ours:g} | {row.paper} | {row.bar} | {met[row.met]} |"
        for row in report.rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the figures that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests, and no files")
    parser.add_argument("--figures", nargs="*", choices=list(FIGURES), default=list(FIGURES))
    parser.add_argument("--beam-model", help="a chat model whose beams are counted, too, as EngineConfig.model")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "paper.md")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "paper", help="where the drawings go")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    report, started = Report(0.1 if arguments.quick else 1.0, arguments.beam_model), time.process_time()
    for name in arguments.figures:
        FIGURES[name](report)
        log.info("figure %s: %.0f s of CPU time so far", name, time.process_time() - started)
    log.info("%s", table(report))
    missed = [row.what for row in report.rows if row.met is False]
    log.info("%s", f"not met: {'; '.join(missed)}" if missed else "every bar is met")
    if arguments.quick:
        return
    from benchmarks.paper.draw import draw

    draw(report.data, arguments.folder)
    head = (
        "# The paper's figures\n\n"
        f"`python -m benchmarks.paper` on {datetime.now(UTC):%Y-%m-%d}, {platform.platform()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}. All times are virtual; only the beams come from real models.\n\n"
    )
    arguments.output.write_text(head + table(report) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
