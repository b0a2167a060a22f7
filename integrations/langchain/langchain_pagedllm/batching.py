"""Many calls at once: LangChain's own doors would send as many as there are CPUs, or one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig

from langchain_pagedllm.sharing import configs_of_one_share, each_as_completed

MAX_THREADS = 512


class AllAtOnce(Runnable[Any, Any]):
    """Doors for many inputs; each input has a run of its own, so an error stays with the one that it is about."""

    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Answer all inputs in one shared batch; `max_concurrency` in the configuration limits it."""
        configs = configs_of_one_share(config, len(inputs), min(len(inputs), MAX_THREADS))
        return Runnable.batch(self, inputs, configs, return_exceptions=return_exceptions, **kwargs)

    def batch_as_completed(
        self,
        inputs: Sequence[Any],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, Any]]:
        """Answer all inputs in one shared batch, each as soon as it is ready."""
        configs = configs_of_one_share(config, len(inputs), min(len(inputs), MAX_THREADS))
        return Runnable.batch_as_completed(self, inputs, configs, return_exceptions=return_exceptions, **kwargs)  # type: ignore[call-overload, no-any-return]

    async def abatch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> list[Any]:
        """Answer all inputs in one shared batch; `max_concurrency` in the configuration limits it."""
        configs = configs_of_one_share(config, len(inputs))
        return await Runnable.abatch(self, inputs, configs, return_exceptions=return_exceptions, **kwargs)

    async def abatch_as_completed(
        self,
        inputs: Sequence[Any],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> AsyncIterator[tuple[int, Any]]:
        """Answer all inputs in one shared batch, each as soon as it is ready."""
        configs = configs_of_one_share(config, len(inputs))
        limit = configs[0].get("max_concurrency") if configs else None

        def answer(number: int) -> Coroutine[Any, Any, Any]:
            return self.ainvoke(inputs[number], configs[number], **kwargs)

        answers = each_as_completed(answer, len(inputs), limit, return_exceptions)
        try:
            async for one in answers:
                yield one
        finally:
            await answers.aclose()
