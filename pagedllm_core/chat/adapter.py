"""What the framework adapters share: an engine that is built at the first call, and requests made from messages.

Importing this module brings in neither torch nor transformers.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from pagedllm_core.chat.formats import ToolFormat, reasoning_format, tool_format
from pagedllm_core.chat.grammar import ReplyRules
from pagedllm_core.chat.messages import with_listed_tools
from pagedllm_core.chat.reply import ReplyStyle
from pagedllm_core.chat.tools import AUTO, ToolChoice, tool_name
from pagedllm_core.config import EngineConfig
from pagedllm_core.errors import InvalidRequestError
from pagedllm_core.outputs import RequestOutput
from pagedllm_core.params import SamplingParams
from pagedllm_core.streams import RequestHandle

if TYPE_CHECKING:
    from pagedllm_core.async_engine import AsyncEngine
    from pagedllm_core.request import Request


class EngineSource:
    """Where an adapter gets its engine from.

    Args:
        config: The engine's configuration.
        engine: An engine to use; without it, the process's one of this configuration.
        token: Token of the Hugging Face hub, where the environment has none.
    """

    def __init__(self, config: EngineConfig, engine: AsyncEngine | None = None, token: str | None = None) -> None:
        self._config = config
        self._given = engine
        self.token = token
        self.keep_alive: float | None = None
        self._shared: weakref.ref[AsyncEngine] | None = None
        self._loading: Future[AsyncEngine] | None = None
        self._lock = threading.Lock()

    def get(self) -> AsyncEngine:
        """The engine; its model is loaded at the first call, and anew after `shutdown`.

        Raises:
            ModelLoadError: The model cannot be loaded.
        """
        return self.current() or self._load().result()

    async def aget(self) -> AsyncEngine:
        """`get` that lets the event loop run while the model loads.

        Raises:
            ModelLoadError: The model cannot be loaded.
        """
        engine = self.current()
        return engine if engine is not None else await asyncio.shield(asyncio.wrap_future(self._load()))

    def current(self) -> AsyncEngine | None:
        """The engine if it is there already; loads nothing."""
        if self._given is not None:
            return self._given
        engine = None if self._shared is None else self._shared()
        if engine is None or engine.closed or not engine.touch():
            return None
        engine.stay(self.keep_alive)
        return engine

    def _load(self) -> Future[AsyncEngine]:
        """Load on a thread of its own, once for all who wait: a loop's default executor has few threads."""
        with self._lock:
            engine = self.current()
            if engine is not None:  # it was loaded since the caller looked
                ready: Future[AsyncEngine] = Future()
                ready.set_result(engine)
                return ready
            if self._loading is None:
                self._loading = Future()
                threading.Thread(target=self._run_load, args=(self._loading,), daemon=True).start()
            return self._loading

    def _run_load(self, future: Future[AsyncEngine]) -> None:
        from pagedllm_core.registry import get_engine

        try:
            with _token_in_environment(self.token):
                engine = get_engine(self._config)
                engine.stay(self.keep_alive)
        except BaseException as error:  # whoever waits gets it
            with self._lock:
                self._loading = None
            future.set_exception(error)
            return
        with self._lock:
            self._shared, self._loading = weakref.ref(engine), None
        future.set_result(engine)


@contextlib.contextmanager
def _token_in_environment(token: str | None) -> Iterator[None]:
    """Let the hub's client find the token while a model loads; a configuration must not hold a secret."""
    if token is None or "HF_TOKEN" in os.environ:
        yield
        return
    os.environ["HF_TOKEN"] = token
    try:
        yield
    finally:
        os.environ.pop("HF_TOKEN", None)


# Adapters are made and copied often, some frameworks make one for every call; they all find the engine here.
_SOURCES: dict[EngineConfig, EngineSource] = {}


def shared_engine(config: EngineConfig, token: str | None = None, keep_alive: float | None = None) -> EngineSource:
    """Where to get the process's engine of this configuration.

    Args:
        config: The configuration.
        token: Counts when the model has to be downloaded.
        keep_alive: Seconds that the engine stays loaded without work, None for ever; who asks last decides.
    """
    source = _SOURCES.get(config) or _SOURCES.setdefault(config, EngineSource(config))
    if token is not None:
        source.token = token  # whoever has one gives it to all who ask for this model
    source.keep_alive = keep_alive
    return source


class Submission(NamedTuple):
    """A request that was queued, and how its reply is to be read."""

    handle: RequestHandle
    style: ReplyStyle


class Answer(NamedTuple):
    """A request's result, and how its reply is to be read."""

    output: RequestOutput
    style: ReplyStyle


@dataclass(frozen=True)
class Call:
    """One request of an adapter, before it is tokenized.

    Attributes:
        prompt: Text for raw completion; or None, and the messages are put through the chat template.
        messages: The conversation.
        params: How to sample.
        tools: JSON schemas of functions the model may call.
        choice: Whether and which of them.
        parallel: Whether there may be several calls in one reply.
        strict: Refuse what of the tools' schemas cannot be enforced.
        schema: JSON schema of the answer.
        tool_parser: Name of the format of tool calls, instead of the template's.
        reasoning_parser: Name of the format of reasoning, instead of the template's.
        chat_template: In place of the model's.
        template_kwargs: Further arguments of `ChatTemplate.render`.
        timeout: Seconds until it fails with `RequestTimeoutError`.
        share_key: Whose share it counts against, under the policy "fair".
    """

    params: SamplingParams
    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    choice: ToolChoice = AUTO
    parallel: bool = True
    strict: bool = False
    schema: Mapping[str, Any] | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    timeout: float | None = None
    share_key: str | None = None

    def tokenize(self, engine: AsyncEngine, limit: int | None = None) -> dict[str, Any]:
        """The prompt as the engine takes it: text and token ids.

        Args:
            engine: Whose tokenizer and template are used.
            limit: The context in tokens, where a conversation of many times that is to be refused by its beginning.

        Raises:
            InvalidRequestError: The chat template refuses the conversation.
            ContextLengthError: See `limit`.
        """
        from pagedllm_core.chat.template import ChatTemplate

        if self.prompt is not None:
            start = getattr(engine.tokenizer, "bos_token", None)
            if start and self.prompt.startswith(start):  # the tokenizer would put a second one in front
                ids = ChatTemplate(engine.tokenizer).encode(self.prompt, limit)
                return {"prompt": self.prompt, "prompt_token_ids": ids}
            return {"prompt": self.prompt}
        template = ChatTemplate(engine.tokenizer, self.chat_template)
        tools = self.tools if self.choice.mode != "none" else ()
        messages = self.messages
        if tools and not template.shows_tools(tools):
            messages, tools = with_listed_tools(messages, tools, self._tool_format(engine)), ()
        text = template.render(messages, tools=tools, simplify=True, **self.template_kwargs)
        return {"prompt": text, "prompt_token_ids": template.encode(text, limit)}

    def submit(self, engine: AsyncEngine, *, stream: bool) -> Submission:
        """Queue it, from any thread.

        Raises:
            PagedLLMError: It cannot be served; nothing was allocated.
        """
        with engine.held():
            request, style = self._prepare(engine, stream)
            return Submission(engine.enqueue(request), style)

    async def asubmit(self, engine: AsyncEngine, *, stream: bool) -> Submission:
        """Queue it from an event loop; template, tokenizer and grammar run on the engine's intake thread.

        Raises:
            PagedLLMError: It cannot be served; nothing was allocated.
        """
        with engine.held():
            request, style = await engine.run_in_intake(self._prepare, engine, stream)
            return Submission(engine.enqueue(request), style)

    def run(self, engine: AsyncEngine) -> Answer:
        """Queue it and block until it has ended; leaving early (Ctrl-C) frees its blocks.

        Raises:
            PagedLLMError: The request cannot be served, or failed.
        """
        handle, style = self.submit(engine, stream=False)
        return Answer(wait(handle), style)

    async def arun(self, engine: AsyncEngine) -> Answer:
        """`run` on an event loop; cancelling the task frees its blocks.

        Raises:
            PagedLLMError: The request cannot be served, or failed.
        """
        handle, style = await self.asubmit(engine, stream=False)
        try:
            return Answer(await handle.aresult(), style)
        finally:
            if not handle.finished:
                handle.cancel()

    def _prepare(self, engine: AsyncEngine, stream: bool) -> tuple[Request, ReplyStyle]:
        prompt = self.tokenize(engine, engine.max_model_len)
        params, style = self.params, ReplyStyle()
        if self.prompt is None:
            params, style = self._held(engine, str(prompt["prompt"]))
        try:
            request = engine.prepare(prompt, params, timeout=self.timeout, share_key=self.share_key, stream=stream)
        except InvalidRequestError as error:
            if self.prompt is None and params.guided is not None and str(error).startswith("guided."):
                self._blame(engine, prompt, error)
            raise
        return request, style

    def _blame(self, engine: AsyncEngine, prompt: Mapping[str, Any], error: InvalidRequestError) -> None:
        """Name the one of several schemas that a grammar was refused for.

        Raises:
            InvalidRequestError: One of them is refused by itself, too.
        """
        auto = dataclasses.replace(self, choice=AUTO)
        alone = [
            (f"tools: the parameters of {tool_name(tool)!r}", dataclasses.replace(auto, tools=(tool,), schema=None))
            for tool in self.tools
        ]
        if self.schema is not None:
            alone.append(("response_format", dataclasses.replace(auto, tools=())))
        for told, call in alone:
            try:
                params, _ = call._held(engine, str(prompt["prompt"]))
                engine.prepare(prompt, params)
            except InvalidRequestError as wrong:
                reason = str(wrong).partition(": ")[2]
                raise InvalidRequestError(f"{told}: {reason}; change or leave out that part of the schema") from error

    def _tool_format(self, engine: AsyncEngine) -> ToolFormat:
        from pagedllm_core.chat.template import ChatTemplate

        template = ChatTemplate(engine.tokenizer, self.chat_template)
        return tool_format(template.source(self.tools), self.tool_parser)

    def _held(self, engine: AsyncEngine, prompt: str) -> tuple[SamplingParams, ReplyStyle]:
        """The sampling parameters with the grammar of the reply, and how the reply is read."""
        from pagedllm_core.chat.template import ChatTemplate

        source = ChatTemplate(engine.tokenizer, self.chat_template).source(self.tools)
        written = tool_format(source, self.tool_parser) if self.tools else None
        reasoning = reasoning_format(source, self.reasoning_parser)
        opened = reasoning is not None and prompt.rstrip().endswith(reasoning.begin)
        style = ReplyStyle(
            tools=None if self.choice.mode == "none" else written,
            names=[tool_name(tool) for tool in self.tools],
            reasoning=reasoning,
            reasoning_open=opened,
            json=self.schema is not None,
        )
        params = self.params
        added = engine.tokenizer.get_added_vocab()
        tags = [reasoning.end if reasoning else "", written.tag if written else ""]
        if any(token in tag for tag in tags if tag for token in added):
            params = params.model_copy(update={"skip_special_tokens": False})
        if params.guided is not None:
            if self.choice.mode == "required" or self.schema is not None:
                raise InvalidRequestError("guided: contradicts a demanded call and response_format; give one of them")
            if reasoning is not None and reasoning.end not in str(params.guided):
                style = dataclasses.replace(style, reasoning=None, reasoning_open=False)  # it leaves no room for any
            return params, style
        rules = ReplyRules(self.tools, self.choice, self.parallel, self.strict, self.schema, written, reasoning, opened)
        guided = rules.guided(added)
        if guided is None:
            return params, style
        update: dict[str, Any] = {"guided": guided}
        if not rules.free:
            update |= {"stop": [], "stop_token_ids": []}  # what is held to a form ends by itself
        return params.model_copy(update=update), style


def wait(handle: RequestHandle) -> RequestOutput:
    """The handle's result; leaving early (Ctrl-C) frees its blocks.

    Raises:
        PagedLLMError: The request failed.
    """
    try:
        return handle.result()
    finally:
        if not handle.finished:
            handle.cancel()


async def watched(handle: RequestHandle) -> AsyncGenerator[RequestOutput, None]:
    """What is new of a streamed request, and an end of it when a task that reads it is cancelled.

    A framework may suspend between two outputs and never close its iterators when its task is cancelled there. Tasks
    that merely end are no sign: some callers read each output in a task of its own.
    """
    reader: asyncio.Task[Any] | None = None

    def on_done(task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            handle.cancel()

    def watch(task: asyncio.Task[Any] | None) -> asyncio.Task[Any] | None:
        if task is not reader:
            if reader is not None:
                reader.remove_done_callback(on_done)
            if task is not None:
                task.add_done_callback(on_done)
        return task

    try:
        reader = watch(asyncio.current_task())
        async for output in handle:
            yield output
            reader = watch(asyncio.current_task())
    finally:
        watch(None)
        if not handle.finished:
            handle.cancel()


def sampling_params(fields: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters from what a caller gave; None means left out, and `max_tokens` left out means no limit.

    Raises:
        InvalidRequestError: A value cannot be served.
    """
    return SamplingParams(
        **{"max_tokens": None, **{name: value for name, value in fields.items() if value is not None}}
    )
