"""What a newcomer runs first: the quickstart and its notebook."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]


def run_python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the quickstart prints, run from an empty directory."""
    run = run_python(str(ROOT / "examples" / "quickstart.py"), cwd=tmp_path_factory.mktemp("empty"))
    assert run.returncode == 0, run.stderr
    return run.stdout


def figure(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, text
    return int(found[1])


def test_quickstart_answers_in_one_batch(quickstart: str) -> None:
    assert figure(r"largest batch\s+(\d+)", quickstart) >= 20
    assert re.search(r"one shared batch .* times faster", quickstart)


def test_quickstart_is_mostly_right(quickstart: str) -> None:
    assert figure(r"right answers\s+(\d+) of 24", quickstart) >= 0.8 * 24, quickstart


def test_notebook() -> None:
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "examples")}}
    )
    client.execute()
    text = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if cell.cell_type == "code"
    )
    assert "of 24 are right" in text
    assert "times faster" in text
    pictures = [output["data"].get("text/html", "") for cell in notebook.cells for output in cell.get("outputs", [])
                if output.output_type == "execute_result"]  # fmt: skip
    assert any("KV blocks after step" in picture for picture in pictures)
