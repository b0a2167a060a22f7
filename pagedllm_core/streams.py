"""Where a request's outputs meet whoever waits for them, on any thread or event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from pagedllm_core.errors import PagedLLMError, RequestTimeoutError
from pagedllm_core.outputs import CompletionOutput, RequestOutput

if TYPE_CHECKING:
    from pagedllm_core.async_engine import AsyncEngine

logger = logging.getLogger("pagedllm")

Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


def merge_outputs(deltas: list[RequestOutput]) -> RequestOutput:
    """Put consecutive outputs of one request together; of a single one, that one itself."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    completions: dict[int, CompletionOutput] = {}
    for delta in deltas:
        for new in delta.outputs:
            old = completions.get(new.index)
            if old is None:
                copy = dataclasses.replace(new, token_ids=list(new.token_ids))
                copy.logprobs = None if new.logprobs is None else list(new.logprobs)
                completions[new.index] = copy
                continue
            old.text += new.text
            old.token_ids.extend(new.token_ids)
            if old.logprobs is not None and new.logprobs is not None:
                old.logprobs.extend(new.logprobs)
            old.cumulative_logprob = new.cumulative_logprob
            old.finish_reason, old.stop_reason = new.finish_reason, new.stop_reason
    scored = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None]
    return dataclasses.replace(
        last,
        outputs=[completions[index] for index in sorted(completions)],
        prompt_logprobs=scored[0] if scored else None,
    )


class Mailbox:
    """Outputs of one request. The engine's thread puts, any thread or loop takes.

    A slow reader finds everything that has come since its last look as one output.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._deltas: list[RequestOutput] = []
        self._read = 0
        self._error: PagedLLMError | None = None
        self._waiters: list[Waiter] = []
        self._readers: list[Waiter] = []  # who waits on event loops
        self._threads = 0  # threads that wait
        self._callbacks: list[Callable[[], None]] = []
        self.finished = False

    def put(self, output: RequestOutput) -> list[Waiter]:
        """Add an output; returns the futures to be woken on their loops."""
        with self._condition:
            if self.finished:
                return []
            if output.error is not None:
                self._error = output.error
            else:
                self._deltas.append(output)
            self.finished = output.finished
            waiters, self._waiters = self._waiters, []
            callbacks = self._callbacks if self.finished else []
            self._condition.notify_all()
        for callback in callbacks:
            _call(callback)
        return waiters

    def take(self) -> RequestOutput | None:
        """What is new since the last call, or None; raises the request's error once nothing is left."""
        with self._condition:
            deltas = self._deltas[self._read :]
            self._read = len(self._deltas)
        if deltas:
            return merge_outputs(deltas)
        if self._error is not None:
            raise self._error
        return None

    def result(self) -> RequestOutput:
        """Everything, of a finished request."""
        if self._error is not None:
            raise self._error
        return merge_outputs(self._deltas)

    def wait(self, whole: bool, timeout: float | None = None) -> bool:
        """Block until there is news (or, with `whole`, the end); False when the time is over."""
        with self._condition:
            self._threads += 1
            try:
                return self._condition.wait_for(lambda: self._has_news(whole), timeout)
            finally:
                self._threads -= 1

    async def wait_async(self, whole: bool) -> None:
        """Wait on the running loop until there is news (or, with `whole`, the end)."""
        loop = asyncio.get_running_loop()
        while True:
            with self._condition:
                if self._has_news(whole):
                    return
                future: asyncio.Future[None] = loop.create_future()
                reader = (loop, future)
                self._waiters.append(reader)
                self._readers.append(reader)
            try:
                await future
            finally:  # reached however the wait ends, but not when the loop is closed under it
                with self._condition:
                    self._readers.remove(reader)

    @property
    def abandoned(self) -> bool:
        """True where all who wait do so on event loops that were closed without cancelling them."""
        with self._condition:
            return bool(self._readers) and not self._threads and all(loop.is_closed() for loop, _ in self._readers)

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the engine's thread at the end, or at once if that has been."""
        with self._condition:
            if not self.finished:
                self._callbacks.append(callback)
                return
        _call(callback)

    def _has_news(self, whole: bool) -> bool:
        return self.finished or (not whole and self._read < len(self._deltas))


def _call(callback: Callable[[], None]) -> None:
    """Call it; what it raises is its owner's, as with `concurrent.futures`."""
    try:
        callback()
    except BaseException:  # it runs on the thread that everybody shares
        logger.exception("a done callback raised")


def wake(waiters: Iterable[Waiter]) -> None:
    """Wake futures with one call per event loop; a loop that is closed has nobody to wake."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for loop, future in waiters:
        loops.setdefault(loop, []).append(future)
    for loop, futures in loops.items():
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_set_all, futures)


def _set_all(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


class RequestHandle:
    """A submitted request. Dropping the last reference to it aborts the request.

    Iterate it (with `for` or `async for`) for what is new, or take the `result`; each works from any thread, and the
    asynchronous forms on any event loop.
    """

    def __init__(self, request_id: str, engine: AsyncEngine, mailbox: Mailbox) -> None:
        self.request_id = request_id
        self._engine = engine  # keeps the engine alive while somebody waits
        self.mailbox = mailbox

    @property
    def finished(self) -> bool:
        """True once the request has ended, in whatever way."""
        return self.mailbox.finished

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Block until the request has ended.

        Args:
            timeout: Seconds to wait; the request goes on when they are over.

        Raises:
            RequestTimeoutError: Not finished in time.
            PagedLLMError: The request failed.
        """
        self._engine.check_process()
        if not self.mailbox.wait(whole=True, timeout=timeout):
            raise RequestTimeoutError(f"request {self.request_id!r} is not finished after timeout={timeout} s")
        return self.mailbox.result()

    async def aresult(self) -> RequestOutput:
        """Wait on the running event loop until the request has ended.

        Raises:
            PagedLLMError: The request failed.
        """
        self._engine.check_process()
        await self.mailbox.wait_async(whole=True)
        return self.mailbox.result()

    def cancel(self) -> None:
        """End the request now; its blocks are free within a step. Harmless if it has ended."""
        self._engine.cancel(self)

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the engine's thread once the request has ended; it must be quick."""
        self.mailbox.add_done_callback(callback)

    def __iter__(self) -> Iterator[RequestOutput]:
        """What is new, blocking in between, up to the output that is finished."""
        self._engine.check_process()
        try:
            while True:
                self.mailbox.wait(whole=False)
                output = self.mailbox.take()
                if output is not None:
                    yield output
                if self.finished if output is None else output.finished:  # without one, another reader was first
                    return
        finally:
            if not self.finished:
                self.cancel()

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        """What is new, up to the output that is finished; waits on the running event loop."""
        self._engine.check_process()
        try:
            while True:
                await self.mailbox.wait_async(whole=False)
                output = self.mailbox.take()
                if output is not None:
                    yield output
                if self.finished if output is None else output.finished:  # without one, another reader was first
                    return
        finally:
            if not self.finished:
                self.cancel()
