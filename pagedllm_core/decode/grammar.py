"""From what a caller asks the output to be to a compiled grammar; the last ones are kept."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from pagedllm_core.decode.guided import MAX_CLOSING, Guide, Vocabulary
from pagedllm_core.decode.schema import escapes, prepare_schema
from pagedllm_core.decode.texts import write_text
from pagedllm_core.errors import InvalidRequestError
from pagedllm_core.params import GuidedParams

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from llguidance._lib import JsonCompileOptions

CACHED_GRAMMARS = 256
MAX_GRAMMAR_CHARACTERS = 1_000_000
MAX_GBNF_CHARACTERS = 20_000  # its conversion takes time with the square of its length
MAX_LITERALS = 64
_SAMPLE = '{"a b": "é 日本 12"}\n'
# As `json.dumps` writes; white space that is left to a model may go on for ever.
_SEPARATORS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar, shared by the requests that use it; nobody advances its matcher.

    Attributes:
        matcher: At the start of an output.
        closing: The shortest output that was found, in tokens.
        vocabulary: What the matchers need of the tokenizer.
    """

    matcher: LLMatcher
    closing: tuple[int, ...]
    vocabulary: Vocabulary

    def start(self, may_end: bool = True) -> Guide:
        """The state of a sequence that has generated nothing.

        Args:
            may_end: Whether an end token may be generated; without it, only a grammar that is finished ends an output.
        """
        return Guide(self.vocabulary, self.matcher.deep_copy(), list(self.closing), may_end)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps the last ones. Used from any thread but the engine's.

    Args:
        tokenizer: The model's transformers tokenizer, or None.
        vocab_size: Width of the logits.
        end_tokens: The model's end tokens.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_tokens: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_tokens = end_tokens
        self._vocabulary: Vocabulary | None = None
        self._grammars: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, guided: GuidedParams) -> Grammar:
        """The grammar of these parameters.

        Raises:
            InvalidRequestError: It cannot be compiled, has no output, or the tokenizer or llguidance is missing.
        """
        try:
            return self._compiled(guided)
        except InvalidRequestError:
            raise
        except (Exception, RecursionError) as error:  # whatever odd input does to the libraries below
            name = next(name for name in ("json", "regex", "grammar", "choice") if getattr(guided, name) is not None)
            raise InvalidRequestError(
                f"guided.{name}: cannot be read: {type(error).__name__}: {str(error)!r:.300}; simplify it"
            ) from error

    def _compiled(self, guided: GuidedParams) -> Grammar:
        key = guided.model_dump_json(exclude_none=True)
        with self._lock:
            found = self._grammars.get(key)
            if found is not None:
                self._grammars.move_to_end(key)
                return found
            vocabulary = self._vocabulary or self._load()
        grammar = _compile(guided, vocabulary, self._added_tokens())
        with self._lock:
            self._grammars[key] = grammar
            while len(self._grammars) > CACHED_GRAMMARS:
                self._grammars.popitem(last=False)
        return grammar

    def __len__(self) -> int:
        """Number of grammars that are kept."""
        return len(self._grammars)

    def _added_tokens(self) -> dict[str, int]:
        """The added tokens that are part of a reply's text."""
        added = self._tokenizer.added_tokens_decoder
        return {token.content: number for number, token in added.items() if not token.special}

    def _load(self) -> Vocabulary:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise InvalidRequestError(
                "guided: needs the package llguidance; install it (pip install 'pagedllm-core[guided]')"
            ) from None
        if self._tokenizer is None or getattr(self._tokenizer, "backend_tokenizer", None) is None:
            raise InvalidRequestError("guided: needs a fast tokenizer, which this model has not; leave guided out")
        if not self._end_tokens:
            raise InvalidRequestError("guided: the model has no end token, so no output could end; leave guided out")
        tokenizer = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=list(self._end_tokens))
        ids = self._tokenizer.encode(_SAMPLE, add_special_tokens=False)
        read = tokenizer.decode_bytes(ids).decode(errors="replace").removeprefix(" ")  # many write one in front
        if self._tokenizer.decode(ids) == _SAMPLE != read:
            raise InvalidRequestError(
                "guided: llguidance reads this model's tokens as other texts than its tokenizer does, so no output "
                "could be held to anything; repair the decoder in the tokenizer.json, or leave guided out"
            )
        self._vocabulary = Vocabulary.of(tokenizer, self._end_tokens)
        return self._vocabulary


def _compile(guided: GuidedParams, vocabulary: Vocabulary, added_tokens: Mapping[str, int]) -> Grammar:
    from llguidance import LLMatcher

    field_name, source = _source(guided, added_tokens)
    found = _literals(source, vocabulary) if guided.grammar is not None else _runs(guided, vocabulary)
    vocabulary = dataclasses.replace(vocabulary, literals=tuple(itertools.islice(found, MAX_LITERALS)))
    matcher = LLMatcher(vocabulary.tokenizer, source, log_level=0)
    if matcher.is_error():
        raise InvalidRequestError(f"guided.{field_name}: cannot be compiled: {_reason(matcher.get_error()):.400}")
    closing = vocabulary.closing(matcher)
    if matcher.is_error():
        raise InvalidRequestError(f"guided.{field_name}: is too large: {matcher.get_error().strip()[:300]}")
    if closing is None:
        raise InvalidRequestError(
            f"guided.{field_name}: an output that satisfies it (of at most {MAX_CLOSING} tokens) could not be found; "
            "simplify it"
        )
    if any(token in vocabulary.end_tokens for token in closing):
        raise InvalidRequestError(
            f"guided.{field_name}: has an end token inside, where the output would end; leave it out"
        )
    return Grammar(matcher, tuple(closing), vocabulary)


def _reason(error: str) -> str:
    """What llguidance says, without its picture of the source and the switches that only its own callers have."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    inner = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
    return f"{lines[0].partition(' Enable ')[0]} {inner}".strip()


def _source(guided: GuidedParams, added_tokens: Mapping[str, int]) -> tuple[str, str]:
    """The field that is given, and its grammar in llguidance's terms."""
    from llguidance import LLMatcher

    if guided.json is not None:
        schema = _read_schema(guided.json)
        prepared = prepare_schema(schema)
        options = cast("JsonCompileOptions", {**_SEPARATORS, **escapes(prepared)})
        return "json", LLMatcher.grammar_from_json_schema(prepared, overrides=options)
    if guided.regex is not None:
        _check_size("regex", guided.regex)
        return "regex", LLMatcher.grammar_from_regex(guided.regex)
    if guided.choice is not None:
        _check_size("choice", "".join(guided.choice))
        return "choice", LLMatcher.grammar_from_lark(_choice(guided.choice, added_tokens))
    text = guided.grammar or ""
    _check_size("grammar", text)
    if "::=" in text:
        if len(text) > MAX_GBNF_CHARACTERS:
            raise InvalidRequestError(
                f"guided.grammar: has {len(text)} characters, more than {MAX_GBNF_CHARACTERS} in GBNF; use Lark"
            )
        from llguidance.gbnf_to_lark import gbnf_to_lark

        text = gbnf_to_lark(text)
    return "grammar", LLMatcher.grammar_from_lark(text)


def _literals(source: str, vocabulary: Vocabulary) -> Iterator[list[int]]:
    """The single tokens and quoted texts of a grammar, and the runs of its schemas' patterns, each as ids."""
    rules = "\n".join(line for line in source.splitlines() if "%json" not in line)
    yield from ([int(token)] for token in re.findall(r"<\[(\d+)\]>", rules))
    for text in re.findall(r'"(?:[^"\\\n]|\\.)*"', rules):
        with contextlib.suppress(ValueError):
            if ids := vocabulary.ids_of(json.loads(text)):
                yield ids
    for schema in re.findall(r"%json (.+)", source):
        with contextlib.suppress(ValueError):
            yield from _plain_runs(_patterns(json.loads(schema)), vocabulary)


def _runs(guided: GuidedParams, vocabulary: Vocabulary) -> Iterator[list[int]]:
    """The runs of plain characters in a regular expression, or in the patterns of a schema, each as ids."""
    patterns = [guided.regex] if guided.regex else _patterns(_read_schema(guided.json)) if guided.json else []
    yield from _plain_runs(patterns, vocabulary)


def _plain_runs(patterns: Iterable[str], vocabulary: Vocabulary) -> Iterator[list[int]]:
    for pattern in patterns:
        for run in re.findall(r"(?:[A-Za-z0-9 _:,@/-]|[^\x00-\x7f]|\\[^\w\s])+", pattern):
            yield vocabulary.ids_of(re.sub(r"\\(.)", r"\1", run))


def _patterns(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str):
            yield schema["pattern"]
        schema = list(schema.values())
    if isinstance(schema, list):
        for item in schema:
            yield from _patterns(item)


def _choice(options: list[str], added_tokens: Mapping[str, int]) -> str:
    """One of some texts. As one terminal there may be thousands; added tokens cannot stand in one."""
    texts = [option for option in options if option]
    if any(token in text for text in texts for token in added_tokens):
        return "start: " + " | ".join(write_text(text, added_tokens) or '""' for text in options)
    alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    if not texts:
        return 'start: ""'
    return f"start: CHOICE{'?' if len(texts) < len(options) else ''}\nCHOICE: {alternatives}"


def _read_schema(given: str | dict[str, Any]) -> dict[str, Any]:
    text = given if isinstance(given, str) else json.dumps(given)
    _check_size("json", text)
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(f"guided.json: is not valid JSON ({error}); give a JSON schema") from None
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"guided.json={text:.40}: must be a JSON object, a schema")
    return schema


def _check_size(name: str, text: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise InvalidRequestError(
            f"guided.{name}: has {len(text)} characters, more than {MAX_GRAMMAR_CHARACTERS}; shorten it"
        )
