"""Embeds the questions of many visitors together. Both assistants use it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

MOST = 64

Vector = list[float]


class EmbedTogether:
    """Calls an embedding model on one thread; texts that wait meanwhile go into its next call together.

    One thread, because a tokenizer must not be used by two at once. Nobody waits for company: a text that comes alone
    is embedded alone, and those that come while the model is busy share the call after.

    Args:
        embed: The model: a vector for each of some texts.

    Attributes:
        calls: How often the model was called.
        texts: How many texts it was given.
    """

    def __init__(self, embed: Callable[[list[str]], list[Vector]]) -> None:
        self.calls = 0
        self.texts = 0
        self._embed = embed
        self._waiting: deque[tuple[str, Future[Vector]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedding")

    def submit(self, text: str) -> Future[Vector]:
        """Have a text embedded; on an event loop, await it through `asyncio.wrap_future`."""
        future: Future[Vector] = Future()
        self._waiting.append((text, future))
        self._thread.submit(self._embed_waiting)  # finds nothing to do where an earlier one took this text along
        return future

    def embed(self, texts: list[str]) -> list[Vector]:
        """A vector for each text."""
        return [future.result() for future in list(map(self.submit, texts))]

    def _embed_waiting(self) -> None:
        taken = [self._waiting.popleft() for _ in range(min(MOST, len(self._waiting)))]
        wanted = [(text, future) for text, future in taken if future.set_running_or_notify_cancel()]
        if not wanted:
            return
        self.calls += 1
        self.texts += len(wanted)
        try:
            vectors = self._embed([text for text, _ in wanted])
        except Exception as error:
            for _, future in wanted:
                future.set_exception(error)
        else:
            for (_, future), vector in zip(wanted, vectors, strict=True):
                future.set_result(vector)
