"""Whatever the logits and the budget: guided output is valid, or the request is refused at submission."""

from __future__ import annotations

import contextlib
import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoTokenizer

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.decode.grammar import GrammarCompiler
from pagedllm_core.engine import Engine
from pagedllm_core.errors import InvalidRequestError
from pagedllm_core.params import GuidedParams, SamplingParams
from tests.fakes import FakeRunner, fake_engine, run_all
from tests.schemas import random_schema

MODEL = Path(__file__).parents[2] / "pagedllm_core" / "bundled" / "tiny"
SCHEMAS = 1000
ENDS = (2041, 2039)


@lru_cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


class RandomRunner(FakeRunner):
    """Logits of one of many random rows, chosen by the token and its position: cheap, and far from flat."""

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        rows = batch.token_ids[batch.logits_rows] * 31 + batch.positions[batch.logits_rows]
        return random_rows()[torch.from_numpy(rows % len(random_rows()))]


@lru_cache
def random_rows() -> torch.Tensor:
    return torch.randn(997, 2048, generator=torch.Generator().manual_seed(1)) * 3


def engine_of(num_blocks: int = 4096, max_num_seqs: int = 64) -> Engine:
    """An engine whose logits are random, over the bundled model's vocabulary."""
    runner = RandomRunner(num_blocks, 8, 2048, 512, ENDS, {"do_sample": True}, tokenizer())
    return fake_engine(runner, max_num_seqs=max_num_seqs, max_num_batched_tokens=max(128, max_num_seqs))


@lru_cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer(), 2048, ENDS)


def params_for(schema: dict[str, Any], rng: random.Random) -> SamplingParams:
    """Sampling of every kind, with a budget that is often just large enough."""
    smallest = len(compiler().compile(GuidedParams(json=schema)).closing)
    fields: dict[str, Any] = {"max_tokens": max(1, smallest + rng.choice([0, 0, 0, 1, 2, 5, 20]))}
    kind = rng.random()
    if kind < 0.25:
        fields |= {"n": rng.choice([2, 3]), "use_beam_search": True}
    elif kind < 0.45:
        fields |= {"n": rng.choice([2, 4]), "temperature": 1.3}
    else:
        fields |= {"temperature": rng.choice([0.0, 0.7, 2.0]), "top_p": rng.choice([0.6, 1.0])}
    if rng.random() < 0.2:
        fields["logprobs"] = 2
    if rng.random() < 0.1:
        fields["ignore_eos"] = True
    if rng.random() < 0.1:
        fields["min_tokens"] = fields["max_tokens"]
    if rng.random() < 0.1:
        fields["bad_words"] = ["}", '"', "0"]
    return SamplingParams(**fields, guided=GuidedParams(json=schema))


def check_text(text: str, schema: dict[str, Any]) -> None:
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.timeout(300)
def test_random_schemas_with_tight_budgets_are_always_valid() -> None:
    rng = random.Random(20261121)
    engine = engine_of()
    schemas: dict[str, dict[str, Any]] = {}
    refused = outputs = 0
    for number in range(SCHEMAS):
        schema = random_schema(rng)
        try:
            params = params_for(schema, rng)
        except InvalidRequestError:
            refused += 1
            continue
        prompt = [rng.randrange(2000) for _ in range(rng.randint(1, 20))]
        schemas[engine.add(prompt, params, request_id=str(number))] = schema
    for request_id, output in run_all(engine, check=False).items():
        assert output.error is None, output.error
        for completion in output.outputs:
            check_text(completion.text, schemas[request_id])
            outputs += 1
    assert refused == 0
    assert outputs > SCHEMAS


@pytest.mark.parametrize("seed", range(5))
def test_valid_when_the_pool_is_short(seed: int) -> None:
    rng = random.Random(seed)
    engine = engine_of(num_blocks=40, max_num_seqs=16)
    schemas = {}
    for number in range(24):
        schema = random_schema(rng)
        params = params_for(schema, rng).model_copy(update={"max_tokens": None})
        with contextlib.suppress(InvalidRequestError):  # its smallest output does not fit the pool
            schemas[engine.add([rng.randrange(2000) for _ in range(9)], params, request_id=str(number))] = schema
    assert len(schemas) > 16
    for request_id, output in run_all(engine).items():
        assert output.error is None, output.error
        for completion in output.outputs:
            check_text(completion.text, schemas[request_id])
    assert engine.stats().preemptions > 0


def test_less_than_the_smallest_output_is_refused() -> None:
    rng = random.Random(3)
    engine = engine_of()
    for _ in range(50):
        schema = random_schema(rng)
        smallest = len(compiler().compile(GuidedParams(json=schema)).closing)
        if smallest > 1:
            params = SamplingParams(max_tokens=smallest - 1, guided=GuidedParams(json=schema))
            with pytest.raises(InvalidRequestError, match=f"takes {smallest} tokens.* leave {smallest - 1};"):
                engine.add([1, 2, 3], params)
    assert not engine.has_unfinished
