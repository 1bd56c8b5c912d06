"""The short form of a schema, as users of `llm` know it: `name, age int, tags [str]`."""

from __future__ import annotations

import re
from typing import Any

from phimlx.errors import GrammarError, shortened

TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_FIELD = re.compile(r"(?P<name>\w[\w-]*)(?:\s+(?P<list>\[\s*)?(?P<type>[a-z]+)(?(list)\s*\]))?")


def read_short_form(text: str) -> dict[str, Any]:
    """Read fields, parted by commas or, where there are several lines, by those.

    A field is its name, then its type where that is no text: one of `TYPES`, or a list of it in
    brackets. What follows a colon tells the model what is meant.

    Raises:
        GrammarError: naming a field that cannot be read.
    """
    lines = text.strip().splitlines()
    fields = [field.strip() for field in (lines if len(lines) > 1 else text.split(","))]
    properties: dict[str, Any] = {}
    for field in filter(None, fields):
        spelled, _, description = field.partition(":")
        found = _FIELD.fullmatch(spelled.strip())
        kind = TYPES.get(found["type"] or "str") if found else None
        if found is None or kind is None or found["name"] in properties:
            raise GrammarError(
                f"The schema has a field {shortened(field)} that cannot be read.",
                hint="Write name, age int, tags [str] with str, int, float or bool, or a JSON "
                "Schema, or the name of its file.",
            )
        schema: dict[str, Any] = {"type": kind}
        if found["list"]:
            schema = {"type": "array", "items": schema}
        if description.strip():
            schema["description"] = description.strip()
        properties[found["name"]] = schema
    if not properties:
        raise GrammarError("The schema names no field.", hint="Write name, age int, tags [str].")
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
