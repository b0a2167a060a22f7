"""Random JSON schemas, and tools that have them as parameters."""

from __future__ import annotations

import random
from typing import Any

_NODE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
    "required": ["value", "next"],
}
_SIMPLE: list[dict[str, Any]] = [
    {"type": "string"},
    {"type": "integer"},
    {"type": "number"},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["red", "green", 3, None]},
    {"const": 'a "b" \\ c'},
    {"type": ["string", "null"]},
    {"type": "string", "enum": ["日本", 'é"q']},
    {"type": "string", "pattern": "^[A-Z]{2,4}-\\d{3}$"},
    {"type": "string", "minLength": 3, "maxLength": 9},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "email"},
    {"type": "integer", "minimum": -4, "maximum": 900},
    {"type": "number", "exclusiveMinimum": 2.5, "maximum": 9},
    {"$ref": "#/$defs/Node"},
]


def random_schema(rng: random.Random) -> dict[str, Any]:
    """A schema with nesting, enumerations, patterns, references and unions."""
    return {**_schema(rng, 0), "$defs": {"Node": _NODE}}


def random_object(rng: random.Random) -> dict[str, Any]:
    """A schema of an object, as a tool's parameters are."""
    return {**_object(rng, 1), "$defs": {"Node": _NODE}}


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    roll = rng.random()
    if depth > 3 or roll < 0.5:
        return rng.choice(_SIMPLE)
    if roll < 0.75:
        return _object(rng, depth)
    if roll < 0.88:
        schema: dict[str, Any] = {"type": "array", "items": _schema(rng, depth + 1)}
        if rng.random() < 0.4:
            schema["minItems"] = rng.randint(0, 3)
            schema["maxItems"] = schema["minItems"] + rng.randint(0, 3)
        return schema
    return {"anyOf": [_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    endings = ["", "_long_name", " of it", "é", '"']
    properties = {f"k{i}{rng.choice(endings)}": _schema(rng, depth + 1) for i in range(rng.randint(0, 4))}
    schema = {"type": "object", "properties": properties, "required": [key for key in properties if rng.random() < 0.6]}
    return {**schema, "additionalProperties": False} if rng.random() < 0.5 else schema
