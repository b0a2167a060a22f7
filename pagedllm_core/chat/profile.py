"""What can be known of a model without loading it: from the files that are on this machine."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from pagedllm_core.chat.formats import reasoning_format

BUNDLED = Path(__file__).parent.parent / "bundled"


@dataclass(frozen=True)
class LocalProfile:
    """A model's limits and abilities.

    Attributes:
        max_model_len: Its context in tokens.
        has_template: Whether it is a chat model.
        reasons: Whether its template knows reasoning.
    """

    max_model_len: int
    has_template: bool
    reasons: bool


@functools.lru_cache(maxsize=64)
def local_profile(model: str, revision: str | None = None) -> LocalProfile | None:
    """The profile of a bundled, local or already downloaded model; None where that cannot be told. No network."""
    config = _read(model, revision, "config.json")
    if config is None:
        return None
    try:
        values = json.loads(config)
        text = values.get("text_config") or values
        limit = text.get("max_position_embeddings") or text.get("n_positions")
        if not isinstance(limit, int):
            return None
        template = _read(model, revision, "chat_template.jinja")
        if template is None:
            settings = json.loads(_read(model, revision, "tokenizer_config.json") or "{}")
            template = json.dumps(settings.get("chat_template") or "")
    except (ValueError, AttributeError):
        return None
    return LocalProfile(limit, len(template) > 2, reasoning_format(template) is not None)


def _read(model: str, revision: str | None, name: str) -> str | None:
    bundled = BUNDLED / model
    path = (bundled if bundled.is_dir() else Path(model)) / name
    if not path.is_file() and "/" in model and not Path(model).exists():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, name, revision=revision)
        path = Path(found) if isinstance(found, str) else path
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
