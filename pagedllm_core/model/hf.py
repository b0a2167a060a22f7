"""The seam to transformers: its own modelling code, with attention handed to us.

A model is called on one ragged row `[1, T]` that holds the new tokens of many sequences. Everything in a causal LM but
attention treats tokens alone, so only attention has to know where one sequence ends and the next begins. The context
of the running forward is thread-local: two engines in one process run on two threads.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from pagedllm_core.attention.base import AttentionBackend, LayerSpec

PAGED = "pagedllm"
"""Attention implementation that serves. No mask function is registered for it, so that transformers builds no mask."""

PROBE = "pagedllm_probe"
"""Attention implementation that looks at a model at load. It is given the masks the model would have built."""


class AttentionContext(Protocol):
    """What receives the attention calls of the forward that runs on this thread."""

    def attend(
        self,
        module: nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        """One layer's attention: q [1, heads, T, dim], k and v [1, kv_heads, T, dim] give [T, heads, dim]."""


class _Running(threading.local):
    context: AttentionContext | None = None


_running = _Running()


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """What transformers calls in place of its own attention."""
    context = _running.context
    if context is None:
        raise RuntimeError(f'attn_implementation="{PAGED}" works only inside a PagedLLM engine')
    return context.attend(module, query, key, value, attention_mask, kwargs)[None], None


def _full_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The mask as a tensor, also where a flag would do."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def register_attention() -> None:
    """Make both implementations known to transformers; before a model is built. Imports its modelling code."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PAGED, _attention)
    AttentionInterface.register(PROBE, _attention)
    AttentionMaskInterface.register(PROBE, _full_mask)


@contextmanager
def running(context: AttentionContext) -> Iterator[None]:
    """Hand the attention calls of this thread's forward to `context`."""
    previous, _running.context = _running.context, context
    try:
        yield
    finally:
        _running.context = previous


class Layer(NamedTuple):
    """One attention layer, ready to serve: what it computes and its cache `[2, kv_heads, blocks, size, dim]`."""

    spec: LayerSpec
    kv: torch.Tensor


class PagedContext:
    """The context of one served step.

    Args:
        backend: Computes attention.
        layers: The model's attention modules.
        meta: What `backend.prepare` returned for the step.
    """

    __slots__ = ("_backend", "_layers", "_meta")

    def __init__(self, backend: AttentionBackend, layers: dict[nn.Module, Layer], meta: Any) -> None:
        self._backend = backend
        self._layers = layers
        self._meta = meta

    def attend(
        self,
        module: nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        """See `AttentionContext.attend`. What the call says besides was read once, at load."""
        layer = self._layers[module]
        return self._backend.forward(q[0], k[0], v[0], layer.kv, layer.spec, self._meta)


class RaggedModel:
    """Calls a causal LM on one ragged row.

    Args:
        model: A transformers causal LM in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None, context: AttentionContext
    ) -> torch.Tensor:
        """One forward pass.

        Args:
            token_ids: int64 [T].
            positions: int64 [T].
            rows: int64 [L], the rows whose logits are wanted; None for all.
            context: Receives the attention calls.

        Returns:
            float32 [L, vocab].
        """
        arguments: dict[str, Any] = {"logits_to_keep": rows} if self._keeps_rows and rows is not None else {}
        with running(context):
            output = self.model(input_ids=token_ids[None], position_ids=positions[None], use_cache=False, **arguments)
        logits: torch.Tensor = output.logits[0]
        return (logits if self._keeps_rows or rows is None else logits.index_select(0, rows)).float()
