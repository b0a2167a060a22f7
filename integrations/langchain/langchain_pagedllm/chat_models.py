"""`ChatPagedLLM`: a chat model whose concurrent calls share one batch."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn

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
from langchain_core.utils.function_calling import convert_to_openai_tool

from langchain_pagedllm.convert import PROVIDER, last_chunk, text_chunk, to_chat_result, to_template_messages
from langchain_pagedllm.fields import IGNORED_PER_CALL, PagedModel, check_streamable
from langchain_pagedllm.sharing import configs_of_one_share, given_key, share_key, with_one_share
from pagedllm_core.chat.adapter import Call, watched
from pagedllm_core.chat.tools import Reply, ReplyStream, check_tool_choice
from pagedllm_core.errors import InvalidRequestError
from pagedllm_core.outputs import RequestOutput

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool

_CHAT_ARGUMENTS = IGNORED_PER_CALL | {
    "tools", "tool_choice", "chat_template", "chat_template_kwargs", "response_format", "stop_sequences",
    "max_new_tokens",
}  # fmt: skip
_MAX_THREADS = 512


class ChatPagedLLM(PagedModel, BaseChatModel):
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

    # One call.

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._call(messages, stop, kwargs, run_manager)
        output = call.run(self._source(kwargs.get("model")).get())
        return to_chat_result(output, kwargs.get("model") or self.model, call.tools is not None)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._call(messages, stop, kwargs, run_manager)
        output = await call.arun(await self._source(kwargs.get("model")).aget())
        return to_chat_result(output, kwargs.get("model") or self.model, call.tools is not None)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self._call(messages, stop, kwargs, run_manager)
        check_streamable(call)
        chunks = _Chunks(kwargs.get("model") or self.model, call.tools is not None)
        handle = call.submit(self._source(kwargs.get("model")).get(), stream=True)
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
        call = self._call(messages, stop, kwargs, run_manager)
        check_streamable(call)
        chunks = _Chunks(kwargs.get("model") or self.model, call.tools is not None)
        handle = await call.asubmit(await self._source(kwargs.get("model")).aget(), stream=True)
        outputs = watched(handle)
        try:
            async for output in outputs:
                for chunk in chunks.feed(output):
                    yield chunk
        finally:
            await outputs.aclose()

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
        if given.get("response_format") is not None:
            raise InvalidRequestError("response_format: not supported yet (it needs guided decoding); leave it out")
        tools = [convert_to_openai_tool(tool) for tool in given.get("tools") or ()]
        allowed = check_tool_choice(given.get("tool_choice"))
        return Call(
            params=self._call_params(stop, given),
            messages=to_template_messages(messages),
            tools=tools if tools and allowed else None,
            chat_template=given.get("chat_template", self.chat_template),
            template_kwargs={**self.chat_template_kwargs, **(given.get("chat_template_kwargs") or {})},
            timeout=given.get("timeout", self.timeout),
            share_key=given.get("share_key") or share_key(run_manager),
        )

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[AIMessageChunk]:
        """Answer bit by bit; closing the iterator frees the memory."""
        return super().stream(input, config, **_named_share(config), **kwargs)

    def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        """Answer bit by bit; closing the iterator or cancelling its reader frees the memory."""
        return super().astream(input, config, **_named_share(config), **kwargs)

    # Many calls from a thread: all at once, where LangChain's own would send as many as there are CPUs, or one.

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Answer all inputs in one shared batch; `max_concurrency` in the configuration limits it."""
        configs = configs_of_one_share(config, len(inputs), min(len(inputs), _MAX_THREADS))
        return super().batch(inputs, configs, return_exceptions=return_exceptions, **kwargs)

    def batch_as_completed(  # type: ignore[override]  # the base has one overload for each value of return_exceptions
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, AIMessage | Exception]]:
        """Answer all inputs in one shared batch, each as soon as it is ready."""
        configs = configs_of_one_share(config, len(inputs), min(len(inputs), _MAX_THREADS))
        return super().batch_as_completed(inputs, configs, return_exceptions=return_exceptions, **kwargs)  # type: ignore[call-overload, no-any-return]

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> list[AIMessage]:
        """Answer all inputs in one shared batch; `max_concurrency` in the configuration limits it."""
        configs = configs_of_one_share(config, len(inputs))
        return await super().abatch(inputs, configs, return_exceptions=return_exceptions, **kwargs)

    async def abatch_as_completed(  # type: ignore[override]  # the base has one overload for each value of return_exceptions
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> AsyncIterator[tuple[int, AIMessage | Exception]]:
        """Answer all inputs in one shared batch, each as soon as it is ready."""
        configs = configs_of_one_share(config, len(inputs))
        answers = super().abatch_as_completed(inputs, configs, return_exceptions=return_exceptions, **kwargs)  # type: ignore[call-overload]
        async for answer in answers:
            yield answer

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
        with ThreadPoolExecutor(min(len(messages), _MAX_THREADS)) as pool:
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
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call these tools, if it chooses to.

        Args:
            tools: Functions, tools, pydantic classes or JSON schemas.
            tool_choice: None, "auto" or "none"; others need guided decoding, which is not there yet.
            **kwargs: Further arguments of each call.

        Raises:
            InvalidRequestError: The tool choice is not supported yet.
        """
        check_tool_choice(tool_choice)
        choice = {} if tool_choice is None else {"tool_choice": tool_choice}
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **choice, **kwargs)

    def with_structured_output(self, schema: dict[str, Any] | type, **kwargs: Any) -> NoReturn:
        """Not supported yet.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "with_structured_output: not supported yet (it needs guided decoding); bind_tools and an output parser work"
        )

    # Counting.

    def get_token_ids(self, text: str) -> list[int]:
        """The model's own token ids of a text."""
        ids: list[int] = self._source().get().tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def get_num_tokens(self, text: str) -> int:
        """The number of the model's own tokens in a text."""
        return len(self.get_token_ids(text))

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """The number of tokens these messages cost as a prompt, through the chat template."""
        call = self._call(messages, None, {"tools": tools} if tools else {})
        return len(call.tokenize(self._source().get())["prompt_token_ids"])


class _Chunks:
    """Turns a request's outputs into LangChain's chunks."""

    def __init__(self, model: str, tools: bool) -> None:
        self._model = model
        self._reader = ReplyStream() if tools else None
        self._count = 0

    def feed(self, output: RequestOutput) -> Iterator[ChatGenerationChunk]:
        """The chunks of one output."""
        for completion in output.outputs:
            self._count += len(completion.token_ids)
            text = completion.text if self._reader is None else self._reader.feed(completion.text)
            if text or completion.logprobs:
                yield text_chunk(text, completion)
            if completion.finished:
                reply = Reply("") if self._reader is None else self._reader.finish()
                yield last_chunk(output, completion, self._count, self._model, reply)


def _named_share(config: RunnableConfig | None) -> dict[str, Any]:
    """What a stream has to be told, as LangChain does not hand it its run."""
    key = given_key(config)
    return {} if key is None else {"share_key": key}
