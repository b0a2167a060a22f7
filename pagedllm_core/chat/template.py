"""Chat templates: from a conversation to the prompt the model was trained on."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from pagedllm_core.chat.messages import Message, simpler_forms
from pagedllm_core.chat.sandbox import compile_template, render_bounded
from pagedllm_core.errors import InvalidRequestError, check_unicode
from pagedllm_core.intake import refuse_endless

# Put behind the text that is to be continued, and cut off after rendering. The last space shows whether the template
# trims its messages.
_END_OF_CONTENT = "\ue000pagedllm-continue\ue000 "
_TEXT_KEYS = {"text", "thinking", "reasoning", "content"}  # where a part of a message holds its text


class ChatTemplate:
    """A model's chat template, or the caller's in its place.

    Args:
        tokenizer: The model's transformers tokenizer.
        chat_template: A Jinja template, the path of a file that holds one, or the name of one of the model's.

    Raises:
        InvalidRequestError: The file cannot be read.
    """

    def __init__(self, tokenizer: Any, chat_template: str | os.PathLike[str] | None = None) -> None:
        self._tokenizer = tokenizer
        own = getattr(tokenizer, "chat_template", None)
        self._named: dict[str, str] = dict(own) if isinstance(own, Mapping) else {"default": own} if own else {}
        self._given = None if chat_template is None else self._read(chat_template)

    def source(self, tools: Sequence[Any] | None = None) -> str:
        """The template's text: the caller's, or the model's own for these tools.

        Raises:
            InvalidRequestError: The model has none.
        """
        if self._given is not None:
            return self._given
        name = "tool_use" if tools and "tool_use" in self._named else "default"
        if name not in self._named:
            hint = f"; or name one of the model's: {', '.join(sorted(self._named))}" if self._named else ""
            raise InvalidRequestError(
                "chat_template: the model's tokenizer has no default chat template; give chat_template= (a Jinja "
                f"template or the path of a file with one){hint}, or use raw completion"
            )
        return self._named[name]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        simplify: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text.

        Args:
            messages: The conversation; each message has a `role`, and mostly `content`.
            tools: JSON schemas of functions the model may call.
            add_generation_prompt: End with the start of an assistant's turn; on unless a message is continued.
            continue_final_message: End right after the content of the last message, which must be the assistant's.
            simplify: Where the template refuses the conversation, try it with short ids of calls, same-role neighbours
                merged and late system messages folded in.
            **variables: Further variables for the template.

        Raises:
            InvalidRequestError: There is no template, it refuses the conversation, or it exceeds the sandbox's bounds.
        """
        conversation: list[Message] = _plain(list(messages), "messages")
        _check_messages(conversation)
        if continue_final_message:
            if add_generation_prompt:
                raise InvalidRequestError(
                    "continue_final_message=True: contradicts add_generation_prompt=True; choose one of them"
                )
            conversation = _mark_end(conversation)
        variables = _plain(variables, "chat_template_kwargs")
        variables["tools"] = _plain(list(tools), "tools") if tools else None
        variables["add_generation_prompt"] = (
            not continue_final_message if add_generation_prompt is None else add_generation_prompt
        )
        variables.setdefault("documents", None)
        for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
            token = getattr(self._tokenizer, name, None)
            if token is not None:
                variables.setdefault(name, str(token))
        text = self._render(self.source(tools), conversation, variables, simplify)
        return _cut_at_mark(text) if continue_final_message else text

    def shows_tools(self, tools: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the template puts tools that it is given into the prompt; some look for them elsewhere."""
        return _shows_tools(self.source(tools))

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Token ids of a rendered text. Templates write the start token themselves, so none is added.

        Args:
            text: What was rendered.
            limit: The context in tokens, where a text of many times that is to be refused by its beginning.

        Raises:
            InvalidRequestError: The text is not valid Unicode.
            ContextLengthError: See `limit`.
        """
        check_unicode("messages", text)
        if limit is not None:
            refuse_endless(text, self._tokenizer, limit)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _read(self, given: str | os.PathLike[str]) -> str:
        if not isinstance(given, str | os.PathLike):  # an integer would be opened as a file descriptor
            raise InvalidRequestError(f"chat_template={given!r:.80}: must be a Jinja template or a file of one")
        if isinstance(given, str) and given in self._named:
            return self._named[given]
        if isinstance(given, str) and ("{" in given or "\n" in given):
            return given
        try:
            with open(given, encoding="utf-8") as file:
                return file.read()
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise InvalidRequestError(
                f"chat_template={str(given)!r:.120}: neither a Jinja template nor a readable file ({error})"
            ) from None

    @staticmethod
    def _render(source: str, messages: list[Message], variables: dict[str, Any], simplify: bool) -> str:
        try:
            return _rendered(source, messages, variables)
        except InvalidRequestError as refusal:
            for simpler in simpler_forms(messages, "tool" in source) if simplify else ():
                try:
                    return _rendered(source, simpler, variables)
                except InvalidRequestError:
                    continue
            raise refusal


@functools.lru_cache(maxsize=64)
def _shows_tools(source: str) -> bool:
    tool = {"type": "function", "function": {"name": "probed_tool", "description": "", "parameters": {}}}
    try:
        text = _rendered(source, [{"role": "user", "content": "Hi"}], {"tools": [tool], "add_generation_prompt": True})
    except InvalidRequestError:  # it may want more than that; what it makes of the conversation itself will show
        return "tools" in source
    return "probed_tool" in text


def _rendered(source: str, messages: list[Message], variables: dict[str, Any]) -> str:
    try:
        return render_bounded(compile_template(source), {**variables, "messages": messages})
    except jinja2.TemplateError as error:
        raise InvalidRequestError(f"chat_template: {error.message or type(error).__name__}") from error
    except RecursionError as error:
        raise InvalidRequestError("chat_template: nested too deeply") from error
    except Exception as error:  # whatever a template does to its values
        raise InvalidRequestError(f"chat_template: {type(error).__name__}: {error}") from error


def _plain(value: Any, field: str) -> Any:
    """A copy made of JSON's types only, so that a template meets no object with methods of its own."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, field) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, field) for item in value]
    raise InvalidRequestError(
        f"{field}: holds a {type(value).__name__}, which a chat template cannot take; use text, numbers, lists, dicts"
    )


def _check_messages(messages: list[Message]) -> None:
    if not messages:
        raise InvalidRequestError("messages: is empty; give at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(f"messages[{number}]={message!r:.80}: must be a dict with a 'role'")
        _check_content(f"messages[{number}]['content']", message.get("content"))


def _check_content(field: str, content: Any) -> None:
    """Text, a tool's result, or parts that all hold text: a template would pass over others in silence."""
    if content is None or isinstance(content, str | Mapping):
        return
    if not isinstance(content, list | tuple):
        raise InvalidRequestError(f"{field}={content!r:.80}: must be text, or a list of parts with text")
    for part in content:
        if not isinstance(part, str) and not (isinstance(part, Mapping) and _TEXT_KEYS & part.keys()):
            kind = part.get("type", part) if isinstance(part, Mapping) else part
            raise InvalidRequestError(f"{field}: holds {kind!r:.80}; the model reads text only, so leave it out")


def _mark_end(messages: list[Message]) -> list[Message]:
    last = dict(messages[-1])
    content = last.get("content")
    if last["role"] != "assistant" or not content:
        raise InvalidRequestError(
            f"continue_final_message=True: the last message (role {last['role']!r}) must be an assistant's with content"
        )
    if isinstance(content, str):
        last["content"] = content + _END_OF_CONTENT
    else:
        parts = [dict(part) if isinstance(part, dict) else {"type": "text", "text": str(part)} for part in content]
        if "text" not in parts[-1]:
            raise InvalidRequestError("continue_final_message=True: the last message must end with text")
        parts[-1]["text"] += _END_OF_CONTENT
        last["content"] = parts
    return [*messages[:-1], last]


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_END_OF_CONTENT.rstrip())
    if at < 0:
        raise InvalidRequestError("continue_final_message=True: the chat template does not show the last message whole")
    trims = not text.startswith(_END_OF_CONTENT, at)
    return text[:at].rstrip() if trims else text[:at]
