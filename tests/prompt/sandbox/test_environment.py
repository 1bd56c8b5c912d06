"""What a template may see and do, in this process and in the worker's, and how it is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pytest

from phimlx.errors import PromptError
from phimlx.prompt.sandbox.environment import Template
from phimlx.prompt.sandbox.isolated import IsolatedTemplate
from phimlx.prompt.sandbox.protocol import HINT

TOO_DEEP = "The chat template calls itself too deeply."
NO_FILES = "The chat template is wrong in line 1: a chat template may not use other files."


class Compiled(Protocol):
    variables: frozenset[str]
    keys: frozenset[str]

    def render(self, variables: Mapping[str, Any]) -> str: ...


Compile = Callable[[str], Compiled]


@pytest.fixture(params=[Template, IsolatedTemplate])
def compile_template(request: pytest.FixtureRequest) -> Compile:
    return request.param


def unsafe(attribute: str, kind: str) -> str:
    return (
        f"The chat template does what is not allowed: access to attribute '{attribute}' of "
        f"'{kind}' object is unsafe."
    )


REFUSED = {
    # Depth.
    "macro": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", TOO_DEEP),
    "recursive loop": ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", TOO_DEEP),
    "parentheses": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", TOO_DEEP),
    "negations": ("{{ " + "not " * 3000 + "1 }}", TOO_DEEP),
    # Reach.
    "classes": ("{{ ''.__class__.__mro__ }}", unsafe("__class__", "str")),
    "globals": (
        "{{ namespace.__init__.__globals__ }}",
        unsafe("__init__", "type"),
    ),
    "function": ("{{ raise_exception.__globals__.sys }}", unsafe("__globals__", "function")),
    "center": ("{{ 'a'.center(1000000000) }}", unsafe("center", "str")),
    "zfill": ("{{ 'a'.zfill(1000000000) }}", unsafe("zfill", "str")),
    "expandtabs": ("{{ '\\t'.expandtabs(1000000000) }}", unsafe("expandtabs", "str")),
    "to_bytes": ("{{ (5).to_bytes(1000000000, 'big') }}", unsafe("to_bytes", "int")),
    "append": ("{{ messages.append(1) }}", unsafe("append", "list")),
    "update": ("{{ messages[0].update({'a': 1}) }}", unsafe("update", "dict")),
    "attr": (
        "{{ ''|attr('__class__') }}",
        "The chat template is wrong in line 1: No filter named 'attr'.",
    ),
    "include": ("{% include '/etc/passwd' %}", NO_FILES),
    "import": ("{% import '/etc/passwd' as p %}", NO_FILES),
    "from": ("{% from '/etc/passwd' import p %}", NO_FILES),
    "extends": ("{% extends '/etc/passwd' %}", NO_FILES),
    # Mistakes.
    "syntax": (
        "\n{% for %}",
        "The chat template is wrong in line 2: Expected an expression, got 'end of statement "
        "block'.",
    ),
    "undefined": ("{{ 'a' + b }}", "The chat template fails: 'b' is undefined."),
    "types": (
        "{{ 'a' + 1 }}",
        'The chat template fails: can only concatenate str (not "int") to str.',
    ),
    "division": ("{{ 1 // 0 }}", "The chat template fails: integer division or modulo by zero."),
    "digits": (
        "{{ " + "9" * 5000 + " }}",
        "The chat template fails: Exceeds the limit (4300 digits) for integer string conversion: "
        "value has 5000 digits; use sys.set_int_max_str_digits() to increase the limit.",
    ),
    "an argument too many": (
        "{% call raise_exception() %}x{% endcall %}",
        "The chat template fails: _raise_exception() got an unexpected keyword argument 'caller'.",
    ),
    "unclosed": ("{% for", "The chat template is wrong in line 1: unexpected 'end of template'."),
    "range": (
        "{{ range(10**9)|list }}",
        "The chat template fails: Range too big. The sandbox blocks ranges larger than "
        "MAX_RANGE (100000).",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_is_refused_in_one_sentence(compile_template: Compile, name: str) -> None:
    source, message = REFUSED[name]
    with pytest.raises(PromptError) as error:
        compile_template(source).render({"messages": [{"role": "user", "content": "hi"}], "a": 1})
    assert str(error.value) == message
    assert error.value.hint == HINT


@pytest.mark.parametrize(
    "source",
    ["{{ ''['__class__'] }}", "{{ raise_exception.__globals__ }}", "{{ self.__init__ }}"],
)
def test_private_attributes_print_as_nothing(compile_template: Compile, source: str) -> None:
    assert compile_template(source).render({}) == ""


def test_a_template_refuses_in_its_own_words(compile_template: Compile) -> None:
    with pytest.raises(PromptError) as error:
        compile_template("{{ raise_exception('Roles must\n alternate!.') }}").render({})
    assert str(error.value) == (
        "The model's chat template refuses this conversation: Roles must alternate!."
    )
    assert error.value.hint == "Arrange the messages as the template asks."


def test_long_messages_are_cut(compile_template: Compile) -> None:
    with pytest.raises(PromptError) as error:
        compile_template("{{ raise_exception('ab ' * 500) }}").render({})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("source", "text"),
    [
        # What transformers sets up: block trimming, loop controls, JSON without HTML escapes.
        ("{% for i in range(9) %}\n  {% if i == 2 %}{% break %}{% endif %}\n{{ i }}\n"
         "{% endfor %}\n",
         "0\n1\n"),
        ("{{ {'b': '<é>', 'a': [1, None]}|tojson }}", '{"b": "<é>", "a": [1, null]}'),
        ("{{ {'b': 1, 'a': 2}|tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ [1, 2]|tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{{ strftime_now('%%') }}", "%"),
        # What chat templates use.
        ("{{ ' a '|trim ~ 'b'|upper ~ ['x', 'y']|join('-') }}", "aBx-y"),
        ("{{ 'a-b-c'.split('-')[1:]|list }}", "['b', 'c']"),
        ("{{ 'abab'.replace('a', 'c') }}{{ 'abab'|replace('b', '') }}", "cbcbaa"),
        ("{{ '%s is %d'|string % ('x', 3) }}", "x is 3"),
        ("{{ 'a\nb'|indent(2) }}", "a\n  b"),
        ("{{ ','.join(['a', 'b']) }}{{ range(3)|join }}", "a,b012"),
        ("{{ [{'r': 'u'}, {'r': 'v'}]|selectattr('r', 'equalto', 'v')|list|length }}", "1"),
        ("{{ [{'r': 'u'}, {'r': 'v'}]|map(attribute='r')|join(' ') }}", "u v"),
        ("{{ [{'r': 'u'}]|join('', attribute='r') }}", "u"),
        ("{{ {'b': 1, 'a': 2}|dictsort }}{{ {'a': 1}.items()|list }}",
         "[('a', 2), ('b', 1)][('a', 1)]"),
        ("{% macro m(x, y=2) %}{{ x }}{{ y }}{% endmacro %}{{ m(1) }}{{ m(y=3, x=0) }}", "1203"),
        ("{% set ns = namespace(n=0) %}{% for a, b in [(1, 2), (3, 4)] %}"
         "{% set ns.n = ns.n + a * b %}{% endfor %}{{ ns.n }}", "14"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ 2 ** 10 }} {{ 7 % 4 }} {{ none }}",
         "a11024 3 None"),
        ("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
         "<Namespace {'x': <Namespace {...}>}>"),
        ("{{ '{:>3}|{a}'.format(1, a='b') }}", "  1|b"),
        ("{{ missing }}{{ missing is defined }}{{ missing|default('d') }}", "Falsed"),
    ],
)  # fmt: skip
def test_well_meant_templates(compile_template: Compile, source: str, text: str) -> None:
    assert compile_template(source).render({}) == text


def test_a_long_conversation_fits(compile_template: Compile) -> None:
    """A template that rebuilds its text with each message, with 120,000 words to build."""
    source = (
        "{% set ns = namespace(text='') %}{% for m in messages %}"
        "{% set ns.text = ns.text ~ '<' + m.role + '>' + m.content %}{% endfor %}{{ ns.text }}"
    )
    messages: list[dict[str, Any]] = [{"role": "u", "content": "word " * 3000}] * 40
    rendered = compile_template(source).render({"messages": messages})
    assert rendered == ("<u>" + "word " * 3000) * 40


def test_names_that_a_template_reads(compile_template: Compile) -> None:
    template = compile_template(
        "{{ messages[0]['tools'] }}{{ m.tool_calls }}{% set x = tools %}{{ x }}"
    )
    assert template.variables == {"messages", "m", "tools"}
    assert template.keys >= {"tools", "tool_calls"}


def test_every_kind_of_value_reaches_a_template(compile_template: Compile) -> None:
    value = {"a": [1, 2.5, True, None, {"é": "日\ud800\U00012000"}], "b": ""}
    assert compile_template("{{ x.a[4]['é'] }}{{ x.a[:4] }}").render({"x": value}) == (
        "日\ud800\U00012000[1, 2.5, True, None]"
    )
