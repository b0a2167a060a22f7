"""Grammars for replies: text, tool calls, an answer in JSON, and the reasoning before them.

    start: reasoning? ( TEXT? calls? | calls | answer | calls | answer )

Written in llguidance's dialect of Lark. JSON schemas stand in it as they are, each with its own root.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagedllm_core.chat.formats import ReasoningFormat, ToolFormat
from pagedllm_core.chat.tools import ToolChoice, tool_name, tool_parameters
from pagedllm_core.decode.schema import escapes, prepare_schema
from pagedllm_core.decode.texts import write_text
from pagedllm_core.params import GuidedParams

_PIECE = re.compile(r'"(?:[^"\\]|\\.)*"|[{}]|[:,] ')
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class ReplyRules:
    """What a reply may be.

    Attributes:
        tools: JSON schemas of the tools that may be called.
        choice: Whether and which.
        parallel: Whether there may be several calls.
        strict: Refuse what of the tools' schemas cannot be enforced, instead of leaving it out.
        schema: JSON schema of the answer; with tools, instead of calls. None: text.
        format: How calls are written.
        reasoning: How reasoning is written; None: there is none.
        reasoning_open: True where the prompt has opened it.
    """

    tools: Sequence[Mapping[str, Any]]
    choice: ToolChoice
    parallel: bool
    strict: bool
    schema: Mapping[str, Any] | None
    format: ToolFormat | None
    reasoning: ReasoningFormat | None
    reasoning_open: bool

    @property
    def free(self) -> bool:
        """True where the reply may be plain text."""
        return "TEXT" in (self._answers() or "TEXT")

    def guided(self, added_tokens: Mapping[str, int]) -> GuidedParams | None:
        """What the engine holds the reply to, or None where everything may be written.

        Args:
            added_tokens: The tokenizer's added tokens: a tag that is one of them is written as this one token.
        """
        if self.schema is not None and self._answers() == "final" and self.reasoning is None:
            return GuidedParams(json=dict(self.schema))
        grammar = self.grammar(added_tokens)
        return None if grammar is None else GuidedParams(grammar=grammar)

    def grammar(self, added_tokens: Mapping[str, int]) -> str | None:
        """The grammar, or None where everything may be written.

        Args:
            added_tokens: The tokenizer's added tokens: a tag that is one of them is written as this one token.
        """
        answers = self._answers()
        if answers is None:
            return None
        lines = [f"start: {self._reasoning(added_tokens)}answer"]
        before = ""
        if self.reasoning is not None:
            lines += _up_to("thought", self.reasoning.end, added_tokens)
        if "TEXT" in answers and "calls" in answers and self.format is not None and self._tag:
            lines += _up_to("before", self._tag, added_tokens, self._no_reasoning())
            before = " | before rest"
            lines += self._calls(added_tokens)
        elif "calls" in answers:
            lines += self._calls(added_tokens)
        lines.append(f"answer: {answers}{before}")
        if "final" in answers:
            lines.append(f"final: %json {_schema(self.schema or {}, strict=True)}")
        if "TEXT" in answers:
            lines.append(f"TEXT: {self._text()}")
        return "\n".join(lines)

    @property
    def _tag(self) -> str:
        """What announces calls; empty where a brace at the beginning does."""
        return self.format.tag if self.format else ""

    def _answers(self) -> str | None:
        if self.schema is not None:
            calls = self.tools and self.choice.mode != "none"
            return "calls" if self.choice.mode == "required" else "calls | final" if calls else "final"
        if not self.tools or self.format is None:
            return None
        if self.choice.mode == "none":
            return "TEXT?"
        return "calls" if self.choice.mode == "required" else "(TEXT | calls)?"

    def _reasoning(self, added_tokens: Mapping[str, int]) -> str:
        if self.reasoning is None:
            return ""
        if self.reasoning_open:
            return "thought /\\n*/ "
        return f"({write_text(self.reasoning.begin, added_tokens)} thought /\\n*/)? "

    def _text(self) -> str:
        if self._tag:
            text = _without(self._tag)
        else:  # a brace at the beginning would be read as a call
            text = r"/(.|\n)+/" if self.choice.mode == "none" else r"/\s*[^{\s](.|\n)*/"
        return text + self._no_reasoning()

    def _no_reasoning(self) -> str:
        """What begins as reasoning does is no text."""
        if self.reasoning is None or self.reasoning_open:
            return ""
        return rf" & ~/\s*{_literal(self.reasoning.begin)}(.|\n)*/"

    def _calls(self, added_tokens: Mapping[str, int]) -> list[str]:
        tools = [tool for tool in self.tools if self.choice.name in (None, tool_name(tool))]
        style = self.format
        if style is None:
            return []
        begin, end = write_text(style.begin, added_tokens), write_text(style.end, added_tokens)
        after = write_text(style.begin.removeprefix(self._tag), added_tokens)  # what follows the tag
        separator = json.dumps(style.separator)
        if style.each:
            more = f" ({separator} {begin} call {end})*" if self.parallel else ""
            body = f"call {end}{more}"
        else:
            body = f"call ({separator} call)* {end}" if self.parallel else f"call {end}"
        lines = [f"calls: {begin} {body}", f"rest: {after} {body}"] if self._tag else [f"calls: {body}"]
        lines.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
        for number, tool in enumerate(tools):
            head, tail = (write_text(text, added_tokens) for text in (style.head(tool_name(tool)), style.tail))
            if not self._tag and self.schema is not None:
                head = _apart(style.head(tool_name(tool)))
            lines.append(f"call_{number}: {head} arguments_{number} {tail}")
            schema = {**tool_parameters(tool), "type": "object"}
            lines.append(f"arguments_{number}: %json {_schema(schema, self.strict)}")
        return lines


def _up_to(name: str, tag: str, added_tokens: Mapping[str, int], but: str = "") -> list[str]:
    """A rule for any text and the tag that ends it: llguidance stops at a suffix, and at a single token by itself."""
    if tag in added_tokens:
        return [f"{name}: {name.upper()}? <[{added_tokens[tag]}]>", f"{name.upper()}: {_without(tag)}{but}"]
    terminal = f"{name.upper()}: /(.|\\n)*/{but}"
    return [f"{name}[suffix={json.dumps(tag, ensure_ascii=False)}]: {name.upper()}", terminal]


def _apart(head: str) -> str:
    """The beginning of an object in the pieces that llguidance makes of JSON.

    Of two pieces that may come next it reads the longer one: a head in one piece would be read for any brace, and no
    answer in JSON could begin.
    """
    return " ".join(json.dumps(piece, ensure_ascii=False) for piece in _PIECE.findall(head))


def _schema(schema: Mapping[str, Any], strict: bool) -> str:
    closed = prepare_schema(dict(schema), strict)
    return json.dumps({**closed, "x-guidance": {**_JSON, **escapes(closed), "lenient": not strict}}, ensure_ascii=False)


def _without(tag: str) -> str:
    """All texts, of one character at least, that do not hold the tag."""
    return rf"/(.|\n)+/ & ~/(.|\n)*{_literal(tag)}(.|\n)*/"


def _literal(text: str) -> str:
    """A text in a regular expression."""
    return re.escape(text).replace("/", "\\/")
