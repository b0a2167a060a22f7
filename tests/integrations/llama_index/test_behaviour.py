"""`PagedLLM` where LlamaIndex's habits are hard on a model: loops, threads, cancellation, errors, tools, roles."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import llama_index.core
import pytest
from llama_index.core import Settings
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, MessageRole, ToolCallBlock
from llama_index.core.extractors import SummaryExtractor
from llama_index.core.tools import FunctionTool
from llama_index.llms.pagedllm import PagedLLM
from llama_index.llms.pagedllm.convert import calls_so_far
from pydantic import BaseModel

from pagedllm_core import AsyncEngine, EngineConfig, get_engine
from pagedllm_core.chat.reply import Piece
from pagedllm_core.errors import (
    CapacityError,
    ContextLengthError,
    EngineClosedError,
    InvalidRequestError,
    RequestFailedError,
    RequestTimeoutError,
)

QUESTION = "What is a page table?"
CHAT = [ChatMessage("Be brief.", role="system"), ChatMessage(QUESTION)]
ENDLESS = {"max_tokens": None, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm() -> PagedLLM:
    return PagedLLM(model="tiny", max_tokens=16, kv_cache_memory="32MiB", engine_kwargs={"num_threads": 1})


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def paint(colour: str) -> str:
    """Paint something."""
    return colour


TOOLS = [FunctionTool.from_defaults(add), FunctionTool.from_defaults(paint)]


# Loops and threads.


def test_every_loop_and_thread_is_served(llm):
    text = llm.chat(CHAT).message.content

    async def ask() -> list[str]:
        replies = await asyncio.gather(*(llm.achat(CHAT) for _ in range(3)))
        return [reply.message.content for reply in replies]

    with ThreadPoolExecutor(4) as threads:
        loops = [threads.submit(asyncio.run, ask()) for _ in range(4)]
        calls = [threads.submit(llm.chat, CHAT) for _ in range(4)]
        assert [loop.result() for loop in loops] == [[text] * 3] * 4
        assert [call.result().message.content for call in calls] == [text] * 4


async def test_a_blocking_call_works_while_a_loop_runs(llm):
    other = asyncio.create_task(llm.achat(CHAT))
    assert llm.chat(CHAT).message.content == (await other).message.content
    assert list(llm.stream_complete(QUESTION))[-1].text


# Counts.


def test_cached_tokens_are_told():
    with AsyncEngine(EngineConfig(model="tiny", max_model_len=512)) as engine:
        llm = PagedLLM(engine=engine, max_tokens=2)
        prompt = "The clinic opens at nine. " * 8
        first, second = (llm.complete(prompt).raw["usage"] for _ in range(2))
        found = second["prompt_tokens_details"]["cached_tokens"]
        assert first["prompt_tokens_details"]["cached_tokens"] == 0
        assert 0 < found < second["prompt_tokens"]
        assert found == engine.stats().prefix_cache_hits
        (*parts, last) = llm.stream_complete(prompt)
        assert last.raw["usage"] == second
        assert not any("usage" in part.raw for part in parts)


def test_the_context_window_is_the_least_of_the_model_s_and_the_pool_s():
    config = EngineConfig(model="tiny", kv_cache_memory="2MiB")
    with AsyncEngine(config) as engine:
        room = engine.stats().kv_blocks_total * config.block_size
        assert room < engine.max_model_len
        small = PagedLLM(engine=engine, max_tokens=1)
        assert small.metadata.context_window == room
        with pytest.raises(CapacityError, match=f"the pool has {engine.stats().kv_blocks_total}"):
            small.complete("a " * (room + 16), formatted=True)


def test_a_call_waits_for_no_step_but_its_own(llm, monkeypatch):
    llm.complete("Hi", max_tokens=1)
    with monkeypatch.context() as patched:
        patched.delattr(AsyncEngine, "stats")
        assert llm.metadata.context_window == 2048
        assert llm.to_payload()["context_window"] == 2048
        assert llm.chat(CHAT).message.content


def test_too_long_a_prompt_is_refused_on_every_path(llm):
    limit = llm.metadata.context_window
    for call in (llm.complete, llm.stream_complete):
        with pytest.raises(ContextLengthError) as error:
            list(call("word " * 3000))
        assert error.value.limit == limit
        assert error.value.prompt_length > 3000
        assert pickle.loads(pickle.dumps(error.value)).prompt_length == error.value.prompt_length


def test_the_tokenizer_is_for_settings(llm, monkeypatch):
    monkeypatch.setattr(llama_index.core, "global_tokenizer", None)  # where `Settings` keeps it; restored afterwards
    Settings.tokenizer = llm.tokenizer
    assert len(Settings.tokenizer(QUESTION)) == llm.complete(QUESTION, formatted=True).raw["usage"]["prompt_tokens"]


# Prompts.


def test_no_second_start_token(llm, monkeypatch):
    tokenizer = get_engine(llm.engine_config()).tokenizer
    start, call = tokenizer.eos_token, type(tokenizer).__call__

    def with_start(self, text, add_special_tokens=True):
        ids = call(self, text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [tokenizer.eos_token_id] * add_special_tokens + ids}

    monkeypatch.setattr(type(tokenizer), "__call__", with_start)
    monkeypatch.setattr(type(tokenizer), "bos_token", start, raising=False)
    wanted = 1 + len(call(tokenizer, "Hi")["input_ids"])
    for prompt in ("Hi", f"{start}Hi"):
        assert llm.complete(prompt, formatted=True).raw["usage"]["prompt_tokens"] == wanted


STERN = """{%- for message in messages -%}
{%- if message.role == "system" and not loop.first %}{{ raise_exception("late system message") }}{% endif -%}
{%- if not loop.first and message.role == messages[loop.index0 - 1].role %}{{ raise_exception("twice") }}{% endif -%}
<{{ message.role }}>{{ message.content }}
{%- endfor %}"""


def test_conversations_that_a_template_refuses_are_simplified(llm):
    messages = [
        ChatMessage("Be brief.", role=MessageRole.DEVELOPER),
        ChatMessage("The document."),
        ChatMessage("The chunk."),
        ChatMessage("Yes.", role=MessageRole.MODEL),
        ChatMessage("And now?"),
        ChatMessage("You are out of steps.", role=MessageRole.SYSTEM),
    ]
    call = llm._chat_call(messages, {"chat_template": STERN})
    prompt = call.tokenize(get_engine(llm.engine_config()))["prompt"]
    assert prompt.count("<system>") == 1
    assert [prompt.count(f"<{role}>") for role in ("user", "assistant")] == [2, 1]
    assert all(message.content in prompt for message in messages)
    assert llm.chat(messages, chat_template=STERN).message.content is not None


# Tools.


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_number_of_calls_is_what_was_allowed(llm, streamed):
    end = get_engine(llm.engine_config()).tokenizer.eos_token_id
    given = {"user_msg": QUESTION, "tool_required": True, "max_tokens": 150, "logit_bias": {end: -100.0}}
    for parallel in (False, True):
        given["allow_parallel_tool_calls"] = parallel
        if streamed:
            (*_, response) = [part async for part in await llm.astream_chat_with_tools(TOOLS, **given)]
        else:
            response = await llm.achat_with_tools(TOOLS, **given)
        calls = llm.get_tool_calls_from_response(response)
        assert (len(calls) > 1) == parallel
        assert len({call.tool_id for call in calls}) == len(calls)
        assert [call["id"] for call in response.message.additional_kwargs["tool_calls"]] == [
            call.tool_id for call in calls
        ]
        # The end is forbidden, so further calls would have come.
        assert response.raw["choices"][0]["finish_reason"] == ("length" if parallel else "tool_calls")


def test_named_and_forbidden_tools(llm):
    for sampling in ({}, {"temperature": 1.6, "seed": 3}):
        for choice in ("paint", {"type": "function", "function": {"name": "paint"}}):
            response = llm.chat_with_tools(TOOLS, QUESTION, tool_choice=choice, max_tokens=60, **sampling)
            assert [call.tool_name for call in llm.get_tool_calls_from_response(response)] == ["paint"]
        none = llm.chat_with_tools(TOOLS, QUESTION, tool_choice="none", **sampling)
        assert llm.get_tool_calls_from_response(none, error_on_no_tool_call=False) == []
    with pytest.raises(InvalidRequestError, match="is no tool"):
        llm.chat_with_tools(TOOLS, QUESTION, tool_choice="subtract")


def test_streamed_calls_grow(llm):
    responses = list(llm.stream_chat_with_tools(TOOLS, QUESTION, tool_choice="paint", max_tokens=60, logprobs=True))
    calls = [block for part in responses for block in part.message.blocks if isinstance(block, ToolCallBlock)]
    assert len(calls) > 1
    assert {(call.tool_name, call.tool_call_id) for call in calls} == {("paint", calls[-1].tool_call_id)}
    for call in calls:
        assert calls[-1].tool_kwargs["colour"].startswith(call.tool_kwargs.get("colour", ""))
    assert llm.get_tool_calls_from_response(responses[-1])[0].tool_kwargs == calls[-1].tool_kwargs


def test_what_is_there_of_calls():
    pieces = [Piece("call", name="add", id="1"), Piece("arguments", '{"a": 1, "b')]
    assert [(call.name, call.arguments, call.id) for call in calls_so_far(pieces)] == [("add", {"a": 1}, "1")]
    pieces += [Piece("arguments", '": 2}'), Piece("call", index=1, name="paint", id="2")]
    assert [call.arguments for call in calls_so_far(pieces)] == [{"a": 1, "b": 2}, {}]


def test_names_are_kept_as_they_are(llm):
    tool = FunctionTool.from_defaults(add, name="Sum[int]: both")
    given = {"max_tokens": 60, "tool_choice": "Sum[int]: both"}
    (call,) = llm.get_tool_calls_from_response(llm.chat_with_tools([tool], QUESTION, **given))
    assert call.tool_name == tool.metadata.name
    assert llm.predict_and_call([tool], QUESTION, **given).sources[0].raw_output == add(**call.tool_kwargs)


class Branch(BaseModel):
    """A tree."""

    leaf: int
    left: Branch | None = None


def test_arguments_that_refer_to_themselves(llm):
    tool = FunctionTool.from_defaults(
        lambda **given: given, name="grow", description="Grow it. " * 150, fn_schema=Branch
    )
    assert llm._prepare_chat_with_tools([tool])["tools"][0]["function"]["parameters"]["required"] == ["leaf"]
    response = llm.chat_with_tools([tool], "Grow.", tool_required=True, max_tokens=120, temperature=1.5, seed=1)
    (call,) = llm.get_tool_calls_from_response(response)
    Branch.model_validate(call.tool_kwargs)


# Leaving.


async def freed(engine: AsyncEngine) -> bool:
    """True once nothing runs; what is closed late is closed within some turns of the loop."""
    for _ in range(1000):
        await asyncio.sleep(0)
        if not engine.stats().kv_blocks_used:
            return True
    return False


async def test_a_dropped_stream_is_ended(llm):
    engine = get_engine(llm.engine_config())
    before = engine.stats().tokens_generated
    for start in (llm.astream_chat(CHAT, **ENDLESS), llm.astream_complete(QUESTION, **ENDLESS)):
        stream = await start
        async for _ in stream:
            break
        del stream, start
        gc.collect()
        assert await freed(engine)
    unread = await llm.astream_chat(CHAT, **ENDLESS)
    del unread
    gc.collect()
    assert await freed(engine)
    assert engine.stats().tokens_generated - before < 1500


async def test_a_cancelled_run_of_an_agent_is_ended(llm):
    engine = get_engine(llm.engine_config())
    before = engine.stats().tokens_generated
    talker = llm.model_copy(update={"max_tokens": None, "ignore_eos": True})
    handler = FunctionAgent(llm=talker, tools=[]).run("Go on for ever.")
    async for _ in handler.stream_events():
        if engine.stats().running:
            break
    await handler.cancel_run()
    assert await freed(engine)
    assert engine.stats().tokens_generated - before < 1500


# Errors.


def broken(output: list[int], logits: object) -> object:
    raise ValueError("oops")


async def test_a_failure_reaches_its_owner(llm):
    given = {"logits_processors": [broken]}
    good = asyncio.create_task(llm.achat(CHAT))
    with pytest.raises(RequestFailedError, match="oops"):
        await llm.achat(CHAT, **given)
    with pytest.raises(RequestFailedError, match="oops"):
        [part async for part in await llm.astream_complete(QUESTION, **given)]
    with pytest.raises(RequestFailedError, match="oops"):
        list(llm.stream_chat(CHAT, **given))
    with pytest.raises(RequestTimeoutError):
        llm.complete(QUESTION, timeout=1e-9)
    assert (await good).message.content


async def test_the_end_of_an_engine_reaches_every_waiter():
    engine = AsyncEngine(EngineConfig(model="tiny", max_model_len=1024))
    llm = PagedLLM(engine=engine, **ENDLESS)

    async def read() -> None:
        async for _ in await llm.astream_chat(CHAT):
            pass

    waiters = [
        asyncio.create_task(llm.achat(CHAT)),
        asyncio.create_task(read()),
        asyncio.create_task(asyncio.to_thread(llm.chat, CHAT)),
        asyncio.create_task(asyncio.to_thread(lambda: list(llm.stream_complete(QUESTION)))),
    ]
    while engine.stats().running < len(waiters):
        await asyncio.sleep(0)
    await engine.aclose()
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert [type(result) for result in results] == [EngineClosedError] * len(waiters)
    with pytest.raises(EngineClosedError):
        llm.chat(CHAT)


def test_a_fork_says_what_it_cannot_do():
    with AsyncEngine(EngineConfig(model="tiny", max_model_len=64)) as engine:
        llm = PagedLLM(engine=engine, max_tokens=2)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                llm.complete("Hi")
                said = "no error"
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(writing, said.encode())
            os._exit(0)
        os.close(writing)
        said = os.read(reading, 4096).decode()
        os.close(reading)
        os.waitpid(child, 0)
        assert said.startswith("EngineClosedError")
        assert "fork" in said
        assert llm.complete("Hi").raw["usage"]["completion_tokens"] <= 2


def test_pickles_of_what_holds_it_hold_no_engine(llm):
    llm.complete("Hi", max_tokens=1)
    extractor = SummaryExtractor(llm=llm, num_workers=7)
    data = pickle.dumps(extractor)
    assert len(data) < 20_000
    copied = pickle.loads(data)
    assert copied.llm.engine_config() == llm.engine_config()
    assert copied.num_workers == 7
    assert copied.llm.model_dump_json() == llm.model_dump_json()
