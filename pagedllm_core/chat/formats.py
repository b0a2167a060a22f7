"""How model families write tool calls and reasoning, found in their chat templates."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TypeVar

from pagedllm_core.errors import InvalidRequestError

Format = TypeVar("Format")
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_CALL_ID = "[CALL_ID]"


@dataclass(frozen=True)
class ToolFormat:
    """How a reply writes its tool calls.

        begin  { "name": ..., "<arguments>": {...} }  separator ... end
        begin  name <mark> {...}  separator ... end

    Attributes:
        name: What `tool_parser` calls it.
        begin: What announces calls; empty where a reply that starts with a brace is one.
        end: What follows the last of them.
        each: True where every call has its own `begin` and `end`.
        separator: Between two calls.
        arguments: The key of the arguments.
        mark: Between a name that stands bare and the arguments; empty where both stand in a JSON object.
    """

    name: str
    begin: str
    end: str
    each: bool
    separator: str
    arguments: str = "arguments"
    mark: str = ""

    @property
    def tag(self) -> str:
        """The mark in `begin`, which no text holds: a list's bracket comes after it."""
        return self.begin.strip().removesuffix("[")

    def body(self, text: str) -> str:
        """What follows the mark, without the bracket of the list where calls stand in one."""
        text = text.lstrip()
        return text.removeprefix("[").lstrip() if self.begin.endswith("[") else text

    def head(self, name: str) -> str:
        """What is written before a call's arguments."""
        if self.mark:
            return name + self.mark
        return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{self.arguments}": '

    @property
    def tail(self) -> str:
        """What is written after a call's arguments."""
        return "" if self.mark else "}"

    def read_head(self, text: str) -> tuple[str, int] | None:
        """The name of the call that begins here, and where its arguments do; None where that does not show, or not yet.

        Behind a bare name there may be an id, which is passed over: nothing says that it is unique.
        """
        if not self.mark:
            body = self.body(text)
            head = _HEAD.match(body)
            try:
                return None if head is None else (json.loads(head.group(1)), len(text) - len(body) + head.end())
            except ValueError:  # an escape that JSON does not know
                return None
        before, _, after = text.partition(self.mark)
        name, arguments = before.partition(_CALL_ID)[0].strip(), after.lstrip()
        if not name or self.begin in before or not arguments.startswith("{"):
            return None
        return name, len(text) - len(arguments)


HERMES = ToolFormat("hermes", "<tool_call>\n", "\n</tool_call>", True, "\n")
LLAMA = ToolFormat("llama3_json", "", "", True, "; ", "parameters")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS][", "]", False, ", ")
MISTRAL_V11 = ToolFormat("mistral_v11", "[TOOL_CALLS]", "", True, "", mark="[ARGS]")
GRANITE = ToolFormat("granite", "<|tool_call|>[", "]", False, ", ")
GENERIC = ToolFormat("json", "", "", True, "\n")
TOOL_FORMATS = {one.name: one for one in (HERMES, LLAMA, MISTRAL, MISTRAL_V11, GRANITE, GENERIC)}
_ALIASES = {
    "qwen": "hermes",
    "llama": "llama3_json",
    "llama4_json": "llama3_json",
    "mistral_v13": "mistral_v11",
    "generic": "json",
}


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
        return MISTRAL_V11 if MISTRAL_V11.mark in template else MISTRAL
    if GRANITE.tag in template:
        return GRANITE
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
