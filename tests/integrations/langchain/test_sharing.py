"""Whose share a call counts against, at every door; and beams, through the adapters."""

from __future__ import annotations

import asyncio
from typing import Any, TypedDict

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_pagedllm import ChatPagedLLM, PagedLLM

from pagedllm_core import LLM, AsyncEngine, SamplingParams
from pagedllm_core.engine import Engine
from pagedllm_core.errors import InvalidRequestError

PROMPT = ChatPromptTemplate.from_messages([("human", "{text}")])


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The share key of every request that is prepared, in order."""
    found: list[str | None] = []
    prepare = AsyncEngine.prepare

    def watched(self: AsyncEngine, *args: Any, **options: Any) -> Any:
        found.append(options.get("share_key"))
        return prepare(self, *args, **options)

    monkeypatch.setattr(AsyncEngine, "prepare", watched)
    return found


def make() -> ChatPagedLLM:
    return ChatPagedLLM(model="tiny", max_tokens=2, temperature=0)


TEXTS = ["a", "b", "c"]


async def test_one_key_for_each_batch(keys: list[str | None]) -> None:
    chat = make()
    chain = PROMPT | chat | StrOutputParser()
    inputs = [{"text": text} for text in TEXTS]
    doors = [
        lambda: chat.batch(TEXTS),
        lambda: list(chat.batch_as_completed(TEXTS)),
        lambda: chat.generate([[HumanMessage(text)] for text in TEXTS]),
        lambda: chain.batch(inputs),
        lambda: PagedLLM(model="tiny", max_tokens=2).generate(TEXTS),
        lambda: PagedLLM(model="tiny", max_tokens=2).batch(TEXTS),
    ]
    adoors: list[Any] = [
        lambda: chat.abatch(TEXTS),
        lambda: drain(chat.abatch_as_completed(TEXTS)),
        lambda: chat.agenerate([[HumanMessage(text)] for text in TEXTS]),
        lambda: chain.abatch(inputs),
        lambda: PagedLLM(model="tiny", max_tokens=2).agenerate(TEXTS),
        lambda: PagedLLM(model="tiny", max_tokens=2).abatch(TEXTS),
    ]
    seen = set()
    for door in [*doors, *adoors]:
        keys.clear()
        result = await asyncio.to_thread(door) if door in doors else await door()
        assert result
        assert len(keys) == 3
        assert len(set(keys)) == 1
        assert keys[0] is not None
        assert keys[0] not in seen, "each call has a key of its own"
        seen.add(keys[0])


async def drain(iterator: Any) -> list[Any]:
    return [item async for item in iterator]


async def test_a_key_that_is_given_wins(keys: list[str | None]) -> None:
    chat = make()
    chain = PROMPT | chat
    await chat.ainvoke("a", {"metadata": {"share_key": "mine"}})
    await chain.ainvoke({"text": "a"}, {"configurable": {"thread_id": "t-7"}})
    await chat.abatch(TEXTS, {"metadata": {"share_key": "mine"}})
    await asyncio.to_thread(chain.batch, [{"text": "a"}, {"text": "b"}], {"configurable": {"thread_id": "t-7"}})
    assert [part async for part in chat.astream("a", {"metadata": {"thread_id": 5}})]
    chat.invoke("a", share_key="of the call")
    list(chat.bind(share_key="of the call").stream("a", {"configurable": {"thread_id": "1"}}))
    assert keys == ["mine", "t-7", "mine", "mine", "mine", "t-7", "t-7", "5", "of the call", "of the call"]


async def test_else_the_parent_run(keys: list[str | None]) -> None:
    chat = make()

    async def twice(text: str) -> None:
        await asyncio.gather(chat.ainvoke(text), chat.ainvoke(text))

    runs: list[str] = []
    step = RunnableLambda(twice).with_listeners(on_start=lambda run: runs.append(str(run.id)))
    await step.ainvoke("a")
    await step.ainvoke("b")
    await chat.ainvoke("alone")
    assert len(runs) == 2
    assert keys == [runs[0], runs[0], runs[1], runs[1], None]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """On the engine's own thread: ("queued" or "finished", id) of every request, in order."""
    found: list[tuple[str, str]] = []
    enqueue, step = Engine.enqueue, Engine.step

    def watched_enqueue(self: Engine, request: Any) -> str:
        found.append(("queued", request.request_id))
        return enqueue(self, request)

    def watched_step(self: Engine) -> Any:
        outputs = step(self)
        found.extend(("finished", output.request_id) for output in outputs if output.finished)
        return outputs

    monkeypatch.setattr(Engine, "enqueue", watched_enqueue)
    monkeypatch.setattr(Engine, "step", watched_step)
    return found


async def test_a_huge_batch_does_not_starve_another_chain(fresh_engines: None, served: list[tuple[str, str]]) -> None:
    with AsyncEngine(model="tiny", max_num_seqs=2, scheduling_policy="fair", block_size=16) as engine:
        chat = ChatPagedLLM(model="tiny", engine=engine, max_tokens=12, ignore_eos=True)
        batch = asyncio.ensure_future(chat.abatch([f"question {number}" for number in range(40)]))
        while engine.stats().waiting < 30 and not batch.done():
            await asyncio.sleep(0)
        await chat.ainvoke("a single call of another chain")
        assert len(await batch) == 40
    queued = [request for kind, request in served if kind == "queued"]
    assert len(queued) == 41
    begin, end = served.index(("queued", queued[-1])), served.index(("finished", queued[-1]))
    assert sum(kind == "finished" for kind, _ in served[begin:end]) <= 6, served


class Beams(TypedDict):
    use_beam_search: bool
    n: int
    max_tokens: int
    length_penalty: float


BEAMS = Beams(use_beam_search=True, n=4, max_tokens=12, length_penalty=0.8)


async def test_beams_through_the_adapters() -> None:
    messages = [{"role": "user", "content": "Where is the library?"}]
    with LLM("tiny") as llm:
        wanted = [part.text for part in llm.chat(messages, SamplingParams(**BEAMS))[0].outputs]
        raw = [part.text for part in llm.beam_search(["The library is"], SamplingParams(**BEAMS))[0].outputs]
    assert len(set(wanted)) == 4
    chat = ChatPagedLLM(model="tiny", **BEAMS)
    replies = chat.generate([[HumanMessage("Where is the library?")]]).generations[0]
    assert [reply.text for reply in replies] == wanted
    again = await chat.agenerate([[HumanMessage("Where is the library?")]])
    assert [reply.text for reply in again.generations[0]] == wanted
    assert chat.invoke("Where is the library?").content == wanted[0], "the best one"
    llm_of_langchain = PagedLLM(model="tiny", **BEAMS)
    assert [one.text for one in llm_of_langchain.generate(["The library is"]).generations[0]] == raw


async def test_beams_are_streamed_when_they_are_done() -> None:
    chat = ChatPagedLLM(model="tiny", **{**BEAMS, "n": 1, "best_of": 4})
    whole = chat.invoke("Where is the library?").content
    assert whole
    chunks = [chunk.content async for chunk in chat.astream("Where is the library?")]
    assert "".join(map(str, chunks)) == whole
    assert [chunk for chunk in chunks if chunk] == [whole]


async def test_invoke_gives_the_best_beam_where_somebody_listens_to_tokens() -> None:
    chat = ChatPagedLLM(model="tiny", **BEAMS)

    async def ask(text: str) -> Any:
        return (await chat.ainvoke(text)).content

    events = [event async for event in RunnableLambda(ask).astream_events("Where is the library?", version="v2")]
    best = chat.invoke("Where is the library?").content
    assert best
    assert events[-1]["data"]["output"] == best
    assert ChatPagedLLM(model="tiny", streaming=True, **BEAMS).invoke("Where is the library?").content == best


def test_what_beams_cannot_have_is_refused_by_name() -> None:
    for fields, name in [({"temperature": 0.7}, "temperature"), ({"top_p": 0.5}, "top_p"), ({"seed": 3}, "seed")]:
        with pytest.raises(InvalidRequestError, match=name):
            ChatPagedLLM(model="tiny", **BEAMS, **fields).invoke("Hello")
    with pytest.raises(InvalidRequestError, match="n=4"):
        list(ChatPagedLLM(model="tiny", **BEAMS).stream("Hello"))
