"""Whatever way a caller leaves, its request ends; the autouse fixture proves that no block stays in use."""

from __future__ import annotations

import asyncio
import threading

import pytest
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_pagedllm import ChatPagedLLM, PagedLLM
from langgraph.graph import END, START, StateGraph
from typing_extensions import TypedDict

from pagedllm_core import get_engine, shutdown

ENDLESS = {"max_tokens": None, "ignore_eos": True}
QUESTION = "What is a page table?"


@pytest.fixture
def chat() -> ChatPagedLLM:
    get_engine(model="tiny")
    return ChatPagedLLM(model="tiny", **ENDLESS)


@pytest.fixture(autouse=True)
def _nothing_ran_to_its_end():
    engine = get_engine(model="tiny")
    before = engine.stats().tokens_generated
    yield
    assert engine.stats().tokens_generated - before < 2000


async def running(count: int) -> None:
    """Wait until `count` sequences have been in a step together."""
    engine = get_engine(model="tiny")
    while engine.stats().running < count:
        await asyncio.sleep(0)


async def freed() -> bool:
    """True once nothing runs; what frameworks close late, they close within some turns of the loop."""
    engine = get_engine(model="tiny")
    for _ in range(100):
        await asyncio.sleep(0)
        if not engine.stats().kv_blocks_used:
            return True
    return False


async def test_a_cancelled_ainvoke(chat):
    task = asyncio.create_task(chat.ainvoke(QUESTION))
    await running(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancelled_abatch(chat):
    task = asyncio.create_task(chat.abatch([QUESTION] * 8))
    await running(8)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_reader_that_leaves_abatch_as_completed(chat):
    answers = chat.abatch_as_completed([QUESTION] * 4)
    reader = asyncio.create_task(anext(answers))
    await running(4)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await answers.aclose()
    assert await freed()


async def test_abatch_as_completed_gives_all_or_the_first_error(chat):
    inputs = ["Hi", "word " * 3000, "Ho"]
    found = dict([one async for one in chat.abatch_as_completed(inputs, max_tokens=2, return_exceptions=True)])
    assert sorted(found) == [0, 1, 2]
    assert isinstance(found[1], Exception)
    with pytest.raises(type(found[1])):
        async for _ in chat.abatch_as_completed(inputs, {"max_concurrency": 1}, max_tokens=2):
            pass


async def test_wait_for(chat):
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(chat.ainvoke(QUESTION), 0.05)


async def test_a_break_and_aclose_of_astream(chat):
    stream = chat.astream(QUESTION)
    async for chunk in stream:
        assert chunk.content
        break
    await stream.aclose()
    assert await freed()  # while the stream is still referred to


async def test_a_chain_s_astream(chat):
    chain = ChatPromptTemplate.from_messages([("human", "{question}")]) | chat | StrOutputParser()
    stream = chain.astream({"question": QUESTION})
    async for _ in stream:
        break
    await stream.aclose()
    assert await freed()  # while the stream is still referred to


async def read(chat) -> None:
    async for _ in chat.astream(QUESTION):
        pass


async def test_a_cancelled_reader_of_astream(chat):
    task = asyncio.create_task(read(chat))
    await running(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_events_v2_and_aclose(chat):
    events = chat.astream_events(QUESTION, version="v2")
    async for event in events:
        if event["event"] == "on_chat_model_stream":
            break
    await events.aclose()
    assert await freed()


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
async def test_events_v3_and_aclose(chat):
    stream = await chat.astream_events(QUESTION, version="v3")
    async for _ in stream:
        break
    await stream.aclose()
    assert await freed()  # while the stream is still referred to


class Text(TypedDict):
    text: str


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_step_timeout_of_a_graph(chat, streamed):
    async def node(state: Text) -> Text:
        if streamed:
            await read(chat)
        return {"text": (await chat.ainvoke(QUESTION)).text}

    graph = StateGraph(Text).add_node("node", node).add_edge(START, "node").add_edge("node", END).compile()
    graph.step_timeout = 0.01
    with pytest.raises(TimeoutError):
        await graph.ainvoke({"text": ""})
    assert await freed()


def test_a_break_in_a_stream(chat):
    for chunk in chat.stream(QUESTION):
        assert chunk.content
        break


def test_raw_completion_too():
    for _ in PagedLLM(model="tiny", **ENDLESS).stream(QUESTION):
        break


def test_a_closed_event_loop_ends_only_its_own_requests(chat, settled):
    """The loop goes away without cancelling anything; others on the same engine finish."""

    def abandon():
        loop = asyncio.new_event_loop()
        tasks.append(loop.create_task(read(chat)))
        loop.run_until_complete(running(1))
        loop.close()

    tasks: list[asyncio.Task[None]] = []
    thread = threading.Thread(target=abandon)
    thread.start()
    thread.join()
    try:
        assert chat.invoke(QUESTION, max_tokens=8).usage_metadata["output_tokens"] == 8
        assert settled(get_engine(model="tiny"))
    finally:
        shutdown()
