"""`benchmarks/gpu.py`: every kernel has a row, and nothing that does not run, or cannot be read, is passed over."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu

pytest.importorskip("triton")

SCRIPT = Path(gpu.__file__)
KERNELS = [
    "cache write, plain", "cache write, fp8", "RoPE + cache write, plain", "RoPE + cache write, fp8", "add + RMSNorm",
    "SiLU·mul", "block copy", "swap out", "swap in", "beam selection", "deterministic product", "greedy",
    "temperature", "top-p", "top-k, top-p, min-p", "top-k, top-p, min-p, penalties", "log-probabilities",
]  # fmt: skip


def table_rows(text: str) -> list[list[str]]:
    """The cells of all tables of a report."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_every_kernel_has_a_row_with_its_share_of_a_roof(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--smoke", "--parts", "roofs", "kernels", "--output", tmp_path]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "error" not in report
    rows = table_rows(report)
    assert any(row[0].startswith("bf16 product") for row in rows)
    shares = {row[0]: row[5] for row in rows if len(row) == 7}
    assert {name: shares[name][-1:] for name in KERNELS} == dict.fromkeys(KERNELS, "%")
    assert "not judged" in report


def test_parts_that_lack_a_package_are_named_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_spec(name: str) -> Any:
        return None if name in ("pydantic", "pydantic_core") else name

    ran: list[str] = []
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(gpu, "run_part", lambda name, *_: ran.append(name))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--output", str(tmp_path)])
    gpu.main()
    assert ran == ["roofs", "decode", "prefill", "kernels"]
    told = capsys.readouterr().out.splitlines()[0]
    assert told.startswith(
        "Missing here: pydantic, pydantic_core. Not run: kernels sampling, start, steps tiny, serving."
    )
    assert all(command in told for command in gpu.WHEELS)
    report = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert told in report
    assert report.count("| not run: pydantic, pydantic_core missing |") == 4


def test_the_commands_are_those_of_the_documentation() -> None:
    documented = (SCRIPT.parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8").replace("\\\n", " ")
    for command in gpu.WHEELS:
        assert command in " ".join(documented.split())


def test_attention_and_kernels_need_torch_and_triton_alone() -> None:
    blocked = sorted({*gpu._ENGINE} - {*gpu._KERNELS})
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked})); sys.path[:0] = {[str(SCRIPT.parent)]}; "
        "import gpu_parts.machine, gpu_parts.attention, gpu_parts.kernels"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=SCRIPT.parents[1])


def test_lines_that_are_no_rows_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = json.dumps({"cells": {"kernel": "one"}})
    lines = [json.dumps({"columns": ["kernel"], "note": ""}), "noise", "7", '{"a": 1}', row[:9], row]
    (tmp_path / "gpu.py").write_text("\n".join(f"print({line!r})" for line in lines))
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    report = gpu.Report(None, "")
    gpu.run_part("part", gpu.Part("A part", "any", 1.0, {}, ()), 20.0, False, {}, report)
    assert report.rows["part"] == [{"kernel": "one"}]
    assert report.notes == ["A part: 4 lines could not be read as rows. The first: `noise`"]
    assert [line for line in capsys.readouterr().out.splitlines() if "no row" in line] == [
        "A part: no row: noise", "A part: no row: 7", 'A part: no row: {"a": 1}', f"A part: no row: {row[:9]}",
    ]  # fmt: skip


def test_rows_of_several_threads_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            for letter in text:
                os.sched_yield()  # whoever waits comes in between
                super().write(letter)
            return len(text)

    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    send = importlib.import_module("gpu_parts.machine").send
    written = Slow()
    monkeypatch.setattr(sys, "stdout", written)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: send({"number": number}), range(40)))
    assert sorted(json.loads(line)["number"] for line in written.getvalue().splitlines()) == [*range(40)]
