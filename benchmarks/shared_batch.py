"""What one shared batch is worth: the quickstart's questions on the bundled model, four ways, interleaved.

    python benchmarks/shared_batch.py [--repeats 3] [--output benchmarks/results/shared_batch.md]

Each repeat runs the four ways one after the other in this process, and ratios are taken within a repeat, so that a
machine whose speed drifts does not decide. All ways generate the same number of tokens (greedy, end tokens ignored).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

import pagedllm_core
from pagedllm_core import LLM, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "pagedllm_core" / "bundled" / "tiny"
NEW_TOKENS = 32


def prompts(tokenizer: Any) -> list[list[int]]:
    """The quickstart's questions, each with its leaflet, as token ids."""
    clinic = ROOT / "examples" / "clinic"
    ids = []
    for item in json.loads((clinic / "questions.json").read_text(encoding="utf-8")):
        leaflet = (clinic / "leaflets" / item["leaflet"]).read_text(encoding="utf-8")
        message = {"role": "user", "content": f"Leaflet:\n{leaflet}\n\nQuestion: {item['question']}"}
        ids.append(tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)["input_ids"])
    return ids


def ways(llm: LLM, model: Any, batch: list[list[int]]) -> dict[str, Callable[[], None]]:
    """Name to function; each answers every prompt once."""
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    # A salt of its own for each run, so that none finds what the one before left in the prefix cache.
    salts = iter(range(1_000_000))

    def salted() -> SamplingParams:
        return params.model_copy(update={"cache_salt": str(next(salts))})

    def generate(chosen: list[list[int]]) -> None:
        longest = max(map(len, chosen))
        ids = torch.tensor([[0] * (longest - len(one)) + one for one in chosen])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in chosen])
        config = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        model.generate(ids, attention_mask=mask, **config)

    def together() -> None:
        llm.generate(batch, salted(), use_tqdm=False)

    def in_turn() -> None:
        one_salt = salted()
        for prompt in batch:
            llm.generate(prompt, one_salt, use_tqdm=False)

    def generate_in_turn() -> None:
        for prompt in batch:
            generate([prompt])

    return {
        "PagedLLM, one shared batch": together,
        "PagedLLM, one at a time": in_turn,
        "transformers generate, padded batch": lambda: generate(batch),
        "transformers generate, one at a time": generate_in_turn,
    }


def measure(repeats: int, dtype: str) -> dict[str, list[float]]:
    """Seconds of each way in each repeat, after one unmeasured round."""
    with LLM(model="tiny", dtype=dtype) as llm:
        model = AutoModelForCausalLM.from_pretrained(TINY, dtype=getattr(torch, dtype)).eval()
        functions = ways(llm, model, prompts(llm.get_tokenizer()))
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for repeat in range(repeats + 1):
            for name, function in functions.items():
                started = time.perf_counter()
                function()
                if repeat:
                    seconds[name].append(time.perf_counter() - started)
    return seconds


def table(seconds: dict[str, list[float]], dtype: str) -> str:
    """A Markdown table of medians, and of the ratios to the shared batch."""
    base = seconds["PagedLLM, one shared batch"]
    lines = [f"### {dtype}", "", "| | seconds | shared batch is faster by (least - most) |", "| --- | --- | --- |"]
    for name, values in seconds.items():
        ratios = [value / own for value, own in zip(values, base, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        lines.append(f"| {name} | {statistics.median(values):.2f} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    head = (
        "# One shared batch on the bundled model\n\n"
        f"24 prompts with their leaflets, {NEW_TOKENS} new tokens each, greedy. "
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, pagedllm-core {pagedllm_core.__version__}, "
        f"{torch.get_num_threads()} threads, {arguments.repeats} interleaved repeats, medians.\n"
    )
    text = "\n".join(
        [head, *(table(measure(arguments.repeats, dtype), dtype) + "\n" for dtype in ("float32", "bfloat16"))]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
