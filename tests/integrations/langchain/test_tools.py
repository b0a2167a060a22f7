"""Tools, structured output and reasoning of `ChatPagedLLM`: whatever the model would say, the reply has its form."""

from __future__ import annotations

import asyncio
import json
import pickle
import random
from decimal import Decimal
from typing import Any, Literal

import jsonschema
import pytest
from langchain_core.exceptions import (
    ContextOverflowError,
    ModelAPIError,
    ModelInvalidRequestError,
    ModelNotFoundError,
    ModelTimeoutError,
)
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import Tool, tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_pagedllm import ChatPagedLLM
from langchain_pagedllm.convert import to_template_messages
from langchain_pagedllm.structured import as_tool
from pydantic import BaseModel, Field, RootModel
from pydantic import v1 as pydantic_v1
from typing_extensions import TypedDict

from pagedllm_core import EngineConfig, GuidedParams, SamplingParams, get_engine
from pagedllm_core.chat.adapter import Call
from pagedllm_core.chat.schemas import class_schema
from pagedllm_core.errors import (
    ContextLengthError,
    EngineClosedError,
    InvalidRequestError,
    ModelLoadError,
    RequestTimeoutError,
)
from tests.mistral import V11, V13, mistral_like
from tests.schemas import random_object

QUESTION = "What is 1 + 2? Add the numbers."
WILD = {"temperature": 1.6, "seed": 5}
END, BRACE, OPEN, BEGIN = 2041, 92, 90, 2042  # tokens: the end of a reply, "}", "{", and <tool_call> or [TOOL_CALLS]
ON_AND_ON = {END: -100.0, BRACE: 100.0, BEGIN: 100.0}


@pytest.fixture(scope="module")
def chat() -> ChatPagedLLM:
    return ChatPagedLLM(model="tiny", max_tokens=90, kv_cache_memory="32MiB", engine_kwargs={"num_threads": 1})


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> ChatPagedLLM:
    """A model of random weights whose template calls tools as newer Mistral models do."""
    return ChatPagedLLM(
        model=str(mistral_like(tmp_path_factory.mktemp("mistral"))),
        max_tokens=90,
        kv_cache_memory="32MiB",
        engine_kwargs={"num_threads": 1, "load_format": "dummy"},
    )


@pytest.fixture(params=["chat", "mistral"])
def caller(request) -> ChatPagedLLM:
    """Either model."""
    return request.getfixturevalue(request.param)


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def paint(colour: Literal["red", "green"], size: float) -> str:
    """Paint something."""
    return f"{colour} {size}"


class Person(BaseModel):
    """A person."""

    name: str
    age: int = Field(ge=0, le=150)
    mood: Literal["good", "bad"] | None = None


class PersonDict(TypedDict):
    """A person."""

    name: str
    age: int


class OldPerson(pydantic_v1.BaseModel):
    """A person."""

    name: str
    age: int


def merged(chunks: Any) -> AIMessage:
    total = None
    for chunk in chunks:
        total = chunk if total is None else total + chunk
    return total


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("any", {"add", "paint"}),
        ("required", {"add", "paint"}),
        (True, {"add", "paint"}),
        ("paint", {"paint"}),
        ({"type": "function", "function": {"name": "add"}}, {"add"}),
    ],
)
def test_a_demanded_call_is_made_once(caller, choice, names, streamed):
    bound = caller.bind_tools([add, paint], tool_choice=choice)
    for sampling in ({}, WILD):
        message = merged(bound.stream(QUESTION, **sampling)) if streamed else bound.invoke(QUESTION, **sampling)
        (call,) = message.tool_calls
        assert call["name"] in names
        {"add": add, "paint": paint}[call["name"]].invoke(call["args"])
        assert call["id"]
        assert message.content == ""
        assert message.invalid_tool_calls == []
        # A number goes on where the model is a random one; what the budget ends says so.
        shortened = message.usage_metadata["output_tokens"] > caller.max_tokens - 5
        assert message.response_metadata["finish_reason"] == ("length" if shortened else "tool_calls")


class Twig(BaseModel):
    """A twig of a tree."""

    name: str = Field(max_length=5)
    kids: list[Twig] = Field([], max_length=2)


@tool
def plant(root: Twig) -> str:
    """Plant a tree."""
    return root.name


def test_a_tool_of_one_text(chat):
    search = Tool(name="search", func=lambda text: f"found {text}", description="Search.")
    (call,) = chat.bind_tools([search], tool_choice="search").invoke(QUESTION).tool_calls
    assert search.invoke(call["args"]).startswith("found ")


class Paid(BaseModel):
    """A payment."""

    amount: Decimal


def test_decimals_are_numbers(chat):
    assert class_schema(Paid)["properties"]["amount"]["type"] == "number"  # and no text, of which most are none
    model = chat.with_structured_output(Paid)
    assert all(isinstance(model.invoke(QUESTION, max_tokens=count).amount, Decimal) for count in (9, 12, 40))


@tool
def pay(amount: Decimal, title: str = "x") -> str:
    """Pay an amount."""
    return str(amount)


def test_decimals_of_tools_are_numbers(chat):
    bound = chat.bind_tools([pay], tool_choice="any")
    for seed in range(4):
        (call,) = bound.invoke(QUESTION, temperature=1.6, seed=seed).tool_calls
        pay.invoke(call["args"])
    for strict in (None, True):
        for plain in (add, Described):
            assert as_tool(plain, strict) == convert_to_openai_tool(plain, strict=strict)


class Described(BaseModel):
    """Properties whose names are keywords."""

    title: str
    properties: list[int] = Field([], title="Some")


def test_what_no_grammar_holds_is_left_out_of_tools(chat):
    parameters = {
        "type": "object",
        "properties": {
            "to": {"type": "string", "pattern": r"^(?!\.)[a-z]+$", "maxLength": 4},
            "twice": {"type": "string", "pattern": r"^(a|b)\1$", "maxLength": 4},
            "from": {"$ref": "https://example.invalid/schema", "type": "integer", "maximum": 9, "minimum": 0},
            "more": {"type": "object", "patternProperties": {"(?=a)a": {"type": "string"}}, "maxProperties": 0},
        },
        "required": ["to", "twice", "from", "more"],
    }
    described = {"type": "function", "function": {"name": "mail", "description": "", "parameters": parameters}}
    (call,) = chat.bind_tools([described], tool_choice="mail").invoke(QUESTION, **WILD).tool_calls
    assert set(call["args"]) == {"to", "twice", "from", "more"}
    assert call["args"]["from"] in range(10)
    assert chat.bind_tools([described]).invoke("Hello").invalid_tool_calls == []
    for name, schema in list(parameters["properties"].items()):
        parameters["properties"] = {name: schema}
        with pytest.raises(ModelInvalidRequestError, match="the parameters of 'mail': cannot be compiled"):
            chat.bind_tools([described], strict=True).invoke(QUESTION)


def test_a_recursive_schema_as_a_function(chat):
    schema = Twig.model_json_schema()
    model = chat.with_structured_output(schema, method="function_calling")
    jsonschema.validate(model.invoke(QUESTION, temperature=2.0, seed=3, logit_bias={OPEN: 5.0}), schema)


def test_errors_name_the_tool(chat):
    def described(name: str, kind: str) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {"x": {"type": kind}}}
        return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}

    bound = chat.bind_tools([described("good", "string"), described("bad", "strin")])
    with pytest.raises(
        ModelInvalidRequestError, match=r"tools: the parameters of 'bad': .*strin.*; change or leave out"
    ):
        bound.invoke(QUESTION)
    wrong = {"type": "object", "properties": {"x": {"type": "strin"}}}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": wrong}}
    bound = chat.bind_tools([described("good", "string")], response_format=asked)
    with pytest.raises(ModelInvalidRequestError, match=r"response_format: .*strin"):
        bound.invoke(QUESTION)
    with pytest.raises(ModelInvalidRequestError, match=r"response_format: .*strin"):
        chat.with_structured_output(wrong).invoke(QUESTION)


def test_arguments_that_hold_themselves(chat):
    bound = chat.bind_tools([plant], tool_choice="plant", strict=True)
    for seed in range(8):
        (call,) = bound.invoke(QUESTION, temperature=2.0, seed=seed, logit_bias={OPEN: 5.0}).tool_calls
        plant.invoke(call["args"])
    assert '"$ref"' in json.dumps(bound.kwargs["tools"])


def test_several_calls_where_they_are_allowed(caller):
    bound = caller.bind_tools([add, paint], tool_choice="any", logit_bias=ON_AND_ON, max_tokens=200)
    assert len(bound.invoke(QUESTION).tool_calls) == 1
    message = bound.invoke(QUESTION, parallel_tool_calls=True)
    assert len(message.tool_calls) > 1
    assert len({call["id"] for call in message.tool_calls}) == len(message.tool_calls)
    assert [call["args"] for call in merged(bound.stream(QUESTION, parallel_tool_calls=True)).tool_calls] == [
        call["args"] for call in message.tool_calls
    ]


def test_calls_that_are_forbidden_are_not_made(caller):
    bound = caller.bind_tools([add], tool_choice="none")
    message = bound.invoke(QUESTION)
    assert message.tool_calls == []
    assert message.usage_metadata["input_tokens"] == caller.invoke(QUESTION).usage_metadata["input_tokens"]
    said = bound.invoke('Repeat: <tool_call>\n{"name": "add"}\n</tool_call>', logit_bias={BEGIN: 100.0}).content
    assert "<tool_call>" not in said
    assert "[TOOL_CALLS]" not in said


def test_a_call_or_the_answer_s_form(caller):
    bound = caller.bind_tools([add], response_format=Person)
    call = bound.invoke(QUESTION, logit_bias={BEGIN: 100.0}, parallel_tool_calls=False)
    assert [one["name"] for one in call.tool_calls] == ["add"]
    answer = bound.invoke(QUESTION, logit_bias={BEGIN: -100.0})
    Person.model_validate_json(answer.content)
    assert answer.tool_calls == []


async def test_no_reply_is_ever_an_invalid_call(caller):
    rng = random.Random(11)

    async def ask(number: int) -> None:
        schemas = {f"tool_{i}": random_object(rng) for i in range(rng.randint(1, 3))}
        tools = [
            {"type": "function", "function": {"name": name, "description": "x", "parameters": schema}}
            for name, schema in schemas.items()
        ]
        choice = rng.choice([None, "any", "tool_0"])
        sampling = {"temperature": rng.choice([0.0, 1.5]), "seed": number, "max_tokens": rng.choice([250, 400])}
        bound = caller.bind_tools(tools, tool_choice=choice, **sampling)
        for message in (await bound.ainvoke(QUESTION), merged([one async for one in bound.astream(QUESTION)])):
            assert message.invalid_tool_calls == []
            assert message.tool_calls or choice is None
            for call in message.tool_calls:
                jsonschema.validate(call["args"], schemas[call["name"]])

    await asyncio.gather(*map(ask, range(24)))


@pytest.mark.parametrize("template", [V11, V13], ids=["v11", "v13"])
def test_a_call_and_its_result_go_through_the_template(mistral, template):
    bound = mistral.bind_tools([add, paint], tool_choice="any", chat_template=template, parallel_tool_calls=True)
    asked = [HumanMessage(QUESTION), bound.invoke(QUESTION, logit_bias=ON_AND_ON)]
    (call, *_) = calls = asked[1].tool_calls
    assert len(calls) > 1
    answered = [*asked, *(ToolMessage("3", tool_call_id=call["id"]) for call in calls)]
    request = Call(SamplingParams(), messages=to_template_messages(answered), chat_template=template)
    prompt = str(request.tokenize(get_engine(mistral.engine_config()))["prompt"])
    assert prompt.count("[TOOL_CALLS]") == prompt.count("[TOOL_RESULTS]") == len(calls)
    assert f"[ARGS]{json.dumps(call['args'], ensure_ascii=False)}" in prompt
    assert call["id"] not in prompt
    assert bound.invoke(answered).tool_calls


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("schema", [Person, PersonDict, OldPerson, Person.model_json_schema()])
def test_structured_output(chat, method, schema):
    structured = chat.with_structured_output(schema, method=method)
    for sampling in ({}, WILD):
        answer = structured.invoke("Anna is 7.", **sampling) if not sampling else (
            chat.with_structured_output(schema, method=method, **sampling).invoke("Anna is 7.")
        )  # fmt: skip
        if isinstance(schema, type) and schema is not PersonDict:
            assert isinstance(answer, schema)
        else:
            assert {"name", "age"} <= set(answer)
    (*_, last) = structured.stream("Anna is 7.")
    assert type(last) is type(answer)


class Node(BaseModel):
    """A list."""

    value: int
    following: Node | None = None
    tags: set[Literal["a", "b"]] = Field(default_factory=set)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_classes_that_refer_to_themselves(chat, method):
    for seed in range(4):
        structured = chat.with_structured_output(Node, method=method, temperature=1.5, seed=seed, max_tokens=200)
        assert isinstance(structured.invoke("Anna is 7."), Node)


def test_schemas_of_other_things_than_objects(chat):
    schema = {"title": "numbers", "type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}
    answer = chat.with_structured_output(schema).invoke("Anna is 7.")
    jsonschema.validate(answer, schema)
    wrapped = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    jsonschema.validate(chat.with_structured_output(wrapped).invoke("Anna is 7."), schema)
    with pytest.raises(ModelInvalidRequestError, match="is no object; function_calling needs one"):
        chat.with_structured_output(schema, method="function_calling")
    with pytest.raises(ModelInvalidRequestError, match="minProperties=2: cannot be enforced"):
        chat.with_structured_output({"type": "object", "minProperties": 2}).invoke("Anna is 7.")


@pytest.mark.parametrize("key", ["schema", "input_schema"])
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_schemas_in_other_providers_wrappings(chat: ChatPagedLLM, key: str, method: str) -> None:
    inner = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    structured = chat.with_structured_output({"name": "person", "strict": True, key: inner}, method=method)
    jsonschema.validate(structured.invoke("Anna is 7."), inner)


def _double(x: int) -> int:
    """Twice x."""
    return 2 * x


@pytest.mark.parametrize("tools", [_double, 5, "double", {"name": "double"}, [5], [_double, None]])
def test_what_is_no_list_of_tools_is_refused(chat: ChatPagedLLM, tools: object) -> None:
    for refused in (chat.bind_tools, lambda given: chat.invoke("x", tools=given)):
        with pytest.raises(InvalidRequestError, match=r"^tools"):
            refused(tools)
    assert chat.bind_tools((_double,)).kwargs["tools"][0]["function"]["name"] == "_double"


def test_a_dictionary_that_is_no_schema_is_refused(chat: ChatPagedLLM) -> None:
    for refused in (chat.with_structured_output, lambda schema: chat.invoke("x", guided={"json": schema})):
        with pytest.raises(InvalidRequestError, match="no keyword of JSON schema"):
            refused({"age": "int"})
    with pytest.raises(InvalidRequestError, match="schema=None: "):
        chat.with_structured_output({"type": "json_schema", "json_schema": {"name": "x"}})
    chat.with_structured_output({"minLength": 2})


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_sets(chat: ChatPagedLLM, method: str) -> None:
    class Tags(BaseModel):
        tags: set[int]

    assert isinstance(chat.with_structured_output(Tags, method=method).invoke("1, 2"), Tags)


def test_function_calling_needs_an_object(chat: ChatPagedLLM) -> None:
    with pytest.raises(InvalidRequestError, match="is no object"):
        chat.with_structured_output(RootModel[list[str]], method="function_calling")


@pytest.mark.parametrize(
    ("guided", "reason"),
    [
        ({"regex": "("}, "unclosed group"),
        ({"json": {"type": "string", "pattern": "(?=a)b"}}, "look-around"),
        ({"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "oneOf constraints are not supported.$"),
    ],
)
def test_a_form_that_cannot_be_held_says_why(chat: ChatPagedLLM, guided: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelInvalidRequestError, match=reason):
        chat.invoke("x", guided=guided)


def test_long_arrays_have_an_output(chat: ChatPagedLLM) -> None:
    schema = {"type": "array", "minItems": 120, "maxItems": 120, "items": {"enum": [1, 2, 3]}}
    assert len(json.loads(chat.invoke("x", guided={"json": schema}, max_tokens=400).content)) == 120


def test_names_of_other_providers_and_engines_are_told_apart() -> None:
    chat = ChatPagedLLM(model_name="tiny", max_completion_tokens=3)
    assert (chat.model, chat.max_tokens) == ("tiny", 3)
    with pytest.warns(UserWarning, match="block_size is ignored; give block_size in engine_kwargs"):
        ChatPagedLLM(block_size=8)
    with pytest.warns(UserWarning, match="base_url is ignored$"):
        ChatPagedLLM(base_url="http://x")
    with pytest.raises(ValueError, match="engine='tiny': must be an AsyncEngine"):
        ChatPagedLLM(engine="tiny")


def test_the_profile_tells_the_context_that_calls_have() -> None:
    assert ChatPagedLLM(engine_kwargs={"max_model_len": 128}).profile["max_input_tokens"] <= 128
    with get_engine(model="tiny", max_model_len=256, kv_cache_memory="8MiB") as engine:
        assert ChatPagedLLM(engine=engine).profile["max_input_tokens"] <= 256


def test_structured_output_with_the_reply_itself(chat):
    answer = chat.with_structured_output(Person, include_raw=True).invoke("Anna is 7.")
    assert isinstance(answer["parsed"], Person)
    assert json.loads(answer["raw"].content)["name"] == answer["parsed"].name
    assert answer["parsing_error"] is None


async def test_structured_output_of_many_at_once(chat):
    answers = await chat.with_structured_output(Person).abatch([f"Number {n} is {n} years old." for n in range(20)])
    assert all(isinstance(answer, Person) for answer in answers)


def test_json_without_a_schema(chat):
    answer = chat.with_structured_output(None, method="json_mode", temperature=1.0, seed=1).invoke("Anna is 7.")
    assert isinstance(answer, dict)
    message = chat.invoke("Anna", response_format={"type": "json_object"})
    assert isinstance(json.loads(message.content), dict)


def test_a_budget_that_is_too_small_is_refused(chat):
    with pytest.raises(InvalidRequestError, match="smallest output"):
        chat.bind_tools([add], tool_choice="any").invoke(QUESTION, max_tokens=5)
    with pytest.raises(ModelInvalidRequestError):
        chat.with_structured_output(Person, max_tokens=5).invoke(QUESTION)


def test_stop_strings_do_not_cut_what_has_a_form(chat):
    stopping = ChatPagedLLM(model="tiny", max_tokens=90, kv_cache_memory="32MiB", stop=["}", '"'])
    assert isinstance(stopping.with_structured_output(Person).invoke("Anna is 7."), Person)
    assert stopping.bind_tools([add], tool_choice="any").invoke(QUESTION).tool_calls


@pytest.mark.parametrize("response_format", ["json", {"type": "xml"}, {"type": "json_schema"}, 3])
def test_unknown_response_formats_are_refused(chat, response_format):
    with pytest.raises(InvalidRequestError, match="response_format="):
        chat.invoke(QUESTION, response_format=response_format)


def test_guidance_per_call(chat):
    assert chat.invoke("Which?", guided=GuidedParams(choice=["left", "right"])).content in ("left", "right")
    held = ChatPagedLLM(
        model="tiny", kv_cache_memory="32MiB", engine_kwargs={"num_threads": 1}, guided={"choice": ["left", "right"]}
    )
    assert held.invoke("Which?").content in ("left", "right")
    assert load(dumpd(held), allowed_objects=[ChatPagedLLM], valid_namespaces=["langchain_pagedllm"]) == held


THINKING = """{%- for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}assistant: {% if enable_thinking is not defined or enable_thinking %}<think>
{% else %}<think>

</think>

{% endif %}"""


@pytest.mark.parametrize("streamed", [False, True])
def test_reasoning_is_kept_apart_and_counted(chat, streamed):
    said = "Let me see.\n</think>\n\nThree."
    arguments = {"chat_template": THINKING, "guided": GuidedParams(choice=[said])}
    message = merged(chat.stream("1 + 2?", **arguments)) if streamed else chat.invoke("1 + 2?", **arguments)
    assert message.content == "Three."
    assert message.additional_kwargs["reasoning_content"] == "Let me see."
    details = message.usage_metadata["output_token_details"]
    assert details["reasoning"] == chat.get_num_tokens("Let me see.")
    blocks = message.content_blocks
    assert [block["type"] for block in blocks] == ["reasoning", "text"]


def test_reasoning_before_an_answer_with_a_form(chat):
    structured = chat.bind(response_format=Person, chat_template=THINKING)
    message = structured.invoke("Anna is 7.", **WILD)
    Person.model_validate_json(message.content)
    without = chat.bind(response_format=Person, chat_template=THINKING, reasoning=False).invoke("Anna is 7.")
    Person.model_validate_json(without.content)
    assert "reasoning_content" not in without.additional_kwargs


def test_the_prompt_s_tokens_are_counted_as_they_are_used(chat):
    rng = random.Random(4)
    words = ["Hello", "日本語", "What is", "a + b", "`code`", "naïve", "\n\n", "{x}", "<b>", "12.5"]
    conversations = []
    for _ in range(200):
        messages: list[Any] = [SystemMessage(rng.choice(words))] if rng.random() < 0.5 else []
        for turn in range(rng.randint(1, 3)):
            messages.append(HumanMessage(" ".join(rng.choices(words, k=rng.randint(1, 9)))))
            if rng.random() < 0.4:
                call = {"name": "add", "args": {"a": turn, "b": rng.randint(0, 99)}, "id": f"call_{turn}"}
                messages.append(AIMessage(content=rng.choice(["", "Let me see."]), tool_calls=[call]))
                messages.append(ToolMessage(rng.choice(words), tool_call_id=f"call_{turn}"))
            messages.append(AIMessage(rng.choice(words)))
        messages.append(HumanMessage("And now?"))
        conversations.append((messages, [[], [add], [add, paint]][rng.randrange(3)]))
    for tools in ([], [add], [add, paint]):
        group = [messages for messages, own in conversations if own == tools]
        bound = chat.bind_tools(tools, max_tokens=1) if tools else chat.bind(max_tokens=1)
        replies = bound.batch(group, config={"max_concurrency": 64})
        for messages, reply in zip(group, replies, strict=True):
            counted = chat.get_num_tokens_from_messages(messages, tools=tools or None)
            assert counted == reply.usage_metadata["input_tokens"]


def test_errors_are_langchain_s_too(chat, tmp_path):
    with pytest.raises(ContextOverflowError) as overflow:
        chat.invoke("word " * 3000)
    assert isinstance(overflow.value, ContextLengthError)
    copied = pickle.loads(pickle.dumps(overflow.value))
    assert (type(copied), str(copied)) == (type(overflow.value), str(overflow.value))
    with pytest.raises(ModelTimeoutError) as late:
        chat.invoke("Hi", timeout=1e-9)
    assert isinstance(late.value, RequestTimeoutError)
    with pytest.raises(ModelNotFoundError) as missing:
        ChatPagedLLM(model=str(tmp_path)).invoke("Hi")
    assert isinstance(missing.value, ModelLoadError)
    with pytest.raises(ModelInvalidRequestError) as invalid:
        chat.invoke("Hi", top_p=3)
    assert isinstance(invalid.value, InvalidRequestError)
    engine = get_engine(EngineConfig(model="tiny", max_model_len=64))
    engine.close()
    with pytest.raises(ModelAPIError) as closed:
        ChatPagedLLM(engine=engine).invoke("Hi")
    assert isinstance(closed.value, EngineClosedError)


async def test_errors_of_streams_are_langchain_s_too(chat):
    with pytest.raises(ContextOverflowError):
        list(chat.stream("word " * 3000))
    with pytest.raises(ContextOverflowError):
        async for _ in chat.astream("word " * 3000):
            pass


def test_the_profile_comes_from_the_files(chat, tmp_path):
    assert chat.profile["max_input_tokens"] == 2048
    assert chat.profile["tool_calling"]
    assert chat.profile["structured_output"]
    assert not chat.profile["image_inputs"]
    assert ChatPagedLLM(model="tiny", max_model_len=256).profile["max_input_tokens"] == 256
    assert ChatPagedLLM(model="nobody/nothing").profile is None
    (tmp_path / "config.json").write_text("{not json")
    assert ChatPagedLLM(model=str(tmp_path)).profile is None


def test_a_dump_is_loaded_again(chat):
    dumped = dumpd(chat)
    assert dumped["type"] == "constructor"
    loaded = load(dumped, allowed_objects=[ChatPagedLLM], valid_namespaces=["langchain_pagedllm"])
    assert loaded == chat
    assert loaded.engine_config() == chat.engine_config()
