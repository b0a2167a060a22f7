"""Texts in a grammar: what the tokenizer writes as one added token has to stand there as this token."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping


def write_text(text: str, added_tokens: Mapping[str, int]) -> str:
    """A text in the notation of llguidance's grammars.

    Args:
        text: Any; an empty one is written as nothing.
        added_tokens: Added tokens and their ids; those in the text are referred to by their number.
    """
    found = [token for token in added_tokens if token in text] if text else []
    if not found:
        return json.dumps(text, ensure_ascii=False) if text else ""
    parts = re.split("(" + "|".join(map(re.escape, sorted(found, key=len, reverse=True))) + ")", text)
    return " ".join(
        f"<[{added_tokens[part]}]>" if part in added_tokens else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part
    )
