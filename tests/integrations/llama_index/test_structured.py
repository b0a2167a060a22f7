"""Structured prediction, `response_format` and reasoning: whatever the model would say, the reply has its form."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import Any, Literal

import jsonschema
import pytest
from llama_index.core.base.llms.types import ChatMessage, TextBlock, ThinkingBlock
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMStructuredPredictEndEvent,
    LLMStructuredPredictInProgressEvent,
    LLMStructuredPredictStartEvent,
)
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.pagedllm import PagedLLM
from pydantic import BaseModel, Field, RootModel, ValidationError, field_validator

from pagedllm_core import GuidedParams, get_engine
from pagedllm_core.chat.schemas import response_schema
from pagedllm_core.errors import InvalidRequestError

PROMPT = PromptTemplate("{who} is 7 years old. Who is it?")
WILD = {"temperature": 1.6, "seed": 5}
PATHS = ["sync", "async", "stream", "async stream"]
MODES = [PydanticProgramMode.DEFAULT, PydanticProgramMode.FUNCTION]
SETTINGS: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 90,
    "kv_cache_memory": "32MiB",
    "engine_kwargs": {"num_threads": 1},
}


@pytest.fixture(scope="module")
def llm() -> PagedLLM:
    return PagedLLM(**SETTINGS)


class Person(BaseModel):
    """A person."""

    name: str
    age: int = Field(ge=0, le=150)
    mood: Literal["good", "bad"] | None = None


class Node(BaseModel):
    """A list."""

    value: int
    following: Node | None = None
    tags: set[Literal["a", "b"]] = Field(default_factory=set)


class Impossible(BaseModel):
    """What no reply is accepted as."""

    name: str

    @field_validator("name")
    @classmethod
    def _refused(cls, value: str) -> str:
        raise ValueError("never right")


class Recorder(BaseEventHandler):
    """Keeps the events of a block."""

    seen: list[Any] = Field(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "Recorder"

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.seen.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.seen if isinstance(event, kind)]


@contextmanager
def recorded():
    root, recorder = get_dispatcher(), Recorder()
    root.add_event_handler(recorder)
    try:
        yield recorder
    finally:
        root.event_handlers.remove(recorder)


async def predict(llm: LLM, path: str, output_cls: type[BaseModel], **llm_kwargs: Any) -> list[Any]:
    """All objects that a path gives, the whole one last."""
    prompt = PROMPT.model_copy()  # some of LlamaIndex's programs change it
    given: Any = (output_cls, prompt, llm_kwargs)
    if path == "sync":
        return [llm.structured_predict(*given, who="Anna")]
    if path == "async":
        return [await llm.astructured_predict(*given, who="Anna")]
    if path == "stream":
        return list(llm.stream_structured_predict(*given, who="Anna"))
    return [found async for found in await llm.astream_structured_predict(*given, who="Anna")]


@pytest.mark.usefixtures("every_output")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("output_cls", [Person, Node])
async def test_every_path_gives_an_object_of_the_class(path, mode, output_cls):
    llm = PagedLLM(**SETTINGS, pydantic_program_mode=mode)
    for sampling in ({}, WILD):
        (*parts, whole) = await predict(llm, path, output_cls, **sampling)
        assert type(whole) is output_cls
        assert ("stream" in path) == bool(parts)
        for part in parts:  # what has come of it, and nothing else
            for name in output_cls.model_fields:
                value = getattr(part, name)
                text = isinstance(value, str) and name == "name"
                assert value is None or not text or whole.name.startswith(value)


async def test_what_is_no_object_comes_as_json_in_either_mode():
    for mode in MODES:
        llm = PagedLLM(**SETTINGS, pydantic_program_mode=mode)
        (found,) = await predict(llm, "sync", RootModel[list[int]])
        assert isinstance(found, RootModel)


@pytest.mark.parametrize("path", PATHS)
async def test_events_and_one_request_for_each_prediction(llm, path):
    with recorded() as events:
        objects = await predict(llm, path, Person)
    (start,) = events.of(LLMStructuredPredictStartEvent)
    assert (start.output_cls, start.template.template, start.template_args) == (
        Person,
        PROMPT.template,
        {"who": "Anna"},
    )
    (end,) = events.of(LLMStructuredPredictEndEvent)
    assert end.output == objects[-1]
    progress = [event.output for event in events.of(LLMStructuredPredictInProgressEvent)]
    assert progress == (objects if "stream" in path else [])
    (chat,) = events.of(LLMChatEndEvent)
    json.dumps(chat.response.raw)
    assert all(event.model_dump_json() for event in events.of(LLMChatEndEvent))


@pytest.mark.parametrize("mode", [*MODES, PydanticProgramMode.LLM])
@pytest.mark.parametrize("path", PATHS)
async def test_the_system_prompt_is_kept(path, mode):
    llm = PagedLLM(**SETTINGS, pydantic_program_mode=mode, system_prompt="Be exact.")
    if mode is PydanticProgramMode.LLM:  # LlamaIndex's own way, held to the class here so that it can be read
        llm = llm.model_copy(update={"guided": {"json": Person.model_json_schema()}})
    with recorded() as events:
        await predict(llm, path, Person)
    (chat,) = events.of(LLMChatEndEvent)
    assert [(message.role.value, message.content) for message in chat.messages][:1] == [("system", "Be exact.")]
    assert len(chat.messages) == 2


async def test_a_budget_that_is_too_small_is_refused(llm):
    for path in PATHS:
        with pytest.raises(InvalidRequestError, match="smallest output"):
            await predict(llm, path, Person, max_tokens=4)


async def test_a_reply_that_was_cut_is_told(llm, monkeypatch):
    prepare = PagedLLM._chat_call
    monkeypatch.setattr(PagedLLM, "_chat_call", lambda self, messages, given: prepare(
        self, messages, {**given, "response_format": None, "guided": {"choice": ['{"name": "An']}}))  # fmt: skip
    for path in PATHS:
        with pytest.raises(InvalidRequestError, match=r"Person: the reply ended \(stop\) before it was complete"):
            await predict(llm, path, Person)


async def test_what_a_validator_refuses_raises_its_error(llm):
    for path in PATHS:
        with pytest.raises(ValidationError, match="never right"):
            await predict(llm, path, Impossible)


def test_arguments_of_programs_are_left_alone(llm):
    given = {"tool_choice": "x", "tool_required": True, "max_tokens": 60}
    assert isinstance(llm.structured_predict(Person, PROMPT, given, who="Anna"), Person)
    assert len(given) == 3
    held = PagedLLM(**SETTINGS, guided={"choice": ["no"]}, stop=['"', "}"])
    assert isinstance(held.structured_predict(Person, PROMPT, who="Anna"), Person)
    chat = ChatPromptTemplate([ChatMessage("Braces {here} and {who}.", role="system"), ChatMessage("Who?")])
    assert isinstance(llm.structured_predict(Person, chat, who="Anna"), Person)


def test_a_structured_llm(llm):
    structured = llm.as_structured_llm(Person)
    assert isinstance(structured.chat([ChatMessage("Anna is 7.")]).raw, Person)
    assert isinstance(structured.complete("Anna is 7.").raw, Person)
    (*_, last) = structured.stream_chat([ChatMessage("Anna is {7}.")])
    assert isinstance(last.raw, Person)


def test_models_without_a_template(llm, monkeypatch):
    monkeypatch.setattr(get_engine(llm.engine_config()).tokenizer, "chat_template", None)
    assert not llm.metadata.is_chat_model
    assert isinstance(llm.structured_predict(Person, PROMPT, who="Anna"), Person)


SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}


def test_response_format_per_call(llm):
    openai = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    messages = [ChatMessage("Anna is 7.")]
    replies = [
        llm.chat(messages, response_format=openai).message.content,
        llm.complete("Anna is 7.", response_format=openai).text,
        llm.complete("Anna is 7.", formatted=True, response_format=openai, stop=["]"]).text,
        list(llm.stream_chat(messages, response_format=openai))[-1].message.content,
        list(llm.stream_complete("Anna", response_format=openai, **WILD))[-1].text,
    ]
    for text in replies:
        jsonschema.validate(json.loads(text), SCHEMA)
    Person.model_validate_json(llm.chat(messages, response_format=Person, **WILD).message.content)
    anything = llm.chat(messages, response_format={"type": "json_object"}, **WILD).message.content
    assert isinstance(json.loads(anything), dict)
    text = llm.chat(messages, response_format={"type": "text"}).message.content
    assert text == llm.chat(messages).message.content


@pytest.mark.parametrize("response_format", ["json", {"type": "xml"}, {"type": "json_schema"}, 3, int])
def test_unknown_response_formats_are_refused(llm, response_format):
    with pytest.raises(InvalidRequestError, match="response_format="):
        llm.complete("Hi", response_format=response_format)


def test_two_forms_at_once_are_refused(llm):
    with pytest.raises(InvalidRequestError, match="give one of them"):
        llm.complete("Hi", response_format=Person, guided={"choice": ["a"]})


def test_a_class_keeps_its_whole_schema():
    schema = response_schema(Node)
    assert "$defs" in schema
    assert "uniqueItems" not in json.dumps(schema)
    assert "uniqueItems" in json.dumps(Node.model_json_schema())


def test_tools_need_a_template():
    plain = PagedLLM(**SETTINGS, messages_to_prompt=lambda messages: str(messages[-1].content))
    tool = FunctionTool.from_defaults(lambda a: a, name="same", description="The same.")
    with pytest.raises(InvalidRequestError, match="tools: only a chat template"):
        plain.chat_with_tools([tool], "Hi")
    assert isinstance(plain.structured_predict(Person, PROMPT, who="Anna"), Person)


THINKING = """{%- for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}assistant: {% if enable_thinking is not defined or enable_thinking %}<think>
{% else %}<think>

</think>

{% endif %}"""
SAID = "Let me see.\n</think>\n\nThree."


def test_reasoning_is_kept_apart_and_counted(llm):
    given = {"chat_template": THINKING, "guided": GuidedParams(choice=[SAID])}
    counted = len(get_engine(llm.engine_config()).tokenizer("Let me see.")["input_ids"])
    responses = list(llm.stream_chat([ChatMessage("1 + 2?")], **given))
    assert "".join(response.delta for response in responses) == "Three."
    thoughts = [response.additional_kwargs.get("thinking_delta", "") for response in responses]
    assert "".join(thoughts) == "Let me see."
    for response in (llm.chat([ChatMessage("1 + 2?")], **given), responses[-1]):
        assert response.message.blocks == [
            ThinkingBlock(content="Let me see.", num_tokens=counted),
            TextBlock(text="Three."),
        ]
        assert response.raw["usage"]["completion_tokens_details"] == {"reasoning_tokens": counted}
    assert llm.complete("1 + 2?", **given).text == "Three."
    assert list(llm.stream_complete("1 + 2?", **given))[-1].text == "Three."


def test_reasoning_goes_back_to_the_template(llm):
    template = "{% for m in messages %}{{ m.reasoning_content }}{{ m.content }}{% endfor %}</think>"
    reply = llm.chat([ChatMessage("1 + 2?")], chat_template=THINKING, guided={"choice": [SAID]}).message
    call = llm._chat_call([ChatMessage("1 + 2?"), reply], {"chat_template": template})
    assert "Let me see.Three." in call.tokenize(get_engine(llm.engine_config()))["prompt"]


@pytest.mark.parametrize("path", PATHS)
async def test_reasoning_before_an_object(llm, path):
    for more in ({}, {"reasoning": False}):
        found = await predict(llm, path, Person, chat_template=THINKING, **WILD, **more)
        assert type(found[-1]) is Person
