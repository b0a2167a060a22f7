"""The JSON schema of an answer, from what the frameworks' users give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic.v1 import BaseModel as BaseModelV1

from pagedllm_core.errors import InvalidRequestError


def response_schema(response_format: Any) -> Mapping[str, Any] | None:
    """The JSON schema that a `response_format` asks for; None where it asks for text.

    Raises:
        InvalidRequestError: It is in no form that is known.
    """
    if response_format is None:
        return None
    if is_class(response_format):
        return class_schema(response_format)
    if isinstance(response_format, Mapping):
        kind = response_format.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            schema = response_format.get("schema")
            return schema if isinstance(schema, Mapping) else {"type": "object"}
        inner = response_format.get("json_schema", response_format)
        if kind == "json_schema" and isinstance(inner, Mapping) and isinstance(inner.get("schema"), Mapping):
            return dict(inner["schema"])
    raise InvalidRequestError(
        f"response_format={str(response_format)!r:.80}: use "
        '{"type": "json_schema", "json_schema": {"schema": ...}}, {"type": "json_object"} or a pydantic class'
    )


def is_class(schema: Any) -> bool:
    """True for a pydantic class, of version 2 or 1."""
    return isinstance(schema, type) and issubclass(schema, BaseModel | BaseModelV1)


def class_schema(output_class: type) -> dict[str, Any]:
    """The whole JSON schema of a pydantic class, what stands beside its properties included.

    Without `uniqueItems`: the class itself makes a set of what it reads.
    """
    if issubclass(output_class, BaseModel):
        whole = output_class.model_json_schema(schema_generator=_Schemas)
    else:
        whole = _old_schema(output_class)
    return dict(without_sets(whole))


class _Schemas(GenerateJsonSchema):
    """Decimals are numbers: pydantic's own schema allows texts as well, of which most are none."""

    def decimal_schema(self, schema: Any) -> dict[str, Any]:
        whole = super().decimal_schema(schema)
        return next((one for one in whole.get("anyOf", ()) if one.get("type") == "number"), whole)


def _old_schema(output_class: Any) -> Any:
    return output_class.schema()


def without_sets(schema: Any) -> Any:
    """A copy without `uniqueItems`, which no grammar can hold an output to."""
    if isinstance(schema, list):
        return [without_sets(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: without_sets(value) for key, value in schema.items() if key != "uniqueItems" or value is not True}
