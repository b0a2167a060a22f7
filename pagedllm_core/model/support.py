"""Models that are known not to be served exactly, refused by name before their weights are read.

What this list misses is caught by `probe.py`, which tries the model; the list exists to give the better reason.
"""

from __future__ import annotations

from typing import Any

from pagedllm_core.errors import UnsupportedModelError

_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}

# Configuration fields that only models with a recurrent state have.
_STATE_FIELDS = (
    "mamba_d_state",
    "ssm_state_size",
    "ssm_cfg",
    "state_size",
    "mamba_num_heads",
    "linear_num_value_heads",
)


def refuse_unsupported(hf_config: Any) -> None:
    """Refuse what the configuration alone shows cannot be served.

    Raises:
        UnsupportedModelError: Names the architecture and the reason.
    """
    text = hf_config.get_text_config(decoder=True)
    reason = _reason(hf_config, text)
    if reason is not None:
        raise unsupported(hf_config, reason)


def unsupported(hf_config: Any, reason: str) -> UnsupportedModelError:
    """The error for a model that would be served wrongly."""
    names = getattr(hf_config, "architectures", None) or [getattr(hf_config, "model_type", "model")]
    return UnsupportedModelError(
        f"model: {names[0]} is not supported: {reason}. PagedLLM serves decoder-only models with causal or "
        "sliding-window attention over a key-value cache; choose such a model"
    )


def _reason(hf_config: Any, text: Any) -> str | None:
    if getattr(hf_config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    if getattr(hf_config, "quantization_config", None) or getattr(text, "quantization_config", None):
        return "its weights are quantized (quantization_config), which is not supported yet"
    if getattr(text, "kv_lora_rank", None):
        return "its attention keeps a compressed latent cache (MLA)"
    if _has_alibi(text):
        return "it adds an ALiBi position bias to the attention scores"
    types = [str(kind) for kind in getattr(text, "layer_types", None) or []]
    strange = sorted(set(types) - _SERVED_LAYER_TYPES)
    if strange:
        return f"it has layers of type {', '.join(strange)} (layer_types)"
    if getattr(text, "num_kv_shared_layers", None):
        return "its last layers share the keys and values of earlier ones (num_kv_shared_layers)"
    states = [field for field in _STATE_FIELDS if getattr(text, field, None)]
    if states:
        return f"it keeps a recurrent state beside the key-value cache ({states[0]})"
    if getattr(text, "is_causal", True) is False or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return "its attention is not causal"
    return None


def _has_alibi(text: Any) -> bool:
    if getattr(text, "model_type", "") == "bloom" or getattr(text, "alibi", False):
        return True
    attention = getattr(text, "attn_config", None)
    nested = attention.get("alibi") if isinstance(attention, dict) else getattr(attention, "alibi", False)
    return bool(nested)
