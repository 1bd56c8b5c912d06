"""Reads tools offered to a model, and its calls of them, in OpenAI's forms, as plain data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phimlx.errors import PromptError, shortened
from phimlx.files import read_json_value
from phimlx.prompt.functions import Function

Tools = Sequence[Mapping[str, Any] | Callable[..., Any]]
"""Definitions of functions in OpenAI's form, and Python functions."""

EXAMPLE = 'A tool is {"name": …, "description": …, "parameters": {JSON schema}}.'


@dataclass(frozen=True)
class ToolCall:
    """One call that a model asks for: a tool's name and the arguments for it."""

    name: str
    arguments: dict[str, Any]

    def as_object(self) -> dict[str, Any]:
        """Make an object of JSON."""
        return {"name": self.name, "arguments": self.arguments}


def read_tools(tools: Tools) -> list[dict[str, Any]]:
    """Read the function objects of `tools`: name, description, parameters.

    Takes them bare or as OpenAI wraps them, `{"type": "function", "function": {…}}`, and makes them
    of Python functions.
    Raises PromptError, naming the tool, where one is not what a model can be told about.
    """
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise PromptError("Tools must be a list.", hint=EXAMPLE)
    functions = [_read_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools)]
    seen: set[str] = set()
    for index, function in enumerate(functions):
        if function["name"] in seen:
            raise PromptError(
                f"tools[{index}] is a second tool named {shortened(function['name'])}.",
                hint="Give each tool a name of its own.",
            )
        seen.add(function["name"])
    return functions


def _read_tool(place: str, tool: Any) -> dict[str, Any]:
    if callable(tool):
        tool = Function(tool).definition
    if isinstance(tool, Mapping) and "function" in tool:
        if tool.get("type", "function") != "function":
            raise PromptError(
                f"{place} has the type {shortened(tool['type'])}; only 'function' is known.",
                hint=EXAMPLE,
            )
        tool = tool["function"]
    if not isinstance(tool, Mapping):
        raise PromptError(f"{place} is not an object.", hint=EXAMPLE)
    for key, kind, name in (
        ("name", str, "a text"),
        ("description", str, "a text"),
        ("parameters", Mapping, "an object"),
    ):
        if tool.get(key) is not None and not isinstance(tool[key], kind):
            raise PromptError(f"{place} has a {shortened(key)} that is not {name}.", hint=EXAMPLE)
    if not tool.get("name"):
        raise PromptError(f"{place} has no name.", hint=EXAMPLE)
    try:
        return dict(json.loads(json.dumps(tool, allow_nan=False)))  # plain data from here on
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"{place} cannot be written as JSON: {error}.", hint=EXAMPLE) from error


def load_tools(path: Path) -> list[dict[str, Any]]:
    """Read the functions that a model may call from a JSON file that lists them.

    Raises:
        PromptError: saying what is wrong with the file.
    """
    value = read_json_value(path, PromptError)
    if not value:
        raise PromptError(f"{path} holds no tools.", EXAMPLE)
    try:
        return read_tools(value)
    except PromptError as error:
        raise PromptError(f"{path}: {error}", error.hint) from None


def tools_json(functions: Sequence[Mapping[str, Any]]) -> str:
    """The list of tools as Phi-4-mini's model card writes it into the prompt."""
    return json.dumps(functions, ensure_ascii=False)


def calls_json(calls: Iterable[ToolCall]) -> str:
    """The list of calls as Phi-4-mini writes it into its reply."""
    return json.dumps(
        [{"name": call.name, "arguments": call.arguments} for call in calls], ensure_ascii=False
    )


def wrapped_calls(calls: Iterable[ToolCall]) -> list[dict[str, Any]]:
    """The calls as templates that render them on their own expect them."""
    return [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]


def read_calls(value: Any) -> list[ToolCall]:
    """The calls in a JSON value: one call, or a list of them.

    A call is `{"name": …, "arguments": {…}}`; "parameters" does for "arguments", which may also be
    the text of a JSON object or absent, and OpenAI's `{"function": {…}}` may be around it.
    Raises ValueError, with the reason, where it is anything else.
    """
    calls = [_read_call(item) for item in (value if isinstance(value, list) else [value])]
    if not calls:
        raise ValueError("it names no tool")
    return calls


def _read_call(item: Any) -> ToolCall:
    if isinstance(item, ToolCall):
        return item
    if isinstance(item, Mapping) and isinstance(item.get("function"), Mapping):
        item = item["function"]
    if not isinstance(item, Mapping):
        raise ValueError("a call must be an object")
    name = item.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError("a call has no name")
    arguments = item.get("arguments", item.get("parameters"))
    if isinstance(arguments, str):
        arguments = read_json_text(arguments) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of {name} are not an object")
    return ToolCall(name, dict(arguments))


def read_json_text(text: str) -> Any:
    """The JSON value that `text` is, line breaks inside its strings allowed.

    Raises ValueError where it is none; NaN and the infinities are none.
    """
    try:
        return json.JSONDecoder(strict=False, parse_constant=_refuse_constant).decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
