"""Takes a reply apart while it arrives: reasoning, text, tool calls.

    reasoning | text | call { name, arguments ... } call ... | text

What is certain is passed on at once; what may be the beginning of a tag or of a call is held until it is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

from pagedllm_core.chat.formats import ReasoningFormat, ToolFormat
from pagedllm_core.chat.tools import InvalidToolCall, Reply, ToolCall, as_call


@dataclass(frozen=True)
class ReplyStyle:
    """What may be in a reply, and how it is written.

    Attributes:
        tools: The format of tool calls; None where there are no tools.
        names: The tools' names.
        reasoning: The format of reasoning; None where the model does none.
        reasoning_open: True where the prompt has opened the reasoning already.
        json: True where the answer, if it is no call, is JSON, which may hold whatever looks like one.
    """

    tools: ToolFormat | None = None
    names: Collection[str] = ()
    reasoning: ReasoningFormat | None = None
    reasoning_open: bool = False
    json: bool = False


@dataclass
class Piece:
    """What is new of a reply.

    Attributes:
        kind: "text" and "reasoning" carry `text`; "call" begins a call, whose `name` and `id` are known; "arguments"
            carries more of a call's arguments, as JSON text; "invalid" carries what is no call, with the `error`.
        text: See `kind`.
        index: Which call it is of, from 0.
        name: The function's name.
        id: The call's id.
        error: Why it is no call.
    """

    kind: Literal["text", "reasoning", "call", "arguments", "invalid"]
    text: str = ""
    index: int = 0
    name: str = ""
    id: str = ""
    error: str = ""


@dataclass
class ReplyReader:
    """Reads one reply.

    Args:
        style: What to look for.
    """

    style: ReplyStyle
    _held: str = ""
    _mode: str = "start"
    _leading: bool = False  # white space that comes now is no part of the text
    _plain: bool = False  # the answer is JSON: nothing in it is a tag
    _calls: int = 0
    _current: ToolCall | None = None
    _place: int = 0  # how much of the held call was passed on, within its arguments
    _depth: int = 0
    _quoted: bool = False
    _failed: int = 0  # what was meant as a call and is none
    _escaped: bool = False
    _pieces: list[Piece] = field(default_factory=list)

    def feed(self, text: str) -> list[Piece]:
        """Add text; returns what is certain now."""
        self._held += text
        return self._take(last=False)

    def finish(self) -> list[Piece]:
        """The rest, once the reply is complete."""
        return self._take(last=True)

    def _take(self, last: bool) -> list[Piece]:
        while getattr(self, f"_read_{self._mode}")(last):
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def _read_start(self, last: bool) -> bool:
        """What kind of reply it is shows in its first characters."""
        reasoning = self.style.reasoning
        if reasoning is not None and not self.style.reasoning_open:
            rest = self._held.lstrip()
            if not rest.startswith(reasoning.begin):
                if reasoning.begin.startswith(rest) and not last:
                    return False
                return self._go("open")
            self._held = rest[len(reasoning.begin) :]
        return self._go("open") if reasoning is None else self._go("reasoning", leading=True)

    def _read_reasoning(self, last: bool) -> bool:
        end = self.style.reasoning.end if self.style.reasoning else ""
        place = self._held.find(end)
        if place < 0:
            self._pass_rest("reasoning", end, last)
            return False
        self._pass_on("reasoning", place, "cut")
        self._held = self._held[len(end) :]
        return self._go("open", leading=True)

    def _read_open(self, last: bool) -> bool:
        """Before the first character of the answer: a brace may begin a call."""
        tools = self.style.tools
        if tools is not None and not tools.begin:
            if not self._held.strip() and not last:
                return False
            if self._held.lstrip().startswith("{"):
                return self._tell_call(tools, last) if self.style.json else self._go("call", self._leading)
        elif tools is not None and self.style.json:
            tag, rest = tools.tag, self._held.lstrip()
            if tag.startswith(rest[: len(tag)]) and len(rest) < len(tag) and not last:
                return False
            self._plain = not rest.startswith(tag)
        return self._go("text", self._leading)

    def _tell_call(self, tools: ToolFormat, last: bool) -> bool:
        """Whether an object is a call shows in how it begins: where an answer is held, calls have one form."""
        rest, heads = self._held.lstrip(), [tools.head(name) + "{" for name in self.style.names]
        if any(rest.startswith(head) for head in heads):
            return self._go("call", self._leading)
        if not last and any(head.startswith(rest) for head in heads):
            return False
        return self._go("text", self._leading)

    def _read_text(self, last: bool) -> bool:
        tools = self.style.tools
        tag = tools.tag if tools and not self._plain else ""
        place = self._held.find(tag) if tag else -1
        if place < 0:
            self._pass_rest("text", tag, last)
            return False
        self._pass_on("text", place, "cut")
        self._held = self._held[len(tag) :]
        return self._go("call")

    def _pass_rest(self, kind: Literal["text", "reasoning"], tag: str, last: bool) -> None:
        """All that is held, but for what the tag may begin with."""
        held_back = 0 if last or not tag else partial(self._held, tag)
        self._pass_on(kind, len(self._held) - held_back, "last" if last else "open")

    def _pass_on(self, kind: Literal["text", "reasoning"], count: int, ending: Literal["open", "cut", "last"]) -> None:
        """Pass on the first characters that are held.

        White space around reasoning and around calls is no part of the text; where more may come it is held. A text
        without either is left as it is.
        """
        text, self._held = self._held[:count], self._held[count:]
        if self._leading:
            text = text.lstrip()
        calls = self.style.tools is not None and bool(self.style.tools.begin)
        kept = text.rstrip()
        if ending == "open" and (kind == "reasoning" or calls or self._calls):
            self._held = text[len(kept) :] + self._held
            text = kept
        elif ending == "cut" or kind == "reasoning" or self._calls:
            text = kept
        if text:
            self._leading = False
            self._pieces.append(Piece(kind, text))

    def _read_call(self, last: bool) -> bool:
        """Within a call: its arguments are passed on as they come."""
        tools = self.style.tools
        if self._current is None and tools is not None:
            head = tools.read_head(self._held)
            if head is not None:
                self._begin(*head)
        if self._current is not None:
            return self._read_arguments(last)
        if tools is not None and tools.mark:
            return self._skip_call(tools, last)
        body = self._held.lstrip() if tools is None else tools.body(self._held)
        try:
            value, end = json.JSONDecoder().raw_decode(body)
        except ValueError as error:
            if last:
                self._fail(self._held, f"not valid JSON: {error}")
                self._held = ""
            return False
        return self._whole(body, value, end)

    def _skip_call(self, tools: ToolFormat, last: bool) -> bool:
        """What shows no name and arguments up to the next call, or to the end, is none."""
        text, begin, rest = self._held.partition(tools.begin)
        if begin or last:
            self._fail(text, f"no name, {tools.mark} and arguments")
            self._held = begin + rest
        return bool(begin) and self._go("text", leading=True)

    def _whole(self, body: str, value: object, end: int) -> bool:
        """A value that is complete, in another form than the usual one."""
        tools = self.style.tools
        try:
            call = as_call(value)
        except ValueError as error:
            if tools is not None and not tools.begin:
                return self._go("text", self._leading)  # JSON that is no call is an answer
            self._held = body[end:]
            self._fail(body[:end], str(error))
            return self._after()
        if tools is not None and not tools.begin and self.style.names and call.name not in self.style.names:
            return self._go("text", self._leading)
        self._held = body[end:]
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        self._pieces += [
            Piece("call", index=self._calls, name=call.name, id=call.id),
            Piece("arguments", arguments, index=self._calls, id=call.id),
        ]
        self._calls += 1
        return self._after()

    def _begin(self, name: str, place: int) -> None:
        tools = self.style.tools
        if tools is not None and not tools.begin and self.style.names and name not in self.style.names:
            return
        self._current = ToolCall(name, {})
        self._held = self._held[place:]
        self._place, self._depth, self._quoted, self._escaped = 0, 0, False, False
        self._pieces.append(Piece("call", index=self._calls, name=name, id=self._current.id))

    def _read_arguments(self, last: bool) -> bool:
        if self._current is None:
            return False
        start, text = self._place, self._held
        while self._place < len(text) and (self._depth or not self._place):
            self._scan(text[self._place])
            self._place += 1
        if self._place > start:
            piece = Piece("arguments", text[start : self._place], index=self._calls, id=self._current.id)
            self._pieces.append(piece)
        if self._depth or not self._place:
            return False
        rest = text[self._place :].lstrip()
        if not rest and not last:
            return False
        self._held = rest.removeprefix(self.style.tools.tail if self.style.tools else "")
        self._current, self._calls, self._place = None, self._calls + 1, 0
        return self._after()

    def _scan(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._quoted:
            self._escaped = character == "\\"
            self._quoted = character != '"'
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1

    def _fail(self, text: str, error: str) -> None:
        begin = self.style.tools.tag if self.style.tools else ""
        self._pieces.append(Piece("invalid", begin + text.rstrip(), index=self._failed, error=error))
        self._failed += 1

    def _after(self) -> bool:
        return self._go("between")

    def _read_between(self, last: bool) -> bool:
        """After a call: its end, another call, or text."""
        tools = self.style.tools
        if tools is None:
            return self._go("text")
        rest = self._held.lstrip()
        for skipped in (tools.end.strip(), tools.separator.strip()):
            if skipped and rest.startswith(skipped):
                self._held = rest[len(skipped) :]
                return True
            if skipped and skipped.startswith(rest) and not last:
                return False
        if not rest:
            self._held = "" if last else self._held
            return False
        self._held = rest
        again = rest.startswith("{") and (not tools.begin or not tools.each)
        return self._go("call" if again else "text", leading=True)

    def _go(self, mode: str, leading: bool = False) -> bool:
        self._mode, self._leading = mode, leading
        return True


def partial(text: str, tag: str) -> int:
    """Length of the longest end of `text` that `tag` may begin with."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0


def read_reply(text: str, style: ReplyStyle) -> Reply:
    """Take a complete reply apart."""
    reader = ReplyReader(style)
    return collect([*reader.feed(text), *reader.finish()])


def collect(pieces: list[Piece]) -> Reply:
    """The reply that pieces make up."""
    reply = Reply("".join(_texts(pieces, "text")), reasoning="".join(_texts(pieces, "reasoning")))
    for begin in (piece for piece in pieces if piece.kind == "call"):
        parts = [piece.text for piece in pieces if piece.kind == "arguments" and piece.index == begin.index]
        text = "".join(parts)
        try:
            arguments = json.loads(text)
        except ValueError as error:
            wrong = InvalidToolCall(text, f"not valid JSON: {error}", begin.id, begin.name)
            reply.invalid.append(wrong)
        else:
            reply.tool_calls.append(ToolCall(begin.name, arguments, begin.id))
    reply.invalid += [InvalidToolCall(piece.text, piece.error) for piece in pieces if piece.kind == "invalid"]
    return reply


def _texts(pieces: list[Piece], kind: str) -> Iterator[str]:
    return (piece.text for piece in pieces if piece.kind == kind)
