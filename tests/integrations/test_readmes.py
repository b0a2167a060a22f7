"""The Python snippets of the READMEs and of docs/ run as they stand, and print what is shown under them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "integrations/langchain/README.md",
    "integrations/llama_index/README.md",
    "docs/guided.md",
    "docs/langchain.md",
    "docs/llama_index.md",
)
# A block of `text` right after a snippet is what it prints.
SNIPPET = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)


def snippets() -> list[object]:
    found = []
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for match in SNIPPET.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(match[1], match[2], id=f"{name}:{line}"))
    return found


@pytest.mark.parametrize(("code", "shown"), snippets())
def test_snippet(code, shown, capsys):
    exec(compile(code, "README.md", "exec", dont_inherit=True), {"__name__": "__main__"})
    if shown is not None:
        assert capsys.readouterr().out == shown
