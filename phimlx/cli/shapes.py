"""Flags that say what an answer must look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phimlx.cli.options import AnyCallable

SHAPES = ("schema", "regex", "grammar")

_schema = click.option(
    "--schema",
    metavar="SCHEMA",
    help="Answer in JSON that is valid under a JSON Schema: a file, JSON, or fields such as "
    '"name, age int, tags [str]".',
)
_regex = click.option(
    "--regex", metavar="REGEX", help="Answer with a text that matches a regular expression."
)
_grammar = click.option(
    "--grammar",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Answer with a text of a grammar, in the form of Lark.",
)
tool_choice_option = click.option(
    "--tool-choice",
    metavar="auto|none|required|NAME",
    help="Whether the model may, must not or must call a tool, or which  [default: auto]",
)


def shape_options(command: AnyCallable) -> AnyCallable:
    """Add --schema, --regex and --grammar; `pop_shape` takes what they gave."""
    for option in (_grammar, _regex, _schema):
        command = option(command)
    return command


def pop_shape(values: dict[str, Any]) -> dict[str, Any]:
    """Take the shape of an answer out of a command's keywords, as `Phi.stream` takes it.

    Raises:
        GrammarError: where a file cannot be read, or is no schema.
    """
    given = {name: values.pop(name) for name in SHAPES}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise click.UsageError(
            f"{' and '.join(f'--{name}' for name in given)} are given together; an answer has one "
            "shape."
        )
    if "schema" in given:
        given["schema"] = read_schema_argument(given["schema"])
    if "grammar" in given:
        from phimlx.errors import GrammarError
        from phimlx.files import read_text
        from phimlx.generation.grammar.limits import MAX_RULES_BYTES

        given["grammar"] = read_text(given["grammar"], GrammarError, limit=MAX_RULES_BYTES)
    return given


def read_schema_argument(text: str) -> dict[str, Any]:
    """Read a schema that is given as a file, as JSON or in the short form.

    Raises:
        GrammarError: where it is none.
    """
    from phimlx.errors import GrammarError
    from phimlx.files import is_file, parse_json, read_json_value
    from phimlx.generation.grammar.schema import read_schema
    from phimlx.generation.grammar.short_form import read_short_form

    if text.lstrip().startswith("{"):
        return read_schema(parse_json(text.encode(errors="replace"), "The schema", GrammarError))
    if text.endswith(".json") or "/" in text.split(":")[0] or is_file(Path(text)):
        return read_schema(read_json_value(Path(text), GrammarError))
    return read_short_form(text)
