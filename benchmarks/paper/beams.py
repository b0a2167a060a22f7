"""Blocks that beams share, counted in real searches.

The bundled model chooses the candidates, over the engine's real block tables. It stands in for the paper's OPT-13B:
what is shared depends on how often beams fork and die, which a small model trained on dialogues only approximates.
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
LONGEST = 400  # tokens of a prompt or an output; the bundled model's context holds both


def questions(engine: Engine) -> list[list[int]]:
    """The quickstart's questions with their leaflets as chat prompts, token ids."""
    found = []
    for item in json.loads((CLINIC / "questions.json").read_text(encoding="utf-8")):
        leaflet = (CLINIC / "leaflets" / item["leaflet"]).read_text(encoding="utf-8")
        message = {"role": "user", "content": f"{leaflet}\n\n{item['question']}"}
        ids = engine.runner.tokenizer.apply_chat_template([message], add_generation_prompt=True)
        found.append(list(ids["input_ids"] if hasattr(ids, "keys") else ids))
    return found


def beam_sharing(width: int, dataset: Dataset = ALPACA, count: int = 16, block_size: int = 16) -> Sharing:
    """Run `count` searches of this width together, their lengths drawn as the dataset's, and count blocks."""
    config = EngineConfig(
        model="tiny", block_size=block_size, max_num_seqs=count * width, enable_prefix_caching=False, dtype="float32"
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
