"""Which JSON schemas an answer can be held to (pure).

xgrammar (0.2.8), which vLLM compiles schemas with, ignores what it does not know, and much that it knows
beside a reference, an alternative or a list of values: answers would break the schema without a word. So a
schema may only say here what the grammar keeps; anything else is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from medray.config.serving import LimitsConfig

PARAM = "response_format.json_schema"
_COUNTS = {f"{end}{what}" for end in ("min", "max") for what in ("Items", "Length", "Properties")}
_LARGEST_COUNT = 1000  # of these: a grammar grows with them
_DEEPEST = 16
# Words about a schema that restrict no answer; discriminator is OpenAPI's, and says again what the
# alternatives say.
_NOTES = {
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "$schema",
    "$id",
    "$comment",
    "$defs",
    "definitions",
    "discriminator",
    "strict",
}
_NUMBER = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_KEYWORDS = {  # that restrict values of a type
    "object": {
        "properties",
        "required",
        "additionalProperties",
        "unevaluatedProperties",
        "minProperties",
        "maxProperties",
    },
    "array": {"items", "prefixItems", "unevaluatedItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "format"},
    "number": _NUMBER,
    "integer": _NUMBER,
    "boolean": set(),
    "null": set(),
}
_FORMATS = {
    "date",
    "time",
    "date-time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uri",
    "uri-reference",
    "uri-template",
    "uuid",
    "json-pointer",
    "relative-json-pointer",
}
# each stands for all of an answer; what stands beside one is ignored
_FORMS = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
# whose value is a schema, or true or false
_SCHEMAS = {"items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems"}
_NAMED_SCHEMAS = {"properties", "$defs", "definitions"}
_LISTED_SCHEMAS = {"prefixItems", "anyOf", "oneOf", "allOf"}


class SchemaError(ValueError):
    """A schema that is refused.

    Args:
        code: as of an ApiError.
    """

    def __init__(self, message: str, code: str = "invalid_value"):
        super().__init__(message)
        self.code = code


def check_schema(schema: dict[str, Any], limits: LimitsConfig) -> None:
    """Raise SchemaError for a schema that no grammar keeps, that no finite text fits, or that passes a
    limit.
    """
    size = len(json.dumps(schema).encode())
    if size > limits.schema_bytes:
        raise SchemaError(f"{size} bytes, at most {limits.schema_bytes} are allowed", "limit_exceeded")
    if _depth(schema) > _DEEPEST:
        raise SchemaError(f"is nested more than {_DEEPEST} deep", "limit_exceeded")
    for inner in _schemas_in(schema):
        _check_one(inner, schema)
    if not _ends(schema):
        raise SchemaError("no text fits the schema: its references lead back to themselves without end")


def _depth(value: Any) -> int:
    """Levels of objects and lists, counted no further than the first that is too deep."""
    level, depth = [value], -1
    while level and depth <= _DEEPEST:
        depth += 1
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return depth


def _schemas_in(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all schemas inside it; data of a schema, such as the values of enum and default, are
    none.
    """
    if not isinstance(schema, dict):
        if not isinstance(schema, bool):
            raise SchemaError(f"{json.dumps(schema)[:40]} stands where a schema belongs")
        return
    yield schema
    for inner in _inner(schema):
        yield from _schemas_in(inner)


def _inner(schema: dict[str, Any]) -> Iterator[Any]:
    for key, value in schema.items():
        if key in _SCHEMAS:
            yield value
        elif key in _NAMED_SCHEMAS:
            if not isinstance(value, dict):
                raise SchemaError(f"{key} must be an object of schemas")
            yield from value.values()
        elif key in _LISTED_SCHEMAS:
            if not isinstance(value, list) or not value:
                raise SchemaError(f"{key} must be a list of schemas")
            yield from value


def _check_one(schema: dict[str, Any], whole: dict[str, Any]) -> None:
    said = {key for key in schema if key not in _NOTES}
    form = next((key for key in _FORMS if key in said), None)
    if form is not None:
        beside = said - {form} - ({"type"} if form in ("const", "enum") else set())
        if beside:
            raise SchemaError(
                f"{_named(beside)} beside {form} would be ignored; leave it out, or write it inside",
                "unsupported_parameter",
            )
        _check_form(form, schema, whole)
        return
    types = _types_of(schema)
    unknown = said - {"type"}.union(*_KEYWORDS.values())
    if unknown:
        raise SchemaError(f"not supported here: {_named(unknown)}; leave it out", "unsupported_parameter")
    _check_counts(schema)
    for key in sorted(said - {"type"}):
        kinds = [kind for kind in _KEYWORDS if key in _KEYWORDS[kind]]
        if not types.intersection(kinds):
            raise SchemaError(
                f"{key} would be ignored: it needs type {' or '.join(kinds)}", "unsupported_parameter"
            )
    if "format" in schema:
        if not isinstance(schema["format"], str) or schema["format"] not in _FORMATS:
            raise SchemaError(
                f"format {json.dumps(schema['format'])[:40]} is not supported; known: "
                f"{', '.join(sorted(_FORMATS))}",
                "unsupported_parameter",
            )
        if "minLength" in schema or "maxLength" in schema:
            raise SchemaError(
                "minLength and maxLength beside format would be ignored; leave one of them out",
                "unsupported_parameter",
            )
    required, properties = schema.get("required", []), schema.get("properties", {})
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise SchemaError("required must be a list of names")
    missing = next((name for name in required if name not in properties), None)
    if missing is not None:
        raise SchemaError(f"required names {json.dumps(missing)[:40]}, which is not among the properties")


def _types_of(schema: dict[str, Any]) -> set[str]:
    """The types of a schema's values; by its keywords where it names none."""
    if "type" not in schema:
        return {kind for kind in ("object", "array") if _KEYWORDS[kind] & schema.keys()}
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    unknown = [kind for kind in types if not isinstance(kind, str) or kind not in _KEYWORDS]
    if unknown or not types:
        raise SchemaError(
            f"type {json.dumps(unknown or types)[:40]} is not known; write one of {', '.join(_KEYWORDS)}"
        )
    return set(types)


def _check_form(form: str, schema: dict[str, Any], whole: dict[str, Any]) -> None:
    if form == "$ref":
        reference = schema["$ref"]
        if not isinstance(reference, str) or (reference != "#" and not reference.startswith("#/")):
            raise SchemaError(
                f"$ref {json.dumps(reference)[:100]} is not supported; write one that begins with #/, such "
                "as #/$defs/NAME",
                "unsupported_parameter",
            )
        target, seen = _at(reference, whole), [reference]
        while (
            isinstance(target, dict)
            and isinstance(following := target.get("$ref"), str)
            and following not in seen
        ):
            seen.append(following)
            target = _at(following, whole)
        if not isinstance(target, dict | bool):
            raise SchemaError(f"$ref {json.dumps(reference)[:100]} names nothing in the schema")
        if isinstance(target, dict) and target.get("$ref") in seen:
            raise SchemaError(f"$ref {json.dumps(reference)[:100]} leads back to itself")
    elif form in ("const", "enum"):
        values = [schema["const"]] if form == "const" else schema["enum"]
        if not isinstance(values, list) or not values:
            raise SchemaError("enum must be a list of values")
        types = _types_of(schema) if "type" in schema else None
        if types is not None and not all(_is_of(value, types) for value in values):
            raise SchemaError(f"{form} has a value that is not of type {' or '.join(sorted(types))}")
    elif form == "allOf" and len(schema["allOf"]) > 1:
        raise SchemaError(
            "allOf of several schemas would be ignored; write them as one", "unsupported_parameter"
        )


def _is_of(value: Any, types: set[str]) -> bool:
    match value:
        case bool():
            return "boolean" in types
        case int() | float():
            return "number" in types or ("integer" in types and value == int(value))
        case None:
            return "null" in types
        case str():
            return "string" in types
        case list():
            return "array" in types
    return "object" in types


def _check_counts(schema: dict[str, Any]) -> None:
    for key in sorted(_COUNTS & schema.keys()):
        count = schema[key]
        if not isinstance(count, int | float) or isinstance(count, bool):
            raise SchemaError(f"{key} must be a whole number, 0 or more")
        if not count <= _LARGEST_COUNT:  # NaN is not either
            raise SchemaError(f"{key}: at most {_LARGEST_COUNT} is allowed", "limit_exceeded")
        if count < 0 or count != int(count):
            raise SchemaError(f"{key} is {count}; it must be a whole number, 0 or more")


def _named(keys: Any) -> str:
    return ", ".join(key if len(key) <= 40 else key[:40] + "…" for key in sorted(keys))


def _at(reference: str, schema: Any) -> Any:
    """What a JSON pointer of a schema (#/$defs/a) names; None for nothing."""
    target = schema
    for part in unquote(reference).removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, list):
            # A place of more than nine digits is in no list, and takes long to read.
            target = (
                target[int(name)]
                if name.isascii() and name.isdigit() and len(name) < 10 and int(name) < len(target)
                else None
            )
        else:
            target = target.get(name) if isinstance(target, dict) else None
    return target


def _ends(schema: dict[str, Any]) -> bool:
    """Whether a finite text fits: the least set of schemas of which that holds, grown until it does not
    change.
    """
    inside = {id(one): one for one in _schemas_in(schema)}
    ending: set[int] = set()

    def ends(one: Any) -> bool:
        if not isinstance(one, dict):
            return one is not False
        return id(one) in ending or (id(one) not in inside)

    def fits(one: dict[str, Any]) -> bool:
        if "$ref" in one:
            return ends(_at(one["$ref"], schema))
        for form in ("anyOf", "oneOf", "allOf"):
            if form in one:
                return any(map(ends, one[form]))
        if "const" in one or "enum" in one:
            return True
        types = _types_of(one)
        if "type" in one and types - {"object", "array"}:
            return True
        if "array" in types and (
            not one.get("minItems") or all(map(ends, [*one.get("prefixItems", ()), one.get("items", True)]))
        ):
            return True
        if types == {"array"}:
            return False
        return all(
            ends(one.get("properties", {}).get(name, True)) for name in one.get("required", ())
        ) and not (
            one.get("minProperties")
            and one.get("properties")
            and not any(map(ends, one["properties"].values()))
        )

    while True:
        more = {key for key, one in inside.items() if key not in ending and fits(one)}
        if not more:
            return id(schema) in ending
        ending |= more
