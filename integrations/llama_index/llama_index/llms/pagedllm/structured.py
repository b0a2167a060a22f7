"""Structured prediction: replies that are objects of a class, held to its JSON schema while they are written."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatResponse, ToolCallBlock
from llama_index.core.instrumentation.events.llm import LLMStructuredPredictEndEvent, LLMStructuredPredictStartEvent
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.program.function_program import get_function_tool
from llama_index.core.program.utils import FlexibleModel, create_flexible_model
from llama_index.core.types import Model, PydanticProgramMode
from llama_index_instrumentation import get_dispatcher
from pydantic import BaseModel, RootModel, SerializerFunctionWrapHandler, ValidationError, model_serializer
from pydantic_core import from_json

from pagedllm_core.chat.fields import AdapterFields
from pagedllm_core.chat.schemas import class_schema
from pagedllm_core.errors import InvalidRequestError

if TYPE_CHECKING:
    from llama_index.core.prompts import PromptTemplate
    from llama_index.core.tools.types import BaseTool

dispatcher = get_dispatcher("llama_index.core.llms.llm")

_HELD = (PydanticProgramMode.DEFAULT, PydanticProgramMode.FUNCTION)
# What programs of llama-index-core take out of the arguments, too: the class decides it.
_DECIDED = ("tool_required", "tool_choice", "allow_parallel_tool_calls")
# For models that have none.
_PLAIN_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "


def as_tool(tool: BaseTool) -> dict[str, Any]:
    """A tool in OpenAI's form, with the whole schema of its arguments: llama-index-core's loses a class's `$ref`."""
    converted: dict[str, Any] = tool.metadata.to_openai_tool(skip_length_check=True)
    converted["function"]["name"] = tool.metadata.get_name()  # as it is: any name can be written here
    if tool.metadata.fn_schema is not None:
        schema = class_schema(tool.metadata.fn_schema)
        root = schema.pop("$ref", None)  # a class that refers to itself
        if root is not None:
            schema = {**schema, **schema["$defs"][root.rpartition("/")[2]]}
        parameters = {key: value for key, value in schema.items() if key not in ("title", "description")}
        converted["function"]["parameters"] = parameters
    return converted


class StructuredPrediction(AdapterFields, FunctionCallingLLM):
    """An LLM whose structured predictions are held to the class's schema.

    With `PydanticProgramMode.DEFAULT` the reply is JSON of that schema; with `FUNCTION` it is a call of a tool that
    takes it, so that the model is shown the schema. Other modes are left to LlamaIndex.
    """

    @model_serializer(mode="wrap")
    def _with_engine(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Dumps as in `AdapterFields`, with the name of the class, by which LlamaIndex reads them."""
        return {**dump(self._on_its_own()), "class_name": self.class_name()}

    @dispatcher.span
    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """An object of this class.

        Args:
            output_cls: The class.
            prompt: The prompt's template.
            llm_kwargs: Arguments of the call.
            **prompt_args: What the template is filled with.

        Raises:
            InvalidRequestError: The class's schema cannot be enforced, or `max_tokens` is too small for it.
            ValidationError: A validator of the class, of which its schema says nothing, refused the reply.
        """
        if self.pydantic_program_mode not in _HELD:
            other: Model = super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
            return other
        dispatcher.event(
            LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args)
        )
        output = _read(output_cls, self.chat(**self._request(output_cls, prompt, llm_kwargs, prompt_args)))
        dispatcher.event(LLMStructuredPredictEndEvent(output=output))
        return output

    @dispatcher.span
    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """`structured_predict` on an event loop; cancelling the task frees its memory.

        Args:
            output_cls: The class.
            prompt: The prompt's template.
            llm_kwargs: Arguments of the call.
            **prompt_args: What the template is filled with.

        Raises:
            InvalidRequestError: The class's schema cannot be enforced, or `max_tokens` is too small for it.
            ValidationError: A validator of the class, of which its schema says nothing, refused the reply.
        """
        if self.pydantic_program_mode not in _HELD:
            later: Model = await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
            return later
        dispatcher.event(
            LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args)
        )
        await self._source_of(llm_kwargs or {}).aget()
        output = _read(output_cls, await self.achat(**self._request(output_cls, prompt, llm_kwargs, prompt_args)))
        dispatcher.event(LLMStructuredPredictEndEvent(output=output))
        return output

    # The two that stream: llama-index-core emits the events around them.

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Model | list[Model] | FlexibleModel | list[FlexibleModel], None, None]:
        if self.pydantic_program_mode not in _HELD:
            return super()._structured_stream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        return self._objects(output_cls, self._request(output_cls, prompt, llm_kwargs, prompt_args))

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Model | list[Model] | FlexibleModel | list[FlexibleModel], None]:
        if self.pydantic_program_mode not in _HELD:
            return await super()._structured_astream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        await self._source_of(llm_kwargs or {}).aget()
        return self._aobjects(output_cls, self._request(output_cls, prompt, llm_kwargs, prompt_args))

    def _objects(
        self, output_cls: type[Model], request: dict[str, Any]
    ) -> Generator[Model | FlexibleModel, None, None]:
        parts = _Parts(output_cls)
        for response in self.stream_chat(**request):
            yield from parts.feed(response)

    async def _aobjects(
        self, output_cls: type[Model], request: dict[str, Any]
    ) -> AsyncGenerator[Model | FlexibleModel, None]:
        parts = _Parts(output_cls)
        responses = await self.astream_chat(**request)
        try:
            async for response in responses:
                for found in parts.feed(response):
                    yield found
        finally:
            await responses.aclose()

    def _request(
        self,
        output_cls: type[BaseModel],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None,
        prompt_args: dict[str, Any],
    ) -> dict[str, Any]:
        """The arguments of the one chat call that a prediction makes."""
        messages = self._extend_messages(prompt.format_messages(llm=self, **prompt_args))
        given = {name: value for name, value in (llm_kwargs or {}).items() if name not in _DECIDED}
        if not self._has_template(self._source_of(given).get()):
            given.setdefault("chat_template", _PLAIN_TEMPLATE)
        is_object = not issubclass(output_cls, RootModel)  # arguments are one
        if self.pydantic_program_mode is PydanticProgramMode.FUNCTION and is_object:
            tool: Any = get_function_tool(output_cls)
            return self._prepare_chat_with_tools([tool], chat_history=messages, tool_required=True, **given)
        form = {"name": output_cls.__name__, "schema": class_schema(output_cls), "strict": True}
        return {"messages": messages, **given, "response_format": {"type": "json_schema", "json_schema": form}}


class _Parts:
    """Turns a streamed reply into what is there of the object, and at its end into the object."""

    def __init__(self, output_cls: type[BaseModel]) -> None:
        self._class = output_cls
        self._flexible = create_flexible_model(output_cls)
        self._last: Any = None

    def feed(self, response: ChatResponse) -> Generator[Any, None, None]:
        if _finish_reason(response) is not None:
            yield _read(self._class, response)
            return
        found = self._found(response)
        if found is not None and found != self._last:
            self._last = found
            yield self._part(found)

    @staticmethod
    def _found(response: ChatResponse) -> Any:
        calls = _calls(response)
        if calls:
            return calls[0].tool_kwargs
        try:
            return from_json(response.message.content or "", allow_partial="trailing-strings")
        except ValueError:  # nothing yet
            return None

    def _part(self, found: Any) -> BaseModel:
        try:
            return self._class.model_validate_json(json.dumps(found))
        except ValidationError:
            return self._flexible.model_validate(found if isinstance(found, dict) else {})


def _read(output_cls: type[Model], response: ChatResponse) -> Model:
    calls = _calls(response)
    if calls:
        return output_cls.model_validate_json(json.dumps(calls[0].tool_kwargs))
    text = response.message.content or ""
    try:
        json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(
            f"{output_cls.__name__}: the reply ended ({_finish_reason(response)}) before it was complete; raise "
            f"max_tokens. It is {text!r:.80}"
        ) from error
    return output_cls.model_validate_json(text)


def _calls(response: ChatResponse) -> list[ToolCallBlock]:
    return [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]


def _finish_reason(response: ChatResponse) -> str | None:
    raw = response.raw
    reason: str | None = raw["choices"][0]["finish_reason"] if isinstance(raw, dict) else None
    return reason
