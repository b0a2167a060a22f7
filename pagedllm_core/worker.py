"""The engine's thread: drain the inbox, step, deliver, over and over."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import torch

from pagedllm_core.engine import Engine
from pagedllm_core.errors import EngineClosedError, InvalidRequestError, PagedLLMError, RequestFailedError
from pagedllm_core.outputs import RequestOutput
from pagedllm_core.request import Request
from pagedllm_core.streams import Mailbox, Waiter, wake

logger = logging.getLogger("pagedllm")

Result = TypeVar("Result")
Command = Callable[[], None]


class EngineWorker:
    """Owns the core and the only thread that touches it. Everything else reaches it through one queue of commands.

    Args:
        core: The engine to drive; the worker closes it.
    """

    def __init__(self, core: Engine) -> None:
        self.core = core
        self.error: PagedLLMError | None = None  # once set, no later request is accepted
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()  # reentrant: finalizers put into it
        self._mailboxes: dict[str, Mailbox] = {}
        self._pid = os.getpid()
        _limit_forks()
        self._stopping = self._left = False
        self.keep_alive: float | None = None  # seconds that it stays without work; None: for ever
        self._holds = 0  # callers who are about to submit something
        self.last_used = time.monotonic()
        self._idle_lock = threading.Lock()  # between whoever is about to use the engine and its leaving for idleness
        self._thread = threading.Thread(target=self._run, name="pagedllm-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """True while requests are served."""
        return self.error is None and not self._left and self._thread.is_alive() and self._pid == os.getpid()

    @property
    def idle(self) -> bool:
        """True where no request is unfinished, and nobody is about to submit one."""
        return not self._mailboxes and not self._holds

    def touch(self) -> bool:
        """Note that somebody is about to use the engine; False where it has just left."""
        with self._idle_lock:
            self.last_used = time.monotonic()
            return not self._left

    def stay(self, keep_alive: float | None) -> None:
        """Seconds that the engine stays without work from now on; None: for ever."""
        if keep_alive != self.keep_alive:
            self.keep_alive = keep_alive
            self._inbox.put(lambda: None)  # it may be waiting without a limit

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within it the engine does not leave, however long a prompt takes to be prepared."""
        with self._idle_lock:
            self._holds += 1
        try:
            yield
        finally:
            with self._idle_lock:
                self._holds -= 1
                self.last_used = time.monotonic()

    def submit(self, request: Request) -> Mailbox:
        """Hand a prepared request to the thread.

        Raises:
            EngineClosedError: The engine is closed or has died, or this process is a fork of its own.
            InvalidRequestError: The request's id is in use.
        """
        self.check_open()
        mailbox = Mailbox()
        if self._mailboxes.setdefault(request.request_id, mailbox) is not mailbox:
            raise InvalidRequestError(f"request_id={request.request_id!r}: is running already; choose another id")
        self._inbox.put(lambda: self._enqueue(request))
        if self.error is not None:  # it closed in between: nobody would answer
            self._deliver([_failed_output(request.request_id, self.error)])
        return mailbox

    def check_open(self) -> None:
        """Raise what a new request would meet: the error that closed the engine."""
        self.check_process()
        if self.error is not None:
            raise EngineClosedError(str(self.error))  # a new one: a shared one would gather everybody's traceback

    def check_process(self) -> None:
        """Raise where this process is a fork of the one that made the engine: its thread is not here."""
        if self._pid != os.getpid():
            raise EngineClosedError(
                "the engine belongs to the parent process; make a new one here, or start processes without fork"
            )

    def abort(self, request_id: str) -> None:
        """End the request that has this id before the next step."""
        self._inbox.put(lambda: self._abort(request_id))

    def cancel(self, request_id: str, mailbox: Mailbox) -> None:
        """`abort` for one request and no later one of its id. May be called from anywhere, a finalizer included."""
        if not mailbox.finished:
            self._inbox.put(lambda: self._cancel(request_id, mailbox))

    def call(self, function: Callable[[], Result]) -> Result:
        """Run `function` on the engine's thread between two steps, and return its result."""
        if threading.current_thread() is self._thread or not self._thread.is_alive():
            return function()
        future: Future[Result] = Future()

        def command() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._inbox.put(command)
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if not self._thread.is_alive():
                    return function()

    def stop(self, wait: bool = True) -> None:
        """End every request with `EngineClosedError` and free the model. May be called twice, and from anywhere."""
        if self._pid != os.getpid():
            return
        self._inbox.put(self._stop)
        if wait and threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._drain(block=not self.core.has_unfinished)
                if self.core.has_unfinished and not self._stopping:
                    self._deliver(self.core.step())
                    self._abort_abandoned()
            self.error = EngineClosedError("the engine was closed; make a new one (get_engine does so by itself)")
        except EngineClosedError as error:
            logger.error("the engine ends: %s", error)
            self._fail_all(error.with_traceback(None))
        except BaseException as error:
            logger.exception("the engine's thread died")
            reason = f"the engine died: {type(error).__name__}: {error}; close it and make a new one"
            self._fail_all(EngineClosedError(reason))
        finally:
            self._shut()

    def _fail_all(self, error: PagedLLMError) -> None:
        self.error = error
        self._deliver([_failed_output(request_id, error) for request_id in list(self._mailboxes)])

    def _shut(self) -> None:
        try:
            self.core.close()
            self._deliver(self.core.take_outputs())
        except Exception:
            logger.exception("closing the engine failed")
        self._fail_all(self.error or EngineClosedError("the engine was closed"))
        while not self._inbox.empty():  # answer whoever still waits in `call`
            self._drain(block=False)

    def _leave_if_idle(self) -> None:
        with self._idle_lock:
            waited = time.monotonic() - self.last_used
            unused = self.idle and self._inbox.empty()
            if self.keep_alive is not None and waited >= self.keep_alive and unused:
                self._left = self._stopping = True

    def _patience(self) -> float | None:
        """Seconds to wait for a command."""
        if self.keep_alive is None:
            return None
        return max(0.01, self.last_used + self.keep_alive - time.monotonic())

    def _drain(self, block: bool) -> None:
        try:
            command = self._inbox.get(block=block, timeout=self._patience() if block else None)
            while True:
                command()
                command = self._inbox.get(block=False)
        except queue.Empty:
            if block:
                self._leave_if_idle()

    def _enqueue(self, request: Request) -> None:
        try:
            self.core.enqueue(request)
        except PagedLLMError as error:
            self._deliver([_failed_output(request.request_id, error)])
        except Exception as error:
            logger.exception("queueing a request failed")
            self._deliver([_failed_output(request.request_id, RequestFailedError(f"{type(error).__name__}: {error}"))])

    def _abort(self, request_id: str) -> None:
        self.core.abort(request_id)

    def _cancel(self, request_id: str, mailbox: Mailbox) -> None:
        if self._mailboxes.get(request_id) is mailbox:
            self.core.abort(request_id)

    def _abort_abandoned(self) -> None:
        """End requests that were awaited on an event loop which has been closed since."""
        for request_id in [name for name, mailbox in self._mailboxes.copy().items() if mailbox.abandoned]:
            self.core.abort(request_id)

    def _stop(self) -> None:
        self._stopping = True

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        waiters: list[Waiter] = []
        for output in outputs:
            find = self._mailboxes.pop if output.finished else self._mailboxes.get
            if output.finished:
                self.last_used = time.monotonic()
            mailbox = find(output.request_id, None)
            if mailbox is not None:
                waiters.extend(mailbox.put(output))
        if waiters:
            wake(waiters)


@functools.cache
def _limit_forks() -> None:
    """In a child of a fork, torch's threads do not exist and are waited for all the same; it works with one."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


def _failed_output(request_id: str, error: PagedLLMError) -> RequestOutput:
    return RequestOutput(request_id, None, [], finished=True, error=error)
