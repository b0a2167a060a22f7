"""What any LLM of LlamaIndex should do, as tests: subclass `LLMSuite`, name the class, and say what it can."""

import asyncio
import copy
import json
import pickle
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import pytest
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMChatStartEvent,
    LLMCompletionEndEvent,
    LLMCompletionStartEvent,
)
from llama_index.core.llms import LLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel, Field

QUESTION = "What is the capital of Italy?"
CHAT = [
    ChatMessage("Be brief.", role=MessageRole.SYSTEM),
    ChatMessage("Hello, naïve 日本語!"),
    ChatMessage("Hello.", role=MessageRole.ASSISTANT),
    ChatMessage(QUESTION),
]
PROMPT = PromptTemplate("{who} lives in Rome and is 30 years old.")
METHODS = [f"{way}{kind}" for kind in ("chat", "complete") for way in ("", "a", "stream_", "astream_")]
STREAMS = [method for method in METHODS if "stream" in method]
ASYNCHRONOUS = [method for method in METHODS if method.startswith("a")]

Response = ChatResponse | CompletionResponse


class Resident(BaseModel):
    """Who lives where."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)
    city: Literal["Rome", "Oslo"]


def weather(city: Literal["Rome", "Oslo"], day: Literal["today", "tomorrow"]) -> str:
    """The weather in a city."""
    return f"It is sunny in {city} {day}."


def add(first: int, second: int) -> int:
    """Add two numbers."""
    return first + second


TOOLS = [FunctionTool.from_defaults(weather), FunctionTool.from_defaults(add)]


def text_of(response: Response) -> str:
    return (response.message.content or "") if isinstance(response, ChatResponse) else response.text


def argument(method: str) -> Any:
    return CHAT if method.endswith("chat") else QUESTION


async def call(llm: LLM, method: str, **given: Any) -> list[Response]:
    """Everything that a method gives, one response or a stream of them."""
    result: Any = getattr(llm, method)(argument(method), **given)
    if method.startswith("a"):
        result = await result
    if "stream" not in method:
        return [result]
    return [part async for part in result] if method.startswith("a") else list(result)


class Counted(BaseEventHandler):
    """Counts events by their class."""

    seen: list[str] = Field(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "Counted"

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.seen.append(type(event).__name__)


class LLMSuite:
    """Tests of an LLM class.

    A subclass sets `llm_class`, `llm_params`, and what is not the case of the flags.
    """

    llm_class: ClassVar[type[LLM]]
    llm_params: ClassVar[dict[str, Any]] = {}
    deterministic: ClassVar[bool] = True  # the same prompt gives the same reply
    calls_tools: ClassVar[bool] = True  # and can be made to: tool_required, a named tool_choice
    predicts_objects: ClassVar[bool] = True
    tells_usage: ClassVar[bool] = True
    limits_per_call: ClassVar[bool] = True  # max_tokens and stop may be given to a call
    tells_logprobs: ClassVar[bool] = True
    pickles: ClassVar[bool] = True

    @pytest.fixture
    def llm(self) -> LLM:
        return self.llm_class(**self.llm_params)

    @pytest.fixture
    def make(self) -> Callable[..., LLM]:
        return lambda **more: self.llm_class(**{**self.llm_params, **more})

    @pytest.fixture
    def caller(self, llm: LLM) -> FunctionCallingLLM:
        if not self.calls_tools:
            pytest.skip("calls no tools")
        assert isinstance(llm, FunctionCallingLLM)
        assert llm.metadata.is_function_calling_model
        return llm

    @pytest.fixture
    def predictor(self, llm: LLM) -> LLM:
        if not self.predicts_objects:
            pytest.skip("predicts no objects")
        return llm

    # Chat, completion, streams.

    @pytest.mark.parametrize("method", METHODS)
    async def test_a_reply_is_a_text(self, llm: LLM, method: str) -> None:
        before = copy.deepcopy(CHAT)
        responses = await call(llm, method)
        wanted = ChatResponse if method.endswith("chat") else CompletionResponse
        assert all(type(response) is wanted for response in responses)
        assert text_of(responses[-1])
        if isinstance(responses[-1], ChatResponse):
            assert responses[-1].message.role is MessageRole.ASSISTANT
        assert before == CHAT

    @pytest.mark.parametrize("method", STREAMS)
    async def test_deltas_add_up_to_the_text(self, llm: LLM, method: str) -> None:
        text = ""
        for response in await call(llm, method):
            text += response.delta or ""
            assert text_of(response) == text

    async def test_all_ways_give_the_same(self, llm: LLM) -> None:
        if not self.deterministic:
            pytest.skip("replies differ from call to call")
        for ending in ("chat", "complete"):
            texts = {text_of((await call(llm, method))[-1]) for method in METHODS if method.endswith(ending)}
            assert len(texts) == 1

    @pytest.mark.parametrize("method", ASYNCHRONOUS)
    async def test_many_at_once(self, llm: LLM, method: str) -> None:
        replies = await asyncio.gather(*(call(llm, method) for _ in range(5)))
        assert all(text_of(responses[-1]) for responses in replies)
        if self.deterministic:
            assert len({text_of(responses[-1]) for responses in replies}) == 1

    def test_loops_one_after_another(self, llm: LLM) -> None:
        for method in (*ASYNCHRONOUS, *ASYNCHRONOUS):
            assert text_of(asyncio.run(call(llm, method))[-1])

    def test_predict_fills_the_template(self, llm: LLM) -> None:
        assert llm.predict(PROMPT, who="Anna")
        assert "".join(llm.stream(PROMPT, who="Anna"))

    @pytest.mark.parametrize("method", METHODS)
    async def test_arguments_of_the_call(self, llm: LLM, method: str) -> None:
        if not self.limits_per_call:
            pytest.skip("takes no limits per call")
        whole = text_of((await call(llm, method))[-1])
        short = text_of((await call(llm, method, max_tokens=2))[-1])
        assert len(short) < len(whole)
        if self.deterministic:
            assert whole.startswith(short)
            cut = text_of((await call(llm, method, stop=[whole[3:6]]))[-1])
            assert cut == whole[: whole.index(whole[3:6])]

    @pytest.mark.parametrize("method", METHODS)
    async def test_log_probabilities(self, llm: LLM, method: str) -> None:
        if not self.tells_logprobs:
            pytest.skip("tells no log-probabilities")
        entries = [one for part in await call(llm, method, logprobs=True) for one in part.logprobs or ()]
        assert entries
        assert all(one.logprob <= 0 and isinstance(one.token, str) for choices in entries for one in choices)

    # What it says of itself.

    def test_metadata(self, llm: LLM) -> None:
        metadata = llm.metadata
        assert metadata.context_window > 0
        assert isinstance(metadata.model_name, str)
        assert llm.class_name() == type(llm).class_name()
        assert metadata.is_function_calling_model or not self.calls_tools

    def test_dumps_are_json_and_the_same_each_time(self, llm: LLM) -> None:
        assert json.dumps(llm.to_dict(), sort_keys=True) == json.dumps(llm.to_dict(), sort_keys=True)
        assert type(llm).from_dict(llm.to_dict()).to_dict() == llm.to_dict()

    async def test_copies_and_pickles(self, llm: LLM) -> None:
        if not self.pickles:
            pytest.skip("cannot be pickled")
        await call(llm, "achat")
        for copied in (copy.deepcopy(llm), pickle.loads(pickle.dumps(llm))):
            assert copied.to_dict() == llm.to_dict()
            assert text_of((await call(copied, "achat"))[-1])

    # Usage, callbacks, events.

    @pytest.mark.parametrize("method", METHODS)
    async def test_usage(self, llm: LLM, method: str) -> None:
        if not self.tells_usage:
            pytest.skip("tells no usage")
        usage = (await call(llm, method))[-1].raw["usage"]
        assert usage["prompt_tokens"] > 0
        assert usage["completion_tokens"] > 0
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

    async def test_token_counts(self, make: Callable[..., LLM]) -> None:
        if not self.tells_usage:
            pytest.skip("tells no usage")
        counter = TokenCountingHandler()
        llm = make(callback_manager=CallbackManager([counter]))
        used = [(await call(llm, method))[-1].raw["usage"] for method in METHODS]
        counts = [(one.prompt_token_count, one.completion_token_count) for one in counter.llm_token_counts]
        assert counts == [(one["prompt_tokens"], one["completion_tokens"]) for one in used]

    @pytest.mark.parametrize("method", METHODS)
    async def test_one_callback_event(self, make: Callable[..., LLM], method: str) -> None:
        debug = LlamaDebugHandler(print_trace_on_end=False)
        await call(make(callback_manager=CallbackManager([debug])), method)
        ((start, end),) = debug.get_event_pairs(CBEventType.LLM)
        assert start.payload is not None
        assert end.payload is not None

    @pytest.mark.parametrize("method", METHODS)
    async def test_one_start_and_one_end(self, llm: LLM, method: str) -> None:
        root, handler = get_dispatcher(), Counted()
        root.add_event_handler(handler)
        try:
            await call(llm, method)
        finally:
            root.event_handlers.remove(handler)
        chat = method.endswith("chat")
        kinds = (LLMChatStartEvent, LLMChatEndEvent) if chat else (LLMCompletionStartEvent, LLMCompletionEndEvent)
        seen = [name for name in handler.seen if name.endswith(("StartEvent", "EndEvent"))]
        assert [name for name in seen if not name.startswith(("Span", "LLMPredict"))] == [one.__name__ for one in kinds]

    # Leaving.

    @pytest.mark.parametrize("method", ASYNCHRONOUS)
    async def test_a_cancelled_task(self, llm: LLM, method: str) -> None:
        task = asyncio.create_task(call(llm, method))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert text_of((await call(llm, method))[-1])

    @pytest.mark.parametrize("method", STREAMS)
    async def test_a_stream_that_is_left(self, llm: LLM, method: str) -> None:
        stream = getattr(llm, method)(argument(method))
        if method.startswith("a"):
            stream = await stream
            async for _ in stream:
                break
            await stream.aclose()
        else:
            for _ in stream:
                break
            stream.close()
        assert text_of((await call(llm, method))[-1])

    # Tools.

    @pytest.mark.parametrize("way", ["chat", "achat", "stream_chat", "astream_chat"])
    @pytest.mark.parametrize("demand", [{"tool_required": True}, {"tool_choice": "add"}])
    async def test_a_demanded_call(self, caller: FunctionCallingLLM, way: str, demand: dict[str, Any]) -> None:
        history = CHAT[:1]
        result: Any = getattr(caller, f"{way}_with_tools")(TOOLS, QUESTION, history, **demand)
        result = await result if way.startswith("a") else result
        if "stream" in way:
            result = ([part async for part in result] if way.startswith("a") else list(result))[-1]
        (selection,) = caller.get_tool_calls_from_response(result)
        tool = next(tool for tool in TOOLS if tool.metadata.name == selection.tool_name)
        assert not tool.call(**selection.tool_kwargs).is_error
        assert selection.tool_id
        assert result.message.additional_kwargs["tool_calls"]
        assert demand.get("tool_choice", selection.tool_name) == selection.tool_name
        assert history == CHAT[:1]

    def test_a_conversation_with_a_call_goes_on(self, caller: FunctionCallingLLM) -> None:
        response = caller.chat_with_tools(TOOLS, QUESTION, tool_required=True)
        (selection,) = caller.get_tool_calls_from_response(response)
        answer = ChatMessage("Sunny.", role=MessageRole.TOOL, additional_kwargs={"tool_call_id": selection.tool_id})
        again = caller.chat_with_tools(TOOLS, chat_history=[ChatMessage(QUESTION), response.message, answer])
        assert again.message.role is MessageRole.ASSISTANT

    def test_no_call(self, caller: FunctionCallingLLM) -> None:
        response = caller.chat(CHAT)
        assert caller.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
        with pytest.raises(ValueError, match="tool call"):
            caller.get_tool_calls_from_response(response)

    async def test_predict_and_call(self, caller: FunctionCallingLLM) -> None:
        for response in (
            caller.predict_and_call(TOOLS, QUESTION, tool_required=True),
            await caller.apredict_and_call(TOOLS, QUESTION, tool_required=True),
        ):
            (source,) = response.sources
            assert not source.is_error
            assert response.response == str(source.raw_output)

    # Objects.

    async def test_objects(self, predictor: LLM) -> None:
        found: list[Any] = [
            predictor.structured_predict(Resident, PROMPT, who="Anna"),
            await predictor.astructured_predict(Resident, PROMPT, who="Anna"),
            list(predictor.stream_structured_predict(Resident, PROMPT, who="Anna"))[-1],
            [one async for one in await predictor.astream_structured_predict(Resident, PROMPT, who="Anna")][-1],
        ]
        assert [type(one) for one in found] == [Resident] * 4

    async def test_a_structured_llm(self, predictor: LLM) -> None:
        structured = predictor.as_structured_llm(Resident)
        for response in (structured.complete(QUESTION), structured.chat(CHAT), await structured.achat(CHAT)):
            assert isinstance(response.raw, Resident)
            assert Resident.model_validate_json(text_of(response)) == response.raw
