"""The doors table: how many of 100 calls are in the engine together, for every way a LangChain program sends them.

The engine's first step is held until the wanted number of requests has been queued, so nothing depends on time: a door
that sends fewer at once never gets there, and the step then goes on without the rest after `PATIENCE` seconds.
"""

from __future__ import annotations

import asyncio
import operator
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Annotated, Any, NamedTuple, TypedDict

import pytest
import torch
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.messages import AnyMessage, HumanMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_core.tools import tool
from langchain_pagedllm import ChatPagedLLM, PagedLLM
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

from pagedllm_core import AsyncEngine, EngineConfig, RequestHandle
from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.model.runner import ModelRunner
from pagedllm_core.request import Request

CALLS = 100
THREADS = min(32, (getattr(os, "process_cpu_count", os.cpu_count)() or 1) + 4)
"""The size of a default `ThreadPoolExecutor`, and of an event loop's."""
PATIENCE = 30.0
WIDE: RunnableConfig = {"max_concurrency": CALLS}
SHORT: dict[str, Any] = {"max_tokens": 3, "min_tokens": 3}  # the step that is held gives one, and all meet in the next


class Hold:
    """Holds an engine's steps until enough requests are queued, and counts the sequences of the largest step."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = threading.Event()
        self.release()

    def release(self) -> None:
        """Hold nothing."""
        self.begin(0)

    def begin(self, wanted: int) -> None:
        """Hold from now on, until `wanted` more requests are queued."""
        with self._lock:
            self._missing, self.largest = wanted, 0
            (self._open.clear if wanted else self._open.set)()

    def count(self) -> None:
        """One more request is queued."""
        with self._lock:
            self._missing -= 1
            if self._missing <= 0:
                self._open.set()

    def wait(self, sequences: int) -> None:
        """Called before each step."""
        if not self._open.wait(PATIENCE):
            self._open.set()
        self.largest = max(self.largest, sequences)


class HeldRunner(ModelRunner):
    """The bundled model, which waits before it runs."""

    def __init__(self, config: EngineConfig, hold: Hold) -> None:
        super().__init__(config)
        self._hold = hold

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        self._hold.wait(len(batch.context_lens))
        return super().run(batch)


class HeldEngine(AsyncEngine):
    """An engine that counts what is queued."""

    def __init__(self) -> None:
        self.hold = Hold()
        config = EngineConfig(model="tiny", max_num_seqs=256, max_num_batched_tokens=16384, kv_cache_memory="64MiB")
        super().__init__(config, runner=HeldRunner(config, self.hold))

    def enqueue(self, request: Request) -> RequestHandle:
        handle = super().enqueue(request)
        self.hold.count()
        return handle


@pytest.fixture(scope="module")
def engine() -> Iterator[HeldEngine]:
    engine = HeldEngine()
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def _nothing_stays_held(engine: HeldEngine) -> Iterator[None]:
    yield
    engine.hold.release()


# The doors. Each sends CALLS questions and returns as many replies.

PROMPT = ChatPromptTemplate.from_messages([("human", "{question}")])


def questions() -> list[str]:
    return [f"Question {number}?" for number in range(CALLS)]


def variables() -> list[dict[str, str]]:
    return [{"question": question} for question in questions()]


ONE = {"question": "One question?"}


def conversations() -> list[list[Any]]:
    return [[HumanMessage(question)] for question in questions()]


def make_chat(engine: HeldEngine) -> ChatPagedLLM:
    return ChatPagedLLM(model="tiny", engine=engine, **SHORT)


def make_chain(engine: HeldEngine) -> Runnable[dict[str, str], str]:
    return PROMPT | make_chat(engine) | StrOutputParser()


def make_raw(engine: HeldEngine) -> PagedLLM:
    return PagedLLM(model="tiny", engine=engine, **SHORT)


def make_function(engine: HeldEngine) -> Runnable[str, Any]:
    """A function that calls the model; LangChain cannot see the model in it."""
    chat = make_chat(engine)
    return RunnableLambda(lambda question: chat.invoke(question))


def make_branches(engine: HeldEngine) -> Runnable[dict[str, str], dict[str, str]]:
    chain = make_chain(engine)
    return RunnableParallel({f"branch {number}": chain for number in range(CALLS)})


def make_assignment(engine: HeldEngine) -> Runnable[dict[str, str], dict[str, Any]]:
    return RunnablePassthrough.assign(answer=make_chain(engine))


async def drain(iterator: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in iterator]


async def gather(chat: ChatPagedLLM) -> list[Any]:
    return await asyncio.gather(*(chat.ainvoke(question) for question in questions()))


async def gather_streams(model: Runnable[Any, Any], inputs: list[Any]) -> list[Any]:
    return await asyncio.gather(*(drain(model.astream(one)) for one in inputs))


async def agenerate(chat: ChatPagedLLM) -> list[Any]:
    return (await chat.agenerate(conversations())).generations


def in_threads(chat: ChatPagedLLM) -> list[Any]:
    """One thread for each question."""
    replies: list[Any] = []
    threads = [threading.Thread(target=lambda one=one: replies.append(chat.invoke(one))) for one in questions()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies


def in_event_loops(chat: ChatPagedLLM, loops: int = 4) -> list[Any]:
    """Each loop on a thread of its own, with its part of the questions."""
    replies: list[Any] = []

    async def ask(part: list[str]) -> list[Any]:
        return await asyncio.gather(*(chat.ainvoke(question) for question in part))

    parts = [questions()[number::loops] for number in range(loops)]
    threads = [threading.Thread(target=lambda part=part: replies.extend(asyncio.run(ask(part)))) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies


class Answers(TypedDict):
    answers: Annotated[list[str], operator.add]


def fan_out(node: Any) -> Any:
    """A graph that sends every question to a node of its own."""
    graph = StateGraph(Answers)
    graph.add_node("answer", node)
    graph.add_conditional_edges(START, lambda state: [Send("answer", one) for one in variables()], ["answer"])
    graph.add_edge("answer", END)
    return graph.compile()


def make_graph(engine: HeldEngine) -> Any:
    chat = make_chat(engine)

    async def answer(state: dict[str, str]) -> dict[str, list[str]]:
        return {"answers": [(await chat.ainvoke(state["question"])).text]}

    return fan_out(answer)


def make_blocking_graph(engine: HeldEngine) -> Any:
    chat = make_chat(engine)

    def answer(state: dict[str, str]) -> dict[str, list[str]]:
        return {"answers": [chat.invoke(state["question"]).text]}

    return fan_out(answer)


async def run_graph(graph: Any) -> list[str]:
    answers: list[str] = (await graph.ainvoke({}, WIDE))["answers"]
    return answers


TOOL_CALLS = 10


class CallTools(AgentMiddleware[Any, Any]):
    """Has the agent's one turn call its tool TOOL_CALLS times; the engine is held when it has."""

    def __init__(self, engine: HeldEngine) -> None:
        super().__init__()
        call = '<tool_call>\n{"name": "ask", "arguments": {}}\n</tool_call>'
        self._ids = [*engine.tokenizer("\n".join([call] * TOOL_CALLS))["input_ids"], engine.tokenizer.eos_token_id]
        self._hold = engine.hold

    def _write(self, written: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits.fill_(-torch.inf)
        logits[self._ids[len(written)]] = 0
        return logits

    def _forced(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        self._hold.release()
        settings = {"logits_processors": [self._write], "max_tokens": len(self._ids), "min_tokens": None}
        return request.override(model_settings=settings)

    def wrap_model_call(self, request: ModelRequest[Any], handler: Callable[[Any], ModelResponse[Any]]) -> Any:
        response = handler(self._forced(request))
        self._hold.begin(CALLS)
        return response

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[Any], Awaitable[ModelResponse[Any]]]
    ) -> Any:
        response = await handler(self._forced(request))
        self._hold.begin(CALLS)
        return response


def make_agent(engine: HeldEngine) -> Any:
    chat = make_chat(engine)

    @tool(return_direct=True)
    async def ask() -> str:
        """Ask a tenth of the questions."""
        return "\n".join(str(len(reply.text)) for reply in await chat.abatch(questions()[::TOOL_CALLS]))

    return create_agent(chat, [ask], middleware=[CallTools(engine)])


def make_blocking_agent(engine: HeldEngine) -> Any:
    chat = make_chat(engine)

    @tool(return_direct=True)
    def ask() -> str:
        """Ask a tenth of the questions."""
        return "\n".join(str(len(reply.text)) for reply in chat.batch(questions()[::TOOL_CALLS]))

    return create_agent(chat, [ask], middleware=[CallTools(engine)])


ASK: Any = {"messages": [HumanMessage("Ask.")]}


async def run_agent(agent: Any) -> list[str]:
    return answers_of_tools((await agent.ainvoke(ASK))["messages"])


def run_blocking_agent(agent: Any) -> list[str]:
    return answers_of_tools(agent.invoke(ASK, WIDE)["messages"])


def answers_of_tools(messages: list[AnyMessage]) -> list[str]:
    replies = [str(message.content) for message in messages if isinstance(message, ToolMessage)]
    assert len(replies) == TOOL_CALLS
    return [line for reply in replies for line in reply.splitlines()]


class Door(NamedTuple):
    """One way to send many calls.

    Attributes:
        name: As a user writes it.
        make: Makes what is called.
        send: Sends CALLS questions to it; returns what came back.
        together: How many of them are in one step of the engine.
        limit: What in LangChain keeps it from more.
    """

    name: str
    make: Callable[[HeldEngine], Any]
    send: Callable[[Any], Any]
    together: int = CALLS
    limit: str = ""


POOL = "LangChain runs these in a thread pool of its own: as large as max_concurrency, else Python's default"
LOOP_POOL = "asynchronous runs put blocking functions into the event loop's thread pool, whatever max_concurrency is"

DOORS = [
    # The model itself.
    Door("chat.batch", make_chat, lambda chat: chat.batch(questions())),
    Door("chat.batch_as_completed", make_chat, lambda chat: list(chat.batch_as_completed(questions()))),
    Door("chat.generate", make_chat, lambda chat: chat.generate(conversations()).generations),
    Door("chat.invoke in threads", make_chat, in_threads),
    Door("chat.abatch", make_chat, lambda chat: chat.abatch(questions())),
    Door("chat.abatch_as_completed", make_chat, lambda chat: drain(chat.abatch_as_completed(questions()))),
    Door("chat.agenerate", make_chat, agenerate),
    Door("chat.ainvoke gathered", make_chat, gather),
    Door("chat.ainvoke in four event loops", make_chat, in_event_loops),
    Door("chat.astream gathered", make_chat, lambda chat: gather_streams(chat, questions())),
    # What wraps the model.
    Door("chat.bind.batch", make_chat, lambda chat: chat.bind(temperature=0.5).batch(questions())),
    Door("chat.with_retry.batch", make_chat, lambda chat: chat.with_retry().batch(questions())),
    Door("chat.with_fallbacks.batch", make_chat, lambda chat: chat.with_fallbacks([chat]).batch(questions())),
    Door("chat.map.invoke", make_chat, lambda chat: chat.map().invoke(questions())),
    # Raw completion.
    Door("llm.batch", make_raw, lambda llm: llm.batch(questions())),
    Door("llm.abatch", make_raw, lambda llm: llm.abatch(questions())),
    Door("llm.generate", make_raw, lambda llm: llm.generate(questions()).generations),
    # Chains.
    Door("chain.batch", make_chain, lambda chain: chain.batch(variables())),
    Door("chain.batch wide", make_chain, lambda chain: chain.batch(variables(), WIDE)),
    Door("chain.batch_as_completed", make_chain, lambda chain: [*chain.batch_as_completed(variables())], THREADS, POOL),
    Door("chain.batch_as_completed wide", make_chain, lambda chain: [*chain.batch_as_completed(variables(), WIDE)]),
    Door("chain.abatch", make_chain, lambda chain: chain.abatch(variables())),
    Door("chain.abatch_as_completed", make_chain, lambda chain: drain(chain.abatch_as_completed(variables()))),
    Door("chain.astream gathered", make_chain, lambda chain: gather_streams(chain, variables())),
    Door("assign(chain).batch", make_assignment, lambda chain: chain.batch(variables()), THREADS, POOL),
    Door("assign(chain).batch wide", make_assignment, lambda chain: chain.batch(variables(), WIDE)),
    Door("assign(chain).abatch", make_assignment, lambda chain: chain.abatch(variables())),
    Door("function.batch", make_function, lambda function: function.batch(questions()), THREADS, POOL),
    Door("function.batch wide", make_function, lambda function: function.batch(questions(), WIDE)),
    Door("RunnableParallel.invoke", make_branches, lambda branches: branches.invoke(ONE), THREADS, POOL),
    Door("RunnableParallel.invoke wide", make_branches, lambda branches: branches.invoke(ONE, WIDE)),
    Door("RunnableParallel.ainvoke", make_branches, lambda branches: branches.ainvoke(ONE)),
    # Graphs and agents.
    Door("Send to blocking nodes", make_blocking_graph, lambda graph: graph.invoke({})["answers"], THREADS, POOL),
    Door("Send to blocking nodes wide", make_blocking_graph, lambda graph: graph.invoke({}, WIDE)["answers"]),
    Door("Send to blocking nodes, ainvoke wide", make_blocking_graph, run_graph, THREADS, LOOP_POOL),
    Door("Send to asynchronous nodes", make_graph, run_graph),
    Door("an agent's tools in parallel", make_agent, run_agent),
    Door("an agent's blocking tools in parallel wide", make_blocking_agent, run_blocking_agent),
]  # "wide" is config={"max_concurrency": CALLS}


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
def test_doors(engine: HeldEngine, door: Door) -> None:
    assert (door.together >= 0.9 * CALLS) == (not door.limit), "a door that falls short says why"
    made = door.make(engine)
    engine.hold.begin(door.together)
    sent = door.send(made)
    replies = asyncio.run(sent) if asyncio.iscoroutine(sent) else sent
    assert len(replies) == CALLS
    assert engine.hold.largest == door.together


def test_max_concurrency_is_respected(engine: HeldEngine) -> None:
    engine.hold.begin(2)
    assert len(make_chat(engine).batch(questions()[:8], {"max_concurrency": 2})) == 8
    assert engine.hold.largest == 2
