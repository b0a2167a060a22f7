"""Tools: what a caller may offer and demand, and the calls in a reply."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pagedllm_core.errors import InvalidRequestError


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
    """What stood where a call was announced and could not be read as one.

    Attributes:
        text: The text as written.
        error: What is wrong with it.
        id: Unique.
        name: The function's name, where that could be read.
    """

    text: str
    error: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex}")
    name: str | None = None


@dataclass
class Reply:
    """A model's reply, taken apart.

    Attributes:
        content: The text outside reasoning and tool calls.
        reasoning: What the model thought before it answered.
        tool_calls: The calls, in order.
        invalid: What looked like a call and was none.
    """

    content: str
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    invalid: list[InvalidToolCall] = field(default_factory=list)


def as_call(value: Any) -> ToolCall:
    """A call from its JSON.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError('not an object with a "name"')
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError('"arguments" is not an object')
    return ToolCall(value["name"], arguments)


@dataclass(frozen=True)
class ToolChoice:
    """Whether and which tools are called.

    Attributes:
        mode: "auto" leaves it to the model, "none" forbids calls, "required" demands one.
        name: The one tool that is demanded, or None.
    """

    mode: Literal["auto", "none", "required"] = "auto"
    name: str | None = None


AUTO = ToolChoice()


def tool_choice(given: Any, tools: Sequence[Mapping[str, Any]]) -> ToolChoice:
    """What a caller's `tool_choice` asks for.

    Args:
        given: None, "auto", "none", "any", "required", True, a tool's name, or OpenAI's dictionary of one.
        tools: JSON schemas of the tools.

    Raises:
        InvalidRequestError: It names no tool, or demands one where there are none.
    """
    if given in (None, False, "auto", ""):
        return AUTO
    if given == "none":
        return ToolChoice("none")
    if not tools:
        raise InvalidRequestError(f"tool_choice={given!r}: demands a call, but there are no tools; give tools")
    if given is True or given in ("any", "required"):
        return ToolChoice("required", tool_name(tools[0]) if given is True and len(tools) == 1 else None)
    name = given
    if isinstance(given, Mapping):
        kind = given.get("type")
        if kind in ("auto", "none", "any", "required") and "name" not in given:
            return tool_choice(kind, tools)
        inner = given.get("function")
        name = inner.get("name") if isinstance(inner, Mapping) else given.get("name")
    names = [tool_name(tool) for tool in tools]
    if name not in names:
        raise InvalidRequestError(
            f"tool_choice={given!r}: is no tool; use one of {', '.join(names)}, or auto, none, any, required"
        )
    return ToolChoice("required", name)


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name of a tool from its JSON schema.

    Raises:
        InvalidRequestError: It has none.
    """
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(f"tools: {str(tool)!r:.80} has no name; give OpenAI's form of a function")
    name: str = function["name"]
    return name


def tool_parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of a tool's arguments."""
    parameters = tool.get("function", tool).get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InvalidRequestError(f"tools: the parameters of {tool_name(tool)!r} must be a JSON schema, a dictionary")
    return {"type": "object", **parameters} if parameters else {"type": "object", "properties": {}}
