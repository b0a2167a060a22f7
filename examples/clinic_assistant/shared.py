"""One assistant for all visitors of a page: each of them is a thread, and their questions run in one batch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import aclosing
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from assistant import ClinicAssistant
from material import Reply

from pagedllm_core import EngineStats, get_engine

Result = TypeVar("Result")


class SharedAssistant:
    """Runs an assistant on an event loop of its own, for visitors who are threads.

    Making one reads the leaflets and loads the model.

    Args:
        assistant: The assistant, not started yet.
    """

    def __init__(self, assistant: ClinicAssistant) -> None:
        self.assistant = assistant
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="clinic-assistant", daemon=True).start()
        try:
            self._run(assistant.start())
            self._engine = get_engine(assistant.llm.engine_config())
        except BaseException:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise

    def stats(self) -> EngineStats:
        """What the engine does at the moment, for all visitors."""
        return self._engine.stats()

    def stream(self, question: str, patience: float = 0.3) -> Iterator[str | Reply]:
        """Answer one visitor's question bit by bit. Closing the iterator ends the request.

        Args:
            question: What is asked.
            patience: After so many seconds without news comes an empty text, so that the visitor's thread can look
                after other things.
        """
        news: SimpleQueue[str | Reply | BaseException | None] = SimpleQueue()
        asked = asyncio.run_coroutine_threadsafe(self._answer(question, news), self._loop)
        try:
            while (part := _next(news, patience)) is not None:
                if isinstance(part, BaseException):
                    raise part
                yield part
        finally:
            asked.cancel()

    async def _answer(self, question: str, news: SimpleQueue[Any]) -> None:
        try:
            async with aclosing(self.assistant.stream(question)) as parts:
                async for part in parts:
                    news.put(part)
            news.put(None)
        except Exception as error:
            news.put(error)

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _next(news: SimpleQueue[Any], patience: float) -> Any:
    try:
        return news.get(timeout=patience)
    except Empty:
        return ""
