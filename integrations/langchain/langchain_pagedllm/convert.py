"""Between LangChain's messages and the core's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

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
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from pagedllm_core.chat.messages import template_role
from pagedllm_core.chat.tools import Reply, parse_reply
from pagedllm_core.errors import InvalidRequestError
from pagedllm_core.outputs import CompletionOutput, Logprob, RequestOutput

PROVIDER = "pagedllm"
# LangChain merges chunks of equal index, whatever their kind; content blocks count from 0.
_FIRST_TOOL_INDEX = 64
_TEXT_BLOCKS = {"text", "input_text", "output_text", "text-plain"}
_SILENT_BLOCKS = {"reasoning", "thinking", "redacted_thinking", "tool_call", "tool_use", "tool_call_chunk"}


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
    calls = [(call["id"], call["name"], call["args"]) for call in message.tool_calls]
    known = {identity for identity, _, _ in calls}
    for block in message.content if isinstance(message.content, list) else []:
        if isinstance(block, dict) and block.get("type") == "tool_use" and block.get("id") not in known:
            calls.append((block.get("id"), block["name"], block.get("input") or {}))
    if calls:
        converted["tool_calls"] = [
            {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
            for identity, name, arguments in calls
        ]
    if reasoning := message.additional_kwargs.get("reasoning_content"):
        converted["reasoning_content"] = reasoning
    return converted


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
        if kind in _TEXT_BLOCKS:
            texts.append(block if isinstance(block, str) else str(block.get("text") or ""))
        elif kind == "json":
            texts.append(json.dumps(block.get("json"), ensure_ascii=False))
        elif kind not in _SILENT_BLOCKS and kind != "tool_result":
            raise InvalidRequestError(
                f"messages: a content block of type {kind!r} cannot be read; models here take text only"
            )
    return separator.join(text for text in texts if text)


def to_chat_result(output: RequestOutput, model: str, tools: bool) -> ChatResult:
    """A finished request as LangChain returns it, one generation for each reply."""
    generations = [_generation(output, completion, model, tools) for completion in output.outputs]
    metrics = output.metrics
    usage = {
        "prompt_tokens": metrics.prompt_tokens,
        "completion_tokens": metrics.output_tokens,
        "total_tokens": metrics.prompt_tokens + metrics.output_tokens,
    }
    return ChatResult(generations=generations, llm_output={"token_usage": usage, "model_name": model})


def _generation(output: RequestOutput, completion: CompletionOutput, model: str, tools: bool) -> ChatGeneration:
    reply = parse_reply(completion.text) if tools else Reply(completion.text)
    metadata = end_metadata(completion, model, bool(reply.tool_calls))
    if completion.logprobs is not None:
        metadata["logprobs"] = logprobs_content(completion)
    message = AIMessage(
        content=reply.content,
        tool_calls=[tool_call(name=call.name, args=call.arguments, id=call.id) for call in reply.tool_calls],
        invalid_tool_calls=[
            invalid_tool_call(name=None, args=call.text, id=call.id, error=call.error) for call in reply.invalid
        ],
        response_metadata=metadata,
        usage_metadata=usage_metadata(output, len(completion.token_ids)),
    )
    return ChatGeneration(message=message, generation_info={"finish_reason": metadata["finish_reason"]})


def text_chunk(text: str, completion: CompletionOutput | None = None) -> ChatGenerationChunk:
    """What is new of a streamed reply."""
    metadata = {"logprobs": logprobs_content(completion)} if completion and completion.logprobs else {}
    return ChatGenerationChunk(message=AIMessageChunk(content=text, response_metadata=metadata))


def last_chunk(
    output: RequestOutput, completion: CompletionOutput, count: int, model: str, reply: Reply
) -> ChatGenerationChunk:
    """The end of a streamed reply: its tool calls, usage and metadata."""
    calls = [(call.id, call.name, json.dumps(call.arguments, ensure_ascii=False)) for call in reply.tool_calls]
    wrong = [(call.id, None, call.text) for call in reply.invalid]
    chunks = [
        tool_call_chunk(name=name, args=arguments, id=identity, index=_FIRST_TOOL_INDEX + number)
        for number, (identity, name, arguments) in enumerate([*calls, *wrong])
    ]
    message = AIMessageChunk(
        content=reply.content,
        tool_call_chunks=chunks,
        response_metadata=end_metadata(completion, model, bool(reply.tool_calls)),
        usage_metadata=usage_metadata(output, count),
        chunk_position="last",
    )
    return ChatGenerationChunk(message=message)


def end_metadata(completion: CompletionOutput, model: str, called: bool) -> dict[str, Any]:
    """What is known once a reply has ended."""
    return {
        "model_name": model,
        "model_provider": PROVIDER,
        "finish_reason": "tool_calls" if called and completion.finish_reason == "stop" else completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def usage_metadata(output: RequestOutput, output_tokens: int) -> UsageMetadata:
    """LangChain's token counts."""
    prompt_tokens = output.metrics.prompt_tokens
    return UsageMetadata(
        input_tokens=prompt_tokens,
        output_tokens=output_tokens,
        total_tokens=prompt_tokens + output_tokens,
        input_token_details=InputTokenDetails(cache_read=output.metrics.cached_tokens),
    )


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
