"""What int8 costs in quality: the bundled model's answers and perplexity, and the logits of random weights.

    python benchmarks/quantization.py [--output benchmarks/results/quantization.md]

The bundled model answers dialogues of the held-out generators (one turn each, greedy), and is scored on the right
answers: perplexity by token. The random model has the 0.5B shape's width and four layers.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pagedllm_core
from pagedllm_core import LLM, SamplingParams
from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.config import EngineConfig
from pagedllm_core.model.runner import ModelRunner
from training.evaluate import split
from training.heldout import TASKS

KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8 over bfloat16": {"dtype": "bfloat16", "quantization": "int8"},
}
TOKENS = 256


def answers_and_perplexity(fields: dict[str, Any], dialogues: list[tuple[str, str]]) -> tuple[float, float]:
    """Share of answers that are exactly right, and the perplexity of the right ones."""
    with LLM("tiny", **fields) as llm:
        tokenizer = llm.get_tokenizer()
        found = llm.generate(
            [prompt for prompt, _ in dialogues], SamplingParams(temperature=0, max_tokens=100), use_tqdm=False
        )
        right = sum(one.outputs[0].text == wanted for one, (_, wanted) in zip(found, dialogues, strict=True))
        ids = [tokenizer(prompt)["input_ids"] for prompt, _ in dialogues]
        whole = [one + tokenizer(wanted)["input_ids"] for one, (_, wanted) in zip(ids, dialogues, strict=True)]
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        scored = llm.generate([{"prompt_token_ids": one} for one in whole], params, use_tqdm=False)
    total, count = 0.0, 0
    for one, prompt in zip(scored, ids, strict=True):
        for token, entry in list(zip(one.prompt_token_ids, one.prompt_logprobs or [], strict=True))[len(prompt) :]:
            total -= entry[token].logprob if entry else 0.0
            count += 1
    return right / len(dialogues), math.exp(total / count)


def logit_errors(folder: str) -> list[tuple[str, float, float]]:
    """Median relative distance of the logits from float32's, and how often the most likely token is the same."""
    rows = np.arange(TOKENS)
    step = ForwardBatch(
        token_ids=np.random.default_rng(0).integers(5, 8000, TOKENS),
        positions=rows,
        slot_mapping=rows,
        query_starts=np.array([0, TOKENS], dtype=np.int32),
        context_lens=np.array([TOKENS], dtype=np.int32),
        block_tables=np.arange(TOKENS // 16, dtype=np.int32)[None],
        logits_rows=rows,
    )
    logits = []
    for fields in KINDS.values():
        runner = ModelRunner(EngineConfig(model=folder, kv_cache_memory="64MiB", **fields))
        logits.append(runner.run(step))
        runner.close()
    exact, results = logits[0], []
    for name, found in zip(KINDS, logits, strict=True):
        distance = (found - exact).norm(dim=1) / (exact - exact.mean(1, keepdim=True)).norm(dim=1)
        same = float((found.argmax(1) == exact.argmax(1)).float().mean())
        results.append((name, float(distance.median()), same))
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-task", type=int, default=100)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    dialogues = []
    for task, make in TASKS.items():
        rng = random.Random(f"{task}-11")
        dialogues += [rng.choice(split(make(rng))) for _ in range(arguments.per_task)]
    config = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=4, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=8000, max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.05,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        errors = logit_errors(folder)
    lines = [
        "# What int8 costs in quality\n",
        f"`benchmarks/quantization.py`, {datetime.now(UTC):%Y-%m-%d}, {platform.processor() or platform.machine()}, "
        f"torch {torch.__version__}, pagedllm-core {pagedllm_core.__version__}. The bundled model on {len(dialogues)} "
        "held-out turns of its own kinds of dialogue; random weights of 896 wide and 4 layers.\n",
        "| | answers exactly right | perplexity of the right answers | logit error, random weights | same best token |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for (name, error, same), fields in zip(errors, KINDS.values(), strict=True):
        exact, perplexity = answers_and_perplexity(fields, dialogues)
        lines.append(f"| {name} | {exact:.1%} | {perplexity:.4f} | {error:.2%} | {same:.1%} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
