"""The READMEs' Python snippets run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def snippets() -> list[object]:
    found = []
    for name in ("README.md", "integrations/langchain/README.md", "integrations/llama_index/README.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(match[1], id=f"{name}:{line}"))
    return found


@pytest.mark.parametrize("code", snippets())
def test_snippet(code):
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
