"""Conversations as lists of `{"role": ..., "content": ...}`, and the shapes a strict template asks for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pagedllm_core.chat.formats import GENERIC, ToolFormat

Message = dict[str, Any]

_ROLES = {"developer": "system", "function": "tool", "chatbot": "assistant", "model": "assistant", "ai": "assistant"}


def template_role(role: str) -> str:
    """The name that chat templates use for a role: system, user, assistant or tool where it is a synonym of one."""
    return _ROLES.get(role, role)


def simpler_forms(messages: Sequence[Mapping[str, Any]], knows_tools: bool = True) -> Iterator[list[Message]]:
    """Forms of a conversation for a template that refused it, the least changed first.

    First, the ids of calls become nine letters and digits, as Mistral's templates demand; then a system message after
    the start becomes a user's, and neighbours of the same role become one turn; then calls of one turn become turns of
    their own, each with its result, as Llama 3's demand; then, for a template that does not know tools, calls and
    results become text. With each of the last three, the first system message is put in front of the user's first turn
    as well.
    """
    short = [_with_short_ids(message) for message in messages]
    merged = _merge_neighbours(_fold_late_system(short))
    forms = [merged, _one_call_a_turn(merged)]
    if not knows_tools:
        forms.append(_merge_neighbours(_as_text(merged)))
    seen = [[dict(message) for message in messages]]
    for form in (short, *(two for one in forms for two in (one, _no_system(one)))):
        if form not in seen:
            seen.append(form)
            yield form


def _no_system(messages: list[Message]) -> list[Message]:
    """With the first system message in front of the user's first turn."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    return _merge_neighbours([{**messages[0], "role": "user"}, *messages[1:]])


def _one_call_a_turn(messages: Sequence[Message]) -> list[Message]:
    """Turns with several calls as turns with one each, followed by its result."""
    turns: list[Message] = []
    waiting: list[Message] = []  # turns of further calls, until the results before them have come
    for message in messages:
        if message["role"] == "tool" and waiting:
            known = [turn["tool_calls"][0].get("id") for turn in waiting]
            place = known.index(message["tool_call_id"]) if message.get("tool_call_id") in known else 0
            turns += [waiting.pop(place), message]
            continue
        turns += waiting
        waiting = []
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            turns.append(message)
            continue
        waiting = [{**message, "tool_calls": [call], **({"content": ""} if i else {})} for i, call in enumerate(calls)]
    return turns + waiting


def _with_short_ids(message: Mapping[str, Any]) -> Message:
    changed = _with_short_id(message, "tool_call_id")
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [_with_short_id(call, "id") for call in calls]
    return changed


def _with_short_id(named: Mapping[str, Any], key: str) -> dict[str, Any]:
    identity = named.get(key)
    if not isinstance(identity, str) or re.fullmatch("[A-Za-z0-9]{9}", identity):
        return dict(named)
    return {**named, key: hashlib.sha256(identity.encode(errors="replace")).hexdigest()[:9]}


def _fold_late_system(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    folded: list[Message] = []
    started = False
    for message in messages:
        started = started or message["role"] != "system"
        late = started and message["role"] == "system"
        folded.append({**message, "role": "user"} if late else dict(message))
    return folded


def with_listed_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], written: ToolFormat
) -> list[Message]:
    """The conversation for a template that knows no tools: they are listed in the system message."""
    lines = [json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools]
    example = f"{written.begin}{written.head('<name>')}<arguments>{written.tail}{written.end}"
    text = "You can call these functions:\n" + "\n".join(lines) + f"\nTo call one, answer with {example}"
    first, rest = (messages[0], messages[1:]) if messages and messages[0]["role"] == "system" else (None, messages)
    content = text if first is None else _join(first.get("content"), text)
    return [{"role": "system", "content": content}, *_as_text(rest, written)]


def _as_text(messages: Sequence[Mapping[str, Any]], written: ToolFormat = GENERIC) -> list[Message]:
    """The conversation without what such a template would leave out: calls, and whose results a turn holds."""
    names: dict[Any, str] = {}
    turns: list[Message] = []
    for message in messages:
        calls = message.get("tool_calls") or ()
        functions = [call.get("function", call) for call in calls]
        names.update((call.get("id"), function["name"]) for call, function in zip(calls, functions, strict=True))
        turn = {key: value for key, value in message.items() if key != "tool_calls"}
        if calls:
            turn["content"] = _join(message.get("content"), _written(functions, written))
        elif message["role"] == "tool":
            name = message.get("name") or names.get(message.get("tool_call_id"))
            turn["role"] = "user"
            turn["content"] = _join(name and f"Result of {name}:", message.get("content"))
        turns.append(turn)
    return turns


def _written(functions: Sequence[Mapping[str, Any]], written: ToolFormat) -> str:
    """Calls as a reply of this format has them."""
    texts = []
    for function in functions:
        arguments = function.get("arguments") or {}
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        texts.append(f"{written.head(function['name'])}{text}{written.tail}")
    if not written.each:
        return written.begin + written.separator.join(texts) + written.end
    return written.separator.join(written.begin + text + written.end for text in texts)


def _merge_neighbours(messages: Sequence[Message]) -> list[Message]:
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        if last is None or last["role"] != message["role"] or message["role"] == "tool":
            merged.append(message)
            continue
        both: Message = {**last, **message, "content": _join(last.get("content"), message.get("content"))}
        if calls := [*(last.get("tool_calls") or ()), *(message.get("tool_calls") or ())]:
            both["tool_calls"] = calls
        merged[-1] = both
    return merged


def _join(first: Any, second: Any) -> Any:
    if not first or not second:
        return first or second
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    return [*_parts(first), *_parts(second)]


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
