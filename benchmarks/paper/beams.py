"""Blocks that beams share, counted in real searches.

A real model chooses the candidates, over the engine's real block tables: the bundled one, or another that is given. It
stands in for the paper's OPT-13B: what is shared depends on how often beams fork and die.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.paper.paged import Sharing
from benchmarks.paper.workload import ALPACA, Dataset, jobs
from pagedllm_core.config import EngineConfig
from pagedllm_core.engine import Engine
from pagedllm_core.params import SamplingParams

CLINIC = Path(__file__).resolve().parents[2] / "examples" / "clinic"
LONGEST = 1000  # tokens of a prompt or an output; the bundled model's context holds both


def questions(engine: Engine) -> list[list[int]]:
    """The quickstart's questions with their leaflets as chat prompts, token ids."""
    found = []
    for item in json.loads((CLINIC / "questions.json").read_text(encoding="utf-8")):
        leaflet = (CLINIC / "leaflets" / item["leaflet"]).read_text(encoding="utf-8")
        message = {"role": "user", "content": f"{leaflet}\n\n{item['question']}"}
        ids = engine.runner.tokenizer.apply_chat_template([message], add_generation_prompt=True)
        found.append(list(ids["input_ids"] if hasattr(ids, "keys") else ids))
    return found


def beam_sharing(width: int, dataset: Dataset = ALPACA, count: int = 16, model: str = "tiny") -> Sharing:
    """Run `count` searches of this width together, their lengths drawn as the dataset's, and count blocks.

    Args:
        width: Beams of a search.
        dataset: Where the lengths come from.
        count: Number of searches.
        model: A name or folder as `EngineConfig.model`; a chat model whose context holds 2,000 tokens.
    """
    config = EngineConfig(
        model=model, block_size=16, max_num_seqs=count * width, max_model_len=2 * LONGEST, enable_prefix_caching=False
    )
    engine, sharing = Engine(config), Sharing()
    prompts = questions(engine)
    for number, job in enumerate(jobs(dataset, count, float("inf"), seed=7)):
        prompt = prompts[number % len(prompts)][-min(job.prompt, LONGEST) :]  # its end, so that an answer follows
        params = SamplingParams(use_beam_search=True, n=width, max_tokens=min(job.output, LONGEST), ignore_eos=True)
        engine.add(prompt, params, stream=False)
    while engine.has_unfinished:
        engine.step()
        sharing.count(engine)
    engine.close()
    return sharing
