"""Builds the tokenizer and writes model folders.

python -m training.build            # tokenizer and an untrained model into pagedllm_core/bundled/tiny
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import words as w
from .chatml import CHAT_TEMPLATE, END, END_OF_TEXT, VOCABULARY, segments, train_tokenizer
from .generator import Generator

SEED = 20261121
BUNDLED = Path(__file__).parent.parent / "pagedllm_core" / "bundled" / "tiny"


def corpus(seed: int = SEED, dialogues: int = 4000) -> list[str]:
    """The text on which the tokenizer is trained: dialogues and lists of common words."""
    generator = Generator(seed)
    texts = []
    for _ in range(dialogues):
        dialogue = generator.dialogue()
        texts.append("".join(text for text, _ in segments(dialogue.messages, dialogue.tools)))
    rng = random.Random(seed)
    bank = w.COMMON + w.NOUNS + w.ADJECTIVES + [form for verb in w.VERBS for form in verb]
    texts += [" ".join(rng.choice(bank) for _ in range(60)) for _ in range(9000)]
    return texts


def configuration() -> LlamaConfig:
    """The Llama configuration of the model."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads it."""
    make: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def replace_files(source: Path, target: Path) -> None:
    """Moves the files of a folder into another one, each by one atomic rename."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        path.chmod(0o644)
        os.replace(path, target / path.name)


def export_weights(model: LlamaForCausalLM, target: Path = BUNDLED) -> None:
    """Writes weights and configuration in bfloat16, without touching the tokenizer."""
    target.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        copy: Any = LlamaForCausalLM(model.config)
        copy.to(torch.bfloat16)
        copy.load_state_dict({key: value.to(torch.bfloat16) for key, value in model.state_dict().items()})
        fast = PreTrainedTokenizerFast.from_pretrained(BUNDLED)
        ends = [fast.convert_tokens_to_ids(END), fast.convert_tokens_to_ids(END_OF_TEXT)]
        copy.config.eos_token_id = ends
        copy.config.pad_token_id = ends[1]
        settings: Any = GenerationConfig
        copy.generation_config = settings(do_sample=False, eos_token_id=ends, pad_token_id=ends[1])
        copy.save_pretrained(folder)
        replace_files(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def export_tokenizer(tokenizer: Tokenizer, target: Path = BUNDLED) -> None:
    """Writes the tokenizer files."""
    target.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        wrap(tokenizer).save_pretrained(folder)
        replace_files(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Trains the tokenizer and exports it with an untrained model, over the bundled one."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    export_tokenizer(train_tokenizer(corpus()))
    torch.manual_seed(SEED)
    export_weights(LlamaForCausalLM(configuration()))
    files = {path.name: path.stat().st_size for path in BUNDLED.iterdir()}
    (Path(__file__).parent / "results").mkdir(exist_ok=True)
    (Path(__file__).parent / "results" / "build.json").write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
