"""Greedy generation by `transformers`, and by a `ModelRunner` driven by hand (no engine, no scheduler)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.config import EngineConfig
from pagedllm_core.model.runner import ModelRunner


def make_runner(folder: Path, **fields: Any) -> ModelRunner:
    """A runner with small blocks and a small pool, so that every prompt spans several blocks."""
    settings: dict[str, Any] = {"block_size": 4, "kv_cache_memory": "8MiB", "device": "cpu"} | fields
    return ModelRunner(EngineConfig(model=str(folder), **settings))


def reference_tokens(folder: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """What `generate` gives greedily for each prompt alone, end tokens ignored."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    results = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, num_beams=1
        )
        results.append(output[0, len(prompt) :].tolist())
    return results


class _Row:
    def __init__(self, prompt: list[int], table: list[int]) -> None:
        self.tokens = list(prompt)
        self.table = table
        self.computed = 0


def paged_tokens(
    runner: ModelRunner, prompts: list[list[int]], new_tokens: int, chunk: int = 1 << 30, seed: int = 0
) -> list[list[int]]:
    """Greedy tokens of all prompts in one ragged batch per step, prompts at most `chunk` tokens a step.

    Prompts join one step after the other, and tables are shuffled, so that steps mix prompts with decoding.
    """
    order = random.Random(seed)
    free = list(range(runner.num_blocks))
    order.shuffle(free)
    rows = []
    for prompt in prompts:
        needed = -(-(len(prompt) + new_tokens) // runner.block_size)
        rows.append(_Row(prompt, [free.pop() for _ in range(needed)]))
    ends = [len(prompt) + new_tokens for prompt in prompts]
    step = 0
    while any(len(row.tokens) < end for row, end in zip(rows, ends, strict=True)):
        step += 1
        active = [row for row, end in list(zip(rows, ends, strict=True))[:step] if len(row.tokens) < end]
        if active:
            _step(runner, active, chunk)
    return [row.tokens[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def _step(runner: ModelRunner, rows: list[_Row], chunk: int) -> None:
    spans = [(row.computed, min(len(row.tokens), row.computed + chunk)) for row in rows]
    logits = runner.run(make_batch([(row.tokens, row.table) for row in rows], spans, runner.block_size))
    for number, (row, (_, end)) in enumerate(zip(rows, spans, strict=True)):
        if end == len(row.tokens):
            row.tokens.append(int(logits[number].argmax()))
        row.computed = end


def make_batch(
    sequences: list[tuple[list[int], list[int]]], spans: list[tuple[int, int]], block_size: int
) -> ForwardBatch:
    """Positions `start` .. `end` - 1 of each (tokens, table); logits of every last row."""
    tables = np.zeros((len(sequences), max(len(table) for _, table in sequences)), dtype=np.int32)
    tokens, positions, slots = [], [], []
    for number, ((ids, table), (start, end)) in enumerate(zip(sequences, spans, strict=True)):
        tables[number, : len(table)] = table
        tokens += ids[start:end]
        positions += range(start, end)
        slots += [table[p // block_size] * block_size + p % block_size for p in range(start, end)]
    starts = np.cumsum([0] + [end - start for start, end in spans])
    return ForwardBatch(
        token_ids=np.array(tokens, dtype=np.int64),
        positions=np.array(positions, dtype=np.int64),
        slot_mapping=np.array(slots, dtype=np.int64),
        query_starts=starts.astype(np.int32),
        context_lens=np.array([end for _, end in spans], dtype=np.int32),
        block_tables=tables,
        logits_rows=starts[1:].astype(np.int64) - 1,
    )
