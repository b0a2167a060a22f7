"""What the distributions promise: light imports, three names, and files where they belong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECTS = {
    "pagedllm-core": ROOT / "pyproject.toml",
    "langchain-pagedllm": ROOT / "integrations/langchain/pyproject.toml",
    "llama-index-llms-pagedllm": ROOT / "integrations/llama_index/pyproject.toml",
}


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    return set(json.loads(done.stdout.splitlines()[-1]))


FRAMEWORKS = {
    "import pagedllm_core": "pass",
    "from pagedllm_core import EngineConfig as C; C(model='tiny')": "import pydantic; pydantic.BaseModel",
    "from pagedllm_core import SamplingParams; SamplingParams()": "import pydantic; pydantic.BaseModel",
    "from langchain_pagedllm import ChatPagedLLM; ChatPagedLLM()": "import langchain_core.language_models.llms",
    "from llama_index.llms.pagedllm import PagedLLM; PagedLLM()": "import llama_index.core.llms.function_calling",
}


@pytest.mark.parametrize("code", FRAMEWORKS)
def test_an_import_brings_in_little_beside_the_framework(code):
    new = {name for name in modules_after(code) - modules_after(FRAMEWORKS[code]) if not name.startswith("_")}
    roots = {name.split(".")[0] for name in new} - sys.stdlib_module_names
    # Parts of the frameworks that load lazily.
    lazy = {"langchain_core", "langchain_protocol", "llama_index", "pydantic", "pydantic_core", "annotated_types"}
    assert roots <= {"pagedllm_core", "langchain_pagedllm", *lazy}
    assert "pagedllm_core.async_engine" not in new
    assert len(new) < 90, sorted(new)


def test_every_requirement_of_the_environment_is_pinned():
    pins = {
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    for path in PROJECTS.values():
        project = tomllib.loads(path.read_text())["project"]
        extras = project.get("optional-dependencies", {})
        for requirement in [*project["dependencies"], *extras.get("test", ()), *extras.get("lint", ())]:
            name = re.split(r"[^A-Za-z0-9-]", requirement)[0].lower()
            assert name in pins or name in PROJECTS, requirement
    for line in (ROOT / "examples/clinic_assistant/requirements.txt").read_text().splitlines():
        assert line.startswith("#") or re.split(r"[^A-Za-z0-9-]", line)[0].lower() in pins, line
    assert "torch==2.13.0\n" in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("name", PROJECTS)
def test_names_and_files(name):
    path = PROJECTS[name]
    project = tomllib.loads(path.read_text())["project"]
    assert project["name"] == name
    assert project["requires-python"] == ">=3.11"
    assert "Apache License" in (path.parent / "LICENSE").read_text()
    assert (path.parent / project["readme"]).exists()


def test_the_namespace_packages_have_no_init():
    folder = ROOT / "integrations/llama_index/llama_index"
    assert not (folder / "__init__.py").exists()
    assert not (folder / "llms/__init__.py").exists()


@pytest.mark.parametrize("folder", ["pagedllm_core", "integrations/langchain/langchain_pagedllm"])
def test_packages_are_marked_as_typed(folder):
    assert (ROOT / folder / "py.typed").exists()
    assert (ROOT / "integrations/llama_index/llama_index/llms/pagedllm/py.typed").exists()


def test_no_file_of_the_library_is_long():
    for folder in ("pagedllm_core", "integrations"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
