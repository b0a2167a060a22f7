"""Bad input gives a typed error that names the field, and leaves what runs unchanged."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch

from pagedllm_core import LLM
from pagedllm_core.chat.template import ChatTemplate
from pagedllm_core.config import EngineConfig, parse_bytes
from pagedllm_core.decode.beam import BeamRule
from pagedllm_core.errors import CapacityError, ContextLengthError, InvalidRequestError
from pagedllm_core.params import GuidedParams, SamplingParams
from tests.fakes import FakeRunner, expected_greedy, fake_engine, run_all

BAD_PARAMS: list[tuple[str, dict[str, Any]]] = [
    *[("max_tokens", {"max_tokens": value}) for value in (0, -1, True, 1.5, "7", math.inf)],
    *[("min_tokens", {"min_tokens": value}) for value in (-1, True, 0.5)],
    ("min_tokens", {"min_tokens": 9, "max_tokens": 8}),
    *[("n", {"n": value}) for value in (0, -1, True, 2.0, "2")],
    *[("best_of", {"best_of": value}) for value in (0, -3, True)],
    ("best_of", {"n": 3, "best_of": 2}),
    ("n=2", {"n": 2, "temperature": 0}),
    *[("temperature", {"temperature": value}) for value in (-0.1, math.nan, math.inf, -math.inf, True, "hot")],
    *[("top_p", {"top_p": value}) for value in (0, -0.5, 1.01, math.nan, True)],
    *[("top_k", {"top_k": value}) for value in (-2, 1.5, True)],
    *[("min_p", {"min_p": value}) for value in (-0.1, 1.1, math.nan)],
    *[("repetition_penalty", {"repetition_penalty": value}) for value in (0, -1, math.nan, math.inf)],
    *[("presence_penalty", {"presence_penalty": value}) for value in (-2.1, 2.1, math.nan)],
    *[("frequency_penalty", {"frequency_penalty": value}) for value in (-2.1, 2.1, math.inf)],
    *[("logprobs", {"logprobs": value}) for value in (-1, 1.5, True)],
    *[("prompt_logprobs", {"prompt_logprobs": value}) for value in (-1, True)],
    *[("seed", {"seed": value}) for value in (1.5, "a", True)],
    *[("stop", {"stop": value}) for value in ("", ["a", ""], [1], 7)],
    *[("stop_token_ids", {"stop_token_ids": value}) for value in (["a"], 3, [1.5])],
    ("bad_words", {"bad_words": [""]}),
    ("allowed_token_ids", {"allowed_token_ids": []}),
    ("logit_bias", {"logit_bias": {1: math.nan}}),
    ("logit_bias", {"logit_bias": {1: math.inf}}),
    ("logit_bias", {"logit_bias": {"a": 1.0}}),
    ("stop", {"guided": GuidedParams(regex="a"), "stop": ["b"]}),
    ("temperature=0.5", {"use_beam_search": True, "temperature": 0.5}),
    *[(name, {"use_beam_search": True, name: 1}) for name in ("top_p", "top_k", "min_p", "seed")],
    ("max_token", {"max_token": 5}),
]


@pytest.mark.parametrize(("field", "fields"), BAD_PARAMS, ids=[f"{fields}" for _, fields in BAD_PARAMS])
def test_sampling_params_name_the_field(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=field) as caught:
        SamplingParams(**fields)
    assert isinstance(caught.value, ValueError)


BAD_REQUESTS: list[tuple[str, Any, dict[str, Any]]] = [
    ("prompt", [], {}),
    ("prompt", "text without a tokenizer", {}),
    ("prompt", None, {}),
    ("prompt", 7, {}),
    ("prompt", [1, "a"], {}),
    ("prompt", [1, True], {}),
    ("prompt", [1, 1.0], {}),
    ("prompt", {}, {}),
    ("prompt", {"prompt": 5}, {}),
    ("prompt", {"prompt_token_ids": "abc"}, {}),
    ("prompt_token_ids", [1, 61], {}),
    ("prompt_token_ids", [-1], {}),
    ("prompt_token_ids", [2**70], {}),
    ("logit_bias", [1], {"logit_bias": {61: 1.0}}),
    ("logit_bias", [1], {"logit_bias": {-1: 1.0}}),
    ("allowed_token_ids", [1], {"allowed_token_ids": [61]}),
    ("stop_token_ids", [1], {"stop_token_ids": [61]}),
    ("stop_token_ids", [1], {"stop_token_ids": [-5]}),
    ("stop_token_ids", [1], {"stop_token_ids": [2**70]}),
    ("logit_bias", [1], {"logit_bias": {2**70: 1.0}}),
    ("cache_salt", [1], {"cache_salt": "\ud800"}),
    ("n=65", [1], {"n": 65, "temperature": 1.0}),
    ("best_of=65", [1], {"best_of": 65, "temperature": 1.0}),
    ("n=17", [1], {"n": 17, "temperature": 1.0}),
    ("n=2", [1], {"n": 2}),
    ("logprobs=21", [1], {"logprobs": 21}),
    ("prompt_logprobs=21", [1], {"prompt_logprobs": 21}),
    ("stop", [1], {"stop": ["x"] * 65}),
    ("stop", [1], {"stop": ["x"]}),
    ("bad_words", [1], {"bad_words": ["x"]}),
]


def test_requests_name_the_field_and_the_running_one_is_unchanged() -> None:
    engine = fake_engine(FakeRunner(num_blocks=70, max_model_len=256))
    engine.add([1, 2, 3], SamplingParams(max_tokens=len(BAD_REQUESTS) + 5), request_id="running", stream=False)
    for field, prompt, fields in BAD_REQUESTS:
        engine.step()
        before = engine.stats()
        with pytest.raises(InvalidRequestError, match=field):
            engine.add(prompt, SamplingParams(**fields))
        assert engine.stats() == before
    with pytest.raises(ContextLengthError, match="257 tokens exceed the context limit of 256") as caught:
        engine.add([1] * 257)
    assert (caught.value.prompt_length, caught.value.limit) == (257, 256)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(CapacityError, match="kv_cache_memory"):
        fake_engine(FakeRunner(num_blocks=2)).add([1] * 9)
    for options, field in [
        ({"timeout": 0}, "timeout"),
        ({"timeout": 10**400}, "timeout"),
        ({"timeout": math.nan}, "timeout"),
        ({"request_id": ""}, "request_id"),
        ({"priority": "high"}, "priority"),
        ({"share_key": ["x"]}, "share_key"),
    ]:
        with pytest.raises(InvalidRequestError, match=field):
            engine.add([1], **options)
    with pytest.raises(InvalidRequestError, match="sampling_params"):
        engine.add([1], {"max_tokens": 3})  # type: ignore[arg-type]
    output = run_all(engine)["running"].outputs[0]
    assert output.token_ids == expected_greedy([1, 2, 3], len(BAD_REQUESTS) + 5, 61)


BAD_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("model", {}),
    ("model", {"model": " "}),
    ("dtype", {"model": "m", "dtype": "int8"}),
    ("kv_cache_memory", {"model": "m", "kv_cache_memory": "lots"}),
    ("kv_cache_memory", {"model": "m", "kv_cache_memory": 0}),
    ("kv_cache_memory", {"model": "m", "kv_cache_memory": 1e9}),
    ("block_size", {"model": "m", "block_size": 0}),
    ("max_num_seqs", {"model": "m", "max_num_seqs": 0}),
    ("max_num_batched_tokens", {"model": "m", "max_num_seqs": 64, "max_num_batched_tokens": 32}),
    ("gpu_memory_utilization", {"model": "m", "gpu_memory_utilization": 1.5}),
    ("quantization", {"model": "m", "quantization": "int4"}),
    ("load_format", {"model": "m", "load_format": "gguf"}),
    ("load_format", {"model": "m", "load_format": "pickle"}),
    ("kv_cache_dtype", {"model": "m", "kv_cache_dtype": "int4"}),
    ("scheduling_policy", {"model": "m", "scheduling_policy": "random"}),
    ("tensor_parallel_size", {"model": "m", "tensor_parallel_size": 2}),
    ("no_such_field", {"model": "m", "no_such_field": 1}),
]


@pytest.mark.parametrize(("field", "fields"), BAD_CONFIGS, ids=[f"{fields}" for _, fields in BAD_CONFIGS])
def test_configurations_name_the_field(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        EngineConfig(**fields)


def test_sizes() -> None:
    assert [parse_bytes(text) for text in ("2GiB", "512 MB", "1.5 KiB", "7", "3b")] == [
        2 << 30,
        512_000_000,
        1536,
        7,
        3,
    ]


@pytest.mark.parametrize(("given", "name"), [("half", "float16"), ("float", "float32"), (torch.bfloat16, "bfloat16")])
def test_types_by_vllms_and_torchs_names(given: object, name: str) -> None:
    assert EngineConfig(model="m", dtype=given).dtype == name  # type: ignore[arg-type]


def test_configurations_are_keys_and_frozen() -> None:
    assert EngineConfig(model="m", kv_cache_memory="1KiB") == EngineConfig(model="m", kv_cache_memory=1024)
    assert len({EngineConfig(model="m"), EngineConfig(model="m"), EngineConfig(model="n")}) == 2
    with pytest.raises(ValueError, match="frozen"):
        EngineConfig(model="m").seed = 3  # type: ignore[misc]


def test_an_endless_text_is_refused_by_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizing all of it would keep everybody waiting who comes after it."""
    with LLM(model="tiny", max_model_len=64, kv_cache_memory="8MiB") as llm:
        template = ChatTemplate(llm.get_tokenizer())
        read: list[int] = []

        def counted(text: str, **options: Any) -> Any:
            read.append(len(text))
            return tokenizer(text, **options)

        tokenizer = llm.get_tokenizer()
        monkeypatch.setattr(llm.engine._worker.core.runner, "tokenizer", counted)
        for size in (70, 300):  # within what may be worth reading whole
            with pytest.raises(ContextLengthError, match=f"prompt: {len(tokenizer('a ' * size)['input_ids'])} tokens"):
                llm.engine.submit("a " * size)
        read.clear()
        with pytest.raises(ContextLengthError, match="limit of 64"):
            llm.engine.submit("a " * 1_000_000)
        assert sum(read) < 2000
        monkeypatch.setattr(template, "_tokenizer", counted)
        read.clear()
        with pytest.raises(ContextLengthError):
            template.encode("a " * 1_000_000, 64)
        assert sum(read) < 2000
        assert len(template.encode("a " * 10_000)) >= 10_000  # to count, all of it


def test_beam_search_takes_what_generate_takes() -> None:
    with LLM(model="tiny", kv_cache_memory="8MiB") as llm:
        params = [SamplingParams(n=n, max_tokens=3) for n in (1, 2)]
        outputs = llm.beam_search(["One", "Two"], params, use_tqdm=False)
        assert [len(output.outputs) for output in outputs] == [1, 2]
        with pytest.raises(InvalidRequestError, match="sampling_params"):
            llm.beam_search("One", {"n": 2})  # type: ignore[arg-type]


@pytest.mark.parametrize(("penalty", "best"), [(100.0, 0.0), (-100.0, -math.inf)])
def test_extreme_length_penalties(penalty: float, best: float) -> None:
    rule = BeamRule(2, penalty, "never", 1, 2000)
    assert rule.finished_score(-5.0, 2000) == best
    assert BeamRule(2, 2.0, "never", 1, 2000).finished_score(-8.0, 2) == -2.0
