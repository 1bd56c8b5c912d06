"""JSON Schemas that a reply is to be valid under: read, checked and made ready for llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from phimlx.errors import GrammarError, shortened
from phimlx.files import json_levels
from phimlx.generation.grammar.limits import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_MULTIPLE,
    MAX_REACH,
    check_expression,
)
from phimlx.sizes import size_text

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
        raise GrammarError(f"The schema has more than {size_text(MAX_BYTES)}.")
    plain: dict[str, Any] = json.loads(text)
    depth = _depth(plain)
    if depth > MAX_DEPTH:
        raise GrammarError(f"The schema is nested deeper than {MAX_DEPTH} levels.")
    targets = {str(each) for each in _values(plain, "$ref")}
    if depth + sum(_depth_at(plain, target) for target in targets) > MAX_REACH:
        raise GrammarError(f"The schema's references reach deeper than {MAX_REACH} levels.")
    for pattern in _values(plain, "pattern"):
        if isinstance(pattern, str):
            check_expression("pattern", pattern)
    for factor in _values(plain, "multipleOf"):
        if isinstance(factor, int | float) and _coefficient(factor) > MAX_MULTIPLE:
            raise GrammarError(
                f"multipleOf is {shortened(factor)}; a reply is held to {MAX_MULTIPLE:,} at most.",
                hint="Leave it out, and check the reply for it.",
            )
    return plain


def is_model(schema: Any) -> bool:
    """Whether a schema is given as a pydantic model's class."""
    return isinstance(schema, type) and hasattr(schema, "model_json_schema")


def answer_reader(schema: Any, said: str = "") -> Callable[[str], Any]:
    """What makes a value of an answer's text: an object of the class, or plain data.

    It raises ValueError for a text that is not a whole answer.

    Args:
        said: what of the answer stands in the prompt.
    """
    read = schema.model_validate_json if is_model(schema) else json.loads
    return lambda text: read(said + text)


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
    return sum(1 for _ in json_levels(value))


def _values(schema: Any, keyword: str) -> Iterator[Any]:
    """What stands behind a keyword, wherever in a schema."""
    for level in ([schema], *json_levels(schema)):
        yield from (each[keyword] for each in level if isinstance(each, dict) and keyword in each)


def _depth_at(schema: Any, target: str) -> int:
    """The depth of what a reference points at; the most there is where it is no pointer."""
    found = schema
    for name in unquote(target).split("/")[1:] if target.startswith("#/") else [None]:
        key = "" if name is None else name.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, dict) and key in found:
            found = found[key]
        else:
            return MAX_DEPTH
    return 1 + _depth(found)


def _coefficient(factor: float) -> int:
    """The digits of a number, read as a whole one."""
    return abs(int("".join(map(str, Decimal(repr(factor)).as_tuple().digits)) or 0))
