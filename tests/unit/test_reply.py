"""Taking replies apart, whole and while they arrive; the formats of model families; what callers demand of tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pagedllm_core.chat.formats import (
    GENERIC,
    GRANITE,
    HERMES,
    LLAMA,
    MAGISTRAL,
    MISTRAL,
    MISTRAL_V11,
    THINK,
    ReasoningFormat,
    ToolFormat,
    reasoning_format,
    tool_format,
)
from pagedllm_core.chat.grammar import ReplyRules
from pagedllm_core.chat.messages import with_listed_tools
from pagedllm_core.chat.reply import Piece, ReplyReader, ReplyStyle, collect, read_reply
from pagedllm_core.chat.template import ChatTemplate
from pagedllm_core.chat.tools import AUTO, Reply, ToolChoice, tool_choice
from pagedllm_core.decode.grammar import GrammarCompiler
from pagedllm_core.errors import InvalidRequestError
from pagedllm_core.params import GuidedParams
from tests.mistral import BUNDLED, V11, V13, mistral_like

CALLS = [("add", {"a": 1, "b": -2}), ("say", {"text": 'a "quoted" \\ {brace} ü </tool_call>[ARGS]'}), ("now", {})]


def written(style: ReplyStyle, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Calls in the format of a family."""
    tools = style.tools or HERMES
    bodies = [json.dumps({"name": name, tools.arguments: arguments}, ensure_ascii=False) for name, arguments in calls]
    if tools is MISTRAL_V11:
        bodies = [f"{name}[ARGS]{json.dumps(arguments, ensure_ascii=False)}" for name, arguments in calls]
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


FORMATS = [HERMES, LLAMA, MISTRAL, MISTRAL_V11, GRANITE, GENERIC]


@pytest.mark.parametrize("tools", FORMATS, ids=lambda one: one.name)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_calls_of_every_family(tools, count):
    style = ReplyStyle(tools=tools, names=["add", "say", "now"])
    reply = read_reply(written(style, CALLS[:count]), style)
    assert names_and_arguments(reply) == CALLS[:count]
    assert len({call.id for call in reply.tool_calls}) == count
    assert (reply.content, reply.invalid) == ("", [])


@pytest.mark.parametrize("tools", FORMATS, ids=lambda one: one.name)
def test_the_example_in_a_list_of_tools_is_read_as_a_call(tools):
    (message,) = with_listed_tools([], [{"name": "add"}], tools)
    _, example = message["content"].split("To call one, answer with ")
    reply = read_reply(example.replace("<arguments>", '{"a": 1}'), ReplyStyle(tools=tools, names=["<name>"]))
    assert (names_and_arguments(reply), reply.content, reply.invalid) == ([("<name>", {"a": 1})], "", [])


@pytest.mark.parametrize("tools", FORMATS, ids=lambda one: one.name)
def test_earlier_calls_beside_a_list_of_tools_are_written_as_replies_write_them(tools):
    calls = [
        {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in CALLS
    ]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": str(i)} for i, call in enumerate(calls)]
    conversation = [{"role": "assistant", "content": "", "tool_calls": calls}, *results]
    _, turn, *told = with_listed_tools(conversation, [{"name": "add"}], tools)
    reply = read_reply(turn["content"], ReplyStyle(tools=tools, names=["add", "say", "now"]))
    assert (names_and_arguments(reply), reply.content, "tool_calls" in turn) == (CALLS, "", False)
    expected = [f"Result of {name}:\n\n{i}" for i, (name, _) in enumerate(CALLS)]
    assert [(one["role"], one["content"]) for one in told] == [("user", text) for text in expected]


@pytest.mark.parametrize("tools", FORMATS, ids=lambda one: one.name)
@pytest.mark.parametrize("reasoning", [None, THINK, MAGISTRAL], ids=["plain", "think", "magistral"])
@given(data=st.data())
def test_a_stream_gives_what_the_whole_gives(tools, reasoning, data):
    style = ReplyStyle(tools=tools, names=["add", "say", "now"], reasoning=reasoning)
    parts = ["Sure. ", "<", "<tool", "\n", "[", "[TOOL_", "CALLS]", "[ARGS]", "add", '{"a": 1}', "{x}", "think>", "ok"]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=5)))
    if reasoning and data.draw(st.booleans()):
        text = f"{reasoning.begin}\nlet me {text}\n{reasoning.end}\n\n{text}"
    if data.draw(st.booleans()) and (tools.begin or not text.strip()):
        text += written(style, CALLS[: data.draw(st.integers(1, 3))]) + data.draw(st.sampled_from(["", *parts]))
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


@pytest.mark.parametrize("begin", ["add[ARGS]", " add [ARGS]\n", "add[CALL_ID]a1B2c3D4e[ARGS]", "add[CALL_ID][ARGS] "])
def test_calls_with_bare_names_in_every_cut(begin):
    style = ReplyStyle(tools=MISTRAL_V11, names=["add"])
    text = f'Sure.\n[TOOL_CALLS]{begin}{{"a": 1}}\n[TOOL_CALLS]{begin}{{"a": "[TOOL_CALLS]x[ARGS]{{}}"}}}} Done.'
    for cuts in (*([cut] for cut in range(len(text))), list(range(1, len(text)))):
        reply = collect(streamed(text, style, cuts))
        assert names_and_arguments(reply) == [("add", {"a": 1}), ("add", {"a": "[TOOL_CALLS]x[ARGS]{}"})]
        assert (reply.content, reply.invalid) == ("Sure.} Done.", [])
        assert "a1B2c3D4e" not in {call.id for call in reply.tool_calls}


@pytest.mark.parametrize(
    "wrong", ["", "add", "add{}", "add[ARGS]", "add[ARGS]x{}", "[ARGS]{}", 'null[ARGS]"x"', '{"name": 1}']
)
def test_what_has_no_bare_name_and_arguments_is_reported(wrong):
    style = ReplyStyle(tools=MISTRAL_V11, names=["add"])
    text = f"[TOOL_CALLS]{wrong}"
    for cuts in (*([cut] for cut in range(len(text))), list(range(1, len(text)))):
        reply = collect(streamed(text + written(style, CALLS[:1]), style, cuts))
        assert names_and_arguments(reply) == CALLS[:1]
        for found in (reply, collect(streamed(text, style, cuts))):
            assert [(one.text, one.error) for one in found.invalid] == [(text, "no name, [ARGS] and arguments")]
            assert found.content == ""
    cut_off = read_reply('[TOOL_CALLS]add[ARGS]{"a": 1', style)
    assert [(one.name, one.text) for one in cut_off.invalid] == [("add", '{"a": 1')]


@pytest.mark.parametrize("template", [V11, V13], ids=["v11", "v13"])
@given(
    calls=st.lists(
        st.tuples(st.sampled_from(["add", "null", "2 fast"]), st.dictionaries(st.text(), st.text())), min_size=1
    )
)
def test_calls_come_back_from_the_template(template, calls):
    listed = [
        {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls)
    ]
    turn = {"role": "assistant", "content": "Sure.", "tool_calls": listed}
    text = ChatTemplate(None, template).render([turn], simplify=True).removesuffix("<|im_end|>")
    reply = read_reply(text, ReplyStyle(tools=tool_format(template)))
    assert (names_and_arguments(reply), reply.content, reply.invalid) == (calls, "Sure.", [])
    if template is V13:
        assert text == "Sure." + written(ReplyStyle(tools=MISTRAL_V11), calls)


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


def test_an_answer_in_json_may_look_like_a_call():
    style = ReplyStyle(tools=LLAMA, names=["add"], json=True)
    keys = '{"name": "add", "arguments": {"x": 1}, "more": 2}'
    for text in ('{"name": "add"}', keys, '{"a": 1, "b": "cut o', '{"name": "ad'):
        for cuts in ([], list(range(1, len(text)))):
            assert collect(streamed(text, style, cuts)) == Reply(text)
    reader = ReplyReader(style)
    assert [[piece.text for piece in reader.feed(part)] for part in ('{"', 'a": ', "1")] == [[], ['{"a": '], ["1"]]
    call = written(style, [("add", {"a": 1})])
    assert names_and_arguments(read_reply(call, style)) == [("add", {"a": 1})]


PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
OFFERED = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("add", "sub")]
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Grammars:
    """What the grammars of replies accept; by default every character is tokens of its own."""

    compiler: GrammarCompiler
    tools: ToolFormat
    reasoning: ReasoningFormat | None = None
    added: Mapping[str, int] = field(default_factory=dict)
    encode: Encode | None = None

    def accepts(self, choice: ToolChoice, text: str, parallel: bool = True, schema: Any = None) -> bool:
        rules = ReplyRules(OFFERED, choice, parallel, False, schema, self.tools, self.reasoning, False)
        compiled = self.compiler.compile(GuidedParams(grammar=rules.grammar(self.added)))
        spell = compiled.vocabulary.tokenizer.tokenize_str
        ids = self.encode(text) if self.encode else [one for character in text for one in spell(character)]
        return compiled.vocabulary.completes(compiled.matcher, ids)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(AutoTokenizer.from_pretrained(BUNDLED), 2048, (2041, 2039))


def check_grammars(grammars: Grammars) -> None:
    accepts, style, reasoning = grammars.accepts, ReplyStyle(tools=grammars.tools), grammars.reasoning
    thought = f"{reasoning.begin}hm, yes{reasoning.end}\n\n" if reasoning else ""
    call, wrong = written(style, [("add", {"a": 1})]), written(style, [("add", {"a": "1"})])
    two = written(style, [("add", {"a": 1}), ("sub", {"a": 2})])
    required, named, none = ToolChoice("required"), ToolChoice("required", "sub"), ToolChoice("none")
    for before in {"", thought}:
        assert accepts(AUTO, f"{before}Hi there")
        assert accepts(AUTO, before + call)
        assert accepts(AUTO, before + two)
        assert not accepts(AUTO, before + two, parallel=False)
        assert not accepts(AUTO, before + wrong)
        assert not accepts(AUTO, before + written(style, [("mul", {"a": 1})]))
        assert not accepts(AUTO, f"{before} {wrong}" if not style.tools.begin else before + "Sure. " + wrong)
        assert accepts(required, before + call)
        assert accepts(required, before + two)
        assert not accepts(required, before + two, parallel=False)
        assert not accepts(required, f"{before}Hi there")
        assert accepts(named, before + written(style, [("sub", {"a": 1})]))
        assert not accepts(named, before + call)
        assert accepts(none, f"{before}Hi there")
        for schema_choice, taken in ((AUTO, True), (required, False)):
            assert accepts(schema_choice, before + call, schema=PARAMETERS)
            assert accepts(schema_choice, before + '{"a": 1}', schema=PARAMETERS) is taken
            assert accepts(schema_choice, before + '{"name": "add"}', schema=NAMED) is taken
            assert not accepts(schema_choice, f"{before}Hi there", schema=PARAMETERS)
        if style.tools.begin:
            assert accepts(AUTO, f"{before}Sure.\n{call}")
            assert not accepts(none, f"{before}Sure.\n{call}")


@pytest.mark.parametrize("tools", FORMATS, ids=lambda one: one.name)
@pytest.mark.parametrize("reasoning", [None, THINK, MAGISTRAL], ids=["plain", "think", "magistral"])
def test_grammars_where_tags_are_plain_text(compiler, tools, reasoning):
    check_grammars(Grammars(compiler, tools, reasoning))


@pytest.mark.parametrize("text", ["", "Sure."])
def test_a_list_of_calls_may_stand_apart_from_its_mark(text):
    """As the templates of Mistral 7B v0.3 and Small 3.1 write it."""
    style = ReplyStyle(tools=MISTRAL, names=["add"])
    calls = '{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 2}}'
    turned = calls.replace('{"name": "add", "arguments": {"a": 1}}', '{"arguments": {"a": 1}, "name": "add"}')
    listed = (f" [{calls}]", f"[ {calls}]", f"[ {turned}]", f"[\n  {turned}\n]")
    for reply in (f"{text}[TOOL_CALLS]{written_so}" for written_so in listed):
        assert read_reply(reply, style).content == text
        assert [call.arguments for call in read_reply(reply, style).tool_calls] == [{"a": 1}, {"a": 2}]
        reader = ReplyReader(style)
        pieces = [piece for letter in reply for piece in reader.feed(letter)] + reader.finish()
        assert collect(pieces).content == text
        assert [call.arguments for call in collect(pieces).tool_calls] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("tools", [HERMES, MISTRAL, MISTRAL_V11], ids=lambda one: one.name)
def test_grammars_where_tags_are_added_tokens(tmp_path, tools):
    folder = BUNDLED if tools is HERMES else mistral_like(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    compiler, added = GrammarCompiler(tokenizer, 2048, (2041, 2039)), tokenizer.get_added_vocab()
    check_grammars(Grammars(compiler, tools, None, added, encode=lambda text: tokenizer(text)["input_ids"]))
    call = written(ReplyStyle(tools=tools), [("add", {"a": 1})])
    assert not Grammars(compiler, tools, None, added).accepts(ToolChoice("required"), call)


def test_formats_are_found_in_templates():
    assert tool_format("{{ '<tool_call>' }}") is HERMES
    assert tool_format("[TOOL_CALLS]") is MISTRAL
    assert tool_format(V11) is tool_format(V13) is MISTRAL_V11
    assert tool_format("[TOOL_CALLS]", "mistral_v13") is tool_format("", "mistral_v11") is MISTRAL_V11
    assert tool_format('<|python_tag|> "parameters"') is LLAMA
    assert tool_format("answer with <|tool_call|> and a list") is GRANITE
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


def test_a_name_that_is_no_json_string_is_no_call() -> None:
    style = ReplyStyle(tools=HERMES)
    reply = read_reply('<tool_call>\n{"name": "a\\q", "arguments": {}}\n</tool_call>', style)
    assert not reply.tool_calls
    assert len(reply.invalid) == 1
