"""One schema of settings behind flags, configuration files and HTTP bodies.

A schema is a subclass of `Options`, a frozen pydantic model. `option` declares each field with its
default, its help and, where they are not the field's name with dashes, its flags; the field's type
holds the bounds:

    class Sampling(Options):
        temperature: NonNegative = option(1.0, "Randomness; 0 for the likeliest token.", "--temp")
        stop: tuple[Text, ...] = option((), "Stop before this text; may be given again.")

    @click.command()
    @click_options(Sampling)
    def command(**flags: Any) -> None:
        settings = from_flags(Sampling, flags, from_file(Sampling, path))

`read` checks a mapping from anywhere else, such as the body of a request. Each of the three raises
`Options.error` with one sentence that names the file, where there is one, and the key. What was
given, rather than left at its default, is in `settings.model_fields_set`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import click
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from phimlx.errors import PhimlxError, SettingsError, shortened
from phimlx.files import parse_toml, parse_yaml, read_text

MAX_FILE_BYTES = 1_000_000
MOST_NAMED = 12  # unknown settings in one message

Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[FiniteFloat, Field(gt=0, le=100_000)]
NonNegative = Annotated[FiniteFloat, Field(ge=0)]
Fraction = Annotated[FiniteFloat, Field(ge=0, lt=1)]
PositiveCount = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]

Schema = dict[str, Any]
"""A field in terms of JSON Schema, beside them what `option` was told."""


class OptionError(ValueError):
    """Values that do not hold together: a sentence and a hint, for a schema's own validators."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


class Options(BaseModel):
    """A schema of settings. A field's value is checked when the object is made, and stays.

    Attributes:
        error: the class of what is raised for values that do not hold.
        hint: the next step where a key is like none that is known.
        exclusive: pairs of fields of which at most one may be given.
        other_names: keys beside the fields that `rename` understands, for suggestions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    error: ClassVar[type[PhimlxError]] = SettingsError
    hint: ClassVar[str | None] = None
    exclusive: ClassVar[tuple[tuple[str, str], ...]] = ()
    other_names: ClassVar[Collection[str]] = ()

    @classmethod
    def rename(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """Return a file's table under the names of the fields; dashes count as underscores.

        A schema that understands another program's files extends it.

        Raises:
            OptionError: for a key that is given twice.
        """
        found: dict[str, Any] = {}
        for key, value in table.items():
            name = str(key).replace("-", "_")
            if name in found:
                raise OptionError(f"{name} is given twice.")
            found[name] = value
        return found

    @field_validator("*", mode="before")
    @classmethod
    def _prepare_value(cls, value: Any, info: ValidationInfo) -> Any:
        return _prepare(schemas(cls)[str(info.field_name)], value)

    @model_validator(mode="after")
    def _hold_exclusive(self) -> Self:
        for one, other in self.exclusive:
            if {one, other} <= self.model_fields_set:
                raise OptionError(f"{one} and {other} exclude each other.", hint="Give one.")
        return self


def _prepare(schema: Schema, value: Any) -> Any:
    """Refuse a boolean that pydantic would convert, and divide a text that stands for a list."""
    if isinstance(value, bool) != (schema.get("type") == "boolean"):
        raise ValueError(value)
    if schema.get("commas") and isinstance(value, str):
        return value.split(",")
    return value


AnyOptions = TypeVar("AnyOptions", bound=Options)
Command = TypeVar("Command", bound=Callable[..., Any])


def option(default: Any, text: str, *flags: str, **more: Any) -> Any:
    """Declare a field of `Options`; each has a default.

    Args:
        default: None for one that follows from others; `text` then says which.
        text: the help.
        flags: on the command line; the field's name with dashes where none is given.
        more: what JSON Schema keeps of it. `metavar` stands for the value in help, and `what`
            completes "it must be", where the type does not tell; with `commas` a list is one flag
            whose items are joined by commas, else the flag is given again for each item; what is
            `in_files_only` has no flag; what is `bare` may be given without a value, for none.
    """
    return Field(default, description=text, json_schema_extra={"flags": list(flags), **more})


@cache
def schemas(model: type[Options]) -> dict[str, Schema]:
    """Return what JSON Schema says of each field, `None` left out of what it may be."""
    found = model.model_json_schema()["properties"]
    return {name: _not_null(schema) for name, schema in found.items()}


def _not_null(schema: Schema) -> Schema:
    variants = [each for each in schema.get("anyOf", []) if each != {"type": "null"}]
    return {**variants[0], **schema} if len(variants) == 1 else schema


def read(model: type[AnyOptions], values: Mapping[str, Any], place: str = "") -> AnyOptions:
    """Check settings by name; None stands for a default.

    Args:
        place: what the values come from, for messages.

    Raises:
        PhimlxError: `model.error`, which names what is unknown, out of bounds or in conflict.
    """
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return model.model_validate(given)
    except ValidationError as errors:
        message, hint = _explain(model, given, errors)
        raise model.error(f"{place}: {message}" if place else message, hint=hint) from None


def from_flags(
    model: type[AnyOptions], flags: Mapping[str, Any], under: AnyOptions | None = None
) -> AnyOptions:
    """Check what a command got from `click_options`; flags come before the settings `under` them.

    Raises:
        PhimlxError: `model.error`, for settings in conflict.
    """
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    return read(model, given) if under is None else override(under, read(model, given))


def override(under: AnyOptions, given: AnyOptions) -> AnyOptions:
    """Return settings with what was given put over those under them.

    What was given also takes the place of what it excludes.

    Raises:
        PhimlxError: `error` of the schema, for settings in conflict.
    """
    first = {name: getattr(given, name) for name in given.model_fields_set}
    excluded = {
        name
        for pair in given.exclusive
        for name, other in (pair, pair[::-1])
        if other in first and name not in first
    }
    second = {name: getattr(under, name) for name in under.model_fields_set - excluded}
    return read(type(given), second | first)


def to_flags(settings: Options) -> list[str]:
    """Return the arguments of a command that give what was given of these settings."""
    arguments: list[str] = []
    for name in type(settings).model_fields:
        if name not in settings.model_fields_set:
            continue
        value, flag = getattr(settings, name), flags_of(type(settings), name)[0]
        schema = schemas(type(settings))[name]
        if isinstance(value, bool):
            arguments += [flag] if value else []
        elif not isinstance(value, tuple):
            arguments += [flag, str(value)]
        elif is_one_flag(schema):
            arguments += [flag, ",".join(map(str, value))]
        else:
            arguments += [word for each in value for word in (flag, str(each))]
    return arguments


def from_file(model: type[AnyOptions], path: Path) -> AnyOptions:
    """Check the settings that a YAML or TOML file gives.

    Raises:
        PhimlxError: `model.error`, which names the file and what is wrong with it.
    """
    try:
        values = model.rename(_parse(path, model.error))
    except OptionError as error:
        raise model.error(f"{path}: {error.message}", hint=error.hint) from None
    return read(model, values, str(path))


def expected(schema: Schema) -> str:
    """Complete the sentence "it must be"."""
    if "what" in schema:
        return str(schema["what"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if schema["type"] == "array":
        return f"a list, each {expected(schema['items'])}"
    bounds = [
        words.format(schema[key])
        for key, words in {
            "minimum": ", {:g} or more",
            "exclusiveMinimum": ", above {:g}",
            "maximum": ", {:g} at most",
            "exclusiveMaximum": ", below {:g}",
        }.items()
        if key in schema
    ]
    return NAMES[schema["type"]] + "".join(bounds)


NAMES = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
}
METAVARS = {"integer": "N", "number": "X", "string": "TEXT"}


def _explain(
    model: type[Options], given: Mapping[str, Any], errors: ValidationError
) -> tuple[str, str | None]:
    """Say in a sentence, with a hint, what is unknown, or else the first that does not hold."""
    found = errors.errors(include_url=False)
    unknown = [shortened(str(e["loc"][0])) for e in found if e["type"] == "extra_forbidden"]
    if len(unknown) > 1:
        more = [f"{len(unknown) - MOST_NAMED} more"] if len(unknown) > MOST_NAMED else []
        return f"there are no settings {', '.join(unknown[:MOST_NAMED] + more)}.", model.hint
    first = found[0]
    if not first["loc"] and "ctx" not in first:  # of a name with half a surrogate pair
        return "a setting's name is no text.", model.hint
    if not first["loc"]:
        error = first["ctx"]["error"]
        return error.message, error.hint
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, [*model.model_fields, *model.other_names], 1)
        return f"there is no setting {name}.", f"Did you mean {close[0]}?" if close else model.hint
    what = expected(schemas(model)[name])
    return f"{name} is {shortened(given.get(name, first['input']))}; it must be {what}.", None


class FlagType(click.ParamType[Any]):
    """The value of a flag, checked as the field's value is in a file."""

    def __init__(self, model: type[Options], field: str) -> None:
        self.schema = schemas(model)[field]
        self.info = model.model_fields[field]
        self.several = self.schema.get("type") == "array" and not is_one_flag(self.schema)
        self.name = metavar(self.schema)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        schema = self.schema["items"] if self.several else self.schema
        if value == "" and schema.get("bare"):
            return ()
        named = {str(each): each for each in schema.get("enum", ())}
        given = named.get(value, value)
        try:
            prepared = _prepare(self.schema, [given] if self.several else given)
            found = self._reader.validate_python(prepared)
        except ValueError:
            self.fail(f"{shortened(value)} is not {expected(schema)}.", param, ctx)
        return found[0] if self.several else found

    @cached_property
    def _reader(self) -> TypeAdapter[Any]:
        kind: Any = Annotated[self.info.annotation, self.info]
        return TypeAdapter(kind)


def is_one_flag(schema: Schema) -> bool:
    """Return whether a list is written as one text, rather than with a flag for each item."""
    return "commas" in schema or "what" in schema


def metavar(schema: Schema) -> str:
    """Return what stands for a value in help."""
    if "metavar" in schema:
        return str(schema["metavar"])
    if "enum" in schema:
        return "|".join(map(str, schema["enum"]))
    if schema["type"] == "array":
        item = metavar(schema["items"])
        return f"{item},…" if schema.get("commas") else item
    return METAVARS[schema["type"]]


def flags_of(model: type[Options], name: str) -> list[str]:
    """Return how a field is spelled on the command line."""
    return schemas(model)[name]["flags"] or [f"--{name.replace('_', '-')}"]


def click_options(
    model: type[Options], names: Collection[str] | None = None
) -> Callable[[Command], Command]:
    """Add a flag to a command for each field, which the command takes as keywords.

    A setting that was not given arrives as None, or () where its flag may be given again.

    Args:
        names: of the fields; all where None.
    """

    def add(command: Command) -> Command:
        for name, schema in reversed(schemas(model).items()):
            if (names is None or name in names) and not schema.get("in_files_only"):
                command = _click_option(model, name, schema)(command)
        return command

    return add


def _click_option(model: type[Options], name: str, schema: Schema) -> Callable[[Command], Command]:
    text = schema["description"]
    default = model.model_fields[name].default
    if default not in (None, (), False, {}) and "[default" not in text:
        text = f"{text.removesuffix('.')}  [default: {default}]"
    flags = [*flags_of(model, name), name]
    if schema.get("type") == "boolean":
        return click.option(*flags, is_flag=True, default=None, help=text)
    kind = FlagType(model, name)
    bare: dict[str, Any] = {"is_flag": False, "flag_value": ""} if schema.get("bare") else {}
    return click.option(
        *flags, type=kind, metavar=kind.name, multiple=kind.several, help=text, **bare
    )


def _parse(path: Path, failure: type[PhimlxError]) -> dict[str, Any]:
    readers = {
        ".toml": ("TOML", parse_toml),
        ".yaml": ("YAML", parse_yaml),
        ".yml": ("YAML", parse_yaml),
    }
    if path.suffix not in readers:
        raise failure(f"{path} is neither YAML nor TOML.", hint="Name it .yaml, .yml or .toml.")
    text = read_text(path, failure, limit=MAX_FILE_BYTES)
    kind, parse = readers[path.suffix]
    try:
        table = parse(text) or {}
    except ValueError as error:
        raise failure(f"{path} is not {kind} ({error}).") from None
    if not isinstance(table, dict):
        raise failure(f"{path} is not a table of settings.")
    return table
