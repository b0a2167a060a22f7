"""Which engine answers, what a model calls itself, and what caches know a call by."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.load import dumps, loads
from langchain_pagedllm import ChatPagedLLM, PagedLLM
from pydantic import BaseModel, Field, create_model

from pagedllm_core import AsyncEngine
from pagedllm_core.errors import InvalidRequestError, ModelLoadError

TINY = Path(__file__).parents[3] / "pagedllm_core" / "bundled" / "tiny"
MODELS = pytest.mark.parametrize("kind", [ChatPagedLLM, PagedLLM])


@pytest.fixture(scope="module")
def engines() -> Iterator[list[AsyncEngine]]:
    """The bundled model and a folder of the same, with shorter contexts."""
    made = [AsyncEngine(model=name, max_model_len=64, kv_cache_memory="8MiB") for name in ("tiny", str(TINY))]
    yield made
    for engine in made:
        engine.close()


@MODELS
def test_a_given_engine_is_known_to_caches(kind: Any, engines: list[AsyncEngine]) -> None:
    cache = InMemoryCache()
    for engine in engines:
        before = engine.stats().tokens_generated
        kind(engine=engine, cache=cache, max_tokens=2).invoke("Hello")
        assert engine.stats().tokens_generated > before
    before = [engine.stats().tokens_generated for engine in engines]
    kind(engine=engines[0], cache=cache, max_tokens=2).invoke("Hello")
    assert before == [engine.stats().tokens_generated for engine in engines]
    assert len(cache._cache) == 2


@MODELS
def test_a_given_engine_names_the_model(kind: Any, engines: list[AsyncEngine]) -> None:
    model = kind(engine=engines[1])
    assert model.model == str(TINY)
    assert kind(engine=engines[1], model="mine").model == "mine"
    assert kind(engine=engines[0], model_name="mine").model == "mine"
    assert model._get_ls_params()["ls_model_name"] == str(TINY)
    assert kind.model_validate(model.model_dump()).engine_config().max_model_len == 64


def test_a_completion_of_other_parameters_is_another() -> None:
    model = PagedLLM(model="tiny", cache=InMemoryCache(), temperature=0)
    short, long = (model.invoke("One, two,", max_completion_tokens=count, ignore_eos=True) for count in (2, 6))
    assert len(model.get_token_ids(long)) > len(model.get_token_ids(short))
    assert model.invoke("One, two,", max_tokens=2, ignore_eos=True) == short
    assert model.max_tokens is None


async def test_a_completion_of_other_parameters_is_another_async() -> None:
    model = PagedLLM(model="tiny", cache=InMemoryCache(), temperature=0)
    short, long = [await model.ainvoke("One, two,", max_tokens=count, ignore_eos=True) for count in (2, 6)]
    assert len(long) > len(short)


def test_schemas_of_one_name_are_two() -> None:
    def made(**fields: Any) -> type[BaseModel]:
        return type("Answer", (BaseModel,), {"__annotations__": fields})

    chat = ChatPagedLLM(model="tiny", cache=InMemoryCache(), max_tokens=24)
    first, second = (chat.bind(response_format=made(**{name: bool})).invoke("Hi").content for name in "ab")
    assert '"a"' in first
    assert '"b"' in second


def test_dumps_name_what_a_given_engine_is(engines: list[AsyncEngine]) -> None:
    made = loads(
        dumps(ChatPagedLLM(engine=engines[1])),
        allowed_objects=[ChatPagedLLM],
        valid_namespaces=["langchain_pagedllm"],
    )
    assert (made.engine_config().model, made.engine_config().max_model_len) == (str(TINY), 64)


def test_completions_of_another_model_are_others(tmp_path: Path) -> None:
    model = PagedLLM(model="tiny", cache=InMemoryCache(), max_tokens=2)
    model.invoke("Hello")
    with pytest.raises(ModelLoadError, match="nowhere"):
        model.invoke("Hello", model=str(tmp_path / "nowhere"))
    other = model.with_config(tags=["x"]).invoke("Hello", model=str(TINY))
    assert other == model.invoke("Hello", model_name=str(TINY))


def test_another_model_per_call_has_its_own_files() -> None:
    chat = ChatPagedLLM(model="tiny", revision="old", engine_kwargs={"tokenizer": "elsewhere", "seed": 3})
    config = chat.engine_config("another")
    assert (config.model, config.revision, config.tokenizer, config.seed) == ("another", None, None, 3)
    assert (chat.engine_config().revision, chat.engine_config("tiny").tokenizer) == ("old", "elsewhere")


def test_other_names_are_no_unknown_ones() -> None:
    chat = ChatPagedLLM(model="tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chat.invoke("Hi", max_completion_tokens=2).usage_metadata["output_tokens"] <= 2


def test_logprobs_as_sampling_parameters_have_them() -> None:
    chat = ChatPagedLLM(model="tiny", max_tokens=2)
    content = chat.invoke("Hi", logprobs=3).response_metadata["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in content] == [3, 3]
    assert "logprobs" in chat.invoke("Hi", logprobs=0).response_metadata
    assert "logprobs" not in chat.invoke("Hi", logprobs=False).response_metadata


@pytest.mark.parametrize("field", ["max_tokens", "top_k", "n", "seed", "max_num_seqs", "temperature", "timeout"])
def test_truth_is_no_number(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        ChatPagedLLM(**{field: True})


@pytest.mark.parametrize("value", ["5", 5.0])
def test_texts_and_fractions_are_no_counts(value: Any) -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        PagedLLM(max_tokens=value)


def test_completions_of_a_batch_fail_alone() -> None:
    model = PagedLLM(model="tiny", max_tokens=2)
    inputs = ["One,", "word " * 3000, "two"]
    replies = model.batch(inputs, return_exceptions=True)
    assert [isinstance(reply, InvalidRequestError) for reply in replies] == [False, True, False]
    with pytest.raises(InvalidRequestError, match="exceed the context limit"):
        model.batch(inputs)


async def test_completions_of_a_batch_fail_alone_async() -> None:
    replies = await PagedLLM(model="tiny", max_tokens=2).abatch(["One,", "word " * 3000, "two"], return_exceptions=True)
    assert [isinstance(reply, InvalidRequestError) for reply in replies] == [False, True, False]


def test_completions_as_completed_are_in_one_batch(fresh_engines: None) -> None:
    with AsyncEngine(model="tiny", kv_cache_memory="32MiB") as engine:
        model = PagedLLM(engine=engine, max_tokens=64, ignore_eos=True)
        assert sorted(number for number, _ in model.batch_as_completed(["Go on."] * 40)) == list(range(40))
        assert engine.stats().max_batch_size >= 30


def test_a_cache_tells_tools_of_one_name_apart() -> None:
    def tool_of(name: str) -> type[BaseModel]:
        return create_model("Answer", __doc__="An answer.", **{name: (int, Field(ge=0, le=9))})

    chat = ChatPagedLLM(model="tiny", cache=InMemoryCache())
    for name in ("first", "second"):
        (call,) = chat.invoke("Hi", tools=[tool_of(name)], tool_choice="any").tool_calls
        assert list(call["args"]) == [name]


def test_a_cache_knows_the_field_s_stop_strings() -> None:
    given = {"model": "tiny", "max_tokens": 12, "ignore_eos": True}
    text = PagedLLM(**given).invoke("One, two,")
    end, cache = text[len(text) // 2], InMemoryCache()
    stopped, whole = PagedLLM(stop=[end], cache=cache, **given), PagedLLM(cache=cache, **given)
    assert stopped.invoke("One, two,") == text[: text.index(end)]
    assert whole.invoke("One, two,") == text
    assert whole.invoke("One, two,", stop=[end]) == stopped.invoke("One, two,")
