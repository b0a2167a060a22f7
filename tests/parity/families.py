"""Tiny random models of many families, for comparing with `transformers`' own `generate`.

Weights are spread wide, norms and biases included, so that a mistake anywhere changes the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

VOCAB = 160
WINDOW = 8

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]


def _config(model_type: str, *groups: dict[str, Any], **fields: Any) -> Callable[[], PretrainedConfig]:
    """A maker of one family's configuration; sizes it does not know are left out."""

    def make() -> PretrainedConfig:
        kind = type(AutoConfig.for_model(model_type))
        known = set(kind.__dataclass_fields__) | set(kind.attribute_map)
        sizes = {name: value for group in (_SIZES, *groups) for name, value in group.items() if name in known}
        return kind(**(sizes | fields))

    return make


def _longrope(max_model_len: int) -> dict[str, Any]:
    """A rope of 16 dimensions whose long factors begin at 64 positions."""
    return {
        "max_position_embeddings": max_model_len,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5],
        },
    }


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _config("llama"),
    "llama_tied": _config("llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama_odd": _config("llama", intermediate_size=90),  # no whole number of vectors
    "qwen2": _config("qwen2"),
    "qwen3": _config("qwen3", head_dim=16),
    "qwen3_moe": _config("qwen3_moe", _EXPERTS, head_dim=16, decoder_sparse_step=1),
    "mistral": _config("mistral", sliding_window=WINDOW, head_dim=16),
    "mixtral": _config("mixtral", _EXPERTS, sliding_window=None),
    "phi3": _config("phi3", sliding_window=WINDOW),
    "phi3_longrope_short": _config("phi3", **_longrope(64)),
    "phi3_longrope_long": _config("phi3", **_longrope(256)),
    "gemma2": _config(
        "gemma2",
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=_SLIDING,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
        query_pre_attn_scalar=10,
    ),
    "gemma3_text": _config("gemma3_text", head_dim=16, sliding_window=WINDOW, layer_types=_SLIDING),
    "gpt2": _config("gpt2", n_embd=64, n_layer=3, n_head=4, n_positions=256),
    "opt": _config("opt", ffn_dim=96, word_embed_proj_dim=64),
    "gpt_neox": _config("gpt_neox", use_parallel_residual=False),
    "qwen2_moe": _config(
        "qwen2_moe",
        _EXPERTS,
        shared_expert_intermediate_size=48,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
        num_hidden_layers=4,
    ),
    "qwen2_window": _config("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "phimoe": _config("phimoe", _EXPERTS, sliding_window=WINDOW),
    "gpt_oss": _config("gpt_oss", _EXPERTS, head_dim=16, sliding_window=WINDOW, layer_types=_SLIDING),
    "granite": _config("granite", attention_multiplier=0.3, residual_multiplier=0.7, logits_scaling=2.0),
    "cohere2": _config("cohere2", head_dim=16, sliding_window=WINDOW, layer_types=_SLIDING),
    "starcoder2": _config("starcoder2", sliding_window=WINDOW),
    "olmo2": _config("olmo2"),
    "glm4": _config("glm4", head_dim=16),
    "stablelm": _config("stablelm"),
    "exaone4": _config("exaone4", head_dim=16, sliding_window=WINDOW, layer_types=_SLIDING),
    "smollm3": _config("smollm3"),
    "smollm3_without_rope": _config("smollm3", num_hidden_layers=4, no_rope_layer_interval=4),
    "gpt_bigcode": _config("gpt_bigcode", n_embd=64, n_layer=3, n_head=4, n_positions=256, multi_query=True),
    "modernbert_decoder": _config("modernbert-decoder", local_attention=2 * WINDOW, global_attn_every_n_layers=2),
    "dynamic_rope": _config(
        "llama",
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        max_position_embeddings=128,
    ),
    "yarn": _config(
        "llama",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
}
"""Families that must give exactly `generate`'s greedy tokens."""


def spread_weights(model: nn.Module, seed: int) -> None:
    """Fill all weights in place, float32, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    # A tied head would repeat the last token if its embedding outweighed what the layers add.
    tied = 0.02 if getattr(model.config, "tie_word_embeddings", False) else 1.0
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty(parameter.shape).normal_(generator=generator)
            if id(parameter) in embeddings:
                parameter.copy_(noise * (tied if parameter.shape[0] == VOCAB else 1.0))
            elif parameter.ndim >= 2:
                parameter.copy_(1.5 * noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.2 * noise)


def make_model(name: str, folder: Path, seed: int = 0) -> Path:
    """Save a random float32 model of a family, without a tokenizer, into `folder`; returns it.

    Args:
        name: A key of `FAMILIES`.
        folder: Where to; made if missing.
        seed: Seed of the weights.
    """
    model = AutoModelForCausalLM.from_config(FAMILIES[name](), dtype=torch.float32).eval()
    spread_weights(model, seed)
    model.save_pretrained(folder)
    return folder


def make_config(name: str, folder: Path, **changes: Any) -> Path:
    """Save only a family's config.json, with fields changed."""
    folder.mkdir(parents=True, exist_ok=True)
    content = FAMILIES[name]().to_dict() | changes
    content["architectures"] = content.get("architectures") or []
    (folder / "config.json").write_text(json.dumps(content))
    return folder
