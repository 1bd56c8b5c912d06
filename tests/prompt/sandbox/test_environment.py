"""Templates that attack, and what a well-meant template may rely on."""

from __future__ import annotations

import sys
import threading
import tracemalloc
from typing import Any

import pytest

from phimlx.errors import PromptError
from phimlx.prompt.sandbox import environment as sandbox
from phimlx.prompt.sandbox.environment import Template

TOO_MUCH = "The chat template builds far more text than a prompt can hold."
TOO_LONG = "The chat template ran for more than 0.5 seconds and was stopped."
TOO_DEEP = "The chat template calls itself too deeply."
NO_FILES = "The chat template is wrong in line 1: a chat template may not use other files."


def unsafe(attribute: str, kind: str) -> str:
    return (
        f"The chat template does what is not allowed: access to attribute '{attribute}' of "
        f"'{kind}' object is unsafe."
    )


def grown(value: str, start: str = "'ha'", loops: int = 60) -> str:
    """A template that sets `ns.x` to `value` again and again."""
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range({loops}) %}}"
        f"{{% set ns.x = {value} %}}{{% endfor %}}"
    )


BIG = "{% set x = 'a' * 1000000 %}"
LITERAL = "{% for i in range(100000) %}" + "b" * 60_000 + "{% endfor %}"

HOSTILE = {
    # Time.
    "loops": (
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        TOO_LONG,
    ),
    "loop of tests": (
        "{% for a in range(100000) %}{% for b in range(100000) %}{% if b is divisibleby 3 %}"
        "{% endif %}{% endfor %}{% endfor %}",
        TOO_LONG,
    ),
    "endless source": ("{{a+a}}{{[a]}}" * 4300, TOO_LONG),
    # Size.
    "repeated text": ("{{ 'a' * 10**9 }}", TOO_MUCH),
    "repeated list": ("{{ [messages] * 10**7 }}", TOO_MUCH),
    "doubling by ~": (grown("ns.x ~ ns.x"), TOO_MUCH),
    "doubling by +": (grown("ns.x + ns.x"), TOO_MUCH),
    "doubling wide text": (grown("ns.x ~ ns.x", "'\U0001f600'"), TOO_MUCH),
    "doubling a list": (grown("ns.x + ns.x", "[1]"), TOO_MUCH),
    "nested lists": (grown("[ns.x, ns.x]") + "{{ ns.x }}", TOO_MUCH),
    "nested tuples": (grown("(ns.x, ns.x)") + "{{ ns.x == (1,) }}", TOO_MUCH),
    "nested dicts": (grown("{'a': ns.x, 'b': ns.x}") + "{{ ns.x|tojson }}", TOO_MUCH),
    "nested dict calls": (grown("dict(a=ns.x, b=ns.x)") + "{{ ns.x }}", TOO_MUCH),
    "nested varargs": (
        "{% macro m(n) %}{% set n.x = varargs %}{% endmacro %}{% set ns = namespace(x='ha') %}"
        "{% for i in range(60) %}{{ m(ns, ns.x, ns.x) }}{% endfor %}{{ ns.x }}",
        TOO_MUCH,
    ),
    "power": ("{{ 10 ** (10 ** 8) }}", TOO_MUCH),
    "squaring": (grown("ns.x * ns.x", "7"), TOO_MUCH),
    "width": ("{{ '%1000000000d' % 1 }}", TOO_MUCH),
    "width as an argument": ("{{ '%*d' % (1000000000, 1) }}", TOO_MUCH),
    "replace": (BIG + "{{ x.replace('a', x) }}", TOO_MUCH),
    "replace filter": (BIG + "{{ x|replace('a', x) }}", TOO_MUCH),
    "join": (BIG + "{{ x.join(['b'] * 1000) }}", TOO_MUCH),
    "join filter": (BIG + "{{ range(1000)|join(x) }}", TOO_MUCH),
    "join of defaults": (BIG + "{{ range(1000)|map('default', x, true)|join }}", TOO_MUCH),
    "sort of defaults": (
        BIG + "{{ range(9999)|map(attribute='a', default=x)|sort }}",
        TOO_MUCH,
    ),
    "split": ("{{ ('a,' * 1000000).split(',') }}", TOO_MUCH),
    "split at spaces": ("{{ ('a ' * 1000000).split() }}", TOO_MUCH),
    "splitlines": ("{{ ('a\\n' * 1000000).splitlines() }}", TOO_MUCH),
    "list of characters": (BIG + "{{ x|list }}", TOO_MUCH),
    "lists": ("{% for i in range(9) %}{% set x = range(100000)|list %}{% endfor %}", TOO_MUCH),
    "indent": ("{{ 'a\nb'|indent(1000000000) }}", TOO_MUCH),
    "indent of JSON": ("{{ [1]|tojson(indent=1000000000) }}", TOO_MUCH),
    "output": ("{% for i in range(100000) %}{{ 'a' * 9999 }}{% endfor %}", TOO_MUCH),
    "output of literals": (LITERAL, TOO_MUCH),
    "block of literals": ("{% set x %}" + LITERAL + "{% endset %}", TOO_MUCH),
    "macro of literals": ("{% macro m() %}" + LITERAL + "{% endmacro %}{{ m() }}", TOO_MUCH),
    "date": ("{{ strftime_now('%Y' * 1000) }}", TOO_MUCH),
    "range": (
        "{{ range(10**9)|list }}",
        "The chat template fails: Range too big. The sandbox blocks ranges larger than "
        "MAX_RANGE (100000).",
    ),
    "source": (
        "a" * 70_000,
        "The chat template has 70000 characters; at most 65536 are read.",
    ),
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
    "format": ("{{ '{:>1000000000}'.format(1) }}", unsafe("format", "str")),
    "format_map": ("{{ '{a:>9999999999}'.format_map({'a': 1}) }}", unsafe("format_map", "str")),
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
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5)
    source, message = HOSTILE[name]
    if message != TOO_LONG:  # an overloaded machine shall not turn one answer into another
        monkeypatch.setattr(sandbox, "MAX_SECONDS", 60.0)
    tracemalloc.start()
    try:
        with pytest.raises(PromptError) as error:
            Template(source).render({"messages": [{"role": "user", "content": "hi"}], "a": 1})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(error.value) == message
    assert error.value.hint == sandbox.HINT
    assert peak < 50e6


def test_big_is_within_the_budget() -> None:
    assert Template(BIG + "{{ x|length }}").render({}) == "1000000"


@pytest.mark.parametrize(
    "source",
    ["{{ ''['__class__'] }}", "{{ raise_exception.__globals__ }}", "{{ self.__init__ }}"],
)
def test_private_attributes_print_as_nothing(source: str) -> None:
    assert Template(source).render({}) == ""


def test_a_namespace_that_holds_itself_prints() -> None:
    source = "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }} {{ [ns] }}"
    assert Template(source).render({}) == "<Namespace> [<Namespace>]"


def test_a_template_refuses_in_its_own_words() -> None:
    with pytest.raises(PromptError) as error:
        Template("{{ raise_exception('Roles must\n alternate!.') }}").render({})
    assert str(error.value) == (
        "The model's chat template refuses this conversation: Roles must alternate!."
    )
    assert error.value.hint == "Arrange the messages as the template asks."


def test_long_messages_are_cut() -> None:
    with pytest.raises(PromptError) as error:
        Template("{{ raise_exception('ab ' * 500) }}").render({})
    assert len(str(error.value)) < 300


def test_a_step_that_stalls_below_python_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.1)
    monkeypatch.setattr(sandbox, "_strftime_now", lambda form: released.wait(60))
    try:
        with pytest.raises(PromptError) as error:
            Template("{{ strftime_now('%Y') }}").render({})
    finally:
        released.set()
    assert str(error.value) == "The chat template ran for more than 0.1 seconds and was stopped."


def test_tracing_stays_with_the_callers_thread() -> None:
    before = sys.gettrace()
    Template("{{ 1 }}").render({})
    assert sys.gettrace() is before


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
        ("{{ missing }}{{ missing is defined }}{{ missing|default('d') }}", "Falsed"),
    ],
)  # fmt: skip
def test_well_meant_templates(source: str, text: str) -> None:
    assert Template(source).render({}) == text


def test_a_long_conversation_fits() -> None:
    """A template that rebuilds its text with each message, with 120,000 words to build."""
    source = (
        "{% set ns = namespace(text='') %}{% for m in messages %}"
        "{% set ns.text = ns.text ~ '<' + m.role + '>' + m.content %}{% endfor %}{{ ns.text }}"
    )
    messages: list[dict[str, Any]] = [{"role": "u", "content": "word " * 3000}] * 40
    assert Template(source).render({"messages": messages}) == ("<u>" + "word " * 3000) * 40


def test_names_that_a_template_reads() -> None:
    template = Template("{{ messages[0]['tools'] }}{{ m.tool_calls }}{% set x = tools %}{{ x }}")
    assert template.variables == {"messages", "m", "tools"}
    assert template.keys >= {"tools", "tool_calls"}
