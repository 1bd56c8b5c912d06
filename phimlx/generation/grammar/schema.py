"""JSON Schemas that a reply is to be valid under: read, checked and made ready for llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from phimlx.errors import GrammarError, shortened
from phimlx.generation.grammar.limits import MAX_BYTES, MAX_DEPTH

# JSON on one line as Python and the models write it. White space that the model may choose could
# go on without end.
COMPILE = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "coerce_one_of": False,
    "lenient": False,
}
LENIENT = {**COMPILE, "coerce_one_of": True, "lenient": True}


def read_schema(schema: Any) -> dict[str, Any]:
    """Read a JSON Schema, or make that of a pydantic model's class, as plain data.

    Objects of a class that says nothing of other keys have none.

    Raises:
        GrammarError: where it is none, or larger or deeper than the limits.
    """
    if is_model(schema):
        schema = _closed(schema.model_json_schema())
    if not isinstance(schema, Mapping):
        raise GrammarError(
            f"schema is {shortened(schema)}, which is no JSON Schema.",
            hint='A schema is an object, such as {"type": "object", "properties": {…}}.',
        )
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"The schema cannot be written as JSON: {error}.") from None
    if len(text) > MAX_BYTES:
        raise GrammarError(f"The schema has more than {MAX_BYTES >> 10} kB.")
    plain: dict[str, Any] = json.loads(text)
    if _depth(plain) > MAX_DEPTH:
        raise GrammarError(f"The schema is nested deeper than {MAX_DEPTH} levels.")
    return plain


def is_model(schema: Any) -> bool:
    """Whether a schema is given as a pydantic model's class."""
    return isinstance(schema, type) and hasattr(schema, "model_json_schema")


def reader(schema: Any) -> Callable[[str], Any]:
    """What makes a value of an answer's text: an object of the class, or plain data.

    It raises ValueError for a text that is not a whole answer.
    """
    return schema.model_validate_json if is_model(schema) else json.loads


def schema_source(name: str, schema: Mapping[str, Any], lenient: bool = False) -> dict[str, Any]:
    """A named grammar of the JSON values that are valid under a schema, as llguidance takes it.

    Args:
        lenient: leave keywords out of account that a reply cannot be held to.
    """
    options = LENIENT if lenient else COMPILE
    return {"name": name, "json_schema": {**schema, "x-guidance": options}}


def _closed(schema: Any) -> Any:
    """A schema whose objects have no keys but those that it names, unless it says otherwise."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        closed.setdefault("additionalProperties", False)
    return closed


def _depth(value: Any) -> int:
    """Levels of objects and lists within each other; no recursion, for a value of any depth."""
    level, depth = [value], 0
    while level := [
        child
        for each in level
        if isinstance(each, dict | list)
        for child in (each.values() if isinstance(each, dict) else each)
    ]:
        depth += 1
    return depth
