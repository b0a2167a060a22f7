"""Conversations as lists of `{"role": ..., "content": ...}`, and the shapes a strict template asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = dict[str, Any]

_ROLES = {"developer": "system", "function": "tool", "chatbot": "assistant", "model": "assistant", "ai": "assistant"}


def template_role(role: str) -> str:
    """The name that chat templates use for a role: system, user, assistant or tool where it is a synonym of one."""
    return _ROLES.get(role, role)


def simpler_forms(messages: Sequence[Mapping[str, Any]]) -> Iterator[list[Message]]:
    """Forms of a conversation for a template that refused it, the least changed first.

    First, a system message after the start becomes a user's, and neighbours of the same role become one turn; then the
    first system message is put in front of the user's first turn as well.
    """
    merged = _merge_neighbours(_fold_late_system(messages))
    if merged != [dict(message) for message in messages]:
        yield merged
    if len(merged) > 1 and merged[0]["role"] == "system":
        yield _merge_neighbours([{**merged[0], "role": "user"}, *merged[1:]])


def _fold_late_system(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    folded: list[Message] = []
    started = False
    for message in messages:
        started = started or message["role"] != "system"
        late = started and message["role"] == "system"
        folded.append({**message, "role": "user"} if late else dict(message))
    return folded


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
