"""Whole programs on the bundled model: agents, graphs, deep agents and summaries of long conversations.

What the model says is held by grammars (a demanded tool, a schema), or written out where a program needs one text; the
tests say what then has to hold, whatever the model knows.
"""

from __future__ import annotations

import asyncio
import json
import operator
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import pytest
import torch
from deepagents import FilesystemMiddleware, SubAgent, create_deep_agent
from langchain.agents import create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    ModelCallLimitMiddleware,
    ModelRequest,
    ModelResponse,
    SummarizationMiddleware,
)
from langchain.agents.structured_output import AutoStrategy, ProviderStrategy, ToolStrategy
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_pagedllm import ChatPagedLLM
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send
from pydantic import BaseModel, Field

from pagedllm_core import get_engine
from pagedllm_core.errors import ContextLengthError

LEAFLETS = Path(__file__).resolve().parents[3] / "examples" / "clinic" / "leaflets"
TOGETHER = 60.0
"""Seconds after which calls that should have come together are given up."""


@pytest.fixture
def chat() -> ChatPagedLLM:
    return ChatPagedLLM(model="tiny", max_tokens=64, temperature=0)


@tool
def weather(city: Literal["Rome", "Oslo", "Lima"]) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


@tool
def add(first: Annotated[int, Field(ge=0, le=99)], second: Annotated[int, Field(ge=0, le=99)]) -> int:
    """Add two numbers."""
    return first + second


TOOLS = {"weather": weather, "add": add}


def ask(text: str) -> Any:
    return {"messages": [HumanMessage(text)]}


def written(text: str) -> dict[str, Any]:
    """Settings of a model call that has the model write this text and end."""
    tokenizer = get_engine(model="tiny").tokenizer
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]

    def write(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits.fill_(-torch.inf)
        logits[ids[len(output)]] = 0
        return logits

    return {"logits_processors": [write], "max_tokens": len(ids) + 64}  # room for whatever else would close the reply


def calls(*named: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """Settings of a model call that has the model call these tools in one reply."""
    texts = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in named]
    return written("\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts))


class Turns(AgentMiddleware[Any, Any]):
    """Changes what an agent's turns ask of the model: the first by the first change, and so on."""

    def __init__(self, *changes: dict[str, Any]) -> None:
        super().__init__()
        self._changes = changes

    def _changed(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        turn = sum(isinstance(message, AIMessage) for message in request.messages)
        return request.override(**self._changes[turn])

    def wrap_model_call(self, request: ModelRequest[Any], handler: Callable[[Any], ModelResponse[Any]]) -> Any:
        return handler(self._changed(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[Any], Awaitable[ModelResponse[Any]]]
    ) -> Any:
        return await handler(self._changed(request))


class Together(AgentMiddleware[Any, Any]):
    """Lets model calls through when this many have come."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._barrier = asyncio.Barrier(count)

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[Any], Awaitable[ModelResponse[Any]]]
    ) -> Any:
        await asyncio.wait_for(self._barrier.wait(), TOGETHER)
        return await handler(request)


def check_conversation(messages: list[AnyMessage]) -> list[ToolMessage]:
    """Every call is answered, in order, by what the tool gives for its arguments; the last turn calls nothing."""
    answers: list[ToolMessage] = []
    wanted: list[tuple[str | None, str]] = []
    for message in messages:
        if isinstance(message, AIMessage):
            assert not message.invalid_tool_calls
            assert message.usage_metadata is not None
            for call in message.tool_calls:
                wanted.append((call["id"], str(TOOLS[call["name"]].invoke(call["args"]))))
        elif isinstance(message, ToolMessage):
            assert message.status == "success"
            answers.append(message)
    assert [(answer.tool_call_id, answer.content) for answer in answers] == wanted
    assert isinstance(messages[-1], AIMessage)
    assert not messages[-1].tool_calls
    return answers


@pytest.mark.parametrize("choice", ["any", "weather", "add"])
async def test_an_agent_with_tools(chat: ChatPagedLLM, choice: str) -> None:
    turns = Turns({"tool_choice": choice}, {"tool_choice": choice}, {"tool_choice": "none"})
    agent = create_agent(chat, list(TOOLS.values()), system_prompt="Use the tools.", middleware=[turns])
    for run in (await agent.ainvoke(ask("How warm is Oslo?")), await asyncio.to_thread(agent.invoke, ask("Add 3, 4"))):
        answers = check_conversation(run["messages"])
        assert len(answers) == 2  # a demand gives exactly one call
        assert choice == "any" or {answer.name for answer in answers} == {choice}


async def test_an_agent_s_parallel_calls_run_together(chat: ChatPagedLLM) -> None:
    barrier = asyncio.Barrier(3)

    @tool
    async def visit(city: str) -> str:
        """Visit a city; all three travellers leave together."""
        await asyncio.wait_for(barrier.wait(), TOGETHER)
        return f"{city}: {(await chat.ainvoke(f'Describe {city}.', max_tokens=8, min_tokens=8)).text}"

    cities = ["Rome", "Oslo", "Lima"]
    turns = Turns({"model_settings": calls(*(("visit", {"city": city}) for city in cities))}, {"tool_choice": "none"})
    agent = create_agent(chat, [visit], middleware=[turns])
    messages = (await agent.ainvoke(ask("Visit all three.")))["messages"]
    assert [call["args"]["city"] for call in messages[1].tool_calls] == cities
    assert [message.content.split(":")[0] for message in messages[2:5]] == cities
    assert len(messages) == 6


async def test_an_agent_s_turns_are_streamed(chat: ChatPagedLLM) -> None:
    turns = Turns({"tool_choice": "weather"}, {"model_settings": written("Sunny, they say.")})
    agent = create_agent(chat, [weather], middleware=[turns])
    pieces = [message async for message, _ in agent.astream(ask("How is Oslo?"), stream_mode="messages")]
    texts = [piece.text for piece in pieces if isinstance(piece, AIMessage) and piece.text]
    assert "".join(texts) == "Sunny, they say."
    (answer,) = [piece for piece in pieces if isinstance(piece, ToolMessage)]
    assert str(answer.content).startswith("It is sunny in ")


class Appointment(BaseModel):
    """An appointment at the clinic."""

    day: Literal["Monday", "Tuesday"]
    hour: int = Field(ge=8, le=17)
    urgent: bool


FORMATS: dict[str, Any] = {
    "class": Appointment,
    "auto": AutoStrategy(Appointment),
    "provider": ProviderStrategy(Appointment),
    "tool": ToolStrategy(Appointment),
}


@pytest.mark.parametrize("form", FORMATS)
async def test_an_agent_with_a_response_format(chat: ChatPagedLLM, form: str) -> None:
    agent = create_agent(chat, response_format=FORMATS[form])
    texts = [f"Patient {number} comes on Monday at 9." for number in range(4)]
    runs = [agent.invoke(ask(texts[0])), *await agent.abatch([ask(text) for text in texts[1:]])]
    for run in runs:
        assert isinstance(run["structured_response"], Appointment)
        reply = run["messages"][1]
        if form == "tool":
            assert Appointment.model_validate(reply.tool_calls[0]["args"]) == run["structured_response"]
        else:
            assert Appointment.model_validate_json(reply.content) == run["structured_response"]
            assert len(run["messages"]) == 2


@pytest.mark.parametrize("form", ["class", "auto", "provider"])
async def test_an_agent_with_tools_and_a_response_format(chat: ChatPagedLLM, form: str) -> None:
    turns = Turns({"model_settings": {"tool_choice": "any"}}, {"model_settings": {"tool_choice": "none"}})
    agent = create_agent(chat, list(TOOLS.values()), response_format=FORMATS[form], middleware=[turns])
    run = await agent.ainvoke(ask("Is Monday at 9 sunny in Oslo?"))
    assert len(check_conversation(run["messages"])) == 1
    assert isinstance(run["structured_response"], Appointment)
    assert Appointment.model_validate_json(run["messages"][-1].content) == run["structured_response"]


CHOICES: dict[str, Callable[[], dict[str, Any]]] = {
    "whatever it likes": dict,
    "an answer": lambda: written('{"day": "Monday", "hour": 9, "urgent": true}'),
    "a call": lambda: calls(("weather", {"city": "Lima"})),
    "two calls": lambda: calls(("add", {"first": 3, "second": 4}), ("weather", {"city": "Rome"})),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_an_agent_that_may_choose_between_tools_and_answer(chat: ChatPagedLLM, choice: str) -> None:
    """Nothing is demanded: a turn either calls tools that exist, or answers in the schema."""
    limit = ModelCallLimitMiddleware(run_limit=1, exit_behavior="end")
    turn = Turns({"model_settings": CHOICES[choice]()})
    agent = create_agent(chat, list(TOOLS.values()), response_format=Appointment, middleware=[limit, turn])
    run = agent.invoke(ask("Is Monday at 9 sunny in Oslo?"))
    reply = run["messages"][1]
    assert len(reply.tool_calls) == {"an answer": 0, "a call": 1, "two calls": 2}.get(choice, len(reply.tool_calls))
    if reply.tool_calls:
        assert not reply.invalid_tool_calls
        assert {call["name"] for call in reply.tool_calls} <= set(TOOLS)
        answers = [message for message in run["messages"] if isinstance(message, ToolMessage)]
        assert [answer.status for answer in answers] == ["success"] * len(reply.tool_calls)
    else:
        assert Appointment.model_validate_json(reply.content) == run["structured_response"]


class Summaries(TypedDict, total=False):
    summaries: Annotated[list[tuple[str, str, int]], operator.add]
    overview: str
    prompt_tokens: int


async def test_a_map_reduce_graph(chat: ChatPagedLLM) -> None:
    leaflets = {path.name: path.read_text(encoding="utf-8") for path in sorted(LEAFLETS.glob("*.txt"))}
    map_prompt = ChatPromptTemplate.from_messages([("system", "Summarize the leaflet."), ("human", "{text}")])
    reduce_prompt = ChatPromptTemplate.from_messages([("system", "Write an overview."), ("human", "{text}")])
    short = chat.bind(max_tokens=24)

    async def summarize(state: dict[str, str]) -> Summaries:
        reply = await (map_prompt | short).ainvoke({"text": leaflets[state["name"]]})
        assert reply.usage_metadata is not None
        return {"summaries": [(state["name"], reply.text, reply.usage_metadata["input_tokens"])]}

    async def reduce(state: Summaries) -> Summaries:
        reply = await (reduce_prompt | chat).ainvoke({"text": joined(state)})
        assert reply.usage_metadata is not None
        return {"overview": reply.text, "prompt_tokens": reply.usage_metadata["input_tokens"]}

    def joined(state: Summaries) -> str:
        return "\n".join(text for _, text, _ in state["summaries"])

    def tokens(prompt: ChatPromptTemplate, text: str) -> int:
        return chat.get_num_tokens_from_messages(prompt.format_messages(text=text))

    graph = StateGraph(Summaries)
    graph.add_node("summarize", summarize)  # type: ignore[type-var]
    graph.add_node("reduce", reduce)
    graph.add_conditional_edges(START, lambda state: [Send("summarize", {"name": name}) for name in leaflets])
    graph.add_edge("summarize", "reduce")
    graph.add_edge("reduce", END)
    state: Any = await graph.compile().ainvoke({"summaries": []})
    assert [(name, count) for name, _, count in state["summaries"]] == [
        (name, tokens(map_prompt, text)) for name, text in leaflets.items()
    ]
    assert state["prompt_tokens"] == tokens(reduce_prompt, joined(state))
    assert state["overview"]


# Deep agents. With all its tools one needs 4,359 tokens of this model's before the user has said a word, and the
# bundled model's context has 2,048; with one of the file tools it needs 1,500.

FEW_TOOLS = FilesystemMiddleware(tools=["read_file"])


def test_a_deep_agent_with_all_its_tools_is_too_large(chat: ChatPagedLLM) -> None:
    with pytest.raises(ContextOverflowError):
        create_deep_agent(chat).invoke(ask("Hello!"))


async def test_a_deep_agent_s_sub_agents_work_together(chat: ChatPagedLLM) -> None:
    together = Together(3)

    def sub_agent(name: str) -> SubAgent:
        return {
            "name": name,
            "description": f"Knows all about {name}.",
            "system_prompt": f"Say something about {name}.",
            "model": chat,
            "tools": [],
            "middleware": [FEW_TOOLS, Turns({"model_settings": written(f"This is {name}.")}), together],
        }

    names = ["fish", "birds", "trees"]
    tasks = [("task", {"description": f"Describe {name}.", "subagent_type": name}) for name in names]
    turns = Turns({"model_settings": calls(*tasks)}, {"tool_choice": "none"})
    # The sub-agent that would be added by itself has a long description; one of the same name takes its place.
    subagents = [sub_agent(name) for name in [*names, "general-purpose"]]
    agent = create_deep_agent(chat, subagents=subagents, middleware=[FEW_TOOLS, turns])
    messages = (await agent.ainvoke(ask("Describe them all.")))["messages"]
    answers = [message for message in messages if isinstance(message, ToolMessage)]
    assert [answer.content for answer in answers] == [f"This is {name}." for name in names]
    assert [answer.tool_call_id for answer in answers] == [call["id"] for call in messages[1].tool_calls]
    assert len(messages) == 6


# Conversations that outgrow the context.


class Errors(BaseCallbackHandler):
    """What model calls failed with."""

    def __init__(self) -> None:
        self.found: list[BaseException] = []

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.found.append(error)


def conversation(turns: int) -> list[AnyMessage]:
    leaflets = [path.read_text(encoding="utf-8") for path in sorted(LEAFLETS.glob("*.txt"))]
    messages: list[AnyMessage] = []
    for number in range(turns):
        messages += [HumanMessage(leaflets[number]), AIMessage(f"I have read leaflet {number}.")]
    return [*messages, HumanMessage("What did I show you first?")]


def test_without_a_summary_a_long_conversation_is_refused(chat: ChatPagedLLM) -> None:
    with pytest.raises(ContextOverflowError, match="exceed the context limit") as caught:
        create_agent(chat).invoke({"messages": conversation(10)})
    assert isinstance(caught.value, ContextLengthError)


def test_summaries_that_are_too_long_are_tried_again_shorter(chat: ChatPagedLLM) -> None:
    """The middleware counts tokens its own way and sends a summary's prompt that is too long; the error tells it."""
    errors = Errors()
    summarize = SummarizationMiddleware(
        chat,
        trigger=("fraction", 0.8),
        keep=("messages", 1),
        trim_tokens_to_summarize=None,
        summary_prompt="Summarize:\n{messages}",
    )
    run = create_agent(chat, middleware=[summarize]).invoke({"messages": conversation(10)}, {"callbacks": [errors]})
    assert [type(error).__name__ for error in errors.found] == ["ContextLengthError"]
    assert isinstance(errors.found[0], ContextOverflowError)
    summary, question, reply = run["messages"]
    assert "summary" in str(summary.content)
    assert question.content == "What did I show you first?"
    assert isinstance(reply, AIMessage)


def test_summaries_by_the_model_s_own_count_are_in_time(chat: ChatPagedLLM) -> None:
    errors = Errors()
    summarize = SummarizationMiddleware(
        chat,
        trigger=("fraction", 0.8),
        keep=("messages", 1),
        trim_tokens_to_summarize=1500,
        token_counter=chat.get_num_tokens_from_messages,
        summary_prompt="Summarize:\n{messages}",
    )
    run = create_agent(chat, middleware=[summarize]).invoke({"messages": conversation(10)}, {"callbacks": [errors]})
    assert errors.found == []
    assert len(run["messages"]) == 3


async def test_a_deep_agent_summarizes_when_the_model_refuses(chat: ChatPagedLLM) -> None:
    """The deep agent's own count says that the conversation fits; the model's error tells it otherwise."""
    errors = Errors()
    agent = create_deep_agent(
        chat, middleware=[FEW_TOOLS, Turns(*[{"model_settings": written("That was a leaflet.")}] * 3)]
    )
    run = await agent.ainvoke({"messages": conversation(2)}, {"callbacks": [errors]})
    assert errors.found
    assert all(isinstance(error, ContextOverflowError) for error in errors.found)
    assert run["messages"][-1].content == "That was a leaflet."
    assert run["files"], "what was summarized is kept in a file"
