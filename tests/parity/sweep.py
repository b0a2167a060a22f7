"""Tries every causal-LM family of transformers: exact, refused by name, or (never) wrong. A script, not a test.

python -m tests.parity.sweep [family ...]
"""

from __future__ import annotations

import dataclasses
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pagedllm_core.errors import UnsupportedModelError
from tests.parity.driver import make_runner, paged_tokens, reference_tokens
from tests.parity.families import VOCAB, spread_weights

_SMALL: dict[str, Any] = {
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "embed_dim": 64, "dim": 64, "word_embed_proj_dim": 64,
    "emb_dim": 64,
    "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "dim_ff": 96, "ffn_hidden_size": 96, "dff": 96,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "expert_hidden_size": 32, "moe_ffn_hidden_size": 32,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 16, "kv_channels": 16, "attention_head_dim": 16,
    "vocab_size": VOCAB, "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_seq_len": 256,
    "sliding_window": 8, "attention_window_size": 8, "attention_chunk_size": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "rotary_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "n_group": 1, "topk_group": 1,
    "layer_types": None, "decoder_start_token_id": 1,
}  # fmt: skip

_MORE: dict[str, dict[str, Any]] = {}


def tiny_config(family: str) -> Any:
    """The family's default configuration with every size made small."""
    default = type(AutoConfig.for_model(family))()
    more = _MORE.get(family, {})
    if hasattr(default, "text_config") and "text_config" in type(default).sub_configs:
        text = {k: v for k, v in _SMALL.items() if hasattr(default.text_config, k)}
        return type(default)(text_config=text | more, **{k: v for k, v in _SMALL.items() if k.endswith("token_id")})
    aliases = type(default).attribute_map
    known = {field.name for field in dataclasses.fields(type(default))} | set(aliases)
    fields = {k: v for k, v in _SMALL.items() if k in known and aliases.get(k) not in _SMALL}
    return type(default)(**(fields | more))


def try_family(family: str, folder: Path) -> str:
    """One line: what happened."""
    try:
        config = tiny_config(family)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > 20e6:
            return f"not built: {size / 1e6:.0f}M parameters"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        spread_weights(model, 1)
        model.save_pretrained(folder)
    except Exception as error:
        return f"not built: {type(error).__name__}: {str(error)[:150]}"
    order = random.Random(0)
    prompts = [[order.randrange(3, VOCAB) for _ in range(n)] for n in (5, 13, 29, 2)]
    try:
        expected = reference_tokens(folder, prompts, 20)
    except Exception as error:
        expected = None
        reason = f"{type(error).__name__}: {str(error)[:100]}"
    try:
        runner = make_runner(folder)
    except UnsupportedModelError as error:
        return f"refused: {str(error).split(' is not supported: ')[-1].split('. PagedLLM')[0][:150]}"
    except Exception as error:
        return f"LOAD FAILED {type(error).__name__}: {str(error)[:200]}"
    if expected is None:
        return f"served, but generate fails: {reason}"
    alone = [paged_tokens(runner, [p], 20)[0] for p in prompts]
    mixed = paged_tokens(runner, prompts, 20)
    chunks = paged_tokens(runner, prompts, 20, chunk=3)
    windows = [layer.spec.window for layer in getattr(runner._steps, "_probed", [])]  # of a fused form: none
    if alone == expected and mixed == expected and chunks == expected:
        distinct = len({t for row in expected for t in row})
        return f"exact (windows {windows}, {distinct} distinct tokens)"
    return f"WRONG alone {alone == expected} mixed {mixed == expected} chunks {chunks == expected} windows {windows}"


def main() -> None:
    """Print one line per family."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for family in sys.argv[1:] or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        folder = Path(tempfile.mkdtemp())
        start = time.time()
        sys.stdout.write(f"{family:28s} {try_family(family, folder)}  [{time.time() - start:.1f}s]\n")
        sys.stdout.flush()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
