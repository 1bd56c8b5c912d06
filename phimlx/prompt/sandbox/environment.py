"""Runs a chat template that nobody has vouched for: jinja2's immutable sandbox, with limits.

Knows nothing of messages or tokens: variables go in, text comes out, anything else is PromptError.
"""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from types import BuiltinMethodType, FrameType
from typing import Any, NoReturn, TypeVar

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context

from phimlx.errors import PromptError
from phimlx.prompt.sandbox.budget import Meter, TemplateLimitError, size_of

MAX_SOURCE = 65_536  # characters; the longest published chat templates have about 30,000
MAX_SECONDS = 2.0
BASE_BUDGET = 4 * 2**20  # bytes that a template may build,
BUDGET_PER_BYTE = 256  # this much more for each byte that it is given,
MAX_BUDGET = 256 * 2**20  # and no more than this

HINT = "Use the chat template that the model's publisher ships, or remove it for the built-in one."

T = TypeVar("T")

_meter: ContextVar[Meter] = ContextVar("meter")


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

# jinja's own filters whose result is no larger than a small multiple of what they are given.
SAFE_FILTERS = _names(
    "abs capitalize count d default dictsort e escape first float int items last length lower map "
    "max min reject rejectattr reverse safe select selectattr sort title trim unique upper"
)

LINE_ENDS = ("\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")


class _TimeoutError(BaseException):
    """The template's time is up."""


class _Namespace(Namespace):
    # jinja's own prints all that it holds, itself included.
    def __repr__(self) -> str:
        return "<Namespace>"


class _Generator(CodeGenerator):
    """Compiles what a template builds into calls that charge for it."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenate((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write("environment.admit(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.admit(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        built = node.ctx == "load"  # else a target of assignment
        self.write("environment.admit(" if built else "")
        super().visit_Tuple(node, frame)
        self.write(")" if built else "")

    def _output_child_to_const(self, *args: Any) -> NoReturn:
        # Literal text too passes through `finalize`, which charges it each time it is output.
        raise nodes.Impossible

    def _refuse(self, node: nodes.Stmt, frame: Frame) -> NoReturn:
        raise TemplateSyntaxError("a chat template may not use other files", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refuse


class _GenerationTag(Extension):
    """`{% generation %}`: marks the assistant's text for training, and means nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        # Without the optimizer nothing is computed while compiling; block trimming as transformers
        # has it in `_compile_jinja_template`.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_GenerationTag, LoopControlExtension],
            finalize=_finalize,
        )
        self.globals = {
            "range": self.globals["range"],  # the sandbox's own, at most 100,000 long
            "dict": dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.filters = {name: _charged(FILTERS[name]) for name in SAFE_FILTERS} | FILTERS_OF_OURS

    def admit(self, value: Any) -> Any:
        return _meter.get().admit(value)

    def concatenate(self, parts: Iterable[Any]) -> str:
        return _meter.get().join("", parts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = _meter.get()
        {"+": meter.add, "*": meter.repeat, "**": meter.power, "%": meter.percent}[operator](
            left, right
        )
        return meter.admit(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> None:
        return None  # str.format has no bound on its width, and is not among the safe attributes

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in SAFE_ATTRIBUTES.items():
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        text = getattr(__obj, "__self__", None)
        if isinstance(__obj, BuiltinMethodType) and isinstance(text, str):
            _check_method(text, __obj.__name__, *args)
        return _meter.get().admit(super().call(__context, __obj, *args, **kwargs))


def _check_method(text: str, name: str, *args: Any) -> None:
    """Look at a method of str that can build far more than it is given, before it runs."""
    meter = _meter.get()
    if name == "join" and args:
        meter.require(meter.weigh(args[0]))
        meter.require(sys.getsizeof(text) * len(args[0]) if hasattr(args[0], "__len__") else 0)
    elif name == "replace" and all(isinstance(arg, str) for arg in args[:2]):
        meter.replace(text, *args[:2])
    elif name in ("split", "rsplit"):
        meter.split(text, [args[0]] if args and isinstance(args[0], str) else None)
    elif name == "splitlines":
        meter.split(text, LINE_ENDS)


@pass_context
def _finalize(context: Context, value: Any) -> str:
    return _meter.get().text(value)


def _raise_exception(message: Any) -> NoReturn:
    raise PromptError(
        f"The model's chat template refuses this conversation: {_clip(message)}",
        hint="Arrange the messages as the template asks.",
    )


def _strftime_now(form: str) -> str:
    if len(form) > 100:
        raise TemplateLimitError
    return datetime.now().strftime(form)


def _charged(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that charges for its result, or for each item where it yields them one by one."""

    @functools.wraps(function)  # keeps the mark that asks for the context as first argument
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return map(_meter.get().admit, result)
        return _meter.get().admit(result)

    return call


def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = value if attribute is None else [item[attribute] for item in value]
    return _meter.get().join(str(d), items)


def _replace(text: Any, old: str, new: str, count: int = -1) -> str:
    meter = _meter.get()
    text, old, new = meter.text(text), meter.text(old), meter.text(new)
    meter.replace(text, old, new)
    return str(meter.admit(text.replace(old, new, count)))


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    meter = _meter.get()
    text = meter.text(text)
    meter.split(text, LINE_ENDS)
    lines = text.count("\n") + 1
    meter.require(lines * (width if isinstance(width, int) else sys.getsizeof(width)))
    return str(meter.admit(FILTERS["indent"](text, width, first, blank)))


def _list(value: Iterable[Any]) -> list[Any]:
    meter = _meter.get()
    if isinstance(value, str):
        meter.charge(sys.getsizeof(value) * 16)
    items = []
    for item in value:
        meter.charge(8)
        items.append(item)
    return list(meter.admit(items))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers, which does not escape HTML as jinja's own filter does."""
    meter = _meter.get()
    meter.weigh(value)
    if isinstance(indent, str) or (indent or 0) > 16:
        raise TemplateLimitError
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return "".join(meter.admit(piece) for piece in encoder.iterencode(value))


FILTERS_OF_OURS: dict[str, Callable[..., Any]] = {
    "indent": _indent,
    "join": _join,
    "list": _list,
    "replace": _replace,
    "string": lambda value: _meter.get().text(value),
    "tojson": _tojson,
}


class Template:
    """A compiled chat template.

    Raises PromptError where the source is too long, does not parse, or reaches for other files.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise PromptError(
                f"The chat template has {len(source)} characters; at most {MAX_SOURCE} are read.",
                hint=HINT,
            )
        self.source = source
        self._environment = _Environment()
        self._template = _guard(lambda: self._environment.from_string(source), Meter(BASE_BUDGET))

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's text for `variables`.

        Raises PromptError where the template fails, refuses, does something unsafe, runs for more
        than `MAX_SECONDS`, or builds more than the budget allows.
        """

        def run() -> str:
            context = self._template.new_context(dict(variables))
            return "".join(self._template.root_render_func(context))

        budget = BASE_BUDGET + BUDGET_PER_BYTE * size_of(dict(variables))
        return _guard(run, Meter(min(budget, MAX_BUDGET)))

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template expects from outside."""
        tree = _guard(lambda: self._environment.parse(self.source), Meter(BASE_BUDGET))
        return frozenset(meta.find_undeclared_variables(tree))

    @functools.cached_property
    def keys(self) -> frozenset[str]:
        """The strings and attributes named in the template, keys of messages among them."""
        tree = _guard(lambda: self._environment.parse(self.source), Meter(BASE_BUDGET))
        constants = (node.value for node in tree.find_all(nodes.Const))
        attributes = (node.attr for node in tree.find_all(nodes.Getattr))
        return frozenset(name for name in (*constants, *attributes) if isinstance(name, str))


def _guard(work: Callable[[], T], meter: Meter) -> T:
    """Run `work` in a thread of its own, with a deadline, turning what it raises to PromptError.

    A trace function looks at the clock on each call and on each line of the template, so that no
    loop outruns it. Should one step stall below Python, the caller returns all the same and the
    thread, a daemon, is left behind.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def target() -> None:
        deadline = time.monotonic() + MAX_SECONDS

        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            if time.monotonic() > deadline:
                raise _TimeoutError
            return trace if frame.f_code.co_filename == "<template>" else None

        _meter.set(meter)
        sys.settrace(trace)
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=target, name="chat-template", daemon=True)
    thread.start()
    thread.join(MAX_SECONDS * 2)
    if results:
        return results[0]
    raise _explain(errors[0] if errors else _TimeoutError())


def _explain(error: BaseException) -> PromptError:
    match error:
        case PromptError():
            return error
        case _TimeoutError():
            message = (
                f"The chat template ran for more than {MAX_SECONDS:g} seconds and was stopped."
            )
        case TemplateLimitError() | MemoryError():
            message = "The chat template builds far more text than a prompt can hold."
        case RecursionError():
            message = "The chat template calls itself too deeply."
        case TemplateSyntaxError(lineno=line):
            message = f"The chat template is wrong in line {line}: {_clip(error.message)}"
        case SecurityError():
            message = f"The chat template does what is not allowed: {_clip(error)}"
        case TemplateError() | Exception():
            message = f"The chat template fails: {_clip(error)}"
        case _:
            raise error
    return PromptError(message, hint=HINT)


def _clip(message: object) -> str:
    """A message in one line of bounded length, ending in one full stop."""
    line = " ".join(str(message).split())
    return (line if len(line) <= 200 else line[:199] + "…").rstrip(".") + "."
