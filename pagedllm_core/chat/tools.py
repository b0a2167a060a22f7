"""Tool calls in a model's reply, as Hermes and Qwen write them.

<tool_call>{"name": ..., "arguments": {...}}</tool_call>
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

from pagedllm_core.errors import InvalidRequestError

OPEN_TAG = "<tool_call>"
CLOSE_TAG = "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """A call the model asks for.

    Attributes:
        name: The function's name.
        arguments: Its arguments by name.
        id: Unique; the tool's answer refers to it.
    """

    name: str
    arguments: dict[str, Any]
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex}")


@dataclass(frozen=True)
class InvalidToolCall:
    """What stood between the tags where no call could be read.

    Attributes:
        text: The text as written, from the opening tag on.
        error: What is wrong with it.
        id: Unique.
    """

    text: str
    error: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex}")


@dataclass
class Reply:
    """A model's reply, taken apart.

    Attributes:
        content: The text outside the tool calls.
        tool_calls: The calls, in order.
        invalid: What looked like a call and was none.
    """

    content: str
    tool_calls: list[ToolCall] = field(default_factory=list)
    invalid: list[InvalidToolCall] = field(default_factory=list)


def parse_reply(text: str) -> Reply:
    """Take a complete reply apart. Text without tags is all content, unchanged."""
    if OPEN_TAG not in text:
        return Reply(text)
    reply, content, position = Reply(""), [], 0
    while (start := text.find(OPEN_TAG, position)) >= 0:
        content.append(text[position:start])
        call, position = _read_call(text, start + len(OPEN_TAG))
        if isinstance(call, ToolCall):
            reply.tool_calls.append(call)
        else:
            reply.invalid.append(call)
    content.append(text[position:])
    reply.content = "".join(content).strip()
    return reply


def _read_call(text: str, start: int) -> tuple[ToolCall | InvalidToolCall, int]:
    """The call that begins at `start`, and where the text goes on."""
    body = len(text) - len(text[start:].lstrip())
    try:
        # The JSON's own end counts, not the next tag: an argument may hold the tag as text.
        value, end = json.JSONDecoder().raw_decode(text, body)
    except ValueError as error:
        close = text.find(CLOSE_TAG, start)
        end = len(text) if close < 0 else close
        return InvalidToolCall(OPEN_TAG + text[start:end].rstrip(), f"not valid JSON: {error}"), _after_tag(text, end)
    after = _after_tag(text, end)
    try:
        return _as_call(value), after
    except ValueError as error:
        return InvalidToolCall(OPEN_TAG + text[start:end], str(error)), after


def _after_tag(text: str, end: int) -> int:
    rest = text[end:].lstrip()
    return len(text) - len(rest) + len(CLOSE_TAG) if rest.startswith(CLOSE_TAG) else end


def _as_call(value: Any) -> ToolCall:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError('not an object with a "name"')
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError('"arguments" is not an object')
    return ToolCall(value["name"], arguments)


class ReplyStream:
    """Takes a reply apart while it arrives: text goes through at once, tool calls are read at the end."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> str:
        """Add text; returns what is certainly content."""
        self._held += text
        start = self._held.find(OPEN_TAG)
        if start < 0:
            start = len(self._held) - _partial_tag(self._held)
        ready, self._held = self._held[:start], self._held[start:]
        return ready

    def finish(self) -> Reply:
        """The rest, once the reply is complete."""
        return parse_reply(self._held)


def _partial_tag(text: str) -> int:
    """Length of the longest end of `text` that a tag may begin with."""
    for length in range(min(len(OPEN_TAG) - 1, len(text)), 0, -1):
        if text.endswith(OPEN_TAG[:length]):
            return length
    return 0


def check_tool_choice(tool_choice: Any) -> bool:
    """Whether tools may be called at all: False for "none".

    Raises:
        InvalidRequestError: The choice needs guided decoding, which does not exist yet.
    """
    if tool_choice in (None, "auto", False):
        return True
    if tool_choice == "none":
        return False
    raise InvalidRequestError(
        f'tool_choice={tool_choice!r}: not supported yet (it needs guided decoding); use None, "auto" or "none"'
    )
