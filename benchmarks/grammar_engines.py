"""Which grammar engine: llguidance and xgrammar on speed, start-up, schema coverage and failures, interleaved.

    PYTHON benchmarks/grammar_engines.py [--walks 20] [--output benchmarks/results/grammar_engines.md]

PYTHON is one that has both packages, beside transformers, jsonschema and tqdm. The tokenizer is made here, as no model
hub is needed: a byte-level BPE of 151,643 tokens, trained on invented words and JSON, under logits 151,936 wide.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

VOCABULARY, WIDTH = 151_643, 151_936  # Qwen2.5's: tokens of the tokenizer, columns of the logits
END = "<|endoftext|>"
SECONDS, GIBIBYTES = 20, 6  # what a failing case may take
Schema = Any
Mask = npt.NDArray[np.int32]


def syllables() -> list[str]:
    """What invented words are made of."""
    onsets = [
        *"bcdfghjklmnprstvw", "br", "ch", "cl", "cr", "dr", "fl", "fr", "gl", "gr", "pl", "pr", "sh", "sl", "sp", "st",
        "str", "th", "tr", "wh",
    ]  # fmt: skip
    vowels = [*"aeiou", "ai", "ea", "ee", "ie", "oo", "ou"]
    codas = ["", "", "", *"nrstldm", "ng", "ck", "st", "nt", "ll", "ss", "rt"]
    return [onset + vowel + coda for onset in onsets for vowel in vowels for coda in codas]


def corpus() -> Iterator[str]:
    """Text to train on: English-like words by Zipf's law, JSON, and some other scripts."""
    generator, parts = random.Random(0), syllables()
    words: set[str] = set()
    while len(words) < 115_000:
        words.add("".join(generator.choices(parts, k=generator.choice((1, 1, 2, 2, 2, 3, 3)))))
    ordered = sorted(words)
    generator.shuffle(ordered)
    for number, word in enumerate(ordered):
        yield f" {word}" * (2 + 20_000 // (number + 1))
        if number % 2 == 0:
            yield f" {word.capitalize()}" * 2
        if number % 3 == 0:
            yield f'{word}\n{word} "{word}" "{word}'
        if number % 5 == 0:
            yield json.dumps({word: [{"a": 1, "b": [True, None]}, {"c": {"d": "e"}}, [[1], ["x", {}]]]}, indent=2)
            yield json.dumps({word: [{"a": 1, "b": ["e"]}, {"c": {"d": "e"}}]})
        if number % 10 == 0:
            yield "".join(chr(generator.choice((0x4E00, 0x0430)) + generator.randrange(32)) for _ in range(4)) * 2


def synthetic_tokenizer(cache: Path | None = None) -> Any:
    """A transformers tokenizer of `VOCABULARY` byte-level BPE tokens; trained in about 20 s, then read from `cache`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    path = cache or Path(tempfile.gettempdir()) / "pagedllm_synthetic_tokenizer_1.json"
    if not path.exists():
        words = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
            r"\s+(?!\S)|\s+"
        )
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[END],
            show_progress=False,
        )
        made.train_from_iterator(corpus(), trainer)
        if made.get_vocab_size() != VOCABULARY:
            raise RuntimeError(f"the tokenizer has {made.get_vocab_size()} tokens instead of {VOCABULARY}")
        made.save(str(path))
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=END)


class Matcher(Protocol):
    """A place in an output."""

    def mask(self, masks: Mask, row: int) -> None:
        """Write what may come next into a row of bits."""

    def take(self, token: int) -> bool:
        """Go on by a token; False where the grammar does not allow it."""

    def complete(self) -> bool:
        """Whether the output may end here."""

    def copy(self) -> Matcher:
        """The same place, for a fork."""

    def allows(self, tokens: list[int]) -> bool:
        """Whether all of these may follow; nothing moves."""


class LlguidanceMatcher:
    """llguidance's."""

    def __init__(self, matcher: Any) -> None:
        import llguidance.numpy

        self.matcher, self._fill = matcher, llguidance.numpy.fill_next_token_bitmask

    def mask(self, masks: Mask, row: int) -> None:
        self._fill(self.matcher, masks, row)
        if self.matcher.is_error():
            raise RuntimeError(self.matcher.get_error())

    def take(self, token: int) -> bool:
        return bool(self.matcher.consume_token(token))

    def complete(self) -> bool:
        return bool(self.matcher.is_accepting())

    def copy(self) -> LlguidanceMatcher:
        return LlguidanceMatcher(self.matcher.deep_copy())

    def allows(self, tokens: list[int]) -> bool:
        return bool(self.matcher.validate_tokens(tokens) == len(tokens))


class XgrammarMatcher:
    """xgrammar's."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher

    def mask(self, masks: Mask, row: int) -> None:
        self.matcher.fill_next_token_bitmask(masks, row)

    def take(self, token: int) -> bool:
        return bool(self.matcher.accept_token(token))

    def complete(self) -> bool:
        return bool(self.matcher.is_completed())

    def copy(self) -> XgrammarMatcher:
        return XgrammarMatcher(self.matcher.fork())

    def allows(self, tokens: list[int]) -> bool:
        taken = 0
        while taken < len(tokens) and self.matcher.accept_token(tokens[taken]):
            taken += 1
        if taken:
            self.matcher.rollback(taken)
        return taken == len(tokens)


class Engine(Protocol):
    """A grammar engine that is ready for one tokenizer."""

    name: str
    packages: tuple[str, ...]

    def json(self, schema: Schema) -> Matcher:
        """Compile a schema (or its text); raises where it cannot be."""

    def regex(self, pattern: str) -> Matcher:
        """Compile a regular expression."""

    def fill_together(self, matchers: list[Any], threads: int) -> Callable[[Mask], None]:
        """A function that writes the masks of all, with the engine's own threads."""


class Llguidance:
    """llguidance, as the engine uses it."""

    name, packages = "llguidance", ("llguidance",)
    start_up = "import llguidance, llguidance.hf, llguidance.numpy"

    def __init__(self, tokenizer: Any) -> None:
        from llguidance.hf import from_tokenizer

        self._tokenizer = from_tokenizer(tokenizer, n_vocab=WIDTH, eos_token=[tokenizer.eos_token_id])

    def json(self, schema: Schema) -> LlguidanceMatcher:
        from llguidance import LLMatcher

        options: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        return self._start(LLMatcher.grammar_from_json_schema(schema, overrides=options))

    def regex(self, pattern: str) -> LlguidanceMatcher:
        from llguidance import LLMatcher

        return self._start(LLMatcher.grammar_from_regex(pattern))

    def _start(self, source: str) -> LlguidanceMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, source, log_level=0)
        if matcher.is_error():
            raise ValueError(" ".join(line.strip() for line in matcher.get_error().splitlines() if line.strip()))
        return LlguidanceMatcher(matcher)

    def fill_together(self, matchers: list[Any], threads: int) -> Callable[[Mask], None]:
        from llguidance import LLExecutor
        from llguidance.numpy import fill_next_token_bitmask_par

        executor = LLExecutor(threads)
        pairs = [(one.matcher, row) for row, one in enumerate(matchers)]
        return lambda masks: fill_next_token_bitmask_par(executor, pairs, masks)


class Xgrammar:
    """xgrammar with the same white space; properties that a schema does not name are allowed, as JSON schema says."""

    name, packages = "xgrammar", ("xgrammar", "apache-tvm-ffi")
    start_up = "import xgrammar"

    def __init__(self, tokenizer: Any) -> None:
        import xgrammar  # type: ignore[import-not-found, unused-ignore]

        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=WIDTH, stop_token_ids=[tokenizer.eos_token_id]
        )
        self._matcher = xgrammar.GrammarMatcher
        self._together = xgrammar.BatchGrammarMatcher
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def json(self, schema: Schema) -> XgrammarMatcher:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return XgrammarMatcher(
            self._matcher(
                self._compiler.compile_json_schema(
                    text, any_whitespace=False, separators=(", ", ": "), strict_mode=False
                )
            )
        )

    def regex(self, pattern: str) -> XgrammarMatcher:
        return XgrammarMatcher(self._matcher(self._compiler.compile_regex(pattern)))

    def fill_together(self, matchers: list[Any], threads: int) -> Callable[[Mask], None]:
        together, inner = self._together(max_threads=threads), [one.matcher for one in matchers]
        return lambda masks: together.batch_fill_next_token_bitmask(inner, masks)


ENGINES: tuple[type[Any], type[Any]] = (Llguidance, Xgrammar)

TEXT, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}


def record(properties: dict[str, Schema], **more: Any) -> Schema:
    """An object of exactly these properties."""
    closed = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {**closed, **more}


def array(items: Schema, **more: Any) -> Schema:
    """An array of these."""
    return {"type": "array", "items": items, **more}


def workloads() -> dict[str, tuple[str, Any, str]]:
    """Name to (kind, grammar, a text that it allows); what speed is measured on."""
    generator = random.Random(1)
    parts = syllables()

    def words(count: int) -> str:
        return " ".join("".join(generator.choices(parts, k=2)) for _ in range(count))

    person = record({"name": TEXT, "age": INTEGER, "email": TEXT, "active": {"type": "boolean"}, "note": TEXT})
    ann = {"name": "Ann " + words(1), "age": 34, "email": "ann@example.org", "active": True, "note": words(20)}
    line = record({"article": TEXT, "count": {"type": "integer", "minimum": 1}, "price": NUMBER})
    order = record({"customer": person, "lines": array(line, minItems=1)})
    lines = [{"article": words(2), "count": 3 + n, "price": 9.5} for n in range(8)]
    cities = [words(2) for _ in range(500)]
    tree = {
        "$ref": "#/$defs/node",
        "$defs": {"node": record({"value": INTEGER, "children": array({"$ref": "#/$defs/node"})})},
    }
    leaf = {"value": 7, "children": []}
    branch = {"value": 12, "children": [leaf, {"value": 8, "children": [leaf, leaf]}, leaf]}
    strict = record(
        {
            "date": {"type": "string", "format": "date"},
            "id": {"type": "string", "format": "uuid"},
            "mail": {"type": "string", "format": "email"},
            "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
        }
    )
    exact = {
        "date": "2026-11-21", "id": "2f1c8a52-5b0e-4a77-9d13-0f6f0f3f9a10", "mail": "ann@example.org",
        "code": "ABC-1234",
    }  # fmt: skip
    tools = [record({"tool": {"const": f"{words(1)}_{n}"}, "arguments": person}) for n in range(20)]
    call = {"tool": tools[7]["properties"]["tool"]["const"], "arguments": ann}
    documents: dict[str, tuple[Schema, Any]] = {
        "flat record": (person, ann),
        "nested arrays of records": (order, {"customer": ann, "lines": lines}),
        "recursive tree": (tree, {"value": 1, "children": [branch, branch]}),
        "enum of 500, ten times": (array({"enum": cities}), cities[:10]),
        "formats and a pattern": (strict, exact),
        "text of at most 2,000 characters": ({"type": "string", "maxLength": 2000}, words(100)),
        "one of 20 tools": ({"anyOf": tools}, call),
        "any JSON": ({}, {"customer": ann, "lines": lines}),
    }
    found = {
        name: ("json", schema, json.dumps(document, ensure_ascii=False))
        for name, (schema, document) in documents.items()
    }
    found["regex: log lines"] = (
        "regex",
        r"([0-9]{4}-[0-9]{2}-[0-9]{2} (INFO|WARN|ERROR) [a-z ]{1,80}\n){1,20}",
        "".join(f"2026-11-{10 + n} INFO {words(4)[:70]}\n" for n in range(8)),
    )
    return found


# Feature: schema, documents that it allows, documents that it forbids.
FEATURES: dict[str, tuple[Schema, list[Any], list[Any]]] = {
    "type": (INTEGER, [3, -2], ["a", 1.5]),
    "several types": ({"type": ["string", "null"]}, ["a", None], [1]),
    "required": (
        {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "required": ["b"]},
        [{"b": 1}, {"a": 1, "b": 2}],
        [{"a": 1}, {}],
    ),
    "additionalProperties: false": (
        {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": False},
        [{}, {"a": 1}],
        [{"b": 1}],
    ),
    "additionalProperties: schema": (
        {"type": "object", "additionalProperties": INTEGER},
        [{}, {"x": 1}],
        [{"x": "a"}],
    ),
    "additionalProperties left out": (
        {"type": "object", "properties": {"a": INTEGER}},
        [{"a": 1, "z": "b"}],
        [{"a": "b"}],
    ),
    "nesting": (record({"a": record({"b": array(INTEGER)})}), [{"a": {"b": [1]}}], [{"a": {"b": ["x"]}}]),
    "enum": ({"enum": ["red", "green", 3, None]}, ["red", 3, None], ["blue", 4]),
    "const": ({"const": {"a": [1, 2]}}, [{"a": [1, 2]}], [{"a": [1]}]),
    "minLength": ({"type": "string", "minLength": 3}, ["abc", "äöü"], ["ab"]),
    "maxLength": ({"type": "string", "maxLength": 3}, ["abc", ""], ["abcd"]),
    "pattern, anchored": ({"type": "string", "pattern": "^a[0-9]+$"}, ["a1"], ["b1", "a"]),
    "pattern, not anchored": ({"type": "string", "pattern": "[0-9]"}, ["a1b", "1"], ["ab"]),
    "pattern and maxLength": ({"type": "string", "pattern": "^a+$", "maxLength": 3}, ["aa"], ["aaaa", "b"]),
    "format: date": ({"type": "string", "format": "date"}, ["2026-11-21"], ["2026-13-01", "tomorrow"]),
    "format: date-time": ({"type": "string", "format": "date-time"}, ["2026-11-21T10:00:00Z"], ["2026-11-21"]),
    "format: time": ({"type": "string", "format": "time"}, ["10:00:00Z"], ["25:00:00Z", "ten"]),
    "format: email": ({"type": "string", "format": "email"}, ["a@b.org"], ["a.b.org"]),
    "format: uuid": (
        {"type": "string", "format": "uuid"},
        ["2f1c8a52-5b0e-4a77-9d13-0f6f0f3f9a10"],
        ["2f1c8a52"],
    ),
    "format: ipv4": ({"type": "string", "format": "ipv4"}, ["10.0.0.1"], ["10.0.0.256", "ten"]),
    "format: uri": ({"type": "string", "format": "uri"}, ["https://a.org/b?c=d"], ["a b"]),
    "format: unknown": ({"type": "string", "format": "shoe-size"}, ["a"], [1]),
    "minimum, maximum (integer)": ({"type": "integer", "minimum": 7, "maximum": 120}, [7, 99, 120], [6, 121, -8]),
    "minimum, maximum (number)": ({"type": "number", "minimum": 0.5, "maximum": 2}, [0.5, 1.25, 2], [0.4, 2.5, -1]),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 3}, [4, 30], [3, 0]),
    "multipleOf": ({"type": "integer", "multipleOf": 5}, [0, 15], [3, 16]),
    "anyOf": ({"anyOf": [INTEGER, {"type": "boolean"}]}, [1, True], ["a"]),
    "oneOf, disjoint": ({"oneOf": [record({"a": INTEGER}), record({"b": INTEGER})]}, [{"a": 1}], [{"a": 1, "b": 1}]),
    "oneOf, overlapping": (
        {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 9}]},
        [10, -1],
        [5],
    ),
    "allOf": (
        {"allOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 9}]},
        [3, 9],
        [2, 10],
    ),
    "allOf of objects": (
        {
            "allOf": [
                {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
                {"type": "object", "properties": {"b": TEXT}, "required": ["b"]},
            ]
        },
        [{"a": 1, "b": "x"}],
        [{"a": 1}, {"b": "x"}],
    ),
    "not": ({"type": "string", "not": {"const": "a"}}, ["b"], ["a"]),
    "if, then": (
        {
            "type": "object",
            "properties": {"a": {"type": "boolean"}, "b": INTEGER},
            "required": ["a"],
            "additionalProperties": False,
            "if": {"properties": {"a": {"const": True}}},
            "then": {"required": ["b"]},
        },
        [{"a": False}, {"a": True, "b": 1}],
        [{"a": True}],
    ),
    "$ref": ({"$ref": "#/$defs/x", "$defs": {"x": INTEGER}}, [1], ["a"]),
    "$ref, recursive": (
        {"$ref": "#/$defs/t", "$defs": {"t": record({"next": {"anyOf": [{"$ref": "#/$defs/t"}, {"type": "null"}]}})}},
        [{"next": {"next": None}}],
        [{"next": 1}],
    ),
    "$ref beside other keywords": (
        {"$ref": "#/$defs/x", "maximum": 5, "$defs": {"x": INTEGER}},
        [1],
        [6],
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^n_": INTEGER}, "additionalProperties": False},
        [{"n_a": 1}],
        [{"n_a": "x"}, {"b": 1}],
    ),
    "propertyNames": (
        {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": INTEGER},
        [{"ab": 1}],
        [{"A": 1}],
    ),
    "minProperties": ({"type": "object", "additionalProperties": INTEGER, "minProperties": 1}, [{"a": 1}], [{}]),
    "maxProperties": (
        {"type": "object", "additionalProperties": INTEGER, "maxProperties": 1},
        [{"a": 1}],
        [{"a": 1, "b": 2}],
    ),
    "dependentRequired": (
        {
            "type": "object",
            "properties": {"a": INTEGER, "b": INTEGER},
            "additionalProperties": False,
            "dependentRequired": {"a": ["b"]},
        },
        [{"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1}],
    ),
    "prefixItems": (
        {"type": "array", "prefixItems": [INTEGER, TEXT], "items": False, "minItems": 2},
        [[1, "a"]],
        [["a", 1], [1]],
    ),
    "minItems, maxItems": (array(INTEGER, minItems=2, maxItems=3), [[1, 2], [1, 2, 3]], [[1], [1, 2, 3, 4]]),
    "uniqueItems": (array({"enum": [1, 2, 3]}, uniqueItems=True), [[1, 2]], [[1, 1]]),
    "contains": (array({"enum": [1, 2]}, contains={"const": 2}), [[1, 2]], [[1, 1]]),
}


def spread(depth: int) -> Schema:
    """Objects within objects."""
    schema: Schema = INTEGER
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    return schema


def deep_text(depth: int) -> str:
    """The same as text, which Python need not be able to write."""
    head = '{"type":"object","additionalProperties":false,"required":["a"],"properties":{"a":'
    return head * depth + '{"type":"integer"}' + "}}" * depth


# Case: kind, grammar, what should happen.
FAILURES: dict[str, tuple[str, Any, str]] = {
    "text that is not JSON": ("json", "{nope", "refused"),
    "unknown type": ("json", {"type": "strin"}, "refused"),
    "type is a number": ("json", {"type": 5}, "refused"),
    "properties is a list": ("json", {"type": "object", "properties": ["a"]}, "refused"),
    "false": ("json", "false", "refused"),
    "empty enum": ("json", {"enum": []}, "refused"),
    "minimum above maximum": ("json", {"type": "integer", "minimum": 5, "maximum": 1}, "refused"),
    "minLength above maxLength": ("json", {"type": "string", "minLength": 5, "maxLength": 1}, "refused"),
    "allOf that contradicts itself": ("json", {"allOf": [{"const": 1}, {"const": 2}]}, "refused"),
    "$ref to nothing": ("json", {"$ref": "#/$defs/none"}, "refused"),
    "$ref to itself": ("json", {"$ref": "#"}, "refused"),
    "required recursion without end": (
        "json",
        {"$ref": "#/$defs/a", "$defs": {"a": record({"a": {"$ref": "#/$defs/a"}})}},
        "refused",
    ),
    "$ref to another server": ("json", {"$ref": "https://example.org/schema.json"}, "refused"),
    "pattern that is no regex": ("json", {"type": "string", "pattern": "(["}, "refused"),
    "pattern with a look-ahead": ("json", {"type": "string", "pattern": "^(?=a)b?"}, "refused"),
    "100 objects deep": ("json", spread(100), "served"),
    "5,000 objects deep": ("json", deep_text(5000), "refused or served"),
    "100,000 objects deep": ("json", deep_text(100_000), "refused or served"),
    "enum of 20,000": ("json", {"enum": [f"value number {n}" for n in range(20_000)]}, "served"),
    "maxLength of 1,000,000": ("json", {"type": "string", "maxLength": 1_000_000}, "served"),
    "maxItems of 100,000": ("json", array(INTEGER, maxItems=100_000), "served"),
    "300 optional properties": (
        "json",
        {"type": "object", "properties": {f"p{n}": INTEGER for n in range(300)}, "additionalProperties": False},
        "served",
    ),
    "regex: back reference": ("regex", r"(a|b)\1", "refused"),
    "regex: (a{1,1000}){1,1000}": ("regex", "(a{1,1000}){1,1000}", "refused or served"),
    "regex: ((a{1,100}){1,100}){1,100}": ("regex", "((a{1,100}){1,100}){1,100}", "refused or served"),
    "regex: .*a.{25}": ("regex", "(.|\n)*a(.|\n){25}", "served"),
    "regex: (a|aa|aaa)*b": ("regex", "(a|aa|aaa)*b", "served"),
    "regex that matches nothing": ("regex", "[^\\s\\S]", "refused"),
}


class Walker:
    """Random outputs, with a will to come to an end.

    Args:
        tokenizer: The transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.end = tokenizer, int(tokenizer.eos_token_id)
        pieces = [tokenizer.convert_ids_to_tokens(token) for token in range(VOCABULARY)]
        ends = {'"', "}", "]", '"}', "]}", '"]', "}}", "0", "1", "2", "e", "5"}
        self._ends = np.zeros(WIDTH, dtype=bool)
        self._ends[[token for token, piece in enumerate(pieces) if piece in ends]] = True
        self._short = np.zeros(WIDTH, dtype=bool)
        self._short[[token for token, piece in enumerate(pieces) if len(piece) < 3 and piece.isascii()]] = True
        self._masks = np.zeros((1, (WIDTH + 31) // 32), dtype=np.int32)

    def allowed(self, matcher: Matcher) -> npt.NDArray[np.bool_]:
        """What may come next, one truth value per token."""
        self._masks[:] = 0
        matcher.mask(self._masks, 0)
        return np.unpackbits(self._masks[0].view(np.uint8), bitorder="little")[:WIDTH].astype(bool)

    def walk(self, matcher: Matcher, generator: random.Random, most: int = 150) -> str | None:
        """A complete output of at most that many tokens, or None."""
        tokens: list[int] = []
        while len(tokens) < most:
            allowed = self.allowed(matcher)
            if allowed[self.end] and (generator.random() < 0.4 or not allowed.sum() - 1):
                return self.text(tokens)
            allowed[self.end] = False
            for preferred in (self._ends, self._short):
                if generator.random() < 0.5 and (allowed & preferred).any():
                    allowed &= preferred
                    break
            choices = np.flatnonzero(allowed)
            if not len(choices):
                return None
            tokens.append(int(generator.choice(choices)))
            if not matcher.take(tokens[-1]):
                raise RuntimeError(f"a token that the mask allows is not taken after {self.text(tokens)!r:.200}")
        return None

    def text(self, tokens: list[int]) -> str:
        """Decoded as it is."""
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def accepts(self, matcher: Matcher, document: Any) -> bool:
        """Whether this document is a complete output, with spaces after separators or without."""
        for separators in ((", ", ": "), (",", ":")):
            text, place = json.dumps(document, ensure_ascii=False, separators=separators), matcher.copy()
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            if all(place.take(token) for token in ids) and place.complete():
                return True
        return False


def coverage(engine: Engine, walker: Walker, feature: str, walks: int) -> tuple[str, str]:
    """How a feature fares: a verdict and what it rests on."""
    import jsonschema  # type: ignore[import-untyped, unused-ignore]

    schema, good, bad = FEATURES[feature]
    try:
        start = engine.json(schema)
    except Exception as error:
        return "refused", f"{error}".split("\n")[0]
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    wrong = [document for document in bad if walker.accepts(start, document)]
    missed = [document for document in good if not walker.accepts(start, document)]
    generator, finished = random.Random(7), 0
    for _ in range(walks):
        text = walker.walk(start.copy(), generator)
        if text is None:
            continue
        finished += 1
        try:
            valid = validator.is_valid(json.loads(text))
        except ValueError:
            valid = False
        if not valid:
            wrong.append(text)
    if wrong:
        return "not held", f"takes {wrong[0]!r:.60}"
    if missed:
        return "too narrow", f"forbids {missed[0]!r:.60}"
    return "held", f"{finished} walks"


def failing(engine: Engine, walker: Walker, kind: str, source: Any, answers: Connection) -> None:
    """Compile and walk in a process of its own, and tell how that went."""
    resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES << 30, GIBIBYTES << 30))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    try:
        matcher = engine.json(source) if kind == "json" else engine.regex(source)
    except BaseException as error:
        message = re.sub(r"^\[[\d:]+\] \S+ |\s+", " ", str(error) or type(error).__name__)
        text = f"refused: {message.strip():.110}"
        answers.send((text, time.perf_counter() - started, 0.0))
        return
    generator, place, taken = random.Random(3), matcher.copy(), 0
    text = "served"
    try:
        for taken in range(40):
            allowed = np.flatnonzero(walker.allowed(place))
            if not len(allowed):
                text = f"served, but nothing may come after {taken} tokens"
                break
            token = int(generator.choice(allowed))
            if token == walker.end:
                break
            if not place.take(token):
                text = f"served, then stuck after {taken} tokens"
                break
    except BaseException as error:
        text = f"served, then an error after {taken} tokens: {str(error).splitlines()[-1]:.90}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    answers.send((text, time.perf_counter() - started, grown))


def failure(engine: Engine, walker: Walker, case: str) -> str:
    """How a case ends: an answer, a crash, or none within the limit."""
    kind, source, _ = FAILURES[case]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=failing, args=(engine, walker, kind, source, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            process.kill()
            return f"**no answer within {SECONDS} s**"
        text, seconds, grown = receiver.recv()
        memory = f", {grown:.0f} MiB" if grown > 50 else ""
        return f"{text} ({seconds * 1e3:.0f} ms{memory})".replace("|", "\\|")
    except EOFError:
        process.join()
        return f"**the process died** (status {process.exitcode})"
    finally:
        process.join()


def start_up() -> list[str]:
    """Table of import, size and licence."""
    lines = [
        "| | version | wheel, MB | installed, MB | with what no one else brings, MB | import after torch and "
        "transformers, s |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for engine in ENGINES:
        code = (
            "import time, torch, transformers\nfrom transformers import PreTrainedTokenizerFast\n"
            f"t = time.perf_counter()\n{engine.start_up}\nprint(time.perf_counter() - t)"
        )
        runs = [
            float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
            for _ in range(3)
        ]
        own = installed(engine.packages[0])
        lines.append(
            f"| {engine.name} | {importlib.metadata.version(engine.packages[0])} | {wheel(engine.packages[0])} | "
            f"{own:.1f} | {sum(map(installed, engine.packages)):.1f} | {statistics.median(runs):.2f} |"
        )
    return lines


def installed(package: str) -> float:
    """Megabytes of a distribution's files."""
    files = importlib.metadata.distribution(package).files or []
    return sum(Path(str(file.locate())).stat().st_size for file in files if Path(str(file.locate())).exists()) / 1e6


def wheel(package: str) -> str:
    """Megabytes of this version's wheel, where pip can fetch it."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"{package}=={importlib.metadata.version(package)}"
        for command in ([sys.executable, "-m", "pip"], ["pip"]):
            try:
                subprocess.run(
                    [*command, "download", "-q", "--no-deps", "-d", folder, wanted],
                    capture_output=True, check=True, timeout=60,
                )  # fmt: skip
            except (subprocess.SubprocessError, OSError):
                continue
            return f"{sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6:.1f}"
    return "–"


def milliseconds(action: Callable[[], Any]) -> float:
    """Time of one call."""
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1e3


def speed(engines: list[Engine], tokenizer: Any, rounds: int) -> list[str]:
    """Table of compiling and of masks along a document, the engines in turn."""
    lines = [
        "| grammar | tokens | engine | compile, ms | first walk, ms | later, ms | mask: median, µs | 99 %, µs | "
        "most, µs | take, µs | copy, µs | 8 tokens asked, µs |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    masks = np.zeros((1, (WIDTH + 31) // 32), dtype=np.int32)
    for name, (kind, source, text) in tqdm(workloads().items(), desc="speed"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        compiles: list[list[float]] = [[] for _ in engines]
        first: list[list[float]] = [[] for _ in engines]
        times: list[list[list[float]]] = [[] for _ in engines]  # [engine][round][position]
        takes: list[list[float]] = [[] for _ in engines]
        copies: list[list[float]] = [[] for _ in engines]
        asks: list[list[float]] = [[] for _ in engines]
        starts: list[Any] = [None] * len(engines)
        for turn in range(rounds):
            for number, engine in enumerate(engines):
                if turn < 3 and (turn == 0 or compiles[number][-1] < 3000):
                    started = time.process_time()
                    starts[number] = engine.json(source) if kind == "json" else engine.regex(source)
                    compiles[number].append((time.process_time() - started) * 1e3)
                place, walk = starts[number].copy(), []
                for position, token in enumerate(ids):
                    walk.append(milliseconds(partial(place.mask, masks, 0)) * 1e3)
                    if turn >= 3 and position % 8 == 4:
                        ahead = ids[position : position + 8]
                        copies[number].append(milliseconds(place.copy) * 1e3)
                        asks[number].append(milliseconds(partial(place.allows, ahead)) * 1e3)
                    started = time.perf_counter()
                    if not place.take(token):
                        raise RuntimeError(
                            f"{engine.name}, {name}: {tokenizer.decode(ids[: position + 1])!r} is refused"
                        )
                    takes[number].append((time.perf_counter() - started) * 1e6)
                if len(compiles[number]) > len(first[number]):
                    first[number].append(sum(walk) / 1e3)
                elif turn >= 3:
                    times[number].append(walk)
        for number, engine in enumerate(engines):
            usual = np.median(np.array(times[number]), axis=0)
            lines.append(
                f"| {name if number == 0 else ''} | {len(ids) if number == 0 else ''} | {engine.name} | "
                f"{statistics.median(compiles[number]):.1f} | {statistics.median(first[number]):.1f} | "
                f"{usual.sum() / 1e3:.1f} | {np.median(usual):.0f} | {np.quantile(usual, 0.99):.0f} | "
                f"{usual.max():.0f} | {statistics.median(takes[number]):.1f} | {statistics.median(copies[number]):.1f} "
                f"| {statistics.median(asks[number]):.1f} |"
            )
    return lines


def together(engines: list[Engine], tokenizer: Any, rounds: int = 40, batch: int = 32) -> list[str]:
    """Table of one step's masks for a batch whose rows are all somewhere else."""
    lines = [
        f"| {batch} masks of a step | one after the other, ms | engine's own batch, 1 thread, ms | 2 threads, ms |",
        "| --- | ---: | ---: | ---: |",
    ]
    work = [item for item in workloads().values() if item[0] == "json"]
    masks = np.zeros((batch, (WIDTH + 31) // 32), dtype=np.int32)
    rows: list[list[tuple[Any, list[int]]]] = []
    for engine in engines:
        starts = [engine.json(source) for _, source, _ in work]
        texts = [tokenizer.encode(text, add_special_tokens=False) for _, _, text in work]
        rows.append([])
        for row in range(batch):
            place, ids = starts[row % len(work)].copy(), texts[row % len(work)]
            skip = row // len(work) * 3
            for token in ids[:skip]:
                place.take(token)
            rows[-1].append((place, ids[skip:]))
    ways: list[list[Callable[[], None]]] = []
    for engine, own in zip(engines, rows, strict=True):
        matchers = [place for place, _ in own]

        def in_turn(matchers: list[Any] = matchers) -> None:
            for row, place in enumerate(matchers):
                place.mask(masks, row)

        calls = [engine.fill_together(matchers, threads) for threads in (1, 2)]
        ways.append([in_turn, *(lambda call=call: call(masks) for call in calls)])
    times: list[list[list[float]]] = [[[] for _ in chosen] for chosen in ways]
    for step in range(rounds):
        for number, own in enumerate(rows):
            for way, action in enumerate(ways[number]):
                times[number][way].append(milliseconds(action))
            for place, ids in own:
                if step < len(ids) - 1:
                    place.take(ids[step])
    for number, engine in enumerate(engines):
        cells = " | ".join(f"{statistics.median(found):.2f}" for found in times[number])
        lines.append(f"| {engine.name} | {cells} |")
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--walks", type=int, default=20, help="random outputs per feature")
    parser.add_argument("--rounds", type=int, default=8, help="times that each document is walked")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = synthetic_tokenizer()
    engines: list[Engine] = []
    prepare = []
    for build in ENGINES:
        engine, times = build(tokenizer), []  # imports, too
        for _ in range(3):
            started = time.process_time()
            engine = build(tokenizer)
            times.append(time.process_time() - started)
        prepare.append(f"{build.name} {statistics.median(times):.2f} s")
        engines.append(engine)
    walker = Walker(tokenizer)

    # First, as the children are forked from a process without threads.
    failures = ["| | should be | " + " | ".join(e.name for e in engines) + " |", "| --- | --- | --- | --- |"]
    for case, (_, _, wanted) in tqdm(FAILURES.items(), desc="failures"):
        shown = case.replace("|", "\\|")
        failures.append(f"| {shown} | {wanted} | {' | '.join(failure(e, walker, case) for e in engines)} |")

    features = ["| | " + " | ".join(e.name for e in engines) + " |", "| --- | --- | --- |"]
    counts: dict[str, dict[str, int]] = {engine.name: {} for engine in engines}
    for feature in tqdm(FEATURES, desc="features"):
        cells = []
        for engine in engines:
            verdict, detail = coverage(engine, walker, feature, arguments.walks)
            counts[engine.name][verdict] = counts[engine.name].get(verdict, 0) + 1
            shown = "" if verdict == "held" else f": {detail:.110}"
            cells.append((f"**{verdict}**" if verdict == "not held" else verdict) + shown.replace("|", "\\|"))
        features.append(f"| {feature} | {' | '.join(cells)} |")
    total = "; ".join(
        f"{name}: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(found.items()))
        for name, found in counts.items()
    )

    sections = [
        "# Grammar engines\n\n"
        f"`benchmarks/grammar_engines.py`, {datetime.now(UTC):%Y-%m-%d}, {processor()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, "
        + ", ".join(f"{e.name} {importlib.metadata.version(e.packages[0])}" for e in engines)
        + f". A synthetic byte-level BPE of {VOCABULARY:,} tokens, masks {WIDTH:,} wide, one thread where nothing "
        "else is said, engines in turn within each measurement, `json.dumps` white space, xgrammar with "
        "`strict_mode=False`.",
        "## Size and start-up\n\n"
        + "\n".join(start_up())
        + f"\n\nTokenizer prepared, time of the processor: {', '.join(prepare)}. What xgrammar brings further is "
        "apache-tvm-ffi; it also "
        "asks for triton on Linux, which a CPU build of torch does not have.",
        "## Speed\n\nAlong a document: compiled with no cache (time of the processor, one thread), then "
        "walked. The first walk of a grammar builds what is "
        f"made lazily; masks, medians over {arguments.rounds - 3} later walks. *Asked*: whether 8 tokens may follow, "
        "with nothing moved (`validate_tokens`; accept and roll back).\n\n"
        + "\n".join(speed(engines, tokenizer, arguments.rounds)),
        "\n".join(together(engines, tokenizer)),
        "## Schema coverage\n\n*held*: takes the documents it should, none that it should not, and every finished "
        f"random walk (of {arguments.walks}) satisfies jsonschema. *not held*: compiles, but takes something invalid. "
        f"*too narrow*: forbids a valid document. {total}.\n\n" + "\n".join(features),
        f"## Failures\n\nEach in a process of its own with {SECONDS} s and {GIBIBYTES} GiB of address space: compiled, "
        "then 40 random tokens.\n\n" + "\n".join(failures),
    ]
    text = "\n\n".join(sections) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


def processor() -> str:
    """This machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
