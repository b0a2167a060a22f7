"""Between LangChain's messages and the core's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import ToolCallChunk, invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from pagedllm_core.chat.messages import template_role
from pagedllm_core.chat.reply import Piece, ReplyReader, ReplyStyle, read_reply
from pagedllm_core.errors import InvalidRequestError
from pagedllm_core.outputs import CompletionOutput, Logprob, RequestOutput

if TYPE_CHECKING:
    from pagedllm_core.async_engine import AsyncEngine
    from pagedllm_core.chat.adapter import Answer

PROVIDER = "pagedllm"
# LangChain merges chunks of equal index, whatever their kind; content blocks count from 0.
_FIRST_TOOL_INDEX = 64
_FIRST_INVALID_INDEX = 1 << 20
_TEXT_BLOCKS = {"text", "input_text", "output_text", "text-plain"}
_REASONING_BLOCKS = ("reasoning", "thinking")  # each has its text under its own name
_CALL_BLOCKS = {"tool_use": "input", "tool_call": "args"}  # where their arguments are
_SILENT_BLOCKS = {
    "reasoning", "thinking", "redacted_thinking", "tool_call_chunk", "invalid_tool_call", "function_call",
    "server_tool_call", "server_tool_call_chunk", "server_tool_result", "non_standard", *_CALL_BLOCKS,
}  # fmt: skip


def to_template_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """The conversation as chat templates take it.

    Raises:
        InvalidRequestError: A message holds something that is not text.
    """
    return [converted for message in messages for converted in _convert_message(message)]


def _convert_message(message: BaseMessage) -> list[dict[str, Any]]:
    if isinstance(message, ToolMessage):
        return [_tool_result(message.content, message.tool_call_id, message.name, message.status == "error")]
    if isinstance(message, FunctionMessage):
        return [_tool_result(message.content, None, message.name, False)]
    if isinstance(message, AIMessage):
        return [_assistant(message)]
    if isinstance(message, SystemMessage):
        role = "system"
    elif isinstance(message, HumanMessage):
        role = "user"
    elif isinstance(message, ChatMessage):
        role = template_role(message.role)
    else:
        raise InvalidRequestError(f"messages: a {type(message).__name__} cannot be sent to a model")
    results = [
        _tool_result(block.get("content") or "", block.get("tool_use_id"), None, bool(block.get("is_error")))
        for block in (message.content if isinstance(message.content, list) else [])
        if isinstance(block, dict) and block.get("type") == "tool_result"
    ]
    text = _text(message.content)
    return [*results, {"role": role, "content": text}] if text or not results else results


def _assistant(message: AIMessage) -> dict[str, Any]:
    converted: dict[str, Any] = {"role": "assistant", "content": _text(message.content, separator="")}
    calls: list[tuple[Any, Any, Any]] = [(call["id"], call["name"], call["args"]) for call in message.tool_calls]
    for wrong in message.invalid_tool_calls:
        if wrong["name"]:
            calls.append((wrong["id"], wrong["name"], {"arguments": wrong["args"] or ""}))
    known = {identity for identity, _, _ in calls}
    blocks = [block for block in message.content if isinstance(block, dict)]
    for block in blocks:
        if block.get("type") in _CALL_BLOCKS and block.get("id") not in known:
            calls.append((block.get("id"), _name(block), block.get(_CALL_BLOCKS[block["type"]]) or {}))
    legacy = message.additional_kwargs.get("function_call")
    if not calls and legacy and isinstance(legacy, Mapping):
        calls.append((None, _name(legacy), legacy.get("arguments") or {}))
    if calls:
        converted["tool_calls"] = [
            {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
            for identity, name, arguments in calls
        ]
    thoughts = [str(block.get(block["type"]) or "") for block in blocks if block.get("type") in _REASONING_BLOCKS]
    if reasoning := message.additional_kwargs.get("reasoning_content") or "".join(thoughts):
        converted["reasoning_content"] = reasoning
    return converted


def _name(call: Mapping[str, Any]) -> str:
    name = call.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequestError(f"messages: {str(dict(call))!r:.80} is a call without a name; give it one")
    return name


def _tool_result(content: Any, call_id: str | None, name: str | None, failed: bool) -> dict[str, Any]:
    text = _text(content)
    result = {"role": "tool", "content": f"Error: {text}" if failed and not text.startswith("Error") else text}
    if call_id:
        result["tool_call_id"] = call_id
    if name:
        result["name"] = name
    return result


def _text(content: str | list[Any], separator: str = "\n") -> str:
    if isinstance(content, str):
        return content
    texts = []
    for block in content:
        kind = "text" if isinstance(block, str) else str(block.get("type", "text" if "text" in block else "?"))
        if kind in _TEXT_BLOCKS and (isinstance(block, str) or kind != "text-plain" or block.get("text") is not None):
            texts.append(block if isinstance(block, str) else str(block.get("text") or ""))
        elif kind == "refusal":
            texts.append(str(block.get("refusal") or ""))
        elif kind == "json":
            texts.append(json.dumps(block.get("json"), ensure_ascii=False))
        elif kind not in _SILENT_BLOCKS and kind != "tool_result":
            raise InvalidRequestError(
                f"messages: a content block of type {kind!r} cannot be read; models here take text only"
            )
    return separator.join(text for text in texts if text)


@dataclass(frozen=True)
class Source:
    """Where a reply comes from.

    Attributes:
        engine: The engine, for its tokenizer and its block size.
        model: The name the caller knows it by.
    """

    engine: AsyncEngine
    model: str

    def usage(self, output: RequestOutput, output_tokens: int, reasoning: str) -> UsageMetadata:
        """LangChain's token counts."""
        config, prompt_tokens, read = self.engine.config, output.metrics.prompt_tokens, output.metrics.cached_tokens
        whole = prompt_tokens // config.block_size * config.block_size  # what a later prompt can find
        created = max(0, whole - read) if config.enable_prefix_caching else 0
        thought = len(self.engine.tokenizer(reasoning, add_special_tokens=False)["input_ids"]) if reasoning else 0
        return UsageMetadata(
            input_tokens=prompt_tokens,
            output_tokens=output_tokens,
            total_tokens=prompt_tokens + output_tokens,
            input_token_details=InputTokenDetails(cache_read=read, cache_creation=created),
            output_token_details=OutputTokenDetails(reasoning=thought),
        )


def to_chat_result(answer: Answer, source: Source) -> ChatResult:
    """A finished request as LangChain returns it, one generation for each reply."""
    output = answer.output
    generations = [_generation(answer, completion, source) for completion in output.outputs]
    metrics = output.metrics
    usage = {
        "prompt_tokens": metrics.prompt_tokens,
        "completion_tokens": metrics.output_tokens,
        "total_tokens": metrics.prompt_tokens + metrics.output_tokens,
    }
    return ChatResult(generations=generations, llm_output={"token_usage": usage, "model_name": source.model})


def _generation(answer: Answer, completion: CompletionOutput, source: Source) -> ChatGeneration:
    reply = read_reply(completion.text, answer.style)
    metadata = end_metadata(completion, source.model, bool(reply.tool_calls))
    if completion.logprobs is not None:
        metadata["logprobs"] = logprobs_content(completion)
    message = AIMessage(
        content=reply.content,
        additional_kwargs={"reasoning_content": reply.reasoning} if reply.reasoning else {},
        tool_calls=[tool_call(name=call.name, args=call.arguments, id=call.id) for call in reply.tool_calls],
        invalid_tool_calls=[
            invalid_tool_call(name=call.name, args=call.text, id=call.id, error=call.error) for call in reply.invalid
        ],
        response_metadata=metadata,
        usage_metadata=source.usage(answer.output, len(completion.token_ids), reply.reasoning),
    )
    return ChatGeneration(message=message, generation_info={"finish_reason": metadata["finish_reason"]})


class Chunks:
    """Turns a streamed request's outputs into LangChain's chunks."""

    def __init__(self, style: ReplyStyle, source: Source) -> None:
        self._reader = ReplyReader(style)
        self._source = source
        self._tokens = 0
        self._reasoning = ""
        self._called = False

    def feed(self, output: RequestOutput) -> Iterator[ChatGenerationChunk]:
        """The chunks of one output; the last one carries usage and metadata."""
        for completion in output.outputs:
            self._tokens += len(completion.token_ids)
            pieces = self._reader.feed(completion.text)
            if completion.finished:
                pieces += self._reader.finish()
            metadata = {"logprobs": logprobs_content(completion)} if completion.logprobs else {}
            # Beside text LangChain takes a piece of a call for the whole of it, so each chunk holds one kind.
            groups = [list(group) for _, group in itertools.groupby(pieces, _kind)] or ([[]] if metadata else [])
            for number, group in enumerate(groups):
                yield self._chunk(group, {} if number else metadata)
            if completion.finished:
                message = AIMessageChunk(
                    content="",
                    response_metadata=end_metadata(completion, self._source.model, self._called),
                    usage_metadata=self._source.usage(output, self._tokens, self._reasoning),
                    chunk_position="last",
                )
                yield ChatGenerationChunk(message=message)

    def _chunk(self, pieces: list[Piece], metadata: dict[str, Any]) -> ChatGenerationChunk:
        reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
        self._reasoning += reasoning
        self._called = self._called or any(piece.kind == "call" for piece in pieces)
        message = AIMessageChunk(
            content="".join(piece.text for piece in pieces if piece.kind == "text"),
            additional_kwargs={"reasoning_content": reasoning} if reasoning else {},
            tool_call_chunks=_call_chunks(pieces),
            response_metadata=metadata,
        )
        return ChatGenerationChunk(message=message)


def _kind(piece: Piece) -> str:
    return piece.kind if piece.kind in ("text", "reasoning") else "call"


def _call_chunks(pieces: list[Piece]) -> list[ToolCallChunk]:
    """The tool calls' news, one chunk for each call: LangChain merges those of one message with the next only."""
    chunks: dict[int, ToolCallChunk] = {}
    for piece in pieces:
        if piece.kind in ("call", "arguments", "invalid"):
            index = (_FIRST_INVALID_INDEX if piece.kind == "invalid" else _FIRST_TOOL_INDEX) + piece.index
            chunk = chunks.setdefault(index, tool_call_chunk(name=None, args="", id=None, index=index))
            chunk["name"] = chunk["name"] or piece.name or None
            chunk["id"] = chunk["id"] or (piece.id if piece.kind == "call" else None)
            chunk["args"] = (chunk["args"] or "") + piece.text
    return list(chunks.values())


def end_metadata(completion: CompletionOutput, model: str, called: bool) -> dict[str, Any]:
    """What is known once a reply has ended."""
    return {
        "model_name": model,
        "model_provider": PROVIDER,
        "finish_reason": "tool_calls" if called and completion.finish_reason == "stop" else completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def logprobs_content(completion: CompletionOutput) -> dict[str, Any]:
    """Log-probabilities in OpenAI's shape."""
    content = []
    for token_id, entries in zip(completion.token_ids, completion.logprobs or (), strict=False):
        top = sorted(entries.values(), key=lambda entry: entry.rank)
        content.append({**_token(entries[token_id]), "top_logprobs": [_token(entry) for entry in top]})
    return {"content": content}


def _token(entry: Logprob) -> dict[str, Any]:
    return {
        "token": entry.decoded_token,
        "bytes": list(entry.decoded_token.encode("utf-8", "replace")),
        "logprob": entry.logprob,
    }
