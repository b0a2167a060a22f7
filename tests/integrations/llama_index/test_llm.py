"""`PagedLLM` of LlamaIndex: the eight methods, what they give back, and that they share one batch."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import warnings

import pytest
from langchain_pagedllm import ChatPagedLLM
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation.dispatcher import instrument_tags
from llama_index.core.tools import FunctionTool
from llama_index.llms.pagedllm import PagedLLM

from pagedllm_core import LLM, AsyncEngine, EngineConfig, SamplingParams, get_engine, list_engines, streams
from pagedllm_core.chat.template import ChatTemplate
from pagedllm_core.errors import ContextLengthError, InvalidRequestError

QUESTION = "What is a page table?"
CHAT = [ChatMessage("Be brief.", role="system"), ChatMessage(QUESTION)]


@pytest.fixture(scope="module")
def llm() -> PagedLLM:
    return PagedLLM(model="tiny", max_tokens=16, dtype="float32")


async def last_of(stream):
    responses = [response async for response in await stream]
    return responses[-1], "".join(response.delta for response in responses)


def last(stream):
    responses = list(stream)
    return responses[-1], "".join(response.delta for response in responses)


async def test_all_eight_methods_agree(llm):
    reply = llm.chat([ChatMessage(QUESTION)])
    text = reply.message.content
    assert text
    assert (await llm.achat([ChatMessage(QUESTION)])).message.content == text
    assert llm.complete(QUESTION).text == (await llm.acomplete(QUESTION)).text == text
    for response, joined in (
        last(llm.stream_chat([ChatMessage(QUESTION)])),
        await last_of(llm.astream_chat([ChatMessage(QUESTION)])),
    ):
        assert response.message.content == joined == text
        assert response.additional_kwargs == reply.additional_kwargs
    for response, joined in (last(llm.stream_complete(QUESTION)), await last_of(llm.astream_complete(QUESTION))):
        assert response.text == joined == text
        assert response.additional_kwargs == reply.additional_kwargs


def test_usage_in_openai_s_shape(llm):
    reply = llm.chat(CHAT)
    usage = reply.raw["usage"]
    template = ChatTemplate(get_engine(llm.engine_config()).tokenizer)
    text = template.render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}])
    assert usage["prompt_tokens"] == len(template.encode(text))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert reply.additional_kwargs == {name: usage[name] for name in reply.additional_kwargs}
    assert len(reply.additional_kwargs) == 3
    assert reply.raw["choices"][0]["finish_reason"] in {"stop", "length"}
    json.dumps(reply.raw)


def test_formatted_prompts_go_in_as_they_are(llm):
    raw = llm.complete("One two", formatted=True).raw["usage"]["prompt_tokens"]
    assert raw == len(llm.tokenizer("One two"))
    assert llm.complete("One two").raw["usage"]["prompt_tokens"] > raw


@pytest.mark.usefixtures("fresh_engines")
def test_making_one_loads_nothing_and_metadata_is_the_model_s():
    llm = PagedLLM(model="tiny", max_model_len=512, temperature=0.5)
    assert llm.to_payload()["temperature"] == 0.5
    assert list_engines() == []
    metadata = llm.metadata
    assert (metadata.context_window, metadata.num_output, metadata.model_name) == (512, -1, "tiny")
    assert metadata.is_chat_model
    assert metadata.is_function_calling_model
    assert PagedLLM(max_new_tokens=7).metadata.num_output == 7
    assert PagedLLM.class_name() == "PagedLLM"


@pytest.mark.usefixtures("fresh_engines")
async def test_it_shares_one_engine_and_one_batch_with_langchain():
    length = {"max_tokens": 32, "min_tokens": 32}
    llm, chat = PagedLLM(model="tiny", **length), ChatPagedLLM(model="tiny", **length)
    await asyncio.gather(*(llm.achat(CHAT) for _ in range(8)), *(chat.ainvoke(QUESTION) for _ in range(8)))
    (engine,) = list_engines()
    assert engine.stats().max_batch_size == 16


@pytest.mark.usefixtures("fresh_engines")
async def test_concurrent_calls_of_every_kind_are_one_batch():
    llm = PagedLLM(model="tiny", max_tokens=32, min_tokens=32)
    await asyncio.gather(
        *(llm.acomplete(QUESTION) for _ in range(8)),
        *(last_of(llm.astream_chat(CHAT)) for _ in range(8)),
        *(last_of(llm.astream_complete(QUESTION)) for _ in range(8)),
    )
    assert list_engines()[0].stats().max_batch_size == 24


async def test_one_event_for_each_request(llm):
    counter = TokenCountingHandler(tokenizer=llm.tokenizer)
    counted = PagedLLM(model="tiny", max_tokens=16, dtype="float32", callback_manager=CallbackManager([counter]))
    used = [
        counted.complete(QUESTION).raw["usage"],
        counted.chat(CHAT).raw["usage"],
        (await counted.achat(CHAT)).raw["usage"],
        last(counted.stream_chat(CHAT))[0].raw["usage"],
        (await last_of(counted.astream_complete(QUESTION)))[0].raw["usage"],
    ]
    assert len(counter.llm_token_counts) == 5
    assert counter.prompt_llm_token_count == sum(usage["prompt_tokens"] for usage in used)
    assert counter.completion_llm_token_count == sum(usage["completion_tokens"] for usage in used)


def test_parameters_per_call(llm):
    assert llm.chat(CHAT, max_tokens=2).raw["usage"]["completion_tokens"] == 2
    assert llm.complete(QUESTION, max_new_tokens=2).raw["usage"]["completion_tokens"] == 2
    text = llm.complete(QUESTION, ignore_eos=True).text
    assert llm.complete(QUESTION, stop=[text[3:6]], ignore_eos=True).text == text[: text.index(text[3:6])]
    sampled = [llm.complete(QUESTION, temperature=1.5, seed=seed).text for seed in (1, 1, 2, 3)]
    assert sampled[0] == sampled[1]
    assert len(set(sampled)) > 1
    llm.chat(CHAT, parallel_tool_calls=False, extra_headers={})
    with pytest.warns(UserWarning, match="unknown argument temprature is ignored"):
        llm.chat(CHAT, temprature=1)
    with pytest.raises(InvalidRequestError, match="n=2"):
        llm.chat(CHAT, n=2, temperature=1)


def test_an_unknown_argument_is_told_once():
    llm = PagedLLM(model="tiny", max_tokens=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            llm.chat(CHAT, temprature=1)
            llm.complete(QUESTION, temprature=1)
    assert len([warning for warning in told if "temprature" in str(warning.message)]) == 1


def test_log_probabilities(llm):
    for response in (llm.chat(CHAT, logprobs=True, top_logprobs=2), llm.complete(QUESTION, logprobs=True)):
        assert len(response.logprobs) == response.raw["usage"]["completion_tokens"]
        assert all(entry.logprob <= 0 for entries in response.logprobs for entry in entries)


def test_roles_and_blocks(llm):
    call = ToolCallBlock(tool_call_id="1", tool_name="add", tool_kwargs='{"a": 1}')
    messages = [
        ChatMessage("Be brief.", role=MessageRole.DEVELOPER),
        ChatMessage(blocks=[TextBlock(text="Add"), TextBlock(text="one")]),
        ChatMessage(role=MessageRole.CHATBOT, blocks=[call]),
        ChatMessage("2", role=MessageRole.FUNCTION, additional_kwargs={"tool_call_id": "1"}),
        ChatMessage("Two.", role=MessageRole.MODEL),
        ChatMessage("Again"),
    ]
    before = copy.deepcopy(messages)
    converted = llm._chat_call(messages, {})
    roles = [message["role"] for message in converted.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert converted.messages[1]["content"] == "Add\none"
    assert converted.messages[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert llm.chat(messages).message.content
    assert messages == before


def test_images_are_refused(llm):
    message = ChatMessage(blocks=[TextBlock(text="Look"), ImageBlock(url="https://example.invalid/a.png")])
    with pytest.raises(InvalidRequestError, match="ImageBlock cannot be read"):
        llm.chat([message])


def test_too_long_a_prompt_names_both_counts(llm):
    with pytest.raises(ContextLengthError, match=r"\d+ tokens exceed the context limit of 2048"):
        llm.complete("word " * 5000)


ENDLESS = {"max_tokens": None, "ignore_eos": True}


async def test_cancelled_tasks_and_closed_streams_free_their_blocks(llm):
    engine = get_engine(llm.engine_config())
    before = engine.stats().tokens_generated
    task = asyncio.create_task(llm.achat(CHAT, **ENDLESS))
    while not engine.stats().running:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stream = await llm.astream_complete(QUESTION, **ENDLESS)
    async for _ in stream:
        break
    await stream.aclose()
    for _ in llm.stream_chat(CHAT, **ENDLESS):
        break
    for _ in llm.stream_complete(QUESTION, **ENDLESS):
        break
    llm.stream_chat(CHAT, **ENDLESS)  # never read, dropped at once
    assert engine.stats().tokens_generated - before < 2000


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


TOOL = FunctionTool.from_defaults(add)
SCRIPT = 'Wait.<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>' * 2


@pytest.fixture
def scripted(monkeypatch):
    """The model says SCRIPT, whatever it is asked."""

    def rewrite(output):
        for completion in output.outputs:
            completion.text = SCRIPT if output.finished else ""
            completion.finish_reason = "stop" if output.finished else None
        return output

    take, result = streams.Mailbox.take, streams.Mailbox.result
    monkeypatch.setattr(streams.Mailbox, "take", lambda self: (out := take(self)) and rewrite(out))
    monkeypatch.setattr(streams.Mailbox, "result", lambda self: rewrite(result(self)))


@pytest.mark.usefixtures("scripted")
def test_tool_calls(llm):
    response = llm.chat_with_tools([TOOL], user_msg=QUESTION, allow_parallel_tool_calls=True)
    calls = llm.get_tool_calls_from_response(response)
    assert [(call.tool_name, call.tool_kwargs) for call in calls] == [("add", {"a": 1, "b": 2})] * 2
    assert len({call.tool_id for call in calls}) == 2
    assert response.message.additional_kwargs["tool_calls"][0]["function"]["name"] == "add"
    assert response.raw["choices"][0]["finish_reason"] == "tool_calls"
    single = llm.chat_with_tools([TOOL], user_msg=QUESTION)
    assert len(llm.get_tool_calls_from_response(single)) == 1
    streamed, _ = last(llm.stream_chat_with_tools([TOOL], user_msg=QUESTION))
    assert len(llm.get_tool_calls_from_response(streamed)) == 2
    assert len(streamed.message.additional_kwargs["tool_calls"]) == 2
    assert llm.predict_and_call([TOOL], user_msg=QUESTION).response == "3"


def test_tools_are_in_the_prompt_and_the_history_is_left_alone(llm):
    history = [ChatMessage("Be brief.", role="system")]
    plain = llm.chat([*history, ChatMessage(QUESTION)]).raw["usage"]["prompt_tokens"]
    response = llm.chat_with_tools([TOOL], user_msg=QUESTION, chat_history=history)
    assert response.raw["usage"]["prompt_tokens"] > plain
    assert len(history) == 1
    unused = llm.chat_with_tools([TOOL], user_msg=QUESTION, chat_history=history, tool_choice="none")
    assert unused.raw["usage"]["prompt_tokens"] == plain
    if not llm.get_tool_calls_from_response(unused, error_on_no_tool_call=False):
        with pytest.raises(ValueError, match="at least one tool call"):
            llm.get_tool_calls_from_response(unused)


@pytest.mark.parametrize("demand", [{"tool_required": True}, {"tool_choice": "add"}])
def test_forced_tools_are_called(llm, demand):
    response = llm.chat_with_tools([TOOL], user_msg=QUESTION, max_tokens=60, **demand)
    (call,) = llm.get_tool_calls_from_response(response)
    assert call.tool_name == "add"
    assert {type(value) for value in call.tool_kwargs.values()} == {int}


def test_copies_and_pickles_carry_the_configuration(llm):
    for copied in (copy.deepcopy(llm), pickle.loads(pickle.dumps(llm)), PagedLLM.from_dict(llm.to_dict())):
        assert copied.engine_config() == llm.engine_config()
        assert copied.max_tokens == 16
        assert copied._source().get() is llm._source().get()
    assert json.loads(llm.model_dump_json()) == json.loads(llm.model_dump_json())
    with AsyncEngine(EngineConfig(model="tiny", max_model_len=512)) as engine:
        own = PagedLLM(model="tiny", engine=engine, max_tokens=2)
        own.complete("Hi")
        assert engine.stats().tokens_generated == 2
        assert "engine" not in own.model_dump()
        assert copy.deepcopy(own).engine is engine
        assert pickle.loads(pickle.dumps(own)).engine_config() == engine.config


def test_unknown_fields_warn():
    with pytest.warns(UserWarning, match="unknown field max_token is ignored"):
        PagedLLM(model="tiny", max_token=3)


def test_a_formatting_function_of_the_caller_s_is_used():
    llm = PagedLLM(model="tiny", max_tokens=1, completion_to_prompt=lambda prompt: f"<|im_start|>{prompt}")
    tokens = llm.tokenizer("<|im_start|>Hi")
    assert llm.complete("Hi").raw["usage"]["prompt_tokens"] == len(tokens)


async def test_whose_share_a_call_counts_against(monkeypatch):
    keys = []
    prepare = AsyncEngine.prepare
    monkeypatch.setattr(
        AsyncEngine, "prepare", lambda self, *a, **k: (keys.append(k["share_key"]), prepare(self, *a, **k))[1]
    )
    llm = PagedLLM(model="tiny", max_tokens=2)
    llm.complete("a")
    llm.chat([ChatMessage(content="a")], share_key="mine")
    with instrument_tags({"thread_id": 5}):
        await llm.acomplete("a")
        assert [part async for part in await llm.astream_chat([ChatMessage(content="a")])]
    assert keys == [None, "mine", "5", "5"]


def test_beams():
    params = SamplingParams(use_beam_search=True, best_of=4, max_tokens=12)
    with LLM("tiny") as engine:
        wanted = engine.chat([{"role": "user", "content": "Where is the library?"}], params)[0].outputs
    llm = PagedLLM(model="tiny", use_beam_search=True, best_of=4, max_tokens=12)
    assert llm.chat([ChatMessage(content="Where is the library?")]).message.content == wanted[0].text
    response, deltas = last(llm.stream_chat([ChatMessage(content="Where is the library?")]))
    assert response.message.content == deltas == wanted[0].text
    with pytest.raises(InvalidRequestError, match=r"temperature=0\.5: beam search does not sample"):
        llm.complete("Hello", temperature=0.5)
    with pytest.raises(InvalidRequestError, match="n=4: a response carries one reply; use n=1, and best_of"):
        llm.complete("Hello", n=4, best_of=4)
