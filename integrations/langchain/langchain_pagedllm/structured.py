"""Structured output: from a schema in any of LangChain's forms to what a call binds, and to the parser of its reply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import (
    JsonOutputKeyToolsParser,
    JsonOutputParser,
    PydanticOutputParser,
    PydanticToolsParser,
)
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool, Tool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool

from pagedllm_core.chat.schemas import class_schema, is_class, without_sets
from pagedllm_core.decode.schema import check_keywords
from pagedllm_core.errors import InvalidRequestError

METHODS = ("json_schema", "function_calling", "json_mode")


def _unwrapped(schema: Any) -> Any:
    """The schema itself, out of the forms in which other providers give it a name; None where one of them lacks it."""
    if not isinstance(schema, Mapping):
        return schema
    wrapped = schema.get("type") == "json_schema"  # OpenAI's form of a response format
    outer = schema.get("json_schema") if wrapped else schema
    for key in ("schema", "input_schema"):
        if isinstance(outer, Mapping) and "properties" not in outer and isinstance(outer.get(key), Mapping):
            named = {"title": outer.get("name"), "description": outer.get("description")}
            return {**{name: text for name, text in named.items() if text}, **outer[key]}
    return None if wrapped else schema


def _json_schema(schema: Any) -> dict[str, Any]:
    """The whole JSON schema of a class or dictionary: core's conversion drops what stands beside properties."""
    if isinstance(schema, Mapping) and not ("name" in schema and "parameters" in schema) and "function" not in schema:
        check_keywords(schema)
        return dict(schema)
    if is_class(schema):
        return class_schema(schema)
    try:
        converted: dict[str, Any] = convert_to_json_schema(schema)
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidRequestError(f"schema={str(schema)!r:.80}: has no JSON schema ({error})") from None
    return converted


def as_tools(tools: Any, strict: bool | None = None) -> list[dict[str, Any]]:
    """Tools in OpenAI's form.

    Raises:
        InvalidRequestError: They are no list, or one of them describes no tool.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
        raise InvalidRequestError(f"tools={tools!r:.80}: give a list of functions, tools, classes or JSON schemas")
    return [as_tool(tool, strict) for tool in tools]


def as_tool(tool: Any, strict: bool | None = None) -> dict[str, Any]:
    """A tool in OpenAI's form, with its whole schema: core's conversion has no recursion, and texts for decimals."""
    if isinstance(tool, Mapping) and "title" not in tool and isinstance(tool.get("$ref"), str):
        tool = {**tool, "title": tool["$ref"].rpartition("/")[2]}  # as pydantic describes a class that holds itself
    try:
        converted = convert_to_openai_tool(tool, strict=strict)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidRequestError(f"tools: {tool!r:.80} does not describe a tool ({reason})") from error
    if not isinstance(tool, Mapping):  # Python makes a set of what it reads
        converted = without_sets(converted)
    if isinstance(tool, Tool) and not tool.args_schema:  # one text, whatever its function's signature says
        return converted
    described = tool.tool_call_schema if isinstance(tool, BaseTool) else tool
    plain = isinstance(tool, Mapping) and "title" in tool and not {"parameters", "input_schema"} & tool.keys()
    if plain or is_class(described) or described is not tool:
        schema = _json_schema(described)
        if "$defs" in schema or "definitions" in schema:
            parameters = {key: value for key, value in schema.items() if key not in ("title", "description")}
            converted["function"]["parameters"] = parameters
        elif is_class(described) and "properties" in schema:
            named = {**_without_titles(schema), "title": converted["function"]["name"]}
            converted["function"]["parameters"] = convert_to_openai_tool(named, strict=strict)["function"]["parameters"]
    return converted


def _without_titles(schema: Any, of_names: bool = False) -> Any:
    """A copy without titles, as core writes the parameters of a class; `of_names`: its keys are a class' own names."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if of_names or key != "title"}
    return {key: _without_titles(value, key == "properties" and not of_names) for key, value in kept.items()}


def bindings_and_parser(
    schema: Any, method: str, strict: bool | None
) -> tuple[dict[str, Any], Runnable[AIMessage, Any], dict[str, Any]]:
    """What `with_structured_output` needs.

    Returns:
        Arguments of each call (`tools` and `tool_choice`, or `response_format`), the parser of its reply, and what
        traces are told.

    Raises:
        InvalidRequestError: The method or the schema is none that is known.
    """
    if method not in METHODS:
        raise InvalidRequestError(f"method={method!r}: use one of {', '.join(METHODS)}")
    schema = _unwrapped(schema)
    if schema is None:
        if method != "json_mode":
            raise InvalidRequestError(f"schema=None: method={method!r} needs a schema; only json_mode goes without")
        return {"response_format": {"type": "json_object"}}, JsonOutputParser(), {}
    told = {"kwargs": {"method": method, **({} if strict is None else {"strict": strict})}, "schema": schema}
    if method == "function_calling":
        tool = as_tool(schema)
        if not {"properties", "$ref"} & tool["function"].get("parameters", {}).keys():
            raise InvalidRequestError(f"schema={str(schema)!r:.80}: is no object; function_calling needs one")
        name = tool["function"]["name"]
        parser: Runnable[AIMessage, Any] = (
            PydanticToolsParser(tools=[schema], first_tool_only=True)
            if is_class(schema)
            else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
        )
        return {"tools": [tool], "tool_choice": name, "strict": True if strict is None else strict}, parser, told
    converted = _json_schema(schema)
    name = str(converted.get("title", "answer"))
    response_format = {"type": "json_schema", "json_schema": {"name": name, "schema": converted, "strict": True}}
    return (
        {"response_format": response_format},
        PydanticOutputParser(pydantic_object=schema) if is_class(schema) else JsonOutputParser(),
        told,
    )


def with_raw(
    model: Runnable[LanguageModelInput, AIMessage], parser: Runnable[AIMessage, Any]
) -> Runnable[LanguageModelInput, dict[str, Any]]:
    """The reply itself, what was parsed of it, and the error where that failed."""
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=model) | parsed.with_fallbacks([failed], exception_key="parsing_error")
