"""Compiles and renders chat templates in jinja2's immutable sandbox.

Imports jinja2 and nothing heavy: the worker process starts with this module.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import Template as Compiled
from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from phimlx.errors import PromptError
from phimlx.prompt.sandbox.protocol import HINT, TOO_MUCH
from phimlx.prompt.sandbox.turns import mark_turns


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


SAFE_ATTRIBUTES: dict[type, frozenset[str]] = {
    str: _names(
        "capitalize count endswith find index isalnum isalpha isdigit islower isnumeric isspace "
        "isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex "
        "rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
    ),
    dict: _names("get items keys values"),
    **{kind: _names("count index") for kind in (list, tuple)},
    **{kind: _names("") for kind in (int, float, bytes, set, frozenset)},
}
SAFE_FILTERS = _names(
    "abs capitalize count d default dictsort e escape first float indent int items join last "
    "length list lower map max min reject rejectattr replace reverse safe select selectattr sort "
    "string title trim unique upper"
)
OTHER_FILES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class _GenerationTag(Extension):
    """`{% generation %}`: marks the assistant's text for training, and means nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Names that a chat template may use, and block trimming as transformers has it.

    Source: transformers `utils/chat_template_utils.py`, `_compile_jinja_template`.
    """

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, LoopControlExtension],
        )
        self.globals = {
            "range": self.globals["range"],  # the sandbox's own, at most 100,000 long
            "dict": dict,
            "namespace": Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.filters = {name: FILTERS[name] for name in SAFE_FILTERS} | {"tojson": _tojson}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in SAFE_ATTRIBUTES.items():
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)


def _raise_exception(message: Any) -> NoReturn:
    raise PromptError(
        f"The model's chat template refuses this conversation: {_clip(message)}",
        hint="Arrange the messages as the template asks.",
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as transformers does, which does not escape HTML as jinja's own filter does."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class Template:
    """A compiled chat template.

    Rendering has no limits here: known templates alone are rendered in the user's process.

    Attributes:
        variables: the names that the template expects from outside.
        keys: the strings and attributes named in the template, keys of messages among them.
    """

    def __init__(self, source: str) -> None:
        """Raises PromptError where the source does not parse or reaches for other files."""
        self.source = source
        environment = _Environment()
        try:
            tree = environment.parse(source)
            if node := next(tree.find_all(OTHER_FILES), None):
                raise TemplateSyntaxError("a chat template may not use other files", node.lineno)
            constants = (node.value for node in tree.find_all(nodes.Const))
            attributes = (node.attr for node in tree.find_all(nodes.Getattr))
            names = (*constants, *attributes)
            self.keys = frozenset(name for name in names if isinstance(name, str))
            self.variables = frozenset(meta.find_undeclared_variables(tree))
            self._template = environment.from_string(tree)
        except Exception as error:
            raise explain(error) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's text for `variables`.

        Raises PromptError where the template fails, refuses, or does something unsafe.
        """
        try:
            return self._template.render(variables)
        except Exception as error:
            raise explain(error) from error

    def render_turns(self, variables: Mapping[str, Any]) -> list[str] | None:
        """The text in parts: what stands before the messages, each one's, and what follows them.

        Where the template goes through the messages again, each one's and what follows come again.
        None where it does not write each message by itself, whatever others there are.
        Raises PromptError as `render`.
        """
        if self._marked is None:
            return None
        mark, template = self._marked
        try:
            return template.render(variables).split(mark)
        except Exception as error:
            raise explain(error) from error

    @cached_property
    def _marked(self) -> tuple[str, Compiled] | None:
        """A mark that no message can guess, and the template that writes it between messages."""
        environment, mark = _Environment(), os.urandom(16).hex()
        tree = environment.parse(self.source)
        return (mark, environment.from_string(tree)) if mark_turns(tree, mark) else None


def explain(error: Exception) -> PromptError:
    """Error for a person in place of what compiling or rendering a template raised."""
    match error:
        case PromptError():
            return error
        case MemoryError():
            message = TOO_MUCH
        case RecursionError():
            message = "The chat template calls itself too deeply."
        case TemplateSyntaxError(lineno=line):
            message = f"The chat template is wrong in line {line}: {_clip(error.message)}"
        case SecurityError():
            message = f"The chat template does what is not allowed: {_clip(error)}"
        case _:
            message = f"The chat template fails: {_clip(error)}"
    return PromptError(message, hint=HINT)


def _clip(message: object) -> str:
    """A message in one line of bounded length, ending in one full stop."""
    line = " ".join(str(message)[:1000].split())
    return (line if len(line) <= 200 else line[:199] + "…").rstrip(".") + "."
