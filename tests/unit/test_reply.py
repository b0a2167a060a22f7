"""Taking replies apart, whole and while they arrive; the formats of model families; what callers demand of tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import pagedllm_core
from pagedllm_core.chat.formats import GENERIC, HERMES, LLAMA, MAGISTRAL, MISTRAL, THINK, reasoning_format, tool_format
from pagedllm_core.chat.grammar import ReplyRules
from pagedllm_core.chat.reply import Piece, ReplyReader, ReplyStyle, collect, read_reply
from pagedllm_core.chat.tools import AUTO, Reply, ToolChoice, tool_choice
from pagedllm_core.decode.grammar import GrammarCompiler
from pagedllm_core.errors import InvalidRequestError
from pagedllm_core.params import GuidedParams

CALLS = [("add", {"a": 1, "b": -2}), ("say", {"text": 'a "quoted" \\ {brace} ü </tool_call>'}), ("now", {})]


def written(style: ReplyStyle, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Calls in the format of a family."""
    tools = style.tools or HERMES
    bodies = [json.dumps({"name": name, tools.arguments: arguments}, ensure_ascii=False) for name, arguments in calls]
    if tools.each:
        return tools.separator.join(tools.begin + body + tools.end for body in bodies)
    return tools.begin + tools.separator.join(bodies) + tools.end


def streamed(text: str, style: ReplyStyle, cuts: list[int]) -> list[Piece]:
    reader, pieces = ReplyReader(style), []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        pieces += reader.feed(text[start:end])
    return pieces + reader.finish()


def names_and_arguments(reply: Reply) -> list[tuple[str, dict[str, Any]]]:
    return [(call.name, call.arguments) for call in reply.tool_calls]


FORMATS = [HERMES, LLAMA, MISTRAL, GENERIC]


@pytest.mark.parametrize("tools", FORMATS, ids=lambda one: one.name)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_calls_of_every_family(tools, count):
    style = ReplyStyle(tools=tools, names=["add", "say", "now"])
    reply = read_reply(written(style, CALLS[:count]), style)
    assert names_and_arguments(reply) == CALLS[:count]
    assert len({call.id for call in reply.tool_calls}) == count
    assert (reply.content, reply.invalid) == ("", [])


@pytest.mark.parametrize("tools", FORMATS, ids=lambda one: one.name)
@pytest.mark.parametrize("reasoning", [None, THINK, MAGISTRAL], ids=["plain", "think", "magistral"])
@given(data=st.data())
def test_a_stream_gives_what_the_whole_gives(tools, reasoning, data):
    style = ReplyStyle(tools=tools, names=["add", "say", "now"], reasoning=reasoning)
    parts = ["Sure. ", "<", "<tool", "\n", "[", "{x}", "think>", "ok"]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=5)))
    if reasoning and data.draw(st.booleans()):
        text = f"{reasoning.begin}\nlet me {text}\n{reasoning.end}\n\n{text}"
    if data.draw(st.booleans()) and (tools.begin or not text.strip()):
        text += written(style, CALLS[: data.draw(st.integers(1, 3))])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    whole = read_reply(text, style)
    pieces = streamed(text, style, cuts)
    reply = collect(pieces)
    assert (reply.content, reply.reasoning) == (whole.content, whole.reasoning)
    assert names_and_arguments(reply) == names_and_arguments(whole)
    assert [one.text for one in reply.invalid] == [one.text for one in whole.invalid]


def test_text_without_calls_is_left_alone():
    for style in (ReplyStyle(), ReplyStyle(tools=HERMES)):
        assert read_reply("  5 < 6 <tool> \n", style).content == "  5 < 6 <tool> \n"


def test_text_before_calls_loses_only_the_white_space_between():
    style = ReplyStyle(tools=HERMES)
    reply = read_reply("First.\n" + written(style, CALLS[:1]), style)
    assert reply.content == "First."
    assert names_and_arguments(reply) == CALLS[:1]


def test_arguments_arrive_bit_by_bit():
    style = ReplyStyle(tools=HERMES)
    text = written(style, CALLS[:1])
    reader, seen = ReplyReader(style), []
    for character in text:
        seen += [piece.kind for piece in reader.feed(character)]
    assert seen.count("call") == 1
    assert seen.count("arguments") > 5
    assert seen.index("call") < seen.index("arguments")


def test_reasoning_is_kept_apart():
    style = ReplyStyle(reasoning=THINK)
    reply = read_reply("<think>\nTwo and two.\n</think>\n\nFour.", style)
    assert (reply.reasoning, reply.content) == ("Two and two.", "Four.")
    opened = ReplyStyle(reasoning=THINK, reasoning_open=True)
    assert read_reply("Two.\n</think>\n\nFour.", opened).reasoning == "Two."
    assert read_reply("Two, and no end", opened) == Reply("", reasoning="Two, and no end")
    assert read_reply("Four.", style) == Reply("Four.")


def test_json_that_is_no_call_is_an_answer():
    style = ReplyStyle(tools=LLAMA, names=["add"])
    for text in ('{"name": "Anna", "parameters": {}}', '{"x": 1}', '{"name": "add"', "{not json"):
        reply = read_reply(text, style)
        assert reply.tool_calls == []
        assert reply.content == text or reply.invalid


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<tool_call>", "not valid JSON"),
        ("<tool_call>[1]</tool_call>", 'not an object with a "name"'),
        ('<tool_call>{"name": "a", "arguments": [1]}</tool_call>', '"arguments" is not an object'),
        ('<tool_call>{"name": 1}</tool_call>', 'not an object with a "name"'),
        ('<tool_call>{"name": "a", "arguments": {"x": 1', "not valid JSON"),
    ],
)
def test_what_is_no_call_is_reported(text, error):
    reply = read_reply(text, ReplyStyle(tools=HERMES))
    assert reply.tool_calls == []
    assert error in reply.invalid[0].error


def test_other_forms_of_a_call_are_read():
    style = ReplyStyle(tools=HERMES)
    for body in ('{"name": "a", "arguments": "{\\"x\\": 1}"}', '{"arguments": {"x": 1}, "name": "a"}'):
        assert names_and_arguments(read_reply(f"<tool_call>{body}</tool_call>", style)) == [("a", {"x": 1})]


def test_what_follows_calls_streams_as_it_is():
    style = ReplyStyle(tools=LLAMA, names=["get"])
    text = '{"name": "get", "parameters": {}}hello\n{"a": 1}'
    for cuts in ([], [38, 39], list(range(1, len(text)))):
        assert collect(streamed(text, style, cuts)).content == 'hello\n{"a": 1}'
    wrong = read_reply('<tool_call>\n{"a": 1}{"a": 1}', ReplyStyle(tools=HERMES))
    assert (len(wrong.invalid), wrong.content) == (1, '{"a": 1}')


def test_an_answer_in_json_may_hold_tags():
    style = ReplyStyle(tools=HERMES, json=True)
    text = '{"a": "<tool_call>"}'
    for cuts in ([], list(range(1, len(text)))):
        assert collect(streamed(text, style, cuts)) == Reply(text)
    assert names_and_arguments(read_reply(written(style, CALLS[:2]), style)) == CALLS[:2]


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    tokenizer = AutoTokenizer.from_pretrained(Path(pagedllm_core.__file__).parent / "bundled" / "tiny")
    return GrammarCompiler(tokenizer, 2048, (2041, 2039))


@pytest.mark.parametrize("tools", FORMATS, ids=lambda one: one.name)
@pytest.mark.parametrize("reasoning", [None, THINK, MAGISTRAL], ids=["plain", "think", "magistral"])
def test_grammars_where_tags_are_plain_text(compiler, tools, reasoning):
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    offered = [{"type": "function", "function": {"name": "add", "parameters": parameters}}]

    def accepts(choice: ToolChoice, text: str) -> bool:
        rules = ReplyRules(offered, choice, True, False, None, tools, reasoning, False)
        compiled = compiler.compile(GuidedParams(grammar=rules.grammar({})))
        ids = [one for character in text for one in compiled.vocabulary.tokenizer.tokenize_str(character)]
        return compiled.vocabulary.completes(compiled.matcher, ids)

    thought = f"{reasoning.begin}hm, yes{reasoning.end}\n\n" if reasoning else ""
    style = ReplyStyle(tools=tools)
    call, wrong = written(style, [("add", {"a": 1})]), written(style, [("add", {"a": "1"})])
    for before in {"", thought}:
        assert accepts(AUTO, f"{before}Hi there")
        assert accepts(AUTO, before + call)
        assert accepts(AUTO, before + written(style, [("add", {"a": 1}), ("add", {"a": 2})]))
        assert not accepts(AUTO, before + wrong)
        assert not accepts(AUTO, f"{before} {wrong}" if not tools.begin else before + "Sure. " + wrong)
        assert accepts(ToolChoice("required"), before + call)
        assert not accepts(ToolChoice("required"), f"{before}Hi there")
        assert accepts(ToolChoice("none"), f"{before}Hi there")
        if tools.begin:
            assert accepts(AUTO, f"{before}Sure.\n{call}")
            assert not accepts(ToolChoice("none"), f"{before}Sure.\n{call}")


def test_formats_are_found_in_templates():
    assert tool_format("{{ '<tool_call>' }}") is HERMES
    assert tool_format("[TOOL_CALLS]") is MISTRAL
    assert tool_format('<|python_tag|> "parameters"') is LLAMA
    assert tool_format("nothing") is GENERIC
    assert tool_format("<tool_call>", "mistral") is MISTRAL
    assert tool_format("", "qwen") is HERMES
    assert reasoning_format("</think>") is THINK
    assert reasoning_format("") is None
    assert reasoning_format("", "deepseek_r1") is THINK
    with pytest.raises(InvalidRequestError, match="tool_parser='x': is none of"):
        tool_format("", "x")
    with pytest.raises(InvalidRequestError, match="reasoning_parser='x': is none of"):
        reasoning_format("", "x")


TOOLS = [{"type": "function", "function": {"name": name}} for name in ("add", "sub")]


@pytest.mark.parametrize(
    ("given_choice", "expected"),
    [
        (None, AUTO),
        ("auto", AUTO),
        (False, AUTO),
        ("none", ToolChoice("none")),
        ("any", ToolChoice("required")),
        ("required", ToolChoice("required")),
        (True, ToolChoice("required")),
        ("sub", ToolChoice("required", "sub")),
        ({"type": "function", "function": {"name": "sub"}}, ToolChoice("required", "sub")),
        ({"type": "tool", "name": "sub"}, ToolChoice("required", "sub")),
        ({"type": "any"}, ToolChoice("required")),
        ({"type": "auto"}, AUTO),
    ],
)
def test_choices(given_choice, expected):
    assert tool_choice(given_choice, TOOLS) == expected


def test_choices_that_name_no_tool_are_refused():
    with pytest.raises(InvalidRequestError, match="tool_choice='mul': is no tool; use one of add, sub"):
        tool_choice("mul", TOOLS)
    with pytest.raises(InvalidRequestError, match="demands a call, but there are no tools"):
        tool_choice("any", [])
    with pytest.raises(InvalidRequestError, match=r"tools: .* has no name"):
        tool_choice("add", [{"type": "function"}])
