"""JSON schemas as guided decoding takes them."""

from __future__ import annotations

from typing import Any

_SINGLE = ("items", "additionalItems", "contains")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_COMBINED = ("allOf", "anyOf", "oneOf", "$ref", "if", "not", "dependentSchemas", "patternProperties", "propertyNames")


def close_objects(schema: Any) -> Any:
    """A copy in which objects that list their properties have no others.

    JSON schema allows further properties unless it says otherwise, and a model that may write them will. What the
    closed schema accepts, the open one accepts as well. Where several schemas speak about one object, nothing is
    closed: each would forbid what the others ask for.
    """
    return schema if _combines(schema) else _closed(schema)


def _combines(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(map(_combines, schema))
    if not isinstance(schema, dict):
        return False
    joined = isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1
    beside = "properties" in schema and any(name in schema for name in _COMBINED)
    return joined or beside or any(map(_combines, schema.values()))


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for name in _SINGLE:
        if isinstance(closed.get(name), dict):
            closed[name] = _closed(closed[name])
    for name in _LISTS:
        if isinstance(closed.get(name), list):
            closed[name] = [_closed(item) for item in closed[name]]
    for name in _MAPS:
        if isinstance(closed.get(name), dict):
            closed[name] = {key: _closed(value) for key, value in closed[name].items()}
    if "properties" in closed and "additionalProperties" not in closed:
        closed["additionalProperties"] = False
    elif isinstance(closed.get("additionalProperties"), dict):
        closed["additionalProperties"] = _closed(closed["additionalProperties"])
    return closed
