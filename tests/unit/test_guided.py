"""Guided decoding: what may be asked for, how it ends, what it costs, and what it is refused for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
from pydantic import BaseModel
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import pagedllm_core
from pagedllm_core import LLM, GuidedParams, SamplingParams
from pagedllm_core.decode import grammar as grammar_module
from pagedllm_core.decode.schema import escapes, prepare_schema
from pagedllm_core.errors import ContextLengthError, InvalidRequestError
from pagedllm_core.outputs import RequestOutput

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "mood": {"enum": ["good", "bad"]}},
    "required": ["name", "age", "mood"],
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(model="tiny", kv_cache_memory="16MiB", num_threads=1) as llm:
        yield llm


def run(llm: LLM, params: SamplingParams, prompt: str = "Anna is 7 and happy. As JSON:") -> RequestOutput:
    return llm.generate(prompt, params, use_tqdm=False)[0]


def guided(max_tokens: int | None = 80, /, **fields: Any) -> SamplingParams:
    sampling = {name: fields.pop(name) for name in list(fields) if name not in GuidedParams.model_fields}
    return SamplingParams(max_tokens=max_tokens, guided=GuidedParams(**fields), **sampling)


@pytest.mark.parametrize(
    "pattern",
    [r"(\d{3}-){2}\d{4}", r"[a-c]{2,5}x?", r"Zürich|Genève", r"\n\t*end"],
)
def test_regex(llm: LLM, pattern: str) -> None:
    completion = run(llm, guided(regex=pattern)).outputs[0]
    assert re.fullmatch(pattern, completion.text)
    assert completion.finish_reason == "stop"


def test_choice_with_quotes_newlines_and_other_scripts(llm: LLM) -> None:
    options = ['say "yes"', "two\nlines", "日本語", "a\\b"]
    for option in options:
        assert run(llm, guided(choice=[option])).outputs[0].text == option
    outputs = run(llm, guided(choice=options, n=8, temperature=2.0)).outputs
    assert {completion.text for completion in outputs} <= set(options)
    assert len({completion.text for completion in outputs}) > 1


def test_grammar_in_two_notations(llm: LLM) -> None:
    for source in ('start: "(" start ")" | "x"', 'root ::= "(" root ")" | "x"'):
        text = run(llm, guided(40, grammar=source, temperature=1.0, seed=2)).outputs[0].text
        depth = text.count("(")
        assert text == "(" * depth + "x" + ")" * depth


def test_schema_as_text_or_dictionary(llm: LLM) -> None:
    one, two = run(llm, guided(json=PERSON)), run(llm, guided(json=json.dumps(PERSON)))
    assert one.outputs[0].token_ids == two.outputs[0].token_ids
    assert json.loads(one.outputs[0].text).keys() == {"name", "age", "mood"}


def test_schema_of_a_pydantic_model(llm: LLM) -> None:
    class Pet(BaseModel):
        name: str
        age: int

    Pet.model_validate_json(run(llm, guided(json=Pet)).outputs[0].text)


def test_forced_text_takes_no_steps(llm: LLM) -> None:
    before = llm.stats()
    output = run(llm, guided(json=PERSON))
    after = llm.stats()
    tokens = len(output.outputs[0].token_ids)
    assert after.tokens_generated - before.tokens_generated == tokens == output.metrics.output_tokens
    assert after.steps - before.steps < tokens - 8


def test_scores_do_not_change_the_tokens(llm: LLM) -> None:
    plain = run(llm, guided(json=PERSON)).outputs[0]
    scored = run(llm, guided(json=PERSON, logprobs=1)).outputs[0]
    assert scored.token_ids == plain.token_ids
    assert len(scored.logprobs or ()) == len(scored.token_ids)


def test_streamed_text_is_the_whole_text(llm: LLM) -> None:
    streamed = "".join(out.outputs[0].text for out in llm.stream("Anna:", guided(json=PERSON)))
    assert streamed == run(llm, guided(json=PERSON), "Anna:").outputs[0].text


def test_ends_with_the_end_token_and_without_one_where_it_is_ignored(llm: LLM) -> None:
    ends = llm.engine.config and llm.get_tokenizer().eos_token_id
    ended = run(llm, guided(choice=["yes"])).outputs[0]
    assert ended.token_ids[-1] == ends
    bare = run(llm, guided(choice=["yes"], ignore_eos=True)).outputs[0]
    assert bare.text == "yes"
    assert bare.finish_reason == ended.finish_reason == "stop"
    assert ends not in bare.token_ids


def test_what_else_is_asked_for_gives_way(llm: LLM) -> None:
    params = guided(choice=["no"], bad_words=["no"], min_tokens=40, logit_bias=dict.fromkeys(range(2048), -100.0))
    assert run(llm, params).outputs[0].text == "no"


def test_beams_come_best_first_and_differ(llm: LLM) -> None:
    outputs = run(llm, guided(json=PERSON, n=3, use_beam_search=True)).outputs
    texts = [completion.text for completion in outputs]
    assert len(set(texts)) == 3
    for text in texts:
        assert json.loads(text)["mood"] in ("good", "bad")
    scores = [completion.cumulative_logprob for completion in outputs]
    assert scores == sorted(scores, reverse=True)


def test_a_second_request_finds_prompt_and_grammar(llm: LLM) -> None:
    prompt = "One two three four five six seven eight nine ten eleven twelve. " * 3
    run(llm, guided(json=PERSON), prompt)
    kept = len(llm.engine._worker.core.intake.grammars)
    again = run(llm, guided(json=PERSON), prompt)
    assert again.metrics.cached_tokens >= 16
    assert len(llm.engine._worker.core.intake.grammars) == kept


def test_kept_grammars_are_bounded(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "CACHED_GRAMMARS", 3)
    grammars = llm.engine._worker.core.intake.grammars
    compiled = [grammars.compile(GuidedParams(choice=[f"option {number}"])) for number in range(9)]
    assert len(grammars) == 3
    assert grammars.compile(GuidedParams(choice=["option 8"])) is compiled[8]
    assert grammars.compile(GuidedParams(choice=["option 0"])) is not compiled[0]


def test_a_matcher_out_of_its_limits_follows_its_closing(llm: LLM) -> None:
    compiled = llm.engine._worker.core.intake.grammars.compile(GuidedParams(json=PERSON))
    guide = compiled.start()
    guide.matcher = None
    tokens = []
    while not guide.finished:
        tokens.append(guide.way_on)
        assert guide.only() == tokens[-1]
        guide.advance(tokens[-1])
    assert json.loads(llm.get_tokenizer().decode(tokens))["mood"] in ("good", "bad")


def test_forced_text_is_begun_with_the_tokenizer_s_own_token(llm: LLM) -> None:
    """After `"name":` only ` "` may come, not the space alone, which is how a number would begin."""
    tokenizer = llm.get_tokenizer()
    guide = llm.engine._worker.core.intake.grammars.compile(GuidedParams(json=PERSON)).start()
    for token in tokenizer.encode('{"name":', add_special_tokens=False):
        guide.advance(token)
    assert guide.only() is None  # a longer token could come
    words = np.zeros((len(tokenizer) + 31) // 32, dtype=np.int32)
    guide.fill(words)
    allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
    assert [tokenizer.decode([token]) for token in allowed] == [' "']


@pytest.mark.parametrize("pair", [("bell", "belong"), ("cabin", "cable"), ("\n    x", "\n    y")])
def test_text_is_begun_as_the_tokenizer_begins_one_that_goes_on(llm: LLM, pair: tuple[str, str]) -> None:
    """What has to come, "bel", would be one token on its own; but "bell" is written `be`, `ll`."""
    tokenizer = llm.get_tokenizer()
    start = llm.engine._worker.core.intake.grammars.compile(GuidedParams(choice=list(pair))).start()
    for word in pair:
        guide = start.copy()
        for token in tokenizer.encode(word, add_special_tokens=False):
            words = np.zeros((len(tokenizer) + 31) // 32, dtype=np.int32)
            guide.fill(words)
            assert np.unpackbits(words.view(np.uint8), bitorder="little")[token]
            guide.advance(token)


def test_a_tokenizer_that_llguidance_reads_differently_is_refused() -> None:
    """As transformers converts one from a GGUF file: `ByteFallback` before `ByteLevel`, which takes no part then."""
    tokenizer = AutoTokenizer.from_pretrained(f"{pagedllm_core.__path__[0]}/bundled/tiny")
    byte_level = tokenizer.backend_tokenizer.decoder
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), byte_level])
    grammars = grammar_module.GrammarCompiler(tokenizer, len(tokenizer), (0,))
    with pytest.raises(InvalidRequestError, match=r"decoder in the tokenizer\.json"):
        grammars.compile(GuidedParams(json=PERSON))


@pytest.mark.parametrize(
    ("normalizer", "decoder"),
    [
        (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), "one space is taken away"),
        (normalizers.Replace(" ", "▁"), "none is"),
    ],
)
def test_a_tokenizer_that_writes_a_space_in_front_is_not_refused(normalizer: Any, decoder: str) -> None:
    """As Llama 2's does."""
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["</s>", *(f"<0x{i:02X}>" for i in range(256))])
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if "taken" in decoder else steps)
    tokenizer.train_from_iterator([json.dumps(PERSON)] * 3, trainer)
    written = json.loads(tokenizer.to_str())  # bytes are no added tokens
    written["added_tokens"] = [token for token in written["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(written))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)
    grammar_module.GrammarCompiler(fast, len(fast), (0,)).compile(GuidedParams(json=PERSON))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grammar": 'start: "a" <[2041]> "b"'}, "an end token inside"),
        ({"regex": "(ab"}, r"guided\.regex: cannot be compiled"),
        ({"regex": "(?=a)b"}, r"guided\.regex: cannot be compiled"),
        ({"json": {"type": "strin"}}, r"guided\.json: cannot be compiled: Invalid type: strin"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"$ref": "#/$defs/nowhere"}}, r"guided\.json"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 2}}, r"guided\.json"),
        ({"json": "{not json"}, r"guided\.json: is not valid JSON"),
        ({"json": "[1]"}, "must be a JSON object, a schema"),
        ({"grammar": "start: nothing"}, r"guided\.grammar: cannot be compiled"),
        ({"choice": []}, "choice"),
        ({"regex": "a" * 1_000_001}, r"guided\.regex: has 1000001 characters"),
        ({"json": PERSON, "stop": ["x"]}, "stop"),
        ({"choice": ["a"], "stop_token_ids": [3]}, "stop"),
        ({"json": PERSON, "regex": "a"}, "exactly one"),
        ({}, "exactly one"),
    ],
)
def test_refusals_name_the_field(llm: LLM, fields: dict[str, Any], message: str) -> None:
    used = llm.stats().kv_blocks_used
    with pytest.raises(InvalidRequestError, match=message):
        run(llm, guided(**fields))
    assert llm.stats().kv_blocks_used == used


def test_texts_that_look_like_added_tokens(llm: LLM) -> None:
    for schema in ({"const": "<think>"}, {"enum": ["<tool_call>", "</tool_call>"]}):
        assert json.loads(run(llm, guided(json=schema)).outputs[0].text).startswith("<")
    assert run(llm, guided(regex="a<think>b")).outputs[0].text == "a<think>b"
    assert run(llm, guided(choice=["x <tool_call> y"])).outputs[0].text == "x <tool_call> y"


def test_a_stop_string_does_not_cut_what_is_not_complete(llm: LLM) -> None:
    completion = run(llm, guided(grammar='start: "one two" /x?/', stop=["one"])).outputs[0]
    assert completion.text.startswith("one two")
    assert completion.finish_reason == "stop"


def test_thousands_of_choices(llm: LLM) -> None:
    options = [f"option number {number}" for number in range(5000)] + [""]
    assert run(llm, guided(choice=options)).outputs[0].text in options


@pytest.mark.parametrize(
    "pattern", [r".*END", r"[a-z]+\n", r"\d+€", r"[a-z]+\t[0-9]+", r"[^\n]*(yes|no)", r"\w+ foo \w+", r"x{3,}y"]
)
def test_regexes_whose_end_has_to_be_found(llm: LLM, pattern: str) -> None:
    assert re.fullmatch(pattern, run(llm, guided(60, regex=pattern)).outputs[0].text, re.DOTALL)


@pytest.mark.parametrize(
    "fields",
    [
        {"choice": ["\ud800"]},
        {"regex": "\ud800"},
        {"grammar": "root ::= ("},
        {"grammar": "root ::= " + "(" * 9000},
        {"grammar": 'root ::= "' + "a" * 30_000 + '"'},
        {"json": {"type": "integer", "maximum": 10**20}},
        {"json": {"const": object()}},
        {"json": "[" * 5000},
        {"json": '{"const": "\\ud800"}'},
    ],
)
def test_odd_input_is_refused_by_name(llm: LLM, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"guided\."):
        run(llm, guided(**fields))


def test_a_schema_cannot_switch_off_what_it_asks_for(llm: LLM) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "x-guidance": {"lenient": True}}
    with pytest.raises(InvalidRequestError, match="uniqueItems"):
        run(llm, guided(json=schema))
    with pytest.raises(InvalidRequestError, match="minProperties=3"):
        run(llm, guided(json={"type": "array", "items": [{"type": "object", "minProperties": 3}]}))


def test_a_search_without_a_result_is_not_repeated(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = llm.engine._worker.core.intake.grammars.compile(GuidedParams(json=PERSON))
    guide = compiled.start()
    searches = []

    def search(matcher: Any, hint: Any = (), limit: int = 0) -> None:
        searches.append(limit)

    monkeypatch.setattr(type(guide.vocabulary), "closing", lambda self, *arguments: search(*arguments))
    for _ in range(3):
        for character in guide.vocabulary.characters:
            guide.fits(character[0], 1000)
    assert len(searches) <= 2


def test_too_small_a_budget_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match=r"guided: the smallest output .* leave 5; raise max_tokens"):
        run(llm, guided(5, json=PERSON))
    long = llm.get_tokenizer()("word " * 3000)["input_ids"][: llm.engine.max_model_len - 4]
    with pytest.raises(ContextLengthError, match=r"2044 tokens and at least \d+ of output, .* limit of 2048"):
        llm.generate([long], guided(None, json=PERSON), use_tqdm=False)


OPEN = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize("more", [{"additionalProperties": {"type": "string"}}, {"patternProperties": {"^x": {}}}])
def test_a_listed_key_does_not_come_again_in_other_letters(llm: LLM, more: dict[str, Any]) -> None:
    schema = {**OPEN, "additionalProperties": True, **more}
    for wanted, text in (("again", '{"a": 1, "\\u0061": "x"}'), ("other", '{"a": 1, "x": "y\\n"}')):
        bias = dict.fromkeys(llm.get_tokenizer()(text, add_special_tokens=False)["input_ids"], 40.0)
        written = run(llm, guided(60, json=schema, temperature=0, logit_bias=bias)).outputs[0].text
        jsonschema.validate(json.loads(written), schema)
        grammar = llm.engine._worker.core.intake.grammars.compile(GuidedParams(json=schema))
        ids = [one for letter in text for one in grammar.vocabulary.tokenizer.tokenize_str(letter)]
        assert grammar.vocabulary.completes(grammar.matcher, ids) == (wanted == "other")


@pytest.mark.parametrize("text", ["x\x01y", "\x1b[0m", "Zoë"])
@pytest.mark.parametrize("keyword", ["const", "enum", "pattern"])
def test_characters_that_have_to_be_escaped(llm: LLM, keyword: str, text: str) -> None:
    value = {"const": text, "enum": [text], "pattern": f"^{re.escape(text)}$"}[keyword]
    kind = {"type": "string"} if keyword == "pattern" else {}
    schema = {"properties": {"a": {**kind, keyword: value}}, "required": ["a"], "additionalProperties": True}
    schema["type"] = "object"
    assert json.loads(run(llm, guided(120, json=schema)).outputs[0].text)["a"] == text
    assert bool(escapes(schema)) == (text == "Zoë")


def test_a_beam_that_is_not_taken_shortens_nothing(llm: LLM) -> None:
    pattern, first = "(blue|red and green and yellow and black)", llm.get_tokenizer().encode("blue")[0]
    how = {"use_beam_search": True, "best_of": 2, "n": 1, "logit_bias": {first: 20.0}}
    for limit in (200, 5):
        completion = run(llm, guided(limit, regex=pattern, **how)).outputs[0]
        assert (completion.text, completion.finish_reason) == ("blue", "stop")


def test_a_demanded_key_that_is_not_listed(llm: LLM) -> None:
    schema = {**OPEN, "required": ["b"]}
    assert "b" in json.loads(run(llm, guided(json=schema)).outputs[0].text)


def test_the_smallest_output_is_small(llm: LLM) -> None:
    keys = [f"x{number}" for number in range(12)]
    integers = {"type": "object", "properties": {key: {"type": "integer"} for key in keys}, "required": keys}
    numbers = {"type": "array", "items": {"type": "number"}, "minItems": 20}
    for schema, least in ((integers, 90), (numbers, 64)):
        jsonschema.validate(json.loads(run(llm, guided(least, json=schema)).outputs[0].text), schema)


@pytest.mark.parametrize("pattern", ["abc", r"\.pdf$", "^.*foo.*$", r"^https?://.+\.pdf$", r"@a\.com$", "foo|bar"])
def test_patterns_that_a_text_has_to_hold_somewhere(llm: LLM, pattern: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}, "required": ["a"]}
    assert re.search(pattern, json.loads(run(llm, guided(json=schema)).outputs[0].text)["a"])
    held = f"start: %json {json.dumps(schema)}"
    assert re.search(pattern, json.loads(run(llm, guided(grammar=held)).outputs[0].text)["a"])


@pytest.mark.parametrize("how", [{}, {"n": 2, "temperature": 1.0}, {"use_beam_search": True, "best_of": 2}])
def test_what_the_budget_shortened_ended_by_length(llm: LLM, how: dict[str, Any]) -> None:
    """A call with half of a path is valid, but not what was meant."""
    pattern = {"regex": "(/home/anna/projects/website_old){1,3};"}
    how = {"temperature": 0, "ignore_eos": False, "logit_bias": {llm.get_tokenizer().encode(";")[0]: -50.0}, **how}
    whole = run(llm, guided(200, **pattern, **how)).outputs
    cut = run(llm, guided(len(whole[0].token_ids) - 3, **pattern, **how)).outputs
    assert {one.finish_reason for one in whole} == {"stop"}
    assert {one.finish_reason for one in cut} == {"length"}
    assert all(re.fullmatch(pattern["regex"], one.text) for one in cut)
    assert len(cut[0].text) < len(whole[0].text)


def test_objects_that_list_their_properties_are_closed() -> None:
    inner = {"type": "object", "properties": {"a": {"type": "string"}}}
    schema = {"type": "object", "properties": {"x": inner, "y": {"anyOf": [inner, {"type": "null"}]}}}
    closed = prepare_schema(schema)
    assert closed["additionalProperties"] is False
    assert closed["properties"]["x"]["additionalProperties"] is False
    assert closed["properties"]["y"]["anyOf"][0]["additionalProperties"] is False
    assert "additionalProperties" not in inner
    open_one = {"type": "object", "properties": {}, "additionalProperties": {"type": "integer"}}
    assert prepare_schema(open_one) == open_one
    both = {"allOf": [inner, {"type": "object", "properties": {"b": {}}}]}
    assert prepare_schema(both) == both
