"""How model families write tool calls and reasoning, found in their chat templates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from pagedllm_core.errors import InvalidRequestError

Format = TypeVar("Format")


@dataclass(frozen=True)
class ToolFormat:
    """How a reply writes its tool calls.

        begin  between { "name": ..., "<arguments>": {...} } between ... end

    Attributes:
        name: What `tool_parser` calls it.
        begin: What announces calls; empty where a reply that starts with a brace is one.
        end: What follows the last of them.
        each: True where every call has its own `begin` and `end`.
        separator: Between two calls.
        arguments: The key of the arguments.
    """

    name: str
    begin: str
    end: str
    each: bool
    separator: str
    arguments: str = "arguments"


HERMES = ToolFormat("hermes", "<tool_call>\n", "\n</tool_call>", True, "\n")
LLAMA = ToolFormat("llama3_json", "", "", True, "; ", "parameters")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS][", "]", False, ", ")
GENERIC = ToolFormat("json", "", "", True, "\n")
TOOL_FORMATS = {one.name: one for one in (HERMES, LLAMA, MISTRAL, GENERIC)}
_ALIASES = {"qwen": "hermes", "llama": "llama3_json", "llama4_json": "llama3_json", "generic": "json"}


@dataclass(frozen=True)
class ReasoningFormat:
    """How a reply writes its reasoning.

    Attributes:
        name: What `reasoning_parser` calls it.
        begin: What opens it.
        end: What closes it.
    """

    name: str
    begin: str
    end: str


THINK = ReasoningFormat("think", "<think>", "</think>")
MAGISTRAL = ReasoningFormat("magistral", "[THINK]", "[/THINK]")
REASONING_FORMATS = {one.name: one for one in (THINK, MAGISTRAL)}
_REASONING_ALIASES = {"qwen3": "think", "deepseek_r1": "think", "mistral": "magistral"}


def tool_format(template: str, given: str | None = None) -> ToolFormat:
    """The format of a model's tool calls.

    Args:
        template: Source of its chat template.
        given: The caller's choice instead, by name.

    Raises:
        InvalidRequestError: There is no format of this name.
    """
    if given is not None:
        return _by_name("tool_parser", given, TOOL_FORMATS, _ALIASES)
    if "<tool_call>" in template:
        return HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<|python_tag|>" in template or ('"parameters"' in template and "ipython" in template):
        return LLAMA
    return GENERIC


def reasoning_format(template: str, given: str | None = None) -> ReasoningFormat | None:
    """The format of a model's reasoning; None where its template shows none.

    Args:
        template: Source of its chat template.
        given: The caller's choice instead, by name.

    Raises:
        InvalidRequestError: There is no format of this name.
    """
    if given is not None:
        return _by_name("reasoning_parser", given, REASONING_FORMATS, _REASONING_ALIASES)
    return next((one for one in REASONING_FORMATS.values() if one.end in template), None)


def _by_name(field: str, given: str, formats: dict[str, Format], aliases: dict[str, str]) -> Format:
    found = formats.get(aliases.get(given, given))
    if found is None:
        raise InvalidRequestError(f"{field}={given!r}: is none of {', '.join(sorted({*formats, *aliases}))}")
    return found
