"""The engine that every thread and event loop of a process may share."""

from __future__ import annotations

import asyncio
import atexit
import functools
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from pagedllm_core.config import EngineConfig
from pagedllm_core.engine import Engine
from pagedllm_core.errors import EngineClosedError
from pagedllm_core.intake import Prompt, checked_id
from pagedllm_core.metrics import EngineStats
from pagedllm_core.model.interface import Runner
from pagedllm_core.outputs import RequestOutput
from pagedllm_core.params import SamplingParams
from pagedllm_core.request import Request
from pagedllm_core.streams import RequestHandle
from pagedllm_core.worker import EngineWorker

__all__ = ["AsyncEngine", "RequestHandle", "open_engines"]

Result = TypeVar("Result")

_OPEN: weakref.WeakSet[AsyncEngine] = weakref.WeakSet()  # what `list_engines` shows; owns nothing
_WORKERS: weakref.WeakSet[EngineWorker] = weakref.WeakSet()  # a running thread keeps its worker alive
_OPEN_LOCK = threading.Lock()


def open_engines() -> list[AsyncEngine]:
    """Every engine of the process that has not been closed."""
    with _OPEN_LOCK:
        return [engine for engine in _OPEN if not engine.closed]


@atexit.register
def _close_all() -> None:
    """Join every engine's thread before the interpreter goes: a thread inside torch must not outlive it.

    The workers are asked, not the engines: an engine that was dropped a moment ago may still be in a step.
    """
    for worker in list(_WORKERS):
        worker.stop(wait=True)


class AsyncEngine:
    """A paged engine on a thread of its own; all its callers share one batch.

    Args:
        config: What the engine is, or the model's name; or give its fields as keyword arguments.
        runner: A loaded model (for tests); by default the one that the configuration names is loaded.
        **fields: Fields of `EngineConfig`, where `config` is not given.

    Raises:
        ModelLoadError: The model cannot be loaded.
        InvalidRequestError: A configuration field cannot be served.
    """

    def __init__(
        self, config: EngineConfig | str | None = None, *, runner: Runner | None = None, **fields: Any
    ) -> None:
        self.config = EngineConfig.of(config, fields)
        self._worker = EngineWorker(Engine(self.config, runner=runner))
        _WORKERS.add(self._worker)
        self._tokenizing: dict[str, bool] = {}  # ids that the caller chose, and whether they were aborted meanwhile
        self._intake = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pagedllm-intake")
        # The thread holds the worker only, so an engine that nobody names any more closes itself.
        self._finalizer = weakref.finalize(self, _close, self._worker, self._intake)
        self._finalizer.atexit = False  # `_close_all` joins the thread, too
        with _OPEN_LOCK:
            _OPEN.add(self)

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer, or None."""
        return self._worker.core.runner.tokenizer

    @property
    def max_model_len(self) -> int:
        """Context limit in tokens."""
        return self._worker.core.runner.max_model_len

    @property
    def context_window(self) -> int:
        """The longest sequence in tokens that the model and the KV pool can hold; needs no step to end."""
        runner = self._worker.core.runner
        return min(runner.max_model_len, runner.num_blocks * self.config.block_size)

    @property
    def closed(self) -> bool:
        """True once the engine accepts no more requests."""
        return not self._worker.alive

    @property
    def idle_since(self) -> float | None:
        """When its last request ended (`time.monotonic`), or None while any is unfinished."""
        return self._worker.last_used if self._worker.idle else None

    def touch(self) -> bool:
        """Note that a request is about to come; False where the engine has just left for idleness."""
        return self._worker.touch()

    def stay(self, keep_alive: float | None) -> None:
        """Let the engine go after this many seconds without work; None: never by itself."""
        self._worker.stay(keep_alive)

    def held(self) -> AbstractContextManager[None]:
        """A context within which the engine does not leave for idleness."""
        return self._worker.held()

    def submit(self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any) -> RequestHandle:
        """Validate, tokenize (on this thread) and queue one request, from any thread.

        Args:
            prompt: Text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`.
            sampling_params: vLLM's defaults if None.
            **options: `request_id, priority, share_key, timeout` (seconds), and `stream` (True: what is new after
                each step; False: one output at the end, which costs the engine less).

        Raises:
            InvalidRequestError: A field cannot be served; nothing was allocated.
            CapacityError: The request can never fit the pool.
            EngineClosedError: The engine was closed.
        """
        return self.enqueue(self.prepare(prompt, sampling_params, **options))

    def prepare(self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any) -> Request:
        """The first half of `submit`: tokenize and validate, without queueing anything."""
        self._worker.check_open()
        return self._worker.core.intake.prepare(prompt, sampling_params, **options)

    def enqueue(self, request: Request) -> RequestHandle:
        """The second half of `submit`: queue a prepared request, once."""
        mailbox = self._worker.submit(request)
        handle = RequestHandle(request.request_id, self, mailbox)
        weakref.finalize(handle, self._worker.cancel, request.request_id, mailbox).atexit = False
        return handle

    def cancel(self, handle: RequestHandle) -> None:
        """End a handle's request, and no other that has its id by now."""
        self._worker.cancel(handle.request_id, handle.mailbox)

    def check_process(self) -> None:
        """Raise where this process is a fork of the engine's.

        Raises:
            EngineClosedError: It is.
        """
        self._worker.check_process()

    async def asubmit(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any
    ) -> RequestHandle:
        """`submit` for event loops: tokenizes on the engine's intake thread."""
        if options.get("request_id") is None:
            return self.enqueue(await self.run_in_intake(self.prepare, prompt, sampling_params, **options))
        request_id = checked_id(options["request_id"])
        self._tokenizing.setdefault(request_id, False)
        try:
            handle = self.enqueue(await self.run_in_intake(self.prepare, prompt, sampling_params, **options))
        finally:
            aborted = self._tokenizing.pop(request_id, False)
        if aborted:
            handle.cancel()
        return handle

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        share_key: str | None = None,
        timeout: float | None = None,
    ) -> RequestOutput:
        """Run one request to its end. Cancelling the task frees its blocks within a step.

        Raises:
            InvalidRequestError: A field cannot be served; nothing was allocated.
            RequestTimeoutError: It did not finish within `timeout` seconds.
            RequestFailedError: It failed while it ran.
            EngineClosedError: The engine was closed.
        """
        handle = await self.asubmit(
            prompt, sampling_params, request_id=request_id, priority=priority, share_key=share_key, timeout=timeout,
            stream=False,
        )  # fmt: skip
        try:
            return await handle.aresult()
        finally:
            if not handle.finished:
                handle.cancel()

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        share_key: str | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yield what is new, up to the output that is finished. Cancelling or closing it frees the blocks.

        Raises:
            PagedLLMError: As `generate`.
        """
        handle = await self.asubmit(
            prompt, sampling_params, request_id=request_id, priority=priority, share_key=share_key, timeout=timeout
        )
        try:
            async for output in handle:
                yield output
        finally:
            if not handle.finished:
                handle.cancel()

    async def run_in_intake(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Run a function (a template, a tokenizer) on the intake thread, in order, off the event loop.

        Raises:
            EngineClosedError: The engine was closed.
        """
        self._worker.check_open()
        call = functools.partial(function, *args, **kwargs)
        try:
            future = asyncio.get_running_loop().run_in_executor(self._intake, call)
        except RuntimeError as error:  # closed in between
            raise EngineClosedError("the engine was closed; make a new one") from error
        return await future

    def abort(self, request_id: str) -> None:
        """End a request now, from any thread; whoever waits gets what it has, with `finish_reason="abort"`."""
        if checked_id(request_id) in self._tokenizing:
            self._tokenizing[request_id] = True
        self._worker.abort(request_id)

    def stats(self) -> EngineStats:
        """A consistent snapshot, taken between two steps."""
        return self._worker.call(self._worker.core.stats)

    def health(self) -> bool:
        """True while the engine serves requests."""
        return self._worker.alive

    def close(self) -> None:
        """End every request with `EngineClosedError`, free the memory, and join the thread. May be called twice."""
        self._finalizer()
        self._worker.stop(wait=True)

    async def aclose(self) -> None:
        """`close` without blocking the event loop."""
        await asyncio.get_running_loop().run_in_executor(None, self.close)

    def __enter__(self) -> AsyncEngine:
        """Return the engine."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the engine."""
        self.close()

    async def __aenter__(self) -> AsyncEngine:
        """Return the engine."""
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Close the engine."""
        await self.aclose()

    def __reduce__(self) -> Any:
        """Engines hold weights and threads; what can be pickled is their configuration."""
        raise TypeError("an AsyncEngine cannot be pickled; pickle its config, and call get_engine(config) there")

    def __deepcopy__(self, memo: dict[int, Any]) -> AsyncEngine:
        """Copies of whatever refers to an engine share it."""
        return self


def _close(worker: EngineWorker, intake: ThreadPoolExecutor) -> None:
    worker.stop(wait=False)
    intake.shutdown(wait=False)
