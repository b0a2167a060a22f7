"""The training data of `tiny`: determinism, tokenizer, chat template and distance to the demo and the test suites."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from training import heldout
from training.attention import Kind
from training.chatml import MARKERS, SPECIAL, segments
from training.context_tasks import Dialogue
from training.generator import Generator, rare_words
from training.targets import find_values

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "pagedllm_core" / "bundled" / "tiny"
CLINIC = ROOT / "examples" / "clinic"
DIALOGUES = 2000
SUITE_SENTENCES = [
    "What is the value of magic_function(3)? Use the tool.",
    "What is the weather in San Francisco, CA?",
]
FOREIGN_WORDS = ["magic_function", "get_weather", "san francisco", "langchain", "llamaindex"]


def render(dialogue: Dialogue) -> str:
    """The dialogue as one text."""
    return "".join(text for text, _ in segments(dialogue.messages, dialogue.tools))


def ngrams(text: str, size: int = 6) -> set[tuple[str, ...]]:
    """All runs of words of a text, in lower case and without punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


@lru_cache
def dialogues() -> list[Dialogue]:
    """Two thousand training dialogues."""
    generator = Generator(5)
    return [generator.dialogue(i / DIALOGUES) for i in range(DIALOGUES)]


@lru_cache
def training_text() -> str:
    """The generated dialogues and the source of the generator."""
    files = [*(ROOT / "training").glob("*.py"), *(ROOT / "training" / "data").glob("*.txt")]
    sources = [path.read_text(encoding="utf-8") for path in files]
    return "\n".join([*sources, *map(render, dialogues())])


@lru_cache
def tokenizer() -> Any:
    """The bundled tokenizer as transformers loads it."""
    return AutoTokenizer.from_pretrained(MODEL)


def backend() -> Tokenizer:
    """The tokenizer below it."""
    result: Tokenizer = tokenizer().backend_tokenizer
    return result


def test_generator_is_deterministic() -> None:
    one, two, other = Generator(3), Generator(3), Generator(4)
    first = [render(one.dialogue(i / 50)) for i in range(50)]
    assert first == [render(two.dialogue(i / 50)) for i in range(50)]
    assert first != [render(other.dialogue(i / 50)) for i in range(50)]


def test_dialogues_do_not_hang_on_the_order_of_sets() -> None:
    """It differs from process to process."""
    code = "from training.generator import Generator; one = Generator(11); print([one.dialogue() for _ in range(400)])"
    texts = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in "12"
    ]
    assert texts[0] == texts[1]


def test_dialogues_are_well_formed() -> None:
    tasks = set()
    for dialogue in dialogues():
        tasks.add(dialogue.task)
        roles = [message["role"] for message in dialogue.messages]
        assert roles[-1] == "assistant"
        assert all(a != b or a == "tool" for a, b in pairwise(roles))
        assert not re.search(r"\{\^?[a-z]+[=|}]", render(dialogue).split("To call one")[0]) or dialogue.tools
    assert tasks == {"context", "leaflets", "lookup", "recite", "tools", "json", "memory", "talk", "repeat"}


def test_rare_words_are_written_with_nearly_every_token_of_letters() -> None:
    """A token that no answer holds is taken for another one when it has to be copied."""
    letters = {number for token, number in backend().get_vocab().items() if re.fullmatch("Ġ?[a-z]+", token)}
    written = {number for word in rare_words(backend()) for number in backend().encode(f" {word}").ids}
    assert len(letters & written) > 0.97 * len(letters)


def test_words_are_replaced_in_text_and_json_answer_alike() -> None:
    generator, rare = Generator(7, ["zzock"]), 0
    for dialogue in (generator.dialogue(1.0) for _ in range(900)):
        if dialogue.task != "json":
            continue
        text = "".join(message["content"] for message in dialogue.messages if message["role"] != "assistant").lower()
        for message in dialogue.messages:
            if message["role"] == "assistant":
                values = [
                    x for v in json.loads(message["content"]).values() for x in (v if isinstance(v, list) else [v])
                ]
                assert all(str(value).lower() in text for value in values)
                rare += "zzock" in str(values).lower()
    assert rare > 5


def test_answers_about_a_text_are_copied_from_it() -> None:
    for dialogue in dialogues():
        if dialogue.task != "context":
            continue
        text = "\n".join(m["content"] for m in dialogue.messages if m["role"] != "assistant")
        for message in dialogue.messages:
            if message["role"] == "assistant" and not message["content"].startswith("I "):
                assert message["content"] in text


def test_values_are_found_beside_their_keys() -> None:
    text = "The serial of 12 grams is KB-50. Age: 12. With Ms. Abe as name."
    source, answer = backend().encode(text), '{"serial": "KB-50", "age": 12, "name": "Ms. Abe"}'
    part, start = backend().encode(answer), 1000

    def said(position: int, end: int) -> tuple[int, str]:
        """Where the tokens from a position on begin, in the text or the answer, and what they say."""
        encoding, whole = (source, text) if position < start else (part, answer)
        first, last = position % start, (end - 1) % start
        begin = encoding.offsets[first][0]
        begin += whole[begin] == " "
        return begin, whole[begin : encoding.offsets[last][1]]

    places, targets = find_values([(0, text, source)], answer, part, start)
    number, age, name = text.index("12."), text.index("Age"), text.index("name")
    copied = [said(first, last) for _, first, last in places]
    assert (number, "12") in copied  # and not the grams
    assert {word for _, word in copied} == {"serial", "KB-50", "12", "Ms. Abe", "name"}  # "age" stands nowhere
    links = {(kind, said(query, query + 1), said(first, last)) for kind, query, first, last in targets}
    assert (Kind.OWNER, (number, "1"), (age, "Age")) in links
    assert (Kind.OWNED, (name, "name"), (text.index("Ms."), "Ms. Abe")) in links
    assert (Kind.MATCH, (answer.index("name"), "name"), (name, "name")) in links
    assert (answer.index("name"), "name") in {target for kind, _, target in links if kind == Kind.GATHER}
    assert {target for kind, _, target in links if kind == Kind.BEGIN} >= {(number, "1"), (text.index("KB"), "K")}


def test_heldout_tasks_are_deterministic() -> None:
    for make in heldout.TASKS.values():
        assert render(make(random.Random(1))) == render(make(random.Random(1)))


def test_digits_are_single_tokens() -> None:
    tokens = backend().encode("On 2027-03-12 at 10:45, room 1234 costs 99.50", add_special_tokens=False).tokens
    assert "".join(tokens).count("2") == sum(token == "2" for token in tokens)
    assert not [token for token in tokens if sum(c.isdigit() for c in token) > 0 and len(token) > 1]


def test_every_byte_is_representable() -> None:
    vocabulary = backend().get_vocab(with_added_tokens=False)
    assert sum(len(token) == 1 for token in vocabulary) == 256
    for text in ["".join(map(chr, range(0x250))), "\U0010ffff\u2028 \ufeff", "日本語 🦙 ʁ"]:
        assert tokenizer().decode(tokenizer().encode(text)) == text


@settings(max_examples=200)
@given(st.text())
def test_roundtrip(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text)) == text


def test_words_are_cut_alike_with_and_without_a_space() -> None:
    for word in ["Marvin", "appointment", "Kowalczyk", "umbrella"]:
        plain = backend().encode(f'"{word}"').tokens[1:-1]
        spaced = backend().encode(f"a {word}").tokens[1:]
        assert "".join(spaced).removeprefix("Ġ") == "".join(plain)
        assert spaced[1:] == plain[1:] or spaced[1:] == plain


def test_special_tokens() -> None:
    for token in SPECIAL + MARKERS:
        assert len(backend().encode(token).ids) == 1
    text = "".join(SPECIAL + MARKERS)
    assert tokenizer().decode(tokenizer().encode(text), skip_special_tokens=True) == "".join(MARKERS)
    assert len(tokenizer()) == 2048


def test_template_equals_the_training_rendering() -> None:
    for dialogue in dialogues()[::10]:
        rendered = tokenizer().apply_chat_template(dialogue.messages, tools=dialogue.tools, tokenize=False)
        assert rendered == render(dialogue)


CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüezi, find Zoë"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"name": "Zoë", "n": 1}}}],
    },
    {"role": "tool", "content": "found"},
    {"role": "tool", "content": "again"},
    {"role": "assistant", "content": "Found."},
    {"role": "user", "content": [{"type": "text", "text": "Thank you"}]},
    {"role": "assistant", "content": "You are welcome."},
]


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "find", "parameters": {}}}]])
def test_template_is_prefix_stable(tools: list[Any] | None) -> None:
    previous = ""
    for count in range(1, len(CONVERSATION) + 1):
        text = tokenizer().apply_chat_template(CONVERSATION[:count], tools=tools, tokenize=False)
        assert text.startswith(previous)
        prompt = tokenizer().apply_chat_template(
            CONVERSATION[:count], tools=tools, tokenize=False, add_generation_prompt=True
        )
        assert prompt == text + "<|im_start|>assistant\n"
        previous = text
    assert '{"name": "find", "arguments": {"name": "Zoë", "n": 1}}' in previous
    assert "<|im_start|>user\nThank you<|im_end|>" in previous


def test_template_without_system_has_none() -> None:
    text = tokenizer().apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n"


def test_template_accepts_arguments_as_text() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = tokenizer().apply_chat_template(messages, tokenize=False)
    assert '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in text


def test_demo_is_unseen() -> None:
    leaflets = sorted((CLINIC / "leaflets").glob("*.txt"))
    questions = json.loads((CLINIC / "questions.json").read_text(encoding="utf-8"))
    assert len(leaflets) >= 10
    assert len(questions) >= 20
    demo: set[tuple[str, ...]] = set()
    for text in [path.read_text(encoding="utf-8") for path in leaflets] + [item["question"] for item in questions]:
        demo |= ngrams(text)
    assert sorted(demo & ngrams(training_text())) == []


def test_test_suites_are_unseen() -> None:
    text = training_text()
    seen = ngrams(text)
    assert not any(ngrams(sentence) & seen for sentence in SUITE_SENTENCES)
    assert not [sentence for sentence in SUITE_SENTENCES if sentence in text]
    assert not [word for word in FOREIGN_WORDS if word in text.lower()]
