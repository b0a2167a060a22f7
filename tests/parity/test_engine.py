"""The whole engine equals `generate` on every required family: alone, in company, in chunks, after preemption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pagedllm_core.config import EngineConfig
from pagedllm_core.engine import Engine
from pagedllm_core.params import SamplingParams
from tests.fakes import run_all
from tests.parity.driver import make_runner, reference_tokens
from tests.parity.test_families import LENGTHS, LONG_LENGTHS, NEW_TOKENS, random_prompts

REQUIRED = [
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "phi3", "phi3_longrope_short", "phi3_longrope_long",
    "gemma2", "gemma3_text", "gpt2", "opt", "gpt_neox", "qwen2_moe",
]  # fmt: skip


class Limited:
    """A loaded model, of whose pool only the first blocks are used."""

    def __init__(self, runner: Any, num_blocks: int) -> None:
        self._runner, self.num_blocks = runner, num_blocks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def generate(runner: Any, prompts: list[list[int]], **fields: Any) -> tuple[list[list[int]], Engine]:
    config = EngineConfig(model="any", block_size=4, **{"max_num_seqs": 4, "max_num_batched_tokens": 512, **fields})
    engine = Engine(config, runner=runner)
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0)
    ids = [engine.add(prompt, params) for prompt in prompts]
    results = run_all(engine)
    return [results[request_id].outputs[0].token_ids for request_id in ids], engine


@pytest.mark.parametrize("name", REQUIRED)
def test_greedy_tokens_equal_generate(name: str, model_folder: Callable[[str], Path]) -> None:
    folder = model_folder(name)
    lengths = LONG_LENGTHS if name == "phi3_longrope_long" else LENGTHS
    prompts = random_prompts(lengths)
    expected = reference_tokens(folder, prompts, NEW_TOKENS)
    runner = make_runner(folder)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert generate(runner, [prompt])[0] == [tokens]
    together, engine = generate(runner, prompts)
    assert together == expected
    assert engine.stats().max_batch_size == len(prompts)
    chunked, engine = generate(runner, prompts, max_num_batched_tokens=6)
    assert chunked == expected
    assert engine.stats().steps > sum(lengths) / 6
    blocks = 1 + sum(-(-length // 4) for length in lengths)  # all are admitted, and then they grow
    for caching in (True, False):
        squeezed, engine = generate(Limited(runner, blocks), prompts, enable_prefix_caching=caching)
        assert squeezed == expected
        assert engine.stats().preemptions > 0


def test_penalties_and_scores_equal_transformers(model_folder: Callable[[str], Path]) -> None:
    """Repetition penalty, bad words and minimum length through the engine; log-probabilities of the raw logits."""
    folder = model_folder("llama")
    prompt = random_prompts((12,))[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.pad_token_id = 0
    plain = reference_tokens(folder, [prompt], 20)[0]
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, repetition_penalty=1.4,
        min_new_tokens=10, eos_token_id=plain[2], output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    wanted = output.sequences[0, 12:].tolist()
    engine = Engine(EngineConfig(model="any", block_size=4), runner=make_runner(folder))
    params = SamplingParams(
        temperature=0,
        max_tokens=20,
        repetition_penalty=1.4,
        min_tokens=10,
        ignore_eos=True,
        stop_token_ids=[plain[2]],
        logprobs=5,
    )
    engine.add(prompt, params, request_id="x")
    found = run_all(engine)["x"].outputs[0]
    assert found.token_ids == wanted
    assert wanted != plain
    for step, entry in enumerate(found.logprobs or []):
        reference = torch.log_softmax(output.logits[step][0], dim=-1)
        assert entry[wanted[step]].logprob == pytest.approx(float(reference[wanted[step]]), abs=1e-4)
        assert [token for token, one in entry.items() if one.rank <= 5][-5:]
        assert {token for token, one in entry.items() if one.rank <= 5} == set(reference.topk(5).indices.tolist())
