"""Checkpoints of the commonest decoders, read from their files straight into native code.

What a model computes is said by transformers' modelling code, and for most models that code is imported, tried and
compared (`probe.py`, `parts.py`). The import alone takes longer than everything else that a small model needs to start.
For the families below, what the native code computes is known to be what transformers' code computes: a test holds the
two routes to the same bits. Such a checkpoint is recognised by its configuration and by the names and shapes of its
weights. Whatever is unusual in either is left to the other route, and to its error messages.

Nothing is compared at load here: what the other route tries on every machine, the tests try.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from pagedllm_core.attention.base import LayerSpec
from pagedllm_core.attention.native import MOST_DIM
from pagedllm_core.kv.storage import LayerGeometry
from pagedllm_core.model.parts import DecoderParts, LayerParts
from pagedllm_core.model.probe import AttentionLayer
from pagedllm_core.model.resolve import read_json, weight_files
from pagedllm_core.native.library import DTYPES

Rotary = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _Family:
    """Where a family's layers have biases (always, never, or as a field says), and what else it has."""

    qkv_bias: bool | str
    o_bias: bool | str
    mlp_bias: bool | str
    has_norms: bool = False
    has_window: bool = False


_FAMILIES = {
    "llama": _Family("attention_bias", "attention_bias", "mlp_bias"),
    "mistral": _Family(False, False, False, has_window=True),
    "qwen2": _Family(True, False, False),
    "qwen3": _Family("attention_bias", "attention_bias", False, has_norms=True),
}
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
_READ = {
    *_SIZES, "model_type", "architectures", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "head_dim",
    "attention_bias", "mlp_bias", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "layer_types",
    "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
_NOT_NEEDED = {
    "_name_or_path", "attention_dropout", "initializer_range", "max_window_layers", "pretraining_tp",
    "transformers_version", "use_cache", "is_llama_config", "transformers.js_config", "unsloth_fixed",
    "unsloth_version",
}  # fmt: skip
_ROPE = {"rope_type", "type", "rope_theta"}
_LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


class DirectDecoder(NamedTuple):
    """A decoder's weights, mapped from their files, and what its attention layers compute and store."""

    parts: DecoderParts
    attention: list[AttentionLayer]


def plain_config(folder: Path) -> Any | None:
    """The configuration of a model that may be read directly, without its family's defaults; None for another.

    Raises:
        ModelLoadError: config.json is missing or is not a JSON object.
    """
    content = read_json(folder / "config.json")
    try:
        return _as_object(content, folder) if _is_usual(content) else None
    except Exception:  # whatever a value of another kind does; transformers' route says what is wrong with it
        return None


def _is_usual(content: dict[str, Any]) -> bool:
    """Whether nothing in a configuration asks for more than the native code computes; fills in what follows from it."""
    family = _FAMILIES.get(str(content.get("model_type")))
    if family is None or any(value for name, value in content.items() if name not in _READ | _NOT_NEEDED):
        return False
    if not all(type(content.get(name)) is int and content[name] > 0 for name in _SIZES):
        return False
    if content.get("hidden_act") != "silu" or not isinstance(content.get("rms_norm_eps"), float):
        return False
    if not isinstance(content.get("tie_word_embeddings"), bool) or "eos_token_id" not in content:
        return False  # what is not in the file has the family's default
    return _has_usual_heads(content, family) and _has_usual_windows(content, family) and _has_usual_rope(content)


def _has_usual_windows(content: dict[str, Any], family: _Family) -> bool:
    if family.has_window:
        window = content.get("sliding_window", 0)  # not in the file: the family has a default
        return not content.get("layer_types") and (window is None or (type(window) is int and window > 0))
    if content["model_type"] == "llama" and content.get("sliding_window") is not None:
        return False  # Qwen's count only beside `use_sliding_window`
    return not set(content.get("layer_types") or []) - {"full_attention"}


def _has_usual_heads(content: dict[str, Any], family: _Family) -> bool:
    heads, kv_heads, width = (content[name] for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if content.get("head_dim") is None:
        if family.has_norms or width % heads:  # Qwen3's default is no quotient
            return False
        content["head_dim"] = width // heads
    dim = content["head_dim"]
    return type(dim) is int and 0 < dim <= MOST_DIM and dim % 2 == 0 and heads % kv_heads == 0


def _has_usual_rope(content: dict[str, Any]) -> bool:
    """Gathers what older files have in several fields in `rope_parameters`."""
    rope, scaling, theta = (content.pop(name, None) for name in ("rope_parameters", "rope_scaling", "rope_theta"))
    if rope and scaling:
        return False
    rope = dict(rope or scaling or {})
    rope.setdefault("rope_theta", theta)
    kind = rope.setdefault("rope_type", rope.get("type", "default"))
    content["rope_parameters"] = rope
    more = set(rope) - _ROPE
    known = (kind == "default" and not more) or (kind == "llama3" and more == _LLAMA3_ROPE)
    return known and isinstance(rope["rope_theta"], int | float)


def _as_object(content: dict[str, Any], folder: Path) -> Any:
    """A configuration object of no family: the families' own classes import the modelling code."""
    from transformers import PreTrainedConfig

    hf_config: Any = PreTrainedConfig.from_dict(content)
    hf_config.model_type = content["model_type"]
    hf_config.name_or_path = str(folder)
    return hf_config


def read_decoder(folder: Path, hf_config: Any, dtype: torch.dtype) -> DirectDecoder | None:
    """Map a decoder's weights from its files.

    Args:
        folder: Holds whole safetensors files.
        hf_config: What `plain_config` gave for it.
        dtype: Type of the weights and of the KV cache, one that native code computes.

    Returns:
        None where the weights have other names, shapes or types than the configuration says.
    """
    family, shapes = _FAMILIES[hf_config.model_type], dict(_shapes(hf_config))
    weights: dict[str, torch.Tensor] = {}
    try:
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError:  # numbers that torch does not know
        return None
    if {name: tuple(tensor.shape) for name, tensor in weights.items()} != shapes:
        return None
    if not all(tensor.dtype in (*DTYPES, torch.float16) for tensor in weights.values()):
        return None
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    embedding = nn.Parameter(weights["model.embed_tokens.weight"], requires_grad=False)
    head = _linear(weights, "lm_head") if "lm_head.weight" in weights else _holder(embedding, None)
    layers = [_layer(weights, f"model.layers.{n}.", family) for n in range(hf_config.num_hidden_layers)]
    scale, window = hf_config.head_dim**-0.5, hf_config.sliding_window if family.has_window else None
    geometry = LayerGeometry(hf_config.num_key_value_heads, hf_config.head_dim, dtype)
    return DirectDecoder(
        DecoderParts(
            _Shown(layers), embedding, head, weights["model.norm.weight"], hf_config.rms_norm_eps, _rotary(hf_config)
        ),
        [AttentionLayer(LayerSpec(scale, window, kv_group=number), geometry) for number in range(len(layers))],
    )


def _shapes(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names of all weights with their shapes."""
    family, hidden, width = _FAMILIES[config.model_type], config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    linear = {
        "self_attn.q_proj": (q, hidden, family.qkv_bias),
        "self_attn.k_proj": (kv, hidden, family.qkv_bias),
        "self_attn.v_proj": (kv, hidden, family.qkv_bias),
        "self_attn.o_proj": (hidden, q, family.o_bias),
        "mlp.gate_proj": (width, hidden, family.mlp_bias),
        "mlp.up_proj": (width, hidden, family.mlp_bias),
        "mlp.down_proj": (hidden, width, family.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if family.has_norms:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    for number in range(config.num_hidden_layers):
        for name, (outputs, inputs, bias) in linear.items():
            yield f"model.layers.{number}.{name}.weight", (outputs, inputs)
            if bias is True or (isinstance(bias, str) and getattr(config, bias, False)):
                yield f"model.layers.{number}.{name}.bias", (outputs,)
        for name, size in norms.items():
            yield f"model.layers.{number}.{name}.weight", (size,)
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def _layer(weights: dict[str, torch.Tensor], prefix: str, family: _Family) -> LayerParts:
    norms = [f"{prefix}{name}.weight" for name in ("self_attn.q_norm", "self_attn.k_norm")]
    return LayerParts(
        [_linear(weights, f"{prefix}self_attn.{name}_proj") for name in "qkv"],
        _linear(weights, f"{prefix}self_attn.o_proj"),
        [_linear(weights, f"{prefix}mlp.{name}_proj") for name in ("gate", "up")],
        _linear(weights, f"{prefix}mlp.down_proj"),
        weights[f"{prefix}input_layernorm.weight"],
        weights[f"{prefix}post_attention_layernorm.weight"],
        *(weights.get(name) if family.has_norms else None for name in norms),
    )


def _linear(weights: dict[str, torch.Tensor], name: str) -> nn.Linear:
    return _holder(weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias", None))


def _holder(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear module around weights that exist."""
    outputs, inputs = weight.shape
    module = nn.Linear(inputs, outputs, bias is not None, device="meta")
    module.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module


def _rotary(config: Any) -> Rotary:
    """Cosines and sines [1, T, dim] of positions [1, T], in the half-split order of Llama."""
    rope, dim = config.rope_parameters, config.head_dim
    if rope["rope_type"] == "default":
        frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))

    def rotary(like: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[..., None].float() * frequencies
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    return rotary


class _Shown(list[LayerParts]):
    """Layers that show a bar while they are gone through: packing reads them from their files."""

    def __iter__(self) -> Iterator[LayerParts]:
        from transformers.utils import logging  # its bars are what `disable_progress_bar` turns off

        return iter(logging.tqdm(super().__iter__(), total=len(self), desc="Loading weights", unit="layer"))
