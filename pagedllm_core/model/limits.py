"""How long a sequence a model takes."""

from __future__ import annotations

from typing import Any

from pagedllm_core.errors import InvalidRequestError

_LIMIT_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_sequence_length",
    "max_seq_len",
    "max_seq_length",
    "model_max_length",
)
_UNLIMITED = 1 << 20


def context_limit(hf_config: Any, asked: int | None) -> int:
    """The engine's `max_model_len`: what the user asked for, else the model's own.

    A scaled rotary embedding reaches further than `max_position_embeddings` where that counts unscaled positions
    ("linear", "dynamic", "yarn"); such a model serves `max_position_embeddings` unless asked for more.

    Raises:
        InvalidRequestError: The user asks for more than the model's limit.
    """
    text = hf_config.get_text_config(decoder=True)
    own = next((int(value) for name in _LIMIT_FIELDS if (value := getattr(text, name, None))), None)
    if own is None:
        return asked or _UNLIMITED
    limit = max([own, *(_scaled_limit(own, rope) for rope in _rope_parameters(text))])
    if asked is not None and asked > limit:
        raise InvalidRequestError(
            f"max_model_len={asked}: the model's own limit is {limit} tokens; use at most that, or leave it out"
        )
    return asked or own


def _rope_parameters(text: Any) -> list[dict[str, Any]]:
    """The model's rotary settings: one, or one per layer type."""
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, dict):
        return []
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _scaled_limit(own: int, rope: dict[str, Any]) -> int:
    kind, factor = rope.get("rope_type"), rope.get("factor")
    if not isinstance(factor, int | float):
        return own
    if kind in ("linear", "dynamic"):
        return int(own * factor)
    original = rope.get("original_max_position_embeddings")
    if kind == "yarn" and isinstance(original, int):
        return int(original * factor)
    return own
