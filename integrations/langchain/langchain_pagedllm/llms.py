"""`PagedLLM`: raw completion, without a chat template."""

from __future__ import annotations

import functools
import operator
from collections.abc import AsyncIterator, Iterator
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.runnables import RunnableConfig

from langchain_pagedllm.batching import AllAtOnce
from langchain_pagedllm.convert import end_metadata, logprobs_content
from langchain_pagedllm.errors import as_langchain_errors
from langchain_pagedllm.fields import IGNORED_PER_CALL, PagedModel, check_streamable
from langchain_pagedllm.sharing import share_key
from pagedllm_core.chat.adapter import Call, wait, watched
from pagedllm_core.chat.fields import SAMPLING_FIELDS
from pagedllm_core.outputs import CompletionOutput, RequestOutput


class PagedLLM(AllAtOnce, PagedModel, BaseLLM):
    """Raw completion on a paged engine inside this process; fields and engine are those of `ChatPagedLLM`."""

    @property
    def _llm_type(self) -> str:
        return "pagedllm"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self._identity()

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Where dumps say this class lives."""
        return ["langchain_pagedllm", "llms"]

    # One bad prompt would be the error of all that come in one call.

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Complete all inputs in one shared batch; `max_concurrency` in the configuration limits it."""
        door = super().batch if return_exceptions else functools.partial(BaseLLM.batch, self)
        return door(inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Complete all inputs in one shared batch; `max_concurrency` in the configuration limits it."""
        door = super().abatch if return_exceptions else functools.partial(BaseLLM.abatch, self)
        return await door(inputs, config, return_exceptions=return_exceptions, **kwargs)

    # LangChain's cache knows a call of this class by the fields alone, so what one call gives becomes fields.

    def generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Complete all prompts in one shared batch."""
        model, rest = self._with(kwargs)
        return BaseLLM.generate(model, prompts, model._stops(stop), callbacks, **rest)

    async def agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Complete all prompts in one shared batch."""
        model, rest = self._with(kwargs)
        return await BaseLLM.agenerate(model, prompts, model._stops(stop), callbacks, **rest)

    def _stops(self, given: list[str] | None) -> list[str] | None:
        """The stop strings of a call; a cache sees what is given here in place of the field."""
        if given is not None or not self.stop:
            return given
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    def _with(self, given: dict[str, Any]) -> tuple[PagedLLM, dict[str, Any]]:
        """This model with the fields that one call gives, and what else that gives."""
        given = self._by_own_names(given)
        fields = {name: given.pop(name) for name in (*SAMPLING_FIELDS, "logprobs", "top_logprobs") if name in given}
        if given.get("model") not in (None, self.model):
            kept = {name: value for name, value in self.engine_kwargs.items() if name != "tokenizer"}
            fields |= {"model": given.pop("model"), "engine": None, "revision": None, "engine_kwargs": kept}
        return (self.model_copy(update=fields) if fields else self), given

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        if self._streams(prompts):
            return self._joined(list(self._stream(prompts[0], stop, run_manager, **kwargs)))
        with as_langchain_errors():
            engine = self._source_of(kwargs).get()
            key = share_key(run_manager, len(prompts))
            handles = []
            try:
                for prompt in prompts:
                    handles.append(self._call(prompt, stop, kwargs, key).submit(engine, stream=False).handle)
                return self._result([wait(handle) for handle in handles], kwargs)
            finally:
                for handle in handles:
                    if not handle.finished:
                        handle.cancel()

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        if self._streams(prompts):
            return self._joined([chunk async for chunk in self._astream(prompts[0], stop, run_manager, **kwargs)])
        with as_langchain_errors():
            engine = await self._source_of(kwargs).aget()
            key = share_key(run_manager, len(prompts))
            handles = []
            try:
                for prompt in prompts:
                    handles.append((await self._call(prompt, stop, kwargs, key).asubmit(engine, stream=False)).handle)
                return self._result([await handle.aresult() for handle in handles], kwargs)
            finally:
                for handle in handles:
                    if not handle.finished:
                        handle.cancel()

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with as_langchain_errors():
            call = self._call(prompt, stop, kwargs, share_key(run_manager))
            check_streamable(call)
            handle = call.submit(self._source_of(kwargs).get(), stream=True).handle
            try:
                for output in handle:
                    for completion in output.outputs:
                        chunk = self._chunk(completion, output, kwargs)
                        if run_manager:
                            run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                        yield chunk
            finally:
                if not handle.finished:
                    handle.cancel()

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        with as_langchain_errors():
            call = self._call(prompt, stop, kwargs, share_key(run_manager))
            check_streamable(call)
            engine = await self._source_of(kwargs).aget()
            outputs = watched((await call.asubmit(engine, stream=True)).handle)
            try:
                async for output in outputs:
                    for completion in output.outputs:
                        chunk = self._chunk(completion, output, kwargs)
                        if run_manager:
                            await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                        yield chunk
            finally:
                await outputs.aclose()

    def _call(self, prompt: str, stop: list[str] | None, given: dict[str, Any], key: str | None) -> Call:
        self._warn_unknown_arguments(given, IGNORED_PER_CALL | {"stop_sequences", "max_new_tokens"})
        params = self._call_params(stop, given)
        timeout = given.get("timeout", self.timeout)
        return Call(params=params, prompt=prompt, timeout=timeout, share_key=given.get("share_key") or key)

    def _streams(self, prompts: list[str]) -> bool:
        """Whether listeners hear every token: LangChain hands on only the first prompt's."""
        return self.streaming and len(prompts) == 1 and self.n == 1

    def _chunk(self, completion: CompletionOutput, output: RequestOutput, given: dict[str, Any]) -> GenerationChunk:
        info = self._info(completion, given)
        if completion.finished:
            info = {**(info or {}), "token_usage": _usage([output])}
        return GenerationChunk(text=completion.text, generation_info=info)

    def _joined(self, chunks: list[GenerationChunk]) -> LLMResult:
        whole = functools.reduce(operator.add, chunks)
        info = dict(whole.generation_info or {})
        llm_output = {"token_usage": info.pop("token_usage"), "model_name": info["model_name"]}
        return LLMResult(generations=[[Generation(text=whole.text, generation_info=info)]], llm_output=llm_output)

    def _result(self, outputs: list[RequestOutput], given: dict[str, Any]) -> LLMResult:
        generations: list[list[Generation]] = [
            [
                Generation(text=completion.text, generation_info=self._info(completion, given))
                for completion in output.outputs
            ]
            for output in outputs
        ]
        model = self._by_own_names(given).get("model") or self.model
        llm_output = {"token_usage": _usage(outputs), "model_name": model}
        return LLMResult(generations=generations, llm_output=llm_output)

    def _info(self, completion: CompletionOutput, given: dict[str, Any]) -> dict[str, Any] | None:
        info = (
            end_metadata(completion, self._by_own_names(given).get("model") or self.model, False)
            if completion.finished
            else {}
        )
        if completion.logprobs is not None:
            info["logprobs"] = logprobs_content(completion)
        return info or None


def _usage(outputs: list[RequestOutput]) -> dict[str, int]:
    prompt_tokens = sum(output.metrics.prompt_tokens for output in outputs)
    output_tokens = sum(output.metrics.output_tokens for output in outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }
