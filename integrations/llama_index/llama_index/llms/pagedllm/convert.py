"""Between LlamaIndex's messages and the core's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CitableBlock,
    CitationBlock,
    CompletionResponse,
    LogProb,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from pydantic_core import from_json

from pagedllm_core.chat.messages import template_role
from pagedllm_core.chat.reply import Piece, ReplyReader, ReplyStyle, collect, read_reply
from pagedllm_core.chat.tools import ToolCall
from pagedllm_core.errors import InvalidRequestError
from pagedllm_core.outputs import CompletionOutput, Logprob, RequestOutput

if TYPE_CHECKING:
    from pagedllm_core.async_engine import AsyncEngine
    from pagedllm_core.chat.adapter import Answer


def to_template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The conversation as chat templates take it.

    Raises:
        InvalidRequestError: A message holds something that is not text.
    """
    return [_convert_message(message) for message in messages]


def _convert_message(message: ChatMessage) -> dict[str, Any]:
    extra = message.additional_kwargs
    converted: dict[str, Any] = {
        "role": template_role(message.role.value),
        "content": "\n".join(text for block in message.blocks for text in _texts(block)),
    }
    calls = [
        _openai_call(block.tool_call_id, block.tool_name, block.tool_kwargs)
        for block in message.blocks
        if isinstance(block, ToolCallBlock)
    ]
    calls = calls or [_call_from_extra(call) for call in extra.get("tool_calls") or ()]
    if calls:
        converted["tool_calls"] = calls
    thoughts = [block.content for block in message.blocks if isinstance(block, ThinkingBlock) and block.content]
    if thoughts:
        converted["reasoning_content"] = "\n".join(thoughts)
    if extra.get("tool_call_id"):
        converted["tool_call_id"] = str(extra["tool_call_id"])
    if isinstance(extra.get("name"), str):
        converted["name"] = extra["name"]
    return converted


def _texts(block: Any) -> Iterator[str]:
    if isinstance(block, TextBlock):
        if block.text:
            yield block.text
    elif isinstance(block, CitableBlock):
        for inner in block.content:
            yield from _texts(inner)
    elif isinstance(block, CitationBlock):
        yield from _texts(block.cited_content)
    elif not isinstance(block, ToolCallBlock | ThinkingBlock | CachePoint):
        raise InvalidRequestError(f"messages: a {type(block).__name__} cannot be read; models here take text only")


def _openai_call(identity: str | None, name: str, arguments: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:  # shown to the model as it was written
            return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _call_from_extra(call: Any) -> dict[str, Any]:
    plain = call if isinstance(call, dict) else call.model_dump()
    function = plain.get("function", plain)
    if not isinstance(function, dict) or not function.get("name"):
        raise InvalidRequestError(f"messages: the tool call {call!r:.80} in additional_kwargs has no name; give it one")
    return _openai_call(plain.get("id"), function["name"], function.get("arguments") or {})


@dataclass(frozen=True)
class Source:
    """Where a reply comes from.

    Attributes:
        engine: The engine, for its tokenizer.
        model: The name the caller knows it by.
    """

    engine: AsyncEngine
    model: str

    def count(self, reasoning: str) -> int:
        """The number of tokens of a reasoning's text."""
        return len(self.engine.tokenizer(reasoning, add_special_tokens=False)["input_ids"]) if reasoning else 0


def to_chat_response(answer: Answer, source: Source) -> ChatResponse:
    """A finished request."""
    output = answer.output
    completion = output.outputs[0]
    reply = read_reply(completion.text, answer.style)
    thought = source.count(reply.reasoning)
    usage = _usage(output, thought)
    message = _message(reply.content, reply.tool_calls, reply.reasoning, thought)
    return ChatResponse(
        message=message,
        raw=_raw(output, completion, source.model, message, usage),
        logprobs=to_logprobs(completion),
        additional_kwargs=_counts(usage),
    )


class ChatStream:
    """Turns a streamed request's outputs into responses that hold the reply so far, and what is new."""

    def __init__(self, style: ReplyStyle, source: Source) -> None:
        self._reader = ReplyReader(style)
        self._source = source
        self._pieces: list[Piece] = []
        self._text = ""
        self._reasoning = ""

    def feed(self, output: RequestOutput) -> Iterator[ChatResponse]:
        """The responses of one output; the last one carries the usage."""
        for completion in output.outputs:
            pieces = self._reader.feed(completion.text)
            if completion.finished:
                pieces += self._reader.finish()
            if pieces or completion.finished or completion.logprobs:
                yield self._response(output, completion, pieces)

    def _response(self, output: RequestOutput, completion: CompletionOutput, pieces: list[Piece]) -> ChatResponse:
        delta, thinking = ("".join(p.text for p in pieces if p.kind == kind) for kind in ("text", "reasoning"))
        self._text += delta
        self._reasoning += thinking
        self._pieces += [piece for piece in pieces if piece.kind in ("call", "arguments")]
        calls = collect(self._pieces).tool_calls if completion.finished else calls_so_far(self._pieces)
        thought = self._source.count(self._reasoning) if completion.finished else None
        usage = _usage(output, thought or 0) if completion.finished else None
        message = _message(self._text, calls, self._reasoning, thought)
        return ChatResponse(
            message=message,
            delta=delta,
            raw=_raw(output, completion, self._source.model, message, usage),
            logprobs=to_logprobs(completion),
            additional_kwargs={**_counts(usage), **({"thinking_delta": thinking} if thinking else {})},
        )


def calls_so_far(pieces: Sequence[Piece]) -> list[ToolCall]:
    """The calls that have begun, with what is there of their arguments."""
    calls = {piece.index: ToolCall(piece.name, {}, piece.id) for piece in pieces if piece.kind == "call"}
    texts: dict[int, list[str]] = {}
    for piece in pieces:
        if piece.kind == "arguments":
            texts.setdefault(piece.index, []).append(piece.text)
    for index, parts in texts.items():
        found = from_json("".join(parts), allow_partial="trailing-strings")
        calls[index].arguments.update(found if isinstance(found, dict) else {})
    return list(calls.values())


def as_completion(response: ChatResponse) -> CompletionResponse:
    """The same reply as text."""
    return CompletionResponse(
        text=response.message.content or "",
        delta=response.delta,
        raw=response.raw,
        logprobs=response.logprobs,
        additional_kwargs=response.additional_kwargs,
    )


def to_logprobs(completion: CompletionOutput) -> list[list[LogProb]] | None:
    """Log-probabilities: for each token the chosen one and its alternatives, the most likely first."""
    if completion.logprobs is None:
        return None
    return [
        [_logprob(entry) for entry in sorted(entries.values(), key=lambda entry: entry.rank)]
        for entries in completion.logprobs
    ]


def _logprob(entry: Logprob) -> LogProb:
    token = entry.decoded_token
    return LogProb(token=token, logprob=entry.logprob, bytes=list(token.encode("utf-8", "replace")))


def _message(text: str, calls: Sequence[ToolCall], reasoning: str, thought: int | None) -> ChatMessage:
    blocks: list[Any] = [ThinkingBlock(content=reasoning, num_tokens=thought)] if reasoning else []
    blocks += [TextBlock(text=text)] if text or not calls else []
    blocks += [ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=call.arguments) for call in calls]
    # Code of llama-index-core that streams looks for the calls in OpenAI's shape only.
    extra = {
        "tool_calls": [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for call in calls
        ]
    }
    return ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs=extra if calls else {})


def _usage(output: RequestOutput, thought: int) -> dict[str, Any]:
    metrics = output.metrics
    return {
        "prompt_tokens": metrics.prompt_tokens,
        "completion_tokens": metrics.output_tokens,
        "total_tokens": metrics.prompt_tokens + metrics.output_tokens,
        "prompt_tokens_details": {"cached_tokens": metrics.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": thought},
    }


def _counts(usage: dict[str, Any] | None) -> dict[str, int]:
    return {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")} if usage else {}


def _raw(
    output: RequestOutput,
    completion: CompletionOutput,
    model: str,
    message: ChatMessage,
    usage: dict[str, Any] | None,
) -> dict[str, Any]:
    """What an OpenAI-compatible server would have sent; token counters and tracers read it."""
    reason = (
        "tool_calls" if message.additional_kwargs and completion.finish_reason == "stop" else completion.finish_reason
    )
    raw: dict[str, Any] = {
        "id": output.request_id,
        "object": "chat.completion",
        "model": model,
        "choices": [
            {
                "index": 0,
                "finish_reason": reason,
                "stop_reason": completion.stop_reason,
                "message": {"role": "assistant", "content": message.content, **message.additional_kwargs},
            }
        ],
    }
    if usage is not None:
        raw["usage"] = usage
    return raw
