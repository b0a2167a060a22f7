"""JSON schemas as guided decoding takes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pagedllm_core.errors import InvalidRequestError

# Where schemas stand in a schema; `properties` may hold a property of any of these names.
_SINGLE = ("items", "additionalItems", "contains", "not", "if", "then", "else", "propertyNames")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_COMBINED = ("allOf", "anyOf", "oneOf", "$ref", "if", "not", "dependentSchemas", "patternProperties", "propertyNames")
_KEYWORDS = {
    *_SINGLE, *_LISTS, *_MAPS, *_COMBINED, "type", "enum", "const", "required", "additionalProperties", "pattern",
    "format", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    "minItems", "maxItems", "uniqueItems", "minContains", "maxContains", "minProperties", "maxProperties",
    "dependentRequired", "title", "description", "default", "examples", "$schema", "$id", "$comment",
}  # fmt: skip
# Others are remarks to the reader, which the standard allows to leave unchecked.
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"}


def check_keywords(schema: Mapping[str, Any]) -> None:
    """Refuse a dictionary that is something else: as a schema it would allow everything.

    Raises:
        InvalidRequestError: It is not empty and has no keyword of JSON schema.
    """
    if schema and not _KEYWORDS & schema.keys():
        raise InvalidRequestError(f"schema={str(schema)!r:.80}: has no keyword of JSON schema, so nothing would hold")


def prepare_schema(schema: dict[str, Any], strict: bool = True) -> dict[str, Any]:
    """A copy in which objects that list their properties have no others, without what asks for nothing.

    JSON schema allows further properties unless it says otherwise, and a model that may write them will. What the
    closed schema accepts, the open one accepts as well. Where several schemas speak about one object, nothing is
    closed: each would forbid what the others ask for.

    Args:
        schema: A JSON schema.
        strict: Refuse what no grammar can hold an output to; else it is left out.

    Raises:
        InvalidRequestError: It has a keyword that would not be enforced, or none at all.
    """
    check_keywords(schema)
    loosely = None if strict else _Loosely(has_names='"$id"' in json.dumps(schema, default=str))
    prepared: dict[str, Any] = _prepared(schema, not _combines(schema), loosely)
    return prepared


def escapes(prepared: dict[str, Any]) -> dict[str, Any]:
    """What llguidance has to be told of escapes in texts.

    Where an object may have more keys than it lists, none is written by the numbers of its characters: it may be a
    listed one, once more, with a value of another kind. A schema that names characters which can be written in no other
    way keeps the numbers.
    """
    named = re.search(r"\\u00|\\\\[xu]|\\\\c", json.dumps(prepared, ensure_ascii=False))
    return {} if named or not _is_open(prepared) else {"json_allowed_escapes": 'nrbtf\\"'}


def _is_open(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(map(_is_open, schema))
    if not isinstance(schema, dict):
        return False
    told = "properties" in schema and schema.get("additionalProperties") is not False
    return told or "patternProperties" in schema or any(map(_is_open, schema.values()))


def _combines(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(map(_combines, schema))
    if not isinstance(schema, dict):
        return False
    joined = isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1
    beside = "properties" in schema and any(name in schema for name in _COMBINED)
    return joined or beside or any(map(_combines, schema.values()))


def _prepared(schema: Any, closing: bool, loosely: _Loosely | None) -> Any:
    if not isinstance(schema, dict):
        return schema
    done = dict(schema)
    for name in _SINGLE:
        if isinstance(done.get(name), dict):
            done[name] = _prepared(done[name], closing, loosely)
    for name in (*_LISTS, "items"):
        if isinstance(done.get(name), list):
            done[name] = [_prepared(item, closing, loosely) for item in done[name]]
    for name in _MAPS:
        if isinstance(done.get(name), dict):
            done[name] = {key: _prepared(value, closing, loosely) for key, value in done[name].items()}
    if isinstance(done.get("additionalProperties"), dict):
        done["additionalProperties"] = _prepared(done["additionalProperties"], closing, loosely)
    listed = isinstance(done.get("properties"), dict) and set(done.get("required") or ()) <= done["properties"].keys()
    if closing and listed and "additionalProperties" not in done:
        done["additionalProperties"] = False
    if loosely is not None:
        loosely.leave_out(done)
    if done.get("uniqueItems") is False:
        del done["uniqueItems"]
    if isinstance(done.get("format"), str) and done["format"] not in _FORMATS:
        del done["format"]
    least = done.get("minProperties")
    if isinstance(least, int) and least > 1:
        raise InvalidRequestError(
            f"minProperties={least}: cannot be enforced, as an object may repeat a key; name the properties in "
            "required, or leave minProperties out"
        )
    return done


@dataclass(frozen=True)
class _Loosely:
    """Leaves out what no grammar can hold an output to, and what llguidance refuses even if lenient.

    Attributes:
        has_names: True where parts of the schema have addresses of their own, which references may name.
    """

    has_names: bool

    def leave_out(self, schema: dict[str, Any]) -> None:
        """Change one schema, but not those inside."""
        for name in ("uniqueItems", "minProperties"):
            schema.pop(name, None)
        reference = schema.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#") and not self.has_names:
            del schema["$ref"]
        if isinstance(schema.get("pattern"), str) and not _is_readable(schema["pattern"]):
            del schema["pattern"]
        found = schema.get("patternProperties")
        if isinstance(found, dict) and not all(map(_is_readable, found)):
            schema["patternProperties"] = {key: value for key, value in found.items() if _is_readable(key)}
            if schema.get("additionalProperties") is False:  # it would forbid what such a pattern allows
                del schema["additionalProperties"]


def _is_readable(pattern: str) -> bool:
    """Whether the grammar engine reads this pattern: it has no look-around and no back-references."""
    try:
        from llguidance import LLMatcher
    except ImportError:  # said where the grammar is compiled
        return True
    text = json.dumps({"type": "string", "pattern": pattern})
    return not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(text))
