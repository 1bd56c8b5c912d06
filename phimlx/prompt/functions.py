"""Python functions as tools: what a model is told of one, and how it is called."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property, partial
from typing import Annotated, Any, get_args, get_origin

from phimlx.errors import PromptError, clipped, shortened

SKIPPED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
HINT = "Annotate it with a type that JSON has, such as str, list[int] or a dataclass."


class ArgumentsError(ValueError):
    """Arguments that a function does not take; a sentence that the model can mend them by."""


class Function:
    """A Python function that a model may call.

    Its name is the function's, the description and those of its parameters come from the
    docstring, in Google's, numpy's or Sphinx's form, or from `Annotated`, and the JSON Schema of
    the arguments from annotations and defaults, as pydantic reads them.

    Args:
        function: any callable with a name: a function, a method, a partial, an object with
            `__call__`; it may be asynchronous. `*args`, `**kwargs` and what a partial has bound
            are not offered.

    Raises:
        PromptError: where it has no name, or a parameter that no JSON Schema describes.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        target = _innermost(function)
        named = isinstance(target, type | types.FunctionType | types.BuiltinFunctionType)
        named = named or hasattr(target, "__name__")
        self.name: str = target.__name__ if named else type(target).__name__
        if not self.name.isidentifier():
            raise PromptError(
                f"The function {shortened(self.name)} has no name that a model could call.",
                hint="Write it with def.",
            )
        bound = _bound(function)
        self._parameters = {
            name: parameter
            for name, parameter in self._signature().parameters.items()
            if parameter.kind not in SKIPPED and name not in bound
        }

    @cached_property
    def definition(self) -> dict[str, Any]:
        """What the model is told: name, description, parameters."""
        description, described = self._documentation
        schema = self._schema()
        properties = schema["properties"]
        for name, parameter in self._parameters.items():
            properties[name].pop("default", None)
            if parameter.default is not inspect.Parameter.empty:
                _set_default(properties[name], parameter.default)
            text = _described(parameter.annotation) or described.get(name)
            if text:
                properties[name].setdefault("description", text)
        made: dict[str, Any] = {"name": self.name}
        if description:
            made["description"] = description
        return {**made, "parameters": schema}

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """Call it; what an asynchronous one gives is to be awaited.

        Raises:
            ArgumentsError: for arguments that are not of its parameters.
            Exception: whatever the function does.
        """
        from pydantic import ValidationError

        try:
            read = self._model.model_validate(dict(arguments))
        except ValidationError as error:
            raise ArgumentsError("; ".join(_problems(error))) from None
        given = {
            self._model.model_fields[field].alias: getattr(read, field)
            for field in read.model_fields_set
        }
        placed: list[Any] = []
        for name, parameter in self._parameters.items():
            if parameter.kind is parameter.POSITIONAL_ONLY and name in given:
                placed.append(given.pop(name))
        return self._function(*placed, **given)

    @cached_property
    def _model(self) -> Any:
        """A pydantic model of the arguments, whose fields have the parameters' names as aliases."""
        from pydantic import ConfigDict, Field, create_model

        fields: dict[str, Any] = {}
        for index, (name, parameter) in enumerate(self._parameters.items()):
            annotation = parameter.annotation
            kind = Any if annotation is inspect.Parameter.empty else annotation
            required = parameter.default is inspect.Parameter.empty
            default = ... if required else None
            fields[f"field_{index}"] = (kind, Field(default, alias=name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return create_model(self.name, __config__=ConfigDict(extra="forbid"), **fields)

    def _schema(self) -> dict[str, Any]:
        from pydantic.errors import PydanticUserError
        from pydantic.json_schema import GenerateJsonSchema

        class Untitled(GenerateJsonSchema):
            ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012

            def field_title_should_be_set(self, schema: Any) -> bool:
                return False

        try:
            schema: dict[str, Any] = self._model.model_json_schema(schema_generator=Untitled)
        except (PydanticUserError, TypeError) as error:
            name = next((name for name in self._parameters if self._fails(name)), None)
            what = self.name if name is None else f"The parameter {name} of {self.name}"
            why = clipped(str(error).splitlines()[0].rstrip("."))
            raise PromptError(f"{what} has no JSON Schema: {why}.", hint=HINT) from error
        schema.pop("title", None)
        schema.setdefault("properties", {})
        return schema

    def _fails(self, name: str) -> bool:
        """Whether a parameter is one that cannot be described."""
        from pydantic import TypeAdapter
        from pydantic.errors import PydanticUserError

        try:
            TypeAdapter(self._parameters[name].annotation).json_schema()
        except (PydanticUserError, TypeError):
            return True
        return False

    def _signature(self) -> inspect.Signature:
        try:
            return inspect.signature(self._function, eval_str=True)
        except NameError as error:
            raise PromptError(
                f"{self.name} has an annotation that means nothing: {error}.",
                hint="Import or define what it names at the top of the function's module.",
            ) from error
        except (TypeError, ValueError, SyntaxError) as error:
            raise PromptError(
                f"{self.name} does not tell its parameters: {error}.",
                hint="Wrap it in a function that does.",
            ) from error

    @cached_property
    def _documentation(self) -> tuple[str, dict[str, str]]:
        """The description of the function, and those of parameters by name."""
        from docstring_parser import ParseError, parse

        target = _innermost(self._function)
        text = inspect.getdoc(target) or ""
        if not hasattr(target, "__name__"):  # else the class's own, where the call has none
            text = inspect.getdoc(type(target).__call__) or text
        try:
            found = parse(text)
        except ParseError:
            return text, {}
        described = {
            each.arg_name.lstrip("*"): " ".join((each.description or "").split())
            for each in found.params
        }
        return (found.description or "").strip(), described


def awaitable(value: Any) -> bool:
    """Whether a function's result has to be awaited."""
    return isinstance(value, Awaitable)


def value_text(value: Any) -> str:
    """Write what a function returns as a model reads it: text as it is, all else as JSON."""
    if isinstance(value, str):
        return value
    from pydantic_core import PydanticSerializationError, to_json

    try:
        return to_json(value, fallback=str).decode()
    except (PydanticSerializationError, ValueError, RecursionError):
        return str(value)


def _innermost(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function


def _bound(function: Any) -> set[str]:
    names: set[str] = set()
    while isinstance(function, partial):
        names |= set(function.keywords)
        function = function.func
    return names


def _described(annotation: Any) -> str | None:
    """The description in `Annotated[…, "…"]` or `Annotated[…, Doc("…")]`."""
    if get_origin(annotation) is not Annotated:
        return None
    for each in get_args(annotation)[1:]:
        text = each if isinstance(each, str) else getattr(each, "documentation", None)
        if isinstance(text, str):
            return text
    return None


def _set_default(schema: dict[str, Any], value: Any) -> None:
    """Tell a default, where JSON has its like."""
    from pydantic_core import PydanticSerializationError, to_jsonable_python

    try:
        schema["default"] = to_jsonable_python(value)
    except (PydanticSerializationError, ValueError, RecursionError):
        return


def _problems(error: Any) -> list[str]:
    return [
        f"{'.'.join(map(str, each['loc'])) or 'arguments'}: {each['msg']}"
        for each in error.errors(include_url=False)
    ]
