"""What a newcomer runs first: the quickstart, its notebook, and the other examples."""

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
    """What the quickstart prints."""
    return output_of("quickstart.py", tmp_path_factory.mktemp("empty"))


def output_of(example: str, cwd: Path) -> str:
    """What an example prints, run from a directory that is not its own."""
    run = run_python(str(ROOT / "examples" / example), cwd=cwd)
    assert run.returncode == 0, run.stderr
    assert "100%" in run.stderr, "the progress bar gets to its end"
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


def test_agents_call_tools_in_parallel(tmp_path: Path) -> None:
    text = output_of("agent_parallel_tools.py", tmp_path)
    assert len(re.findall(r"^  get_(weather|train)\(\w+\) .*-> .", text, re.MULTILINE)) == 12
    assert figure(r"calls with the right city\s+(\d+) of 12", text) >= 9
    assert figure(r"most tools at once\s+(\d+)", text) > 1
    assert figure(r"largest batch\s+(\d+)", text) > 1


def test_leaflets_are_mapped_and_reduced(tmp_path: Path) -> None:
    text = output_of("map_reduce_summaries.py", tmp_path)
    leaflets = [path.read_text(encoding="utf-8") for path in (ROOT / "examples" / "clinic" / "leaflets").glob("*.txt")]
    printed, overview = (re.findall(r"^\S.*\n((?:  .*\n)+)", part, re.MULTILINE) for part in text.split("Overview"))
    chosen = [" ".join(lines.split()) for lines in printed]
    assert len(chosen) == len(leaflets) == figure(r"leaflets\s+(\d+)", text)
    assert all(sum(sentence in leaflet for leaflet in leaflets) == 1 for sentence in chosen)
    assert len(overview) == 3
    assert {" ".join(lines.split()) for lines in overview} <= set(chosen)
    assert figure(r"largest batch\s+(\d+)", text) > 1


def test_messages_become_bookings(tmp_path: Path) -> None:
    text = output_of("structured_extraction.py", tmp_path)
    assert len(re.findall(r"^ *\d+  \S.*day\b.*\d\d:\d\d", text, re.MULTILINE)) == 32
    assert figure(r"valid bookings\s+(\d+) of 32", text) == 32
    assert figure(r"all four right\s+(\d+) of 32", text) >= 20
    assert figure(r"largest batch\s+(\d+)", text) > 1
