"""What one call of `ChatPagedLLM` gives back."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import LanguageModelInput
from langchain_core.load import dumps, load
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage, trim_messages
from langchain_core.runnables import ConfigurableField
from langchain_core.tools import tool
from langchain_pagedllm import ChatPagedLLM, PagedLLM
from langchain_pagedllm.convert import to_template_messages
from pydantic import ValidationError

from pagedllm_core import AsyncEngine, EngineConfig, get_engine, list_engines, registry, shutdown
from pagedllm_core.errors import InvalidRequestError, RequestTimeoutError

QUESTION: LanguageModelInput = "What is a page table?"


@pytest.fixture(scope="module")
def chat() -> ChatPagedLLM:
    return ChatPagedLLM(model="tiny", max_tokens=24, dtype="float32")


def merged(chunks):
    chunks = list(chunks)
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    return total, chunks


@pytest.mark.usefixtures("fresh_engines")
def test_making_one_loads_nothing_and_two_share_an_engine():
    first, second = ChatPagedLLM(model="tiny"), ChatPagedLLM(model="tiny", temperature=0.5)
    other = ChatPagedLLM(model="tiny", max_model_len=256)
    assert list_engines() == []
    first.invoke("Hi", max_tokens=1)
    second.invoke("Hi", max_tokens=1)
    PagedLLM(model="tiny").invoke("Hi", max_tokens=1)
    assert len(list_engines()) == 1
    assert list_engines()[0] is get_engine(model="tiny")
    other.invoke("Hi", max_tokens=1)
    assert len(list_engines()) == 2


@pytest.mark.usefixtures("fresh_engines")
def test_configurable_fields_do_not_load_again():
    chat = ChatPagedLLM(model="tiny", max_tokens=1).configurable_fields(temperature=ConfigurableField("warmth"))
    chat.with_config(configurable={"warmth": 0.5}).batch(["Hi"] * 4)
    assert len(list_engines()) == 1


def test_usage_and_metadata(chat):
    message = chat.invoke(QUESTION)
    usage, metadata = message.usage_metadata, message.response_metadata
    assert usage["input_tokens"] == chat.get_num_tokens_from_messages([HumanMessage(QUESTION)])
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_token_details"]["cache_read"] >= 0
    assert (metadata["model_name"], metadata["model_provider"]) == ("tiny", "pagedllm")
    assert metadata["finish_reason"] in {"stop", "length"}


def test_the_prefix_cache_is_counted(chat):
    context = "The page table maps pages to frames. " * 12
    chat.invoke(context + "Why?")
    again = chat.invoke(context + "How?").usage_metadata
    assert 0 < again["input_token_details"]["cache_read"] < again["input_tokens"]


def test_finish_reasons(chat):
    assert chat.invoke(QUESTION, max_tokens=2).response_metadata["finish_reason"] == "length"
    text = chat.invoke(QUESTION, ignore_eos=True).content
    stop = text[4:7]
    stopped = chat.invoke(QUESTION, stop=[stop], ignore_eos=True)
    assert stopped.content == text[: text.index(stop)]
    assert stopped.response_metadata["finish_reason"] == "stop"
    assert stopped.response_metadata["stop_reason"] == stop
    assert ChatPagedLLM(model="tiny", stop=stop, dtype="float32").invoke(QUESTION).content == stopped.content


@pytest.mark.usefixtures("every_output")
def test_a_stream_is_the_reply_in_pieces(chat):
    reply = chat.invoke(QUESTION)
    total, chunks = merged(chat.stream(QUESTION))
    assert len(chunks) > 3
    assert total.content == reply.content
    assert total.usage_metadata == {
        **reply.usage_metadata,
        "input_token_details": total.usage_metadata["input_token_details"],
    }
    assert sum(chunk.usage_metadata is not None for chunk in chunks) == 1
    assert [chunk.chunk_position for chunk in chunks].index("last") == len(chunks) - 1
    for name in ("model_name", "model_provider", "finish_reason", "stop_reason"):
        assert total.response_metadata[name] == reply.response_metadata[name]


async def test_an_asynchronous_stream_is_the_same(chat):
    total, _ = merged([chunk async for chunk in chat.astream(QUESTION)])
    assert total.content == (await chat.ainvoke(QUESTION)).content
    assert total.chunk_position == "last"


@pytest.mark.filterwarnings("ignore:astream_events version='v1' is deprecated")
async def test_events_of_both_versions(chat):
    reply = chat.invoke(QUESTION).content
    for version in ("v1", "v2"):
        events = [event async for event in chat.astream_events(QUESTION, version=version)]
        pieces = [event["data"]["chunk"].content for event in events if event["event"] == "on_chat_model_stream"]
        assert "".join(pieces) == reply


def test_seeds(chat):
    sampled = {"temperature": 1.5, "seed": 7, "max_tokens": 12}
    assert chat.invoke(QUESTION, **sampled).content == chat.invoke(QUESTION, **sampled).content
    assert len({chat.invoke(QUESTION, **{**sampled, "seed": seed}).content for seed in range(3)}) > 1


def test_several_replies(chat):
    result = chat.generate([[HumanMessage(QUESTION)]], n=3, temperature=1.5, seed=1)
    (generations,) = result.generations
    assert len(generations) == 3
    assert len({generation.text for generation in generations}) > 1
    counts = [generation.message.usage_metadata["output_tokens"] for generation in generations]
    assert sum(counts) == result.llm_output["token_usage"]["completion_tokens"]
    with pytest.raises(InvalidRequestError, match="n=3: a stream carries one reply"):
        next(chat.stream(QUESTION, n=3, temperature=1.0))


@pytest.mark.parametrize("streamed", [False, True])
def test_log_probabilities(chat, streamed):
    arguments = {"logprobs": True, "top_logprobs": 2}
    message = merged(chat.stream(QUESTION, **arguments))[0] if streamed else chat.invoke(QUESTION, **arguments)
    content = message.response_metadata["logprobs"]["content"]
    assert len(content) == message.usage_metadata["output_tokens"]
    assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) >= 2 for entry in content)


def test_parameters_per_call_and_by_binding(chat):
    assert chat.bind(max_tokens=3).invoke(QUESTION).usage_metadata["output_tokens"] == 3
    assert chat.invoke(QUESTION, max_tokens=3, min_tokens=3).usage_metadata["output_tokens"] == 3
    with pytest.raises(InvalidRequestError, match="temperature=-1"):
        chat.invoke(QUESTION, temperature=-1)


def test_another_model_per_call(chat, tmp_path):
    with pytest.raises(Exception, match="nowhere"):
        chat.invoke(QUESTION, model=str(tmp_path / "nowhere"))


def test_unknown_names_warn(chat):
    with pytest.warns(UserWarning, match="unknown field max_token is ignored"):
        ChatPagedLLM(model="tiny", max_token=3)
    with pytest.warns(UserWarning, match="unknown argument temprature is ignored"):
        chat.invoke(QUESTION, temprature=0.1)


def test_timeouts_free_the_memory(chat):
    with pytest.raises(RequestTimeoutError):
        chat.invoke(QUESTION, timeout=1e-6, max_tokens=None, ignore_eos=True)


def test_conversations_with_all_kinds_of_messages(chat):
    call = {"name": "add", "args": {"a": 1}, "id": "1"}
    reply = chat.invoke(
        [
            SystemMessage("Be brief."),
            HumanMessage([{"type": "text", "text": "Add"}, "one"]),
            AIMessage("", tool_calls=[call]),
            ToolMessage("boom", tool_call_id="1", status="error"),
            AIMessage([{"type": "text", "text": "It failed."}]),
            ("human", "Again"),
        ]
    )
    assert reply.usage_metadata["output_tokens"] > 0


@pytest.mark.parametrize("kind", ["image_url", "image", "audio", "video"])
def test_images_are_refused(chat, kind):
    part = {"type": kind, kind: {"url": "https://example.invalid/a.png"}, "url": "https://example.invalid/a.png"}
    with pytest.raises(InvalidRequestError, match="models here take text only"):
        chat.invoke([HumanMessage([{"type": "text", "text": "Look"}, part])])


def test_counting_tokens(chat):
    assert len(chat.get_token_ids("page table")) == chat.get_num_tokens("page table") > 0
    messages = [SystemMessage("Be brief."), HumanMessage("Add 1 and 2")]
    counted = chat.get_num_tokens_from_messages(messages, tools=[add])
    assert counted > chat.get_num_tokens_from_messages(messages)
    assert counted == chat.bind_tools([add]).invoke(messages).usage_metadata["input_tokens"]


def test_no_messages_cost_nothing(chat):
    assert chat.get_num_tokens_from_messages([]) == 0
    history = [HumanMessage("a long question " * 20), AIMessage("and an answer")]
    assert trim_messages(history, max_tokens=5, token_counter=chat, strategy="last", allow_partial=True) == []


def test_histories_of_other_models(chat):
    """An agent falls back to this model in the middle of a conversation."""
    args = {"a": 1, "b": 2}
    told = [{"type": "function_call", "name": "add", "arguments": "{}", "call_id": "1"}]
    histories = [
        AIMessage(told, tool_calls=[{"name": "add", "args": args, "id": "1"}]),
        AIMessage([{"type": "tool_call", "name": "add", "args": args, "id": "1"}]),
        AIMessage([{"type": "tool_use", "name": "add", "input": args, "id": "1"}]),
    ]
    counts = {
        chat.get_num_tokens_from_messages([HumanMessage("Add"), message, ToolMessage("3", tool_call_id="1")])
        for message in histories
    }
    assert len(counts) == 1
    refused = AIMessage([{"type": "refusal", "refusal": "I will not."}])
    assert chat.get_num_tokens_from_messages([HumanMessage("Add"), refused]) == chat.get_num_tokens_from_messages(
        [HumanMessage("Add"), AIMessage("I will not.")]
    )
    broken = AIMessage("", invalid_tool_calls=[{"name": "add", "args": '{"a": ', "id": "1", "error": None}])
    (call,) = to_template_messages([broken])[0]["tool_calls"]
    assert call["function"]["arguments"] == {"arguments": '{"a": '}  # a mapping: templates go through its items
    with pytest.raises(InvalidRequestError, match="text-plain"):
        chat.invoke([HumanMessage([{"type": "text-plain", "url": "https://example.invalid/a.txt"}])])


def test_caches_tell_parameters_apart():
    chat, cache = ChatPagedLLM(model="tiny", max_tokens=4), InMemoryCache()
    cached = [ChatPagedLLM(model="tiny", max_tokens=4, cache=cache, temperature=value) for value in (0.0, 0.0, 1.0)]
    for model in cached:
        model.invoke(QUESTION)
    assert len(cache._cache) == 2
    assert chat._identifying_params != cached[2]._identifying_params


def test_tracing_parameters(chat):
    params = chat._get_ls_params(stop=["x"], temperature=0.5)
    assert params["ls_provider"] == "pagedllm"
    assert (params["ls_model_name"], params["ls_temperature"], params["ls_max_tokens"]) == ("tiny", 0.5, 24)
    assert params["ls_stop"] == ["x"]
    assert chat._llm_type == "chat-pagedllm"


@pytest.mark.filterwarnings("ignore:The function `load` is in beta")
def test_dumps_hold_the_configuration_only(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    chat = ChatPagedLLM(model="tiny", max_tokens=4, temperature=0.5, dtype="float32", api_key="sk-secret")
    chat.invoke("Hi")
    text = dumps(chat)
    assert "hf_secret" not in text
    assert "sk-secret" not in text
    namespaces = {"allowed_objects": [ChatPagedLLM], "valid_namespaces": ["langchain_pagedllm"]}
    assert load(json.loads(text), secrets_map={"HF_TOKEN": "hf_secret"}, **namespaces) == chat.model_copy(
        update={"api_key": None}
    )
    for copied in (copy.copy(chat), copy.deepcopy(chat), pickle.loads(pickle.dumps(chat))):
        assert copied == chat
        assert copied._source().get() is chat._source().get()


def test_the_hub_s_token_is_there_while_a_model_loads(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    seen = []
    monkeypatch.setattr(registry, "get_engine", lambda config: seen.append(os.environ.get("HF_TOKEN")) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ChatPagedLLM(model="some/gated-model", hf_token="hf_secret").invoke("Hi")
    assert seen == ["hf_secret"]
    assert "HF_TOKEN" not in os.environ


def test_an_engine_of_one_s_own():
    with AsyncEngine(EngineConfig(model="tiny", max_model_len=512)) as engine:
        chat = ChatPagedLLM(model="tiny", engine=engine, max_tokens=2)
        chat.invoke("Hi")
        assert engine.stats().tokens_generated == 2
        assert "engine" not in json.loads(dumps(chat))["kwargs"]
        assert copy.deepcopy(chat).engine is engine
        assert pickle.loads(pickle.dumps(chat)).engine_config() == engine.config


def test_after_a_shutdown_the_next_call_builds_anew(chat):
    chat.invoke("Hi", max_tokens=1)
    shutdown()
    assert chat.invoke("Hi", max_tokens=1).usage_metadata["output_tokens"] == 1


@pytest.mark.usefixtures("fresh_engines")
async def test_closing_frees_the_engine_and_the_next_call_builds_anew():
    with ChatPagedLLM(model="tiny", max_tokens=1) as chat:
        chat.close()  # nothing is loaded yet
        assert chat.invoke("Hi").usage_metadata["output_tokens"] == 1
        assert len(list_engines()) == 1
    assert list_engines() == []
    async with chat:
        await chat.ainvoke("Hi")
    assert list_engines() == []


@pytest.mark.usefixtures("fresh_engines")
def test_an_engine_that_is_not_used_is_let_go():
    chat = ChatPagedLLM(model="tiny", max_tokens=1, keep_alive=0.05)
    for _ in range(2):
        chat.invoke("Hi")
        for engine in list_engines():
            engine._worker._thread.join(timeout=30)
        assert list_engines() == []
    with pytest.raises(ValidationError, match="keep_alive"):
        ChatPagedLLM(model="tiny", keep_alive=0)


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


SCRIPT = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü"}}\n</tool_call>\n<tool_call>{"name"'


def scripted(monkeypatch):
    """The model says SCRIPT, whatever it is asked."""
    from pagedllm_core import streams

    def rewrite(output):
        done = output.finished
        for completion in output.outputs:
            completion.text = completion.text and "" if not done else SCRIPT
            if done:
                completion.finish_reason = "stop"
        return output

    take, result = streams.Mailbox.take, streams.Mailbox.result
    monkeypatch.setattr(streams.Mailbox, "take", lambda self: (out := take(self)) and rewrite(out))
    monkeypatch.setattr(streams.Mailbox, "result", lambda self: rewrite(result(self)))


@pytest.mark.parametrize("streamed", [False, True])
def test_tool_calls_are_read_from_the_reply(chat, monkeypatch, streamed):
    scripted(monkeypatch)
    bound = chat.bind_tools([add])
    message = merged(bound.stream(QUESTION))[0] if streamed else bound.invoke(QUESTION)
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("add", {"a": 1, "b": "ü"})
    assert call["id"]
    assert message.content.strip() == "Let me see."
    assert message.response_metadata["finish_reason"] == "tool_calls"
    assert [call["args"] for call in message.invalid_tool_calls] == ['<tool_call>{"name"']
    plain = merged(chat.stream(QUESTION))[0] if streamed else chat.invoke(QUESTION)
    assert (plain.content, plain.tool_calls) == (SCRIPT, [])


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_no_chunk_holds_text_and_a_piece_of_a_call(monkeypatch, version):
    """LangChain would take the piece for the whole call, in `content_blocks` and in events of version 3."""
    scripted(monkeypatch)
    bound = ChatPagedLLM(model="tiny", output_version=version).bind_tools([add])
    kinds = [{block["type"] for block in chunk.content_blocks} for chunk in bound.stream(QUESTION)]
    assert [kind for kind in kinds if kind] == [{"text"}, {"tool_call_chunk"}]
    (call,) = merged(bound.stream(QUESTION))[0].tool_calls
    assert call["args"] == {"a": 1, "b": "ü"}


def test_raw_completion_streams_to_listeners():
    class Listener(BaseCallbackHandler):
        tokens = ()

        def on_llm_new_token(self, token, **kwargs):
            self.tokens += (token,)

    async def later():
        return await streaming.agenerate(["One"], callbacks=[listeners[1]])

    given = {"model": "tiny", "max_tokens": 6, "min_tokens": 6, "dtype": "float32", "logprobs": True}
    streaming, whole, listeners = PagedLLM(streaming=True, **given), PagedLLM(**given), (Listener(), Listener())
    expected = whole.generate(["One"])
    for result in (streaming.generate(["One"], callbacks=[listeners[0]]), asyncio.run(later())):
        (found,), (wanted,) = result.generations[0], expected.generations[0]
        assert (found.text, found.generation_info) == (wanted.text, wanted.generation_info)
        assert result.llm_output == expected.llm_output
    assert ["".join(listener.tokens) for listener in listeners] == [found.text] * 2  # in pieces, but for slow readers
    assert len(streaming.generate(["One"], n=2, temperature=0.9).generations[0]) == 2
    assert len(streaming.generate(["One", "Two"]).generations) == 2


def test_stop_strings_of_a_call_replace_the_field_s(chat):
    silent = ChatPagedLLM(model="tiny", max_tokens=24, stop=["e"])
    assert silent.invoke("Hello", stop=[]).content == chat.invoke("Hello").content != silent.invoke("Hello").content


def test_raw_completion():
    llm = PagedLLM(model="tiny", max_tokens=6, min_tokens=6, dtype="float32")
    result = llm.generate(["One", "Two"])
    assert result.llm_output["token_usage"]["completion_tokens"] == 12
    assert [text for (generation,) in result.generations for text in [generation.text]] == llm.batch(["One", "Two"])
    assert "".join(llm.stream("One")) == llm.invoke("One")
    assert result.generations[0][0].generation_info["finish_reason"] == "length"


def test_what_other_providers_write_is_read():
    legacy = AIMessage("", additional_kwargs={"function_call": {"name": "add", "arguments": '{"a": 1}'}})
    (call,) = to_template_messages([legacy])[0]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert "tool_calls" not in to_template_messages([AIMessage("", additional_kwargs={"function_call": {}})])[0]
    thinking = [{"type": "thinking", "thinking": "Why? "}, {"type": "reasoning", "reasoning": "So."}]
    other = [{"type": "server_tool_call", "id": "1", "name": "find", "args": {}}, {"type": "non_standard", "value": {}}]
    (converted,) = to_template_messages([AIMessage([*thinking, *other, {"type": "text", "text": "Yes."}])])
    assert converted == {"role": "assistant", "content": "Yes.", "reasoning_content": "Why? So."}
    with pytest.raises(InvalidRequestError, match="a call without a name"):
        to_template_messages([AIMessage([{"type": "tool_use", "id": "1", "input": {}}])])
