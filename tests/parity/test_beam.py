"""Beam search equals `transformers` `generate(num_beams=w)`: sequences and scores, for many families and settings."""

from __future__ import annotations

import itertools
import random
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
from tests.parity.driver import make_runner
from tests.parity.families import VOCAB

MATRIX = list(itertools.product((2, 4, 5), (0.0, 1.0, 2.0, -1.0), (True, False, "never"), (1, 8, 30)))
FAMILIES = [
    "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "phi3", "gemma2", "gemma3_text", "gpt2", "opt", "gpt_neox",
    "qwen2_moe", "granite", "olmo2",
]  # fmt: skip
NEW_TOKENS = 12


def compare(folder: Path, cases: list[tuple[int, float, Any, int]]) -> None:
    """Width, length penalty, early stopping, number of end tokens; all searches of ours share one batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.pad_token_id = 0
    engine = Engine(
        EngineConfig(model="any", block_size=4, max_num_seqs=64, max_num_batched_tokens=64), runner=make_runner(folder)
    )
    generator = random.Random(len(cases))
    wanted = {}
    for width, length_penalty, early_stopping, dense in cases:
        prompt = [generator.randrange(3, VOCAB) for _ in range(generator.randint(2, 20))]
        ends = sorted(generator.sample(range(3, VOCAB), dense))
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=width, num_return_sequences=width, do_sample=False,
            max_new_tokens=NEW_TOKENS, length_penalty=length_penalty, early_stopping=early_stopping, eos_token_id=ends,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        params = SamplingParams(
            use_beam_search=True, n=width, length_penalty=length_penalty, early_stopping=early_stopping,
            stop_token_ids=ends, ignore_eos=True, max_tokens=NEW_TOKENS,
        )  # fmt: skip
        request_id = engine.add(prompt, params)
        wanted[request_id] = (output.sequences[:, len(prompt) :].tolist(), output.sequences_scores.tolist(), set(ends))
    results = run_all(engine)
    for request_id, (sequences, scores, ends_of) in wanted.items():
        found = results[request_id].outputs
        cut = [
            one[: next((place + 1 for place, token in enumerate(one) if token in ends_of), len(one))]
            for one in sequences
        ]
        assert [output.token_ids for output in found] == cut
        assert [output.cumulative_logprob for output in found] == pytest.approx(scores, rel=1e-5)


def test_the_whole_matrix_on_llama(model_folder: Callable[[str], Path]) -> None:
    compare(model_folder("llama"), MATRIX)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_matrix_with_one_width_each_on_other_families(name: str, model_folder: Callable[[str], Path]) -> None:
    generator = random.Random(name)
    settings = sorted({case[1:] for case in MATRIX}, key=str)
    compare(model_folder(name), [(generator.choice((2, 4, 5)), *case) for case in settings])
