"""Exact match of a model on held-out dialogues, task by task.

python -m training.evaluate --model pagedllm_core/bundled/tiny --per-task 100
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from .chatml import END, END_OF_TEXT, START, segments, token_id
from .context_tasks import Dialogue
from .heldout import TASKS

log = logging.getLogger("training")
LAST_TURN = {"conversation"}
"""Tasks of which the last turn is asked, not a random one."""
CALLS = """start: call ("\\n" call)*
call: <[2042]> "\\n{{\\"name\\": " name ", \\"arguments\\": " arguments "}}\\n" <[2043]>
name: {names}
arguments: %json {{"type": "object", "x-guidance": {{"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "}}}}"""
"""The form of tool calls, with names that exist and arguments that are any object."""


def split(dialogue: Dialogue) -> list[tuple[str, str]]:
    """Every assistant turn of a dialogue with the text before it."""
    pairs, prefix = [], ""
    for text, learnt in segments(dialogue.messages, dialogue.tools):
        if learnt:
            pairs.append((prefix, text.removesuffix(END)))
        prefix += text
    return pairs


@torch.no_grad()
def complete(model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: list[str], limit: int = 100) -> list[str]:
    """Greedy answers to prompts of which each ends where the assistant begins; one padded batch."""
    padding = token_id(tokenizer, END_OF_TEXT)
    ends = torch.tensor([token_id(tokenizer, token) for token in (END, END_OF_TEXT, START)])
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    longest = max(map(len, encoded))
    ids: Tensor = torch.tensor([[padding] * (longest - len(one)) + one for one in encoded])
    mask: Tensor = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in encoded])
    cache: Any = None
    output: list[Tensor] = []
    finished = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(limit):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        step = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = step.past_key_values
        token = step.logits[:, -1].argmax(-1)
        finished |= torch.isin(token, ends)
        output.append(torch.where(finished, padding, token))
        if bool(finished.all()):
            break
        ids = token[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    rows = torch.stack(output, 1).tolist()
    return [tokenizer.decode([token for token in row if token != padding], skip_special_tokens=False) for row in rows]


def evaluate(
    model: LlamaForCausalLM, tokenizer: Tokenizer, per_task: int, seed: int = 7, failures: list[Any] | None = None
) -> dict[str, float]:
    """The share of exactly right answers of each task; one turn of each dialogue is asked."""
    result = {}
    for task, make in TASKS.items():
        rng = random.Random(f"{task}-{seed}")
        chosen = [
            (split(one)[-1] if task in LAST_TURN else rng.choice(split(one)))
            for one in (make(rng) for _ in range(per_task))
        ]
        answers = []
        for start in range(0, per_task, 25):
            answers += complete(model, tokenizer, [prompt for prompt, _ in chosen[start : start + 25]])
        right = [answer == expected for answer, (_, expected) in zip(answers, chosen, strict=True)]
        if failures is not None:
            failures += [
                {"task": task, "prompt": prompt, "expected": expected, "answer": answer}
                for answer, (prompt, expected), good in zip(answers, chosen, right, strict=True)
                if not good
            ]
        result[task] = round(sum(right) / per_task, 3)
    return result


def schema_of(answer: dict[str, Any]) -> dict[str, Any]:
    """The schema that an extraction is asked for with: the keys of the answer in their order, and their types."""
    kinds: dict[type, dict[str, Any]] = {
        str: {"type": "string"},
        int: {"type": "integer"},
        float: {"type": "number"},
        list: {"type": "array", "items": {"type": "string"}},
    }
    properties = {key: kinds[type(value)] for key, value in answer.items()}
    return {"type": "object", "properties": properties, "required": list(answer)}


def evaluate_held(folder: str, per_task: int, seed: int = 7) -> dict[str, float]:
    """The share of exactly right extractions and calls whose form PagedLLM holds, as its users ask for them."""
    from pagedllm_core import LLM, GuidedParams, SamplingParams

    result = {}
    with LLM(model=folder, kv_cache_memory="256MiB") as llm:
        for task in ("json", "tools", "unicode"):
            rng = random.Random(f"{task}-{seed}")
            chosen = [rng.choice(split(TASKS[task](rng))) for _ in range(per_task)]
            params = [_held(task, expected) for _, expected in chosen]
            prompts = [
                {"prompt_token_ids": llm.get_tokenizer()(prompt, add_special_tokens=False)["input_ids"]}
                for prompt, _ in chosen
            ]
            outputs = llm.generate(
                prompts,
                [SamplingParams(max_tokens=150, guided=one and GuidedParams(**one)) for one in params],
                use_tqdm=False,
            )
            texts = [output.outputs[0].text for output in outputs]
            right = [text == expected for text, (_, expected) in zip(texts, chosen, strict=True)]
            result[task] = round(sum(right) / per_task, 3)
    return result


def _held(task: str, expected: str) -> dict[str, Any] | None:
    """What holds an answer: the schema of an extraction, the form of the calls, nothing for text."""
    if task == "json":
        return {"json": schema_of(json.loads(expected))}
    if not expected.startswith("<tool_call>"):
        return None
    names = dict.fromkeys(re.findall(r'\{"name": ("[^"]*")', expected))
    return {"grammar": CALLS.format(names=" | ".join(json.dumps(name) for name in names))}


def overall(result: dict[str, float]) -> float:
    """One figure for a result: half of it the questions about prose and documents."""
    main = ("prose", "context", "leaflets")
    prose = [score for task, score in result.items() if task in main]
    others = [score for task, score in result.items() if task not in main]
    return round(0.5 * sum(prose) / len(prose) + 0.5 * sum(others) / len(others), 4)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--per-task", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--held", action="store_true", help="extractions and calls as PagedLLM's grammars hold them, too"
    )
    parser.add_argument("--failures", help="write the wrong answers to this JSON lines file")
    parser.add_argument("--output", help="write the table to this JSON file")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model).backend_tokenizer
    wrong: list[Any] = []
    result = evaluate(model, tokenizer, arguments.per_task, arguments.seed, wrong)
    for task, score in result.items():
        log.info("%-16s %5.1f %%  (n = %d)", task, 100 * score, arguments.per_task)
    held = evaluate_held(arguments.model, arguments.per_task, arguments.seed) if arguments.held else {}
    for task, score in held.items():
        log.info("%-16s %5.1f %%  (n = %d, held to its form)", task, 100 * score, arguments.per_task)
    if arguments.failures:
        with open(arguments.failures, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in wrong)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(
                {"per_task": arguments.per_task, "seed": arguments.seed, "exact": result, "held": held}, file, indent=1
            )


if __name__ == "__main__":
    main()
