"""Rotary embeddings whose frequencies depend on the longest sequence, fixed once.

"dynamic" and "longrope" embeddings choose their frequencies from the largest position of the row they are given. A
ragged row holds many requests, so one long request would change its neighbours' tokens. They are therefore fixed at
load to what the model chooses for a row of `max_model_len` positions:

- "dynamic": `max_model_len` is `max_position_embeddings` unless the user asks for more, and up to there the frequencies
  are the original ones: equal to `generate` for every request.
- "longrope": short factors where `max_model_len` is at most `original_max_position_embeddings`, equal to `generate` for
  every request; else the long ones, equal to `generate` for requests longer than that. A user whose requests are all
  short gets the short factors by setting `max_model_len`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pagedllm_core.errors import UnsupportedModelError

_VARYING = ("dynamic", "longrope")


def fix_rotary_frequencies(model: nn.Module, max_model_len: int) -> None:
    """Make every rotary embedding of the model a function of each token's own position.

    Raises:
        UnsupportedModelError: An embedding still depends on the other positions of its row.
    """
    for name, module in model.named_modules():
        kinds: Any = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            if _varies(kinds):
                _fix(name, module, max_model_len, {})
                module.rope_type = "default"
                _check(name, module, max_model_len, {})
        elif isinstance(kinds, dict):
            varying = [layer_type for layer_type, kind in kinds.items() if _varies(kind)]
            for layer_type in varying:
                _fix(name, module, max_model_len, {"layer_type": layer_type})
            module.rope_type = kinds | dict.fromkeys(varying, "default")
            for layer_type in varying:
                _check(name, module, max_model_len, {"layer_type": layer_type})


def _varies(kind: Any) -> bool:
    return isinstance(kind, str) and any(varying in kind for varying in _VARYING)


def _embed(module: nn.Module, positions: list[int], arguments: dict[str, str]) -> tuple[torch.Tensor, ...]:
    device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))
    with torch.inference_mode(False), torch.no_grad():
        embedded: tuple[torch.Tensor, ...] = module(
            torch.zeros(1, dtype=torch.float32, device=device), torch.tensor([positions], device=device), **arguments
        )
    return embedded


def _fix(name: str, module: nn.Module, max_model_len: int, arguments: dict[str, str]) -> None:
    """Let the module choose its frequencies as for a row of `max_model_len` positions."""
    try:
        _embed(module, [max_model_len - 1], arguments)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise UnsupportedModelError(f"{name}: its rotary embedding cannot be fixed for serving ({error})") from error


def _check(name: str, module: nn.Module, max_model_len: int, arguments: dict[str, str]) -> None:
    """A token's embedding must not change with a far neighbour in the row."""
    alone = _embed(module, [0, 1], arguments)
    beside = _embed(module, [0, 1, max_model_len - 1], arguments)
    if not all(torch.equal(a, b[:, :2]) for a, b in zip(alone, beside, strict=True)):
        raise UnsupportedModelError(
            f"{name}: rope_type chooses frequencies or scale from the longest request in the batch, so requests would "
            "change each other; set max_model_len to at most the model's original_max_position_embeddings"
        )
