"""Chat templates: the same prompts as transformers renders, and none that runs away."""

from __future__ import annotations

import re

import pytest

from pagedllm_core.chat.template import ChatTemplate
from pagedllm_core.errors import InvalidRequestError
from tests.mistral import V11

CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' ~ message['content'] ~ ' [/INST]' }}"
    "{% else %}{% generation %}{{ message['content'] ~ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
LOOPS = (
    "{% set ns = namespace(last=0) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% if loop.last %}({{ loop.length }}){% endif %}{% endfor %}"
    "{% for key, value in (tools or [{}])[0].items() %}{{ key ~ '=' ~ value | tojson }}{% if loop.last %}{% break %}"
    "{% endif %}, {% endfor %}{{ ns.last }}{{ messages[-1].content.split('\\n')[-1].replace('a', 'b') | indent(2) }}"
)
CHAT = [
    {"role": "user", "content": "Grüß dich <b>\nA second line"},
    {"role": "assistant", "content": " Hello! "},
    {"role": "user", "content": "What is a page table?"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "日本 <x>", "parameters": {"type": "object"}}}]


class FakeTokenizer:
    chat_template: object = None
    bos_token, eos_token = "<s>", "</s>"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    import pagedllm_core

    return AutoTokenizer.from_pretrained(f"{pagedllm_core.__path__[0]}/bundled/tiny")


def theirs(tokenizer, template, **arguments):
    return tokenizer.apply_chat_template(CHAT, tokenize=False, chat_template=template, **arguments)


@pytest.mark.parametrize("template", [None, CHATML, LLAMA2, LOOPS], ids=["own", "chatml", "llama2", "loops"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_what_transformers_renders(tokenizer, template, tools, prompt):
    tokenizer.bos_token = "<s>"
    expected = theirs(tokenizer, template, tools=tools, add_generation_prompt=prompt)
    rendered = ChatTemplate(tokenizer, template).render(CHAT, tools=tools, add_generation_prompt=prompt)
    assert rendered == expected


@pytest.mark.parametrize("template", [None, CHATML, LLAMA2], ids=["own", "chatml", "llama2"])
@pytest.mark.parametrize("content", ["The answer is", "Trailing space "])
def test_continues_the_final_message_like_transformers(tokenizer, template, content):
    chat = [*CHAT[:1], {"role": "assistant", "content": content}]
    expected = tokenizer.apply_chat_template(
        chat, tokenize=False, chat_template=template, continue_final_message=True, add_generation_prompt=False
    )
    rendered = ChatTemplate(tokenizer, template).render(chat, continue_final_message=True)
    assert rendered == expected
    assert rendered.endswith(content.strip() if template == CHATML else content)


def test_continuing_needs_an_assistants_message():
    template = ChatTemplate(FakeTokenizer(), CHATML)
    with pytest.raises(InvalidRequestError, match=r"continue_final_message=True.*'user'"):
        template.render(CHAT, continue_final_message=True)
    with pytest.raises(InvalidRequestError, match="add_generation_prompt=True"):
        template.render(CHAT[:2], continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(InvalidRequestError, match="does not show"):
        ChatTemplate(FakeTokenizer(), "{{ 'fixed' }}").render(CHAT[:2], continue_final_message=True)


def test_encodes_without_a_second_start_token(tokenizer):
    template = ChatTemplate(tokenizer)
    text = template.render(CHAT)
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert template.encode(text) == list(expected)


def test_the_model_s_named_templates():
    tokenizer = FakeTokenizer()
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools", "rag": "with documents"}
    assert ChatTemplate(tokenizer).render(CHAT) == "plain"
    assert ChatTemplate(tokenizer).render(CHAT, tools=TOOLS) == "with tools"
    assert ChatTemplate(tokenizer, "rag").render(CHAT) == "with documents"


def test_a_model_without_a_template_names_the_argument():
    with pytest.raises(InvalidRequestError, match="chat_template="):
        ChatTemplate(FakeTokenizer()).render(CHAT)


def test_a_template_from_a_file(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{{ messages[0].content ~ mood }}", encoding="utf-8")
    assert ChatTemplate(FakeTokenizer(), str(path)).render([{"role": "user", "content": "ä"}], mood="!") == "ä!"
    with pytest.raises(InvalidRequestError, match=r"chat_template='nowhere\.jinja'"):
        ChatTemplate(FakeTokenizer(), "nowhere.jinja")


NESTED = "{% set n = namespace(a=['x' * 99]) %}{% for i in range(40) %}{% set n.a = [n.a, n.a] %}{% endfor %}"
HOSTILE = {
    "nested lists": NESTED + "{{ n.a }}",
    "nested lists as text": NESTED + "{{ n.a | string | length }}",
    "nested lists in JSON": NESTED + "{{ n.a | tojson | length }}",
    "nested lists in a text": NESTED + "{{ ('' ~ n.a) | length }}",
    "nested lists in capitals": NESTED + "{{ n.a | upper | length }}",
    "many long texts": "{% set n = namespace(a=[]) %}{% for i in range(999) %}"
    "{% set n.a = n.a + ['x' * 9999999] %}{% endfor %}",
    "sum of lists": "{{ ([[1] * 20000] * 800) | sum(start=[]) | length }}",
    "round": "{{ 1 | round(3000000, 'ceil') }}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "times": "{{ 'x' * 99999999999 }}",
    "list times": "{{ [0] * 99999999999 }}",
    "power": "{{ 9 ** 999999999 }}",
    "doubling by concatenation": "{% set n = namespace(x='x' * 9999) %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x | length }}",
    "doubling by addition": "{% set n = namespace(x='x' * 9999) %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}",
    "doubling by blocks": "{% set n = namespace(x='x' * 9999) %}{% for i in range(60) %}"
    "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}{{ n.x | length }}",
    "old format": "{{ '%0999999999d' % 1 }}",
    "new format": "{{ '{:>999999999}'.format('x') }}",
    "format filter": "{{ '%0999999999d' | format(1) }}",
    "star format": "{{ '%*d' % (999999999, 1) }}",
    "center": "{{ 'x' | center(9999999999) }}",
    "just": "{{ 'x'.ljust(9999999999) }}",
    "replace": "{% set x = 'x' * 99999 %}{{ x.replace('x', x) }}",
    "join": "{% set x = 'x' * 9999 %}{{ x.join([x] * 99999) }}",
    "join filter": "{% set x = 'x' * 9999 %}{{ ([x] * 99999) | join(x) }}",
    "indent": "{{ 'x\ny' | indent(9999999999) }}",
    "range": "{{ range(999999999) | list | length }}",
    "lipsum": "{{ lipsum(n=999) }}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "escape by attr": "{{ messages | attr('__class__') }}{{ (messages | attr('__class__')).mro() }}",
    "change": "{{ messages.append(1) }}",
    "syntax": "{% for %}",
    "wrong type": "{{ 1 + 'a' }}",
    "import": "{% import 'os' as os %}",
    "refusal": "{{ raise_exception('no tools here') }}",
}


def test_lists_may_be_added_up():
    template = "{{ [[1], [2, 3], []] | sum(start=[]) }}{{ [{'a': 1}, {'a': 2}] | sum(attribute='a') }}"
    assert ChatTemplate(None, template).render(CHAT) == "[1, 2, 3]3"


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_template_cannot_run_away(source):
    with pytest.raises(InvalidRequestError, match="chat_template: "):
        ChatTemplate(FakeTokenizer(), source + "{{ '' }}").render(CHAT)


def test_a_template_sees_only_plain_values():
    with pytest.raises(InvalidRequestError, match="messages: holds a object"):
        ChatTemplate(FakeTokenizer(), CHATML).render([{"role": "user", "content": object()}])


def test_long_conversations_fit_the_bounds():
    chat = CHAT[:2] * 2000
    assert len(ChatTemplate(FakeTokenizer(), CHATML).render(chat)) > 100_000


@pytest.mark.parametrize("chat", [[], ["text"], [{"content": "no role"}]])
def test_messages_are_checked(chat):
    with pytest.raises(InvalidRequestError, match="messages"):
        ChatTemplate(FakeTokenizer(), CHATML).render(chat)


def test_a_strict_template_gets_a_simpler_form_only_where_it_is_asked_for():
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One."},
        {"role": "user", "content": "Two."},
        {"role": "assistant", "content": "Yes."},
        {"role": "system", "content": "Stop now."},
    ]
    template = ChatTemplate(FakeTokenizer(), LLAMA2)
    with pytest.raises(InvalidRequestError, match="must alternate"):
        template.render(chat)
    assert template.render(chat, simplify=True) == (
        "<s>[INST] Be brief.\n\nOne.\n\nTwo. [/INST]Yes.</s>[INST] Stop now. [/INST]"
    )
    assert ChatTemplate(FakeTokenizer(), CHATML).render(chat, simplify=True).count("<|im_start|>") == 6
    assert chat[1] == {"role": "user", "content": "One."}


def test_ids_of_calls_become_short_only_where_others_are_refused():
    calls = [{"id": one, "function": {"name": "add", "arguments": {}}} for one in ("call_1", "a1B2c3D4e", "call_2")]
    results = [{"role": "tool", "content": "3", "tool_call_id": call["id"]} for call in calls]
    chat = [{"role": "assistant", "content": "", "tool_calls": calls}, *results]
    text = ChatTemplate(None, V11).render(chat, simplify=True)
    ids = re.findall(r"\[CALL_ID\](.*?)\[ARGS\]", text)
    assert ids == re.findall(r"\[TOOL_RESULTS\](.{9})3\[", text)
    assert len(set(ids)) == 3
    assert ids[1] == "a1B2c3D4e"
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", one) for one in ids)
    shown = "{% for message in messages %}{{ message.tool_call_id }} {% endfor %}"
    assert ChatTemplate(None, shown).render(chat, simplify=True).split() == [call["id"] for call in calls]
    with pytest.raises(InvalidRequestError, match="9 characters"):
        ChatTemplate(None, V11).render([{**chat[0], "tool_calls": [{**calls[0], "id": None}]}], simplify=True)


LLAMA = """{% for message in messages %}{% if message.tool_calls %}{% if message.tool_calls | length != 1 %}
{{- raise_exception("This model only supports single tool-calls at once!") }}{% endif %}
{{- "<call>" + message.tool_calls[0].function.name + "</call>" }}
{%- else %}{{ "<" + message.role + ">" + message.content }}{% endif %}{% endfor %}"""
"""As Llama 3.1's: one call a turn."""


def test_calls_of_one_turn_become_turns_of_their_own():
    calls = [{"id": one, "function": {"name": one, "arguments": {}}} for one in ("a", "b", "c")]
    results = [{"role": "tool", "content": one.upper(), "tool_call_id": one} for one in ("b", "a", "c")]
    chat = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "", "tool_calls": calls}, *results]
    template = ChatTemplate(None, LLAMA)
    with pytest.raises(InvalidRequestError, match="single tool-calls"):
        template.render(chat)
    together = "<user>Go<call>b</call><tool>B<call>a</call><tool>A<call>c</call><tool>C<user>On"
    assert template.render([*chat, {"role": "user", "content": "On"}], simplify=True) == together
    nameless = [{key: value for key, value in message.items() if key != "tool_call_id"} for message in chat]
    assert template.render(nameless, simplify=True).startswith("<user>Go<call>a</call><tool>B<call>b</call>")


def test_calls_become_text_where_turns_have_to_alternate_and_tools_are_unknown():
    strict = "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    strict += (
        "{{ raise_exception('roles must alternate') }}{% endif %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    )
    call = {"id": "1", "function": {"name": "add", "arguments": {"a": 1}}}
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    text = ChatTemplate(None, strict).render(chat, simplify=True)
    assert text == '<user>Be brief.\n\nAdd<assistant>{"name": "add", "arguments": {"a": 1}}<user>Result of add:\n\n3'


def test_tools_that_a_template_looks_for_elsewhere_are_not_shown():
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    elsewhere = "{% for m in messages %}{{ m.content }}{% if m.tools %}{{ m.tools }}{% endif %}{% endfor %}"
    assert not ChatTemplate(None, elsewhere).shows_tools(tools)
    assert not ChatTemplate(None, CHATML).shows_tools(tools)
    assert ChatTemplate(None, "{{ tools | tojson }}{{ messages[0].content }}").shows_tools(tools)
