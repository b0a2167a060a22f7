"""Reading tool calls out of a reply, whole and while it arrives."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedllm_core.chat.tools import ReplyStream, check_tool_choice, parse_reply
from pagedllm_core.errors import InvalidRequestError


def written(name: str, arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def test_text_without_calls_is_left_alone():
    reply = parse_reply("  5 < 6 <tool> \n")
    assert (reply.content, reply.tool_calls, reply.invalid) == ("  5 < 6 <tool> \n", [], [])


def test_several_calls_between_text():
    reply = parse_reply(f"First. {written('a', {'x': 1})}\n{written('b', {})} Last.")
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("a", {"x": 1}), ("b", {})]
    assert len({call.id for call in reply.tool_calls}) == 2
    assert reply.content == "First. \n Last."


def test_an_argument_may_hold_the_tags():
    reply = parse_reply(written("echo", {"text": "</tool_call><tool_call>"}))
    assert reply.tool_calls[0].arguments == {"text": "</tool_call><tool_call>"}
    assert reply.content == ""


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('<tool_call>{"name": "a", "arguments": {"x": 1', "not valid JSON"),
        ("<tool_call>", "not valid JSON"),
        ("<tool_call>[1]</tool_call>", 'not an object with a "name"'),
        ('<tool_call>{"name": "a", "arguments": [1]}</tool_call>', '"arguments" is not an object'),
        ('<tool_call>{"name": 1}</tool_call>', 'not an object with a "name"'),
    ],
)
def test_what_is_no_call_is_reported_as_written(text, error):
    reply = parse_reply(text)
    assert reply.tool_calls == []
    assert error in reply.invalid[0].error
    assert text.startswith(reply.invalid[0].text)


def test_arguments_written_as_a_string():
    assert parse_reply(written("a", '{"x": 1}')).tool_calls[0].arguments == {"x": 1}


@given(
    st.lists(st.sampled_from(["text ", "<tool", "<", written("a", {"x": "ü"}), "_call>", "\n"]), max_size=8), st.data()
)
def test_a_stream_gives_what_the_whole_gives(parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    stream, seen = ReplyStream(), ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        seen += stream.feed(text[start:end])
    rest, whole = stream.finish(), parse_reply(text)
    assert [(call.name, call.arguments) for call in rest.tool_calls] == [
        (call.name, call.arguments) for call in whole.tool_calls
    ]
    assert "<tool_call>" not in seen
    assert (seen + rest.content).split() == whole.content.split() or whole.tool_calls or whole.invalid
    if not whole.tool_calls and not whole.invalid:
        assert seen + rest.content == text


def test_choices_that_need_a_grammar_are_refused():
    assert check_tool_choice(None)
    assert check_tool_choice("auto")
    assert not check_tool_choice("none")
    for choice in ("any", "required", True, "add", {"type": "function", "function": {"name": "add"}}):
        with pytest.raises(InvalidRequestError, match=r"tool_choice=.*not supported yet"):
            check_tool_choice(choice)
