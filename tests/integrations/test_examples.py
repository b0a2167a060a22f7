"""What a newcomer runs first: the quickstart and its notebook."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]


def run_python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280, check=False)


def test_quickstart(tmp_path: Path) -> None:
    """The bundled model answers at least 80 %, and the shared batch holds most of the questions at once."""
    run = run_python(str(ROOT / "examples" / "quickstart.py"), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = re.search(r"right answers\s+(\d+) of 24", run.stdout)
    assert found is not None, run.stdout
    assert int(found[1]) >= 0.8 * 24, run.stdout
    batch = re.search(r"largest batch\s+(\d+)", run.stdout)
    assert batch is not None
    assert int(batch[1]) >= 20
    assert re.search(r"one shared batch .* times faster", run.stdout)


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
