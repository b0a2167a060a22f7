"""The model shapes, with random weights made where they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

CONFIGS: dict[str, Any] = {
    "tiny": lambda: LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=500, max_position_embeddings=2048, tie_word_embeddings=False,
    ),
    "0.5b": lambda: Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151_936, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "1.5b": lambda: Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151_936, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "8b": lambda: LlamaConfig(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128_256, max_position_embeddings=8192, tie_word_embeddings=False,
    ),
}  # fmt: skip


def random_model(config: Any, dtype: torch.dtype, device: torch.device, **options: Any) -> Any:
    """A model with the weights of `load_format="dummy"` in kind, made on the device: a CPU takes minutes for 8B."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model.eval()


def read_each_step(config: Any, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of weights that every step reads (of the embedding only its rows), and bytes of a token's cache."""
    hidden, dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    kv = config.num_key_value_heads * dim
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * config.intermediate_size
    weights = config.num_hidden_layers * layer + hidden * config.vocab_size
    return weights * dtype.itemsize, 2 * config.num_hidden_layers * kv * dtype.itemsize


def save(name: str, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """The model as a folder that every system can read."""
    model = random_model(CONFIGS[name](), dtype, device)
    model.save_pretrained(folder)
