"""Finds out at load what each attention layer computes, and proves that serving it gives the model's own logits.

Nothing here knows a model by name; the model itself is asked, on a handful of tokens and in three steps:

1. Every declared window is shrunk to three tokens for the time of the probe, so that a short row shows it.
2. The model runs with an attention that only looks: which modules call it, with which shapes and arguments, and with
   which mask. The mask tells a sliding layer from a full one, also where the call does not (phimoe, doge, qwen2_moe),
   and anything that is neither (chunks, biases, prefixes) is refused.
3. Two sequences go through the model's own eager attention one after the other, and through ours together, in chunks,
   over paged blocks. Different logits mean that something else than attention looks across tokens (a convolution, a
   recurrent state), or that the hook was not told everything; the model is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from pagedllm_core.attention.base import AttentionBackend, ForwardBatch, LayerSpec
from pagedllm_core.errors import UnsupportedModelError
from pagedllm_core.kv.storage import KVStorage, LayerGeometry
from pagedllm_core.model.hf import PROBE, Layer, PagedContext, RaggedModel, running
from pagedllm_core.model.support import unsupported

logger = logging.getLogger("pagedllm.model")

StepFunction = Callable[[ForwardBatch], torch.Tensor]
"""Computes a step: float32 [L, vocab], a row for each of the batch's `logits_rows`."""

_WINDOW = 3
_LENGTH = 9
_BLOCK_SIZE = 4

# Arguments of the attention call that do not change what is computed, or that are read into the `LayerSpec`.
_KNOWN_ARGUMENTS = {
    "scaling", "softcap", "sliding_window", "s_aux", "dropout", "is_causal",
    "position_ids", "cache_position", "position_embeddings", "use_cache", "layer_idx",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep",
    "num_items_in_batch",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One layer's attention.

    Attributes:
        spec: What it computes.
        geometry: What it stores per token.
    """

    spec: LayerSpec
    geometry: LayerGeometry


@dataclass(frozen=True, slots=True)
class ProbedLayer(AttentionLayer):
    """One attention module of a transformers model.

    Attributes:
        module: The module that calls attention.
    """

    module: nn.Module


@dataclass(slots=True)
class _Call:
    module: nn.Module
    q_shape: torch.Size
    k_shape: torch.Size
    v_shape: torch.Size
    dtype: torch.dtype
    mask: Any
    arguments: dict[str, Any]


class _Recorder:
    """Writes down every attention call and answers with zeros."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def attend(
        self,
        module: nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        self.calls.append(_Call(module, q.shape, k.shape, v.shape, k.dtype, mask, arguments))
        return torch.zeros(q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)


def probe_layers(
    model: nn.Module, hf_config: Any, backend: Callable[[torch.device, int], AttentionBackend], prove: bool = True
) -> list[ProbedLayer]:
    """Find the model's attention layers and prove that they can be served.

    Args:
        model: A causal LM in eval mode, loaded with `attn_implementation` = `PAGED`.
        hf_config: Its configuration.
        backend: Makes an attention backend for a device and a block size.
        prove: False where the caller compares logits on its own.

    Returns:
        The layers in the order in which the model calls them.

    Raises:
        UnsupportedModelError: The model cannot be served exactly; says why.
    """
    device = next(model.parameters()).device
    tokens = probe_tokens(hf_config).to(device)
    try:
        with torch.inference_mode(), _small_windows(model) as windows:
            layers = _look(model, hf_config, tokens[:1], windows)
            if prove:
                _prove(model, hf_config, layers, tokens, backend(device, _BLOCK_SIZE))
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever transformers' code raises when it is called in a way it does not expect
        raise unsupported(
            hf_config, f"it cannot run on one ragged row of tokens ({type(error).__name__}: {error})"
        ) from error
    layers = [_with_real_window(hf_config, layer, windows) for layer in layers]
    _compare_with_cache(hf_config, layers)
    return layers


def probe_tokens(hf_config: Any) -> torch.Tensor:
    """Two sequences of random tokens, int64 [2, 9]."""
    vocab = int(hf_config.get_text_config(decoder=True).vocab_size)
    return torch.randint(0, vocab, (2, _LENGTH), generator=torch.Generator().manual_seed(0))


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration object that a part of the model reads, each once."""
    found: dict[int, Any] = {}
    for module in model.modules():
        pending = [getattr(module, "config", None)]
        while pending:
            config = pending.pop()
            if config is None or id(config) in found or not hasattr(config, "_attn_implementation"):
                continue
            found[id(config)] = config
            pending.extend(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    return list(found.values())


@contextmanager
def _small_windows(model: nn.Module) -> Iterator[dict[int, int]]:
    """Set every configured window to `_WINDOW`; yields the real ones by the configuration's id."""
    windows = {}
    changed: list[tuple[Any, str, int]] = []
    try:
        for config in _configs(model):
            for field in ("sliding_window", "attention_chunk_size"):
                value = vars(config).get(field)
                if isinstance(value, int) and value > 0:
                    changed.append((config, field, value))
                    vars(config)[field] = _WINDOW
                    if field == "sliding_window":
                        windows[id(config)] = value
        yield windows
    finally:
        for config, field, value in changed:
            vars(config)[field] = value


@contextmanager
def _implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Run the model with another attention implementation."""
    previous = [(config, config._attn_implementation_internal) for config in _configs(model)]
    try:
        for config, _ in previous:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, implementation in previous:
            config._attn_implementation_internal = implementation


def _own_logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [T, vocab] of one sequence [1, T], called as `generate` calls it."""
    logits: torch.Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    return logits[0].float()


def _look(model: nn.Module, hf_config: Any, tokens: torch.Tensor, windows: dict[int, int]) -> list[ProbedLayer]:
    recorder = _Recorder()
    with _implementation(model, PROBE), running(recorder):
        _own_logits(model, tokens)
    expected = int(hf_config.get_text_config(decoder=True).num_hidden_layers)
    modules = {call.module for call in recorder.calls}
    if len(recorder.calls) != expected or len(modules) != expected:
        raise unsupported(
            hf_config,
            f"its {expected} layers called the attention interface {len(recorder.calls)} times from {len(modules)} "
            "modules instead of once each",
        )
    return [_layer(hf_config, number, call, windows) for number, call in enumerate(recorder.calls)]


def _layer(hf_config: Any, number: int, call: _Call, windows: dict[int, int]) -> ProbedLayer:
    heads, kv_heads, width = call.q_shape[1], call.k_shape[1], call.k_shape[3]
    arguments = {name: value for name, value in call.arguments.items() if value is not None}
    strange = sorted(set(arguments) - _KNOWN_ARGUMENTS)
    if strange:
        raise unsupported(hf_config, f"layer {number} passes {', '.join(strange)} to attention")
    if call.k_shape[2] != call.q_shape[2]:
        raise unsupported(hf_config, f"layer {number} attends to other than its own tokens (cross-attention)")
    if arguments.get("is_causal") is False or getattr(call.module, "is_causal", True) is False:
        raise unsupported(hf_config, f"layer {number} is not causal")
    if call.v_shape[3] != width or call.q_shape[3] != width:
        raise unsupported(hf_config, f"layer {number} has keys of {width} and values of {call.v_shape[3]} numbers")
    if heads % kv_heads:
        raise unsupported(hf_config, f"layer {number} has {heads} query heads over {kv_heads} key heads")
    window = _seen_window(hf_config, number, call.mask)
    declared = arguments.get("sliding_window")
    config = getattr(call.module, "config", None)
    if window is None and declared is not None and id(config) not in windows and declared > 0:
        raise unsupported(
            hf_config, f"layer {number} passes a window of {declared} that its configuration does not name"
        )
    scale = arguments.get("scaling")
    spec = LayerSpec(
        scale=float(width**-0.5 if scale is None else scale),
        window=window,
        softcap=None if not arguments.get("softcap") else float(arguments["softcap"]),
        sinks=arguments.get("s_aux"),
        kv_group=number,
    )
    return ProbedLayer(spec, LayerGeometry(kv_heads, width, call.dtype), call.module)


def _seen_window(hf_config: Any, number: int, mask: Any) -> int | None:
    """The window that a layer's mask shows: `_WINDOW` or None."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[-1] != _LENGTH:
        raise unsupported(hf_config, f"layer {number} has a mask that is not a matrix of its tokens")
    if mask.dtype == torch.bool:
        visible = mask
    else:
        visible = mask == 0
        if bool((~visible & (mask > torch.finfo(mask.dtype).min / 2)).any()):
            raise unsupported(hf_config, f"layer {number} adds a position bias to the attention scores")
    ones = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool, device=mask.device)
    causal = ones.tril()
    if bool((visible == causal).all()):
        return None
    if bool((visible == causal & ones.triu(1 - _WINDOW)).all()):
        return _WINDOW
    raise unsupported(hf_config, f"layer {number} has an attention pattern that is neither causal nor a sliding window")


def _with_real_window(hf_config: Any, layer: ProbedLayer, windows: dict[int, int]) -> ProbedLayer:
    if layer.spec.window is None:
        return layer
    config = getattr(layer.module, "config", None)
    candidates = {windows[id(config)]} if id(config) in windows else set(windows.values())
    if len(candidates) != 1:
        raise unsupported(hf_config, f"layer {layer.spec.kv_group} has a sliding window of unknown size")
    return replace(layer, spec=replace(layer.spec, window=candidates.pop()))


def _compare_with_cache(hf_config: Any, layers: list[ProbedLayer]) -> None:
    """The cache that `generate` would use drops what is out of its windows; they must be those of the masks."""
    from transformers import DynamicCache

    try:
        cache = [
            (getattr(layer, "is_sliding", False), getattr(layer, "sliding_window", None))
            for layer in DynamicCache(config=hf_config).layers
        ]
    except Exception as error:  # layer types or settings without a cache layer of their own
        raise unsupported(hf_config, f"transformers has no key-value cache for it ({error})") from error
    kept = [window if sliding else None for sliding, window in cache]
    if kept and kept != [layer.spec.window for layer in layers]:
        raise unsupported(hf_config, f"its masks and the cache that generate uses differ in their windows ({kept})")


def _prove(
    model: nn.Module, hf_config: Any, layers: list[ProbedLayer], tokens: torch.Tensor, backend: AttentionBackend
) -> None:
    """Compare our logits with the model's own."""

    def served(storage: KVStorage) -> StepFunction:
        modules = {layer.module: Layer(layer.spec, storage.layer(layer.spec.kv_group)) for layer in layers}
        ragged = RaggedModel(model)
        return lambda batch: ragged.logits(
            torch.from_numpy(batch.token_ids).to(tokens.device),
            torch.from_numpy(batch.positions).to(tokens.device),
            torch.from_numpy(batch.logits_rows).to(tokens.device),
            PagedContext(backend, modules, backend.prepare(batch)),
        )

    error = distances_to_own(model, layers, tokens, served)
    if error is None:
        logger.warning("the model's own logits are not finite, so that the check against them was left out")
        return
    exact = layers[0].geometry.dtype in (torch.float32, torch.float64)
    far = (error > (0.01 if exact else 0.2)) | error.isnan()
    # A few rows may differ by more: rounding can send a token to another expert.
    if int(far.sum()) > len(error) // 4:
        raise unsupported(
            hf_config,
            "tried on a few tokens, its logits over a paged cache are not its own "
            f"(relative difference {float(error.nanmedian()):.2g}), so something beside attention looks across tokens",
        )


def distances_to_own(
    model: nn.Module, layers: list[ProbedLayer], tokens: torch.Tensor, served: Callable[[KVStorage], StepFunction]
) -> torch.Tensor | None:
    """How far logits over a paged cache are from the model's own, on two sequences side by side in three steps.

    Args:
        model: A causal LM in eval mode.
        layers: Its attention layers.
        tokens: int64 [2, 9].
        served: Gives what computes a step over a storage of small blocks; called after the model's own logits.

    Returns:
        The relative distance of each row's logits, [16]; None where the model's own are not finite.
    """
    first, second = tokens[:1], tokens[1:, :-2]
    with _implementation(model, "eager"), running(_Refusing()):
        own = [_own_logits(model, first), _own_logits(model, second)]
    if not all(bool(logits.isfinite().all()) for logits in own):
        return None
    per_table = -(-_LENGTH // _BLOCK_SIZE)
    step = served(KVStorage([layer.geometry for layer in layers], 2 * per_table, _BLOCK_SIZE, tokens.device))
    ours: list[list[torch.Tensor]] = [[], []]
    for spans in (((0, 4), (0, 1)), ((4, 5), (1, 6)), ((5, 9), (6, 7))):
        batch = _batch(spans, tokens, per_table)
        logits, cut = step(batch), int(batch.query_starts[1])
        ours[0].append(logits[:cut])
        ours[1].append(logits[cut:])
    return torch.cat([_distance(torch.cat(mine), theirs) for mine, theirs in zip(ours, own, strict=True)])


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Relative distance of each row's logits, [T], measured without their common offset."""
    spread = (theirs - theirs.mean(-1, keepdim=True)).norm(dim=-1)
    distance: torch.Tensor = (ours - theirs).norm(dim=-1) / spread.clamp_min(1e-20)
    return distance


class _Refusing:
    """A context for the model's own attention, which must not call ours."""

    def attend(self, *args: Any) -> torch.Tensor:
        """Never right: the model was set to its own attention."""
        raise RuntimeError("attention implementation cannot be switched to eager")


def _batch(spans: tuple[tuple[int, int], tuple[int, int]], tokens: torch.Tensor, per_table: int) -> ForwardBatch:
    """Positions `start` .. `end` - 1 of each of the two sequences, whose tables are runs of blocks."""
    positions = np.concatenate([np.arange(start, end) for start, end in spans])
    lengths = [end - start for start, end in spans]
    owner = np.repeat([0, 1], lengths)
    return ForwardBatch(
        token_ids=tokens.cpu().numpy()[owner, positions],
        positions=positions,
        slot_mapping=owner * per_table * _BLOCK_SIZE + positions,
        query_starts=np.array([0, lengths[0], sum(lengths)], dtype=np.int32),
        context_lens=np.array([end for _, end in spans], dtype=np.int32),
        block_tables=np.arange(2 * per_table, dtype=np.int32).reshape(2, per_table),
        logits_rows=np.arange(len(positions)),
    )
