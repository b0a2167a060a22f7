"""Calls that come at once are answered in one batch; test_doors.py has a table of all the ways to send them."""

from __future__ import annotations

import asyncio
import threading

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_pagedllm import ChatPagedLLM

from pagedllm_core import get_engine, list_engines
from pagedllm_core.errors import InvalidRequestError

pytestmark = pytest.mark.usefixtures("fresh_engines")
LONG = {"max_tokens": 128, "min_tokens": 128}
SHORT = {"max_tokens": 24, "min_tokens": 24}


def largest_batch() -> int:
    (engine,) = list_engines()
    return engine.stats().max_batch_size


def questions(count: int) -> list[str]:
    return [f"Question number {number}: what is a page table?" for number in range(count)]


async def test_64_concurrent_ainvokes():
    chat = ChatPagedLLM(model="tiny", **LONG)
    replies = await asyncio.gather(*(chat.ainvoke(question) for question in questions(64)))
    assert {reply.usage_metadata["output_tokens"] for reply in replies} == {128}
    assert largest_batch() >= 48


def test_32_threads_released_at_once():
    chat = ChatPagedLLM(model="tiny", **LONG)
    barrier, replies = threading.Barrier(32), []

    def ask(question):
        barrier.wait()
        replies.append(chat.invoke(question))

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replies) == 32
    assert largest_batch() >= 24


def test_three_event_loops_of_16():
    chat = ChatPagedLLM(model="tiny", **LONG)
    get_engine(model="tiny")
    barrier, counts = threading.Barrier(3), []

    async def ask_all():
        return await asyncio.gather(*(chat.ainvoke(question) for question in questions(16)))

    def run():
        barrier.wait()
        counts.append(len(asyncio.run(ask_all())))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [16, 16, 16]
    assert largest_batch() >= 36


class Runs(BaseCallbackHandler):
    def __init__(self):
        self.started, self.ended, self.failed = [], [], []

    def on_chat_model_start(self, *args, run_id, **kwargs):
        self.started.append(run_id)

    def on_llm_end(self, *args, run_id, **kwargs):
        self.ended.append(run_id)

    def on_llm_error(self, *args, run_id, **kwargs):
        self.failed.append(run_id)


def batch(chat, runs):
    return chat.batch(questions(24), {"callbacks": [runs]})


def batch_as_completed(chat, runs):
    replies = dict(chat.batch_as_completed(questions(24), {"callbacks": [runs]}))
    return [replies[number] for number in range(24)]


def generate(chat, runs):
    result = chat.generate([[HumanMessage(question)] for question in questions(24)], callbacks=[runs])
    assert [run.run_id for run in result.run]
    assert result.llm_output["token_usage"]["completion_tokens"] == 24 * 24
    return [generation.message for (generation,) in result.generations]


@pytest.mark.parametrize("door", [batch, batch_as_completed, generate])
def test_each_call_of_a_batch_is_a_run(door):
    runs = Runs()
    replies = door(ChatPagedLLM(model="tiny", **SHORT), runs)
    assert [reply.usage_metadata["output_tokens"] for reply in replies] == [24] * 24
    assert len(set(runs.started)) == 24
    assert sorted(runs.started) == sorted(runs.ended)


def test_replies_of_a_batch_are_those_of_single_calls():
    # In float32: bfloat16 rounds differently in batches of different sizes.
    chat = ChatPagedLLM(model="tiny", max_tokens=16, temperature=0, dtype="float32")
    texts = [reply.content for reply in chat.batch(questions(8))]
    assert texts == [chat.invoke(question).content for question in questions(8)]


def test_errors_of_a_batch():
    chat, runs = ChatPagedLLM(model="tiny", max_tokens=4), Runs()
    inputs = ["fine", "too long " * 3000, "fine too"]
    replies = chat.batch(inputs, {"callbacks": [runs]}, return_exceptions=True)
    assert [isinstance(reply, InvalidRequestError) for reply in replies] == [False, True, False]
    assert (len(runs.started), len(runs.ended), len(runs.failed)) == (3, 2, 1)
    with pytest.raises(InvalidRequestError, match="exceed the context limit"):
        chat.batch(inputs)


def test_an_empty_batch():
    assert ChatPagedLLM(model="tiny").batch([]) == []
    assert list_engines() == []
