"""Schemas of every keyword that a reply can be held to, each alone and with others."""

from __future__ import annotations

from itertools import combinations
from typing import Any

Schema = dict[str, Any]

SHORT: Schema = {"type": "string", "maxLength": 8}
DIGIT: Schema = {"type": "integer", "minimum": 0, "maximum": 9}
FORMATS = ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")
PATTERNS = (
    "^[a-z]{2,6}$", "^(foo|bar)-[0-9]+$", r"^\d{3}$", "[0-9]", "^#[0-9A-F]{6}$",
    r"^\w+@\w+$", "^é+$",
    r"^[^\"\\]{1,5}$", r'^"q"$', r"^\\$", r"^a\tb$", "^[\u4e00-\u4e20]{1,3}$", r"^\s$",
    "^(?:a|b)c?$",
    "^.{3}$", "z$", r"^\.\*$", r"^[+-]?\d+(\.\d+)?$", "^$", r"^a\/b$",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, "", "a", 'q"uote', "back\\slash", "tab\tand\nline", "é",
    "日本", "⚡", "\x7f",
    "</think>", "<|end|>", [], {}, [1, [2, [3]]], {"a": {"b": None}}, {"": 0}, {'k"': "v"}, 10**12,
    -1e-3,
)  # fmt: skip
RANGES: tuple[Schema, ...] = (
    {"minimum": 0, "maximum": 9}, {"minimum": -5, "maximum": 5}, {"minimum": 100, "maximum": 1234},
    {"exclusiveMinimum": 0, "maximum": 10}, {"minimum": 7, "exclusiveMaximum": 8},
    {"exclusiveMinimum": -2, "exclusiveMaximum": 0}, {"minimum": -1000, "maximum": -999},
    {"minimum": 98, "maximum": 102},
)  # fmt: skip


def closed(properties: Schema, *optional: str, **more: Any) -> Schema:
    """An object of these properties and no others, all required but those that are optional."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
        **more,
    }


def every() -> dict[str, Schema]:
    """All of them by name."""
    found: dict[str, Schema] = {}
    for kind in ("boolean", "null"):
        found[kind] = {"type": kind}
    found["string"] = {"type": "string", "maxLength": 30}
    found["integer"] = {"type": "integer", "minimum": -(10**6), "maximum": 10**6}
    found["number"] = {"type": "number", "minimum": -1000, "maximum": 1000}
    for first, second in combinations(("boolean", "null", "string", "integer", "array"), 2):
        found[f"{first} or {second}"] = {
            "type": [first, second], "maxLength": 5, "maxItems": 2, "minimum": 0, "maximum": 99,
            "items": DIGIT,
        }  # fmt: skip
    for index, value in enumerate(VALUES):
        found[f"const {index}"] = {"const": value}
        found[f"enum {index}"] = {"enum": [value, VALUES[index - 1], "other"]}
    for least, most in ((0, 0), (0, 3), (1, 1), (2, 4), (5, 5), (0, 20), (17, 20)):
        found[f"string of {least} to {most}"] = {
            "type": "string", "minLength": least, "maxLength": most,
        }  # fmt: skip
        found[f"list of {least} to {most}"] = {
            "type": "array", "items": DIGIT, "minItems": least, "maxItems": most,
        }  # fmt: skip
    for index, pattern in enumerate(PATTERNS):
        found[f"pattern {index}"] = {"type": "string", "pattern": pattern}
    found["pattern and length"] = {
        "type": "string", "pattern": "^a[bc]*$", "minLength": 3, "maxLength": 5,
    }  # fmt: skip
    for name in FORMATS:
        found[f"format {name}"] = {"type": "string", "format": name}
    found["format and pattern"] = {"type": "string", "format": "date", "pattern": "^20"}
    for index, bounds in enumerate(RANGES):
        found[f"integer range {index}"] = {"type": "integer", **bounds}
        found[f"number range {index}"] = {"type": "number", **bounds}
    found["integer range 5"] = {"type": "integer", "exclusiveMinimum": -4, "exclusiveMaximum": 0}
    for factor in (2, 7, 10, 25):
        found[f"multiple of {factor}"] = {
            "type": "integer", "multipleOf": factor, "minimum": 0, "maximum": 1000,
        }  # fmt: skip
    found["multiple of a tenth"] = {
        "type": "number", "multipleOf": 0.1, "minimum": 0, "maximum": 9,
    }  # fmt: skip
    found |= _objects()
    found |= _lists()
    found |= _choices()
    found |= _references()
    return found


def _objects() -> dict[str, Schema]:
    names = ("a", "bb", "c c", 'd"d', "é", "\\", "", "日本", "tab\t", "$ref")
    found = {
        "no keys": closed({}),
        "any object": {"type": "object", "maxProperties": 2, "additionalProperties": DIGIT},
        "least keys": {"type": "object", "minProperties": 1, "additionalProperties": DIGIT},
        "open object": {"type": "object", "properties": {"a": DIGIT}, "required": ["a"]},
        "other keys": {
            "type": "object", "properties": {"a": SHORT}, "additionalProperties": {"type": "null"},
        },
        "a required key beside": {
            "type": "object", "required": ["z"], "additionalProperties": {"type": "boolean"},
        },
        "keys by pattern": {
            "type": "object",
            "patternProperties": {"^n_[a-z]$": DIGIT, "^s_": SHORT},
            "additionalProperties": False,
        },
        "named and by pattern": {
            "type": "object",
            "properties": {"id": DIGIT},
            "patternProperties": {"^x-[a-z]{1,3}$": {"type": "boolean"}},
            "required": ["id"],
            "additionalProperties": False,
        },
        "annotated": {
            "$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://a.b/c",
            "title": "T", "description": "D", "$comment": "C", "default": 3, "examples": [1],
            "deprecated": True, "readOnly": True, "x-of-ours": {"uniqueItems": 1}, **DIGIT,
        },
    }  # fmt: skip
    for count in range(1, len(names) + 1):
        properties = {name: DIGIT if place % 2 else SHORT for place, name in enumerate(names)}
        some = dict(list(properties.items())[-count:])
        found[f"{count} keys"] = closed(some)
        found[f"{count} optional keys"] = closed(some, *some)
        found[f"{count} keys, half of them optional"] = closed(some, *list(some)[::2])
    nested: Schema = {"type": "boolean"}
    for depth in range(1, 8):
        nested = closed({"inner": nested, "n": DIGIT}, "n")
        found[f"nested {depth} deep"] = nested
    return found


def _lists() -> dict[str, Schema]:
    return {
        "any list": {"type": "array", "maxItems": 2, "items": {"type": ["null", "boolean"]}},
        "tuple": {"type": "array", "prefixItems": [SHORT, DIGIT], "items": False, "minItems": 2},
        "tuple, partly": {"type": "array", "prefixItems": [SHORT, DIGIT], "items": False},
        "tuple and more": {
            "type": "array", "prefixItems": [{"const": "x"}], "items": DIGIT, "maxItems": 4,
        },
        "lists of lists": {
            "type": "array", "maxItems": 3,
            "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "list of objects": {
            "type": "array", "minItems": 1, "maxItems": 3,
            "items": closed({"k": SHORT, "v": DIGIT}, "v"),
        },
        "empty list": {"type": "array", "items": False},
    }  # fmt: skip


def _choices() -> dict[str, Schema]:
    circle = closed({"kind": {"const": "circle"}, "r": DIGIT})
    square = closed({"kind": {"const": "square"}, "side": DIGIT})
    return {
        "anyOf": {"anyOf": [SHORT, DIGIT, {"type": "null"}]},
        "anyOf of objects": {"anyOf": [closed({"a": DIGIT}), closed({"b": SHORT})]},
        "anyOf beside": {
            "type": "object", "properties": {"a": DIGIT, "b": DIGIT}, "additionalProperties": False,
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        "oneOf of types": {"oneOf": [SHORT, DIGIT, {"type": "boolean"}]},
        "oneOf by a constant": {"oneOf": [circle, square]},
        "oneOf of consts": {"oneOf": [{"const": 1}, {"const": "1"}, {"const": [1]}]},
        "allOf": {
            "allOf": [
                {"type": "object", "properties": {"a": DIGIT}, "required": ["a"]},
                {"properties": {"b": SHORT}, "required": ["b"]},
            ],
            "unevaluated": True, "maxProperties": 2,
        },
        "allOf of ranges": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
        "allOf and enum": {"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]},
        "optional of pydantic": closed(
            {"a": {"anyOf": [DIGIT, {"type": "null"}], "default": None}}
        ),
        "list of either": {"type": "array", "items": {"oneOf": [circle, square]}, "maxItems": 2},
    }  # fmt: skip


def _references() -> dict[str, Schema]:
    tree = closed({"v": DIGIT, "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}})
    return {
        "$ref": {"$defs": {"n": DIGIT}, **closed({"a": {"$ref": "#/$defs/n"}})},
        "definitions": {"definitions": {"n": SHORT}, "$ref": "#/definitions/n"},
        "$ref to a property": closed({"a": DIGIT, "b": {"$ref": "#/properties/a"}}),
        "$ref with escapes": {"$defs": {"a/b~c": DIGIT}, "$ref": "#/$defs/a~1b~0c"},
        "$anchor": {"$defs": {"n": {"$anchor": "here", **DIGIT}}, "$ref": "#here"},
        "$ref beside": {"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n", **DIGIT},
        "recursion": {"$defs": {"tree": tree}, "$ref": "#/$defs/tree"},
        "recursion in a list": {
            "$defs": {
                "node": closed(
                    {
                        "v": DIGIT,
                        "c": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
                    }
                )
            },
            "$ref": "#/$defs/node",
        },
        "recursion at the root": closed({"next": {"$ref": "#"}, "v": DIGIT}, "next"),
        "two that need each other": {
            "$defs": {
                "even": closed({"odd": {"$ref": "#/$defs/odd"}}, "odd"),
                "odd": closed({"even": {"$ref": "#/$defs/even"}}, "even"),
            },
            "$ref": "#/$defs/even",
        },
    }
