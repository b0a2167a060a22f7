"""`PagedLLM`: a function-calling LLM whose concurrent calls share one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt as default_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    ToolCallBlock,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import ToolSelection, default_completion_to_prompt
from llama_index.core.types import TokenAsyncGen
from llama_index.llms.pagedllm.convert import ChatStream, Source, as_completion, to_chat_response, to_template_messages
from llama_index.llms.pagedllm.structured import StructuredPrediction, as_tool
from llama_index_instrumentation.dispatcher import active_instrument_tags

from pagedllm_core.chat.adapter import Call, EngineSource, watched
from pagedllm_core.chat.schemas import response_schema
from pagedllm_core.chat.tools import tool_choice as parse_tool_choice
from pagedllm_core.errors import InvalidRequestError
from pagedllm_core.params import GuidedParams

if TYPE_CHECKING:
    from llama_index.core.prompts import BasePromptTemplate
    from llama_index.core.tools.types import BaseTool

    from pagedllm_core.async_engine import AsyncEngine
    from pagedllm_core.streams import RequestHandle

_CHAT_ARGUMENTS = frozenset({
    "tools", "tool_choice", "chat_template", "chat_template_kwargs", "response_format", "parallel_tool_calls",
    "tool_parser", "reasoning_parser", "reasoning",
})  # fmt: skip
# Arguments that code written for other providers passes along; they ask for nothing here.
_IGNORED = frozenset({"stream", "extra_headers", "extra_query", "user", "formatted"})


class PagedLLM(StructuredPrediction):
    """A function-calling LLM on a paged engine inside this process.

    Making one is cheap: the engine is built at the first call and shared by everyone who names the same configuration,
    `ChatPagedLLM` of LangChain included. Every field of `SamplingParams` can also be given per call; so can `model` and
    `timeout`.

    Example:
        ```python
        from llama_index.llms.pagedllm import PagedLLM

        llm = PagedLLM(model="tiny", max_tokens=32)
        print(llm.complete("What is PagedLLM?"))
        ```
    """

    @classmethod
    def class_name(cls) -> str:
        """The name in dumps."""
        return "PagedLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What the loaded model can do; loads it."""
        engine = self._source().get()
        is_chat_model = self._has_template(engine)
        return LLMMetadata(
            context_window=engine.context_window,
            num_output=-1 if self.max_tokens is None else self.max_tokens,
            is_chat_model=is_chat_model,
            # Where a template shows no tools, the system message does; a grammar holds the calls in any case.
            is_function_calling_model=is_chat_model and not self._own_prompts,
            model_name=self.model,
        )

    @property
    def _own_prompts(self) -> bool:
        to_prompt: Any = self.messages_to_prompt
        return to_prompt is not default_messages_to_prompt

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, for `Settings.tokenizer`; loads the model."""
        return self._source().get().tokenizer.encode

    @property
    def recommended_concurrency(self) -> int:
        """How many calls at once one step takes; see `raise_concurrency`. Loads nothing."""
        config = self.engine_config() if self.engine is None else self.engine.config
        return int(config.max_num_seqs)

    def to_payload(self) -> dict[str, Any]:
        """What events say about this model. It is asked for at the start of each call, so it must not load anything."""
        known = self.metadata.model_dump() if self._source().current() else {"model_name": self.model}
        return {"class_name": self.class_name(), **known, **self._identity()}

    # What asks for the metadata on an event loop, where the model may not be loaded yet.

    async def apredict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """Answer a prompt that is filled with these arguments."""
        await self._source().aget()
        return await super().apredict(prompt, **prompt_args)

    async def astream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenAsyncGen:
        """Answer a prompt that is filled with these arguments, bit by bit."""
        await self._source().aget()
        return await super().astream(prompt, **prompt_args)

    # Chat.

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        call = self._chat_call(messages, kwargs)
        engine = self._source_of(kwargs).get()
        return to_chat_response(call.run(engine), self._reply_source(engine, kwargs))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation; cancelling the task frees its memory."""
        call = self._chat_call(messages, kwargs)
        engine = await self._source_of(kwargs).aget()
        return to_chat_response(await call.arun(engine), self._reply_source(engine, kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a conversation bit by bit; closing the iterator frees its memory."""
        return self._stream(self._chat_call(messages, kwargs), kwargs)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Answer a conversation bit by bit; closing the iterator or cancelling its reader frees its memory."""
        return await self._astream(self._chat_call(messages, kwargs), kwargs)

    # Completion: one user's turn through the chat template, unless the prompt is formatted already.

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Complete a prompt."""
        source = self._source_of(kwargs)
        answer = self._completion_call(source, prompt, formatted, kwargs).run(source.get())
        return as_completion(to_chat_response(answer, self._reply_source(source.get(), kwargs)))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Complete a prompt; cancelling the task frees its memory."""
        source = self._source_of(kwargs)
        engine = await source.aget()
        answer = await self._completion_call(source, prompt, formatted, kwargs).arun(engine)
        return as_completion(to_chat_response(answer, self._reply_source(engine, kwargs)))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Complete a prompt bit by bit; closing the iterator frees its memory."""
        call = self._completion_call(self._source_of(kwargs), prompt, formatted, kwargs)
        chats = self._stream(call, kwargs)
        return (as_completion(response) for response in chats)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Complete a prompt bit by bit; closing the iterator or cancelling its reader frees its memory."""
        source = self._source_of(kwargs)
        await source.aget()
        chats = await self._astream(self._completion_call(source, prompt, formatted, kwargs), kwargs)

        async def responses() -> CompletionResponseAsyncGen:
            try:
                async for response in chats:
                    yield as_completion(response)
            finally:
                await chats.aclose()

        return responses()

    def _stream(self, call: Call, given: dict[str, Any]) -> ChatResponseGen:
        engine = self._source_of(given).get()
        handle, style = call.submit(engine, stream=True)
        return self._responses(handle, ChatStream(style, self._reply_source(engine, given)))

    @staticmethod
    def _responses(handle: RequestHandle, stream: ChatStream) -> ChatResponseGen:
        try:
            for output in handle:
                yield from stream.feed(output)
        finally:
            if not handle.finished:
                handle.cancel()

    async def _astream(self, call: Call, given: dict[str, Any]) -> ChatResponseAsyncGen:
        engine = await self._source_of(given).aget()
        handle, style = await call.asubmit(engine, stream=True)
        return self._aresponses(handle, ChatStream(style, self._reply_source(engine, given)))

    @staticmethod
    async def _aresponses(handle: RequestHandle, stream: ChatStream) -> ChatResponseAsyncGen:
        outputs = watched(handle)
        try:
            async for output in outputs:
                for response in stream.feed(output):
                    yield response
        finally:
            await outputs.aclose()

    def _reply_source(self, engine: AsyncEngine, given: dict[str, Any]) -> Source:
        return Source(engine, self._by_own_names(given).get("model") or self.model)

    def _chat_call(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> Call:
        given = self._checked(kwargs)
        if self._own_prompts:
            to_prompt: Any = self.messages_to_prompt
            return self._raw_call(to_prompt(messages), given)
        schema = response_schema(given.get("response_format"))
        if schema is not None:
            given = {**given, "guided": None}
        tools = given.get("tools") or ()
        choice = parse_tool_choice(given.get("tool_choice"), tools)
        parallel = given.get("parallel_tool_calls", self.parallel_tool_calls)
        return Call(
            params=self._sampling(given),
            messages=to_template_messages(messages),
            tools=tools,
            choice=choice,
            parallel=choice.mode != "required" if parallel is None else bool(parallel),
            schema=schema,
            tool_parser=given.get("tool_parser", self.tool_parser),
            reasoning_parser=given.get("reasoning_parser", self.reasoning_parser),
            chat_template=given.get("chat_template", self.chat_template),
            template_kwargs=self._template_kwargs(given),
            timeout=given.get("timeout", self.timeout),
            share_key=_share_key(given),
        )

    def _completion_call(self, source: EngineSource, prompt: str, formatted: bool, kwargs: dict[str, Any]) -> Call:
        given = self._checked(kwargs)
        if formatted:
            return self._raw_call(prompt, given)
        to_prompt: Any = self.completion_to_prompt
        if to_prompt is not default_completion_to_prompt:
            return self._raw_call(to_prompt(prompt), given)
        if not self._has_template(source.get()):
            return self._raw_call(prompt, given)
        return self._chat_call([ChatMessage(content=prompt, role=MessageRole.USER)], given)

    def _raw_call(self, prompt: str, given: dict[str, Any]) -> Call:
        if given.get("tools"):
            raise InvalidRequestError(
                "tools: only a chat template shows them to the model; leave out messages_to_prompt, or the tools"
            )
        timeout = given.get("timeout", self.timeout)
        schema = response_schema(given.get("response_format"))
        if schema is not None:  # what is held to a form ends by itself
            given = {**given, "guided": GuidedParams(json=dict(schema)), "stop": [], "stop_token_ids": []}
        return Call(params=self._sampling(given), prompt=prompt, timeout=timeout, share_key=_share_key(given))

    def _checked(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = self._by_own_names(kwargs)
        self._warn_unknown_arguments(given, _CHAT_ARGUMENTS | _IGNORED)
        if given.get("response_format") is not None and given.get("guided") is not None:
            raise InvalidRequestError("response_format, guided: both say what the reply is held to; give one of them")
        n = self.n if given.get("n") is None else given["n"]
        if n != 1:
            raise InvalidRequestError(f"n={n}: a response carries one reply; use n=1, and best_of for the beams' width")
        return given

    # Tools.

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or ())
        if user_msg is not None:
            messages.append(ChatMessage(content=user_msg) if isinstance(user_msg, str) else user_msg)
        converted = [as_tool(tool) for tool in tools]
        if tool_choice is None and tool_required and converted:
            tool_choice = "required"
        parse_tool_choice(tool_choice, converted)
        prepared = {
            "messages": messages,
            "tools": converted,
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }
        return prepared if tool_choice is None else {**prepared, "tool_choice": tool_choice}

    def _validate_chat_with_tools_response(
        self,
        response: ChatResponse,
        tools: Sequence[BaseTool],
        allow_parallel_tool_calls: bool = False,
        **kwargs: Any,
    ) -> ChatResponse:
        calls = _tool_calls(response)
        if len(calls) > 1 and not allow_parallel_tool_calls:
            message = response.message
            message.blocks = [block for block in message.blocks if block not in calls[1:]]
            message.additional_kwargs["tool_calls"] = message.additional_kwargs["tool_calls"][:1]
        return response

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls that a reply asks for.

        Args:
            response: The reply.
            error_on_no_tool_call: Raise where there is none.
            **kwargs: Ignored.

        Raises:
            ValueError: There is none.
        """
        calls = _tool_calls(response)
        if not calls and error_on_no_tool_call:
            raise ValueError(f"Expected at least one tool call, but got none in: {response.message.content!r:.200}")
        return [
            ToolSelection(
                tool_id=call.tool_call_id or "",
                tool_name=call.tool_name,
                tool_kwargs=call.tool_kwargs if isinstance(call.tool_kwargs, dict) else {},
            )
            for call in calls
        ]


def _share_key(given: dict[str, Any]) -> str | None:
    """Whose share a call counts against: what it says itself, else what `instrument_tags` says around it."""
    tags = active_instrument_tags.get()
    found = given.get("share_key") or tags.get("share_key") or tags.get("thread_id")
    return None if found is None else str(found)


def _tool_calls(response: ChatResponse) -> list[ToolCallBlock]:
    return [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
