"""What LlamaHub reads of the package, and the notebook in the style of LlamaIndex's own."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import nbformat
from llama_index.core.llms.function_calling import FunctionCallingLLM
from nbclient import NotebookClient

PACKAGE = Path(__file__).parents[3] / "integrations" / "llama_index"


def test_llamahub_metadata_names_what_is_there() -> None:
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))
    hub = project["tool"]["llamahub"]
    module = importlib.import_module(hub["import_path"])
    for name, author in hub["class_authors"].items():
        assert issubclass(getattr(module, name), FunctionCallingLLM)
        assert author
    assert project["project"]["name"] == hub["import_path"].replace("llama_index.", "llama-index-").replace(".", "-")
    assert hub["contains_example"] == (PACKAGE / "examples").is_dir()
    assert {"README.md", "LICENSE", "pyproject.toml"} <= {path.name for path in PACKAGE.iterdir()}


def test_llama_index_stays_a_namespace() -> None:
    """A package file in `llama_index` or `llama_index.llms` would hide every other distribution's modules."""
    assert not (PACKAGE / "llama_index" / "__init__.py").exists()
    assert not (PACKAGE / "llama_index" / "llms" / "__init__.py").exists()
    assert (PACKAGE / "llama_index" / "llms" / "pagedllm" / "py.typed").exists()


def test_notebook(tmp_path: Path) -> None:
    notebook = nbformat.read(PACKAGE / "examples" / "pagedllm.ipynb", as_version=4)
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [
        "".join(
            output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", [])
        )
        for cell in notebook.cells
    ]
    text = "\n".join(outputs)
    assert "runs language models inside your own Python process" in text
    assert "32 answers; the largest batch held 32 sequences" in text
    assert "Booking(name=" in text
    assert "get_weather {'city': " in text
    assert "Response 12: " in text or "Response 6: " in text
