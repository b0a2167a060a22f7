"""`ChatPagedLLM`: a chat model whose concurrent calls share one batch."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    BaseRunManager,
    CallbackManagerForLLMRun,
    Callbacks,
)
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult, RunInfo
from langchain_core.runnables import Runnable, RunnableConfig

from langchain_pagedllm.batching import MAX_THREADS, AllAtOnce
from langchain_pagedllm.convert import PROVIDER, Chunks, Source, to_chat_result, to_template_messages
from langchain_pagedllm.errors import as_langchain_errors
from langchain_pagedllm.fields import IGNORED_PER_CALL, PagedModel, check_streamable
from langchain_pagedllm.profile import model_profile
from langchain_pagedllm.sharing import given_key, share_key, with_one_share
from langchain_pagedllm.structured import as_tools, bindings_and_parser, with_raw
from pagedllm_core.chat.adapter import Call, watched
from pagedllm_core.chat.schemas import class_schema, is_class, response_schema
from pagedllm_core.chat.tools import tool_choice as parse_tool_choice

if TYPE_CHECKING:
    from langchain_core.language_models.model_profile import ModelProfile
    from langchain_core.tools import BaseTool

    from pagedllm_core.async_engine import AsyncEngine

_CHAT_ARGUMENTS = IGNORED_PER_CALL | {
    "tools", "tool_choice", "chat_template", "chat_template_kwargs", "response_format", "stop_sequences",
    "max_new_tokens", "strict", "parallel_tool_calls", "tool_parser", "reasoning_parser", "reasoning",
}  # fmt: skip


class ChatPagedLLM(AllAtOnce, PagedModel, BaseChatModel):
    """A chat model on a paged engine inside this process.

    Making one is cheap: the engine is built at the first call and shared by everyone who names the same configuration.
    Every field of `SamplingParams` can also be given per call, by keyword or `bind`; so can `model` and `timeout`.

    Example:
        ```python
        from langchain_pagedllm import ChatPagedLLM

        chat = ChatPagedLLM(model="tiny", max_tokens=32)
        replies = chat.batch(["Hello!", "What is PagedLLM?"])
        ```
    """

    @property
    def _llm_type(self) -> str:
        return "chat-pagedllm"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self._identity()

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        # A cache would know a class by its name alone.
        if isinstance(kwargs.get("tools"), list | tuple):
            with as_langchain_errors():
                kwargs["tools"] = as_tools(kwargs["tools"])
        if is_class(kwargs.get("response_format")):
            kwargs["response_format"] = class_schema(kwargs["response_format"])
        return super()._get_llm_string(stop=stop, **kwargs)

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Where dumps say this class lives."""
        return ["langchain_pagedllm", "chat_models"]

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = PROVIDER
        if stop is None and self.stop:
            params["ls_stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        return params

    def _resolve_model_profile(self) -> ModelProfile | None:
        return model_profile(self.model, self.revision, self._context_limit(), self.max_tokens)

    # One call.

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with as_langchain_errors():
            call = self._call(messages, stop, kwargs, run_manager)
            engine = self._source_of(kwargs).get()
            return to_chat_result(call.run(engine), self._reply_source(engine, kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with as_langchain_errors():
            call = self._call(messages, stop, kwargs, run_manager)
            engine = await self._source_of(kwargs).aget()
            return to_chat_result(await call.arun(engine), self._reply_source(engine, kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with as_langchain_errors():
            call = self._call(messages, stop, kwargs, run_manager)
            check_streamable(call)
            engine = self._source_of(kwargs).get()
            handle, style = call.submit(engine, stream=True)
            chunks = Chunks(style, self._reply_source(engine, kwargs))
            try:
                for output in handle:
                    yield from chunks.feed(output)
            finally:
                if not handle.finished:
                    handle.cancel()

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        with as_langchain_errors():
            call = self._call(messages, stop, kwargs, run_manager)
            check_streamable(call)
            engine = await self._source_of(kwargs).aget()
            handle, style = await call.asubmit(engine, stream=True)
            chunks = Chunks(style, self._reply_source(engine, kwargs))
            outputs = watched(handle)
            try:
                async for output in outputs:
                    for chunk in chunks.feed(output):
                        yield chunk
            finally:
                await outputs.aclose()

    def _reply_source(self, engine: AsyncEngine, given: dict[str, Any]) -> Source:
        return Source(engine, self._by_own_names(given).get("model") or self.model)

    def _streaming_disabled(self, **kwargs: Any) -> bool:
        # A listener to tokens makes `invoke` stream, too; several replies come whole, unless `stream` was called.
        several = kwargs.get("n", self.n) != 1 and not kwargs.get("stream")
        return several or super()._streaming_disabled(**kwargs)

    def _call(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        given: dict[str, Any],
        run_manager: BaseRunManager | None = None,
    ) -> Call:
        self._warn_unknown_arguments(given, _CHAT_ARGUMENTS)
        tools = as_tools(given.get("tools") or ())
        choice = parse_tool_choice(given.get("tool_choice"), tools)
        parallel = given.get("parallel_tool_calls", self.parallel_tool_calls)
        schema = response_schema(given.get("response_format"))
        if schema is not None or choice.mode == "required":
            given = {"guided": None, **given}  # what the call asks for stands above the model's own field
        return Call(
            params=self._call_params(stop, given),
            messages=to_template_messages(messages),
            tools=tools,
            choice=choice,
            parallel=choice.mode != "required" if parallel is None else bool(parallel),
            strict=bool(given.get("strict")),
            schema=schema,
            tool_parser=given.get("tool_parser", self.tool_parser),
            reasoning_parser=given.get("reasoning_parser", self.reasoning_parser),
            chat_template=given.get("chat_template", self.chat_template),
            template_kwargs=self._template_kwargs(given),
            timeout=given.get("timeout", self.timeout),
            share_key=given.get("share_key") or share_key(run_manager),
        )

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[AIMessageChunk]:
        """Answer bit by bit; closing the iterator frees the memory."""
        return super().stream(input, config, **{**_named_share(config), **kwargs})

    def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        """Answer bit by bit; closing the iterator or cancelling its reader frees the memory."""
        return super().astream(input, config, **{**_named_share(config), **kwargs})

    def generate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answer all conversations in one shared batch."""
        if len(messages) < 2:
            return super().generate(messages, stop, callbacks, **kwargs)
        kwargs["metadata"] = with_one_share(kwargs.get("metadata"))
        # A thread for each: every conversation has a run of its own, so callbacks and caches work as for one.
        one, rest = super().generate, {**kwargs, "run_id": None}
        with ThreadPoolExecutor(min(len(messages), MAX_THREADS)) as pool:
            futures = []
            for number, conversation in enumerate(messages):
                run = functools.partial(one, [conversation], stop, callbacks, **(rest if number else kwargs))
                futures.append(pool.submit(contextvars.copy_context().run, run))
        results = [future.result() for future in futures]
        result = LLMResult(
            generations=[result.generations[0] for result in results],
            llm_output=self._combine_llm_outputs([result.llm_output for result in results]),
        )
        runs: list[RunInfo] = [run for one in results for run in one.run or ()]
        result.run = runs or None
        return result

    async def agenerate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answer all conversations in one shared batch."""
        if len(messages) > 1:
            kwargs["metadata"] = with_one_share(kwargs.get("metadata"))
        return await super().agenerate(messages, stop, callbacks, **kwargs)

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None]) -> dict[str, Any]:
        usage: dict[str, int] = {}
        for output in llm_outputs:
            for name, count in (output or {}).get("token_usage", {}).items():
                usage[name] = usage.get(name, 0) + count
        return {"token_usage": usage, "model_name": self.model}

    # Tools.

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        response_format: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call these tools; what it writes is held to their schemas.

        Args:
            tools: Functions, tools, pydantic classes or JSON schemas.
            tool_choice: None or "auto" leaves it to the model, "none" forbids calls, "any", "required" or True demands
                one, and a name (or OpenAI's dictionary of one) demands that tool.
            strict: Refuse a schema of which a part cannot be enforced, instead of leaving that part out.
            parallel_tool_calls: Several calls in one reply; None: yes, unless one is demanded.
            response_format: A JSON schema (as OpenAI takes it) that an answer without calls has to satisfy.
            **kwargs: Further arguments of each call.

        Raises:
            InvalidRequestError: It is no list of tools, or the choice is none of them.
        """
        with as_langchain_errors():
            converted = as_tools(tools, strict)
            parse_tool_choice(tool_choice, converted)
        given = {
            "tool_choice": tool_choice,
            "strict": strict,
            "parallel_tool_calls": parallel_tool_calls,
            "response_format": response_format,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return self.bind(tools=converted, **given, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """A model whose replies are objects of this schema, always.

        Args:
            schema: A pydantic class, a TypedDict, a JSON schema or an OpenAI function.
            method: "json_schema" and "json_mode" answer in JSON; "function_calling" calls the schema as a tool.
            include_raw: Return a dictionary of `raw`, `parsed` and `parsing_error`.
            strict: See `bind_tools`; JSON schemas are always enforced whole.
            **kwargs: Further arguments of each call.

        Raises:
            InvalidRequestError: The method or the schema is none that is known.
        """
        with as_langchain_errors():
            given, parser, told = bindings_and_parser(schema, method, strict)
        model = self.bind(**given, **({"ls_structured_output_format": told} if told else {}), **kwargs)
        return with_raw(model, parser) if include_raw else model | parser

    # Counting.

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """The number of tokens these messages cost as a prompt, through the chat template."""
        if not messages:
            return 0
        with as_langchain_errors():
            call = self._call(messages, None, {"tools": tools} if tools else {})
            return len(call.tokenize(self._source().get())["prompt_token_ids"])


def _named_share(config: RunnableConfig | None) -> dict[str, Any]:
    """What a stream has to be told, as LangChain does not hand it its run."""
    key = given_key(config)
    return {} if key is None else {"share_key": key}
