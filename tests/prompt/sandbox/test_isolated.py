"""Templates that attack, and what becomes of the process that renders them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from phimlx.errors import PromptError
from phimlx.prompt.sandbox import isolated
from phimlx.prompt.sandbox.isolated import IsolatedTemplate, Worker, worker
from phimlx.prompt.sandbox.protocol import HINT, MAX_MEMORY

DEADLINE = 60  # seconds that a process may take to end
TOO_MUCH = "The chat template builds far more text than a prompt can hold."
TOO_LONG = "The chat template ran for more than 0.5 seconds and was stopped."

BIG = "{% set x = 'a' * 1000000 %}"
LITERAL = "{% for i in range(100000) %}" + "b" * 60_000 + "{% endfor %}"
LONG = "('a' * 1000000)"
LATE = "('ab' + 'a' * 500000)"  # is compared with each place of LONG, almost to its end
NUMBER = "{% set n = 1800000 %}{% set x = ('f' * n)|int(base=16) %}"  # no constant of the compiler


def grown(value: str, start: str = "'ha'", loops: int = 60) -> str:
    """A template that sets `ns.x` to `value` again and again."""
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range({loops}) %}}"
        f"{{% set ns.x = {value} %}}{{% endfor %}}{{{{ ns.x }}}}"
    )


# Each ends by a limit. Which of them comes first is a matter of the machine.
ATTACKS = {
    # Loops.
    "loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "loop of tests": (
        "{% for a in range(100000) %}{% for b in range(100000) %}{% if b is divisibleby 3 %}"
        "{% endif %}{% endfor %}{% endfor %}"
    ),
    "endless source": "{{a+a}}{{[a]}}" * 4300,
    # Single calls of C.
    "rfind": f"{{{{ {LONG}.rfind({LATE}) }}}}",
    "rindex": f"{{{{ {LONG}.rindex({LATE}) }}}}",
    "rsplit": f"{{{{ {LONG}.rsplit({LATE}) }}}}",
    "rpartition": f"{{{{ {LONG}.rpartition({LATE}) }}}}",
    "strip": (
        "{% set set = namespace(x='') %}{% for i in range(2000) %}"
        "{% set set.x = set.x ~ i|string * 40 %}{% endfor %}"
        "{% for i in range(1000) %}{% set y = (set.x * 9).strip(set.x) %}{% endfor %}"
    ),
    "powers": NUMBER + "{{ (x ** 30) % 7 }}",
    "divisions": NUMBER + "{{ ((x ** 3) // x) % 7 }}",
    "remainders": NUMBER + "{{ ((x ** 3) % x) % 7 }}",
    "divisible": NUMBER + "{{ (x ** 3) is divisibleby x }}",
    "repeated list": "{{ [messages] * 10**7 }}",
    "formatting": "{{ ('%(a)s' * 100000) % {'a': 'b' * 100000} }}",
    # Size.
    "repeated text": "{{ 'a' * 10**9 }}",
    "doubling by ~": grown("ns.x ~ ns.x"),
    "doubling by +": grown("ns.x + ns.x"),
    "doubling wide text": grown("ns.x ~ ns.x", "'\U0001f600'"),
    "doubling a list": grown("ns.x + ns.x", "[1]"),
    "nested lists": grown("[ns.x, ns.x]"),
    "nested dicts": grown("{'a': ns.x, 'b': ns.x}") + "{{ ns.x|tojson }}",
    "nested dict calls": grown("dict(a=ns.x, b=ns.x)"),
    "nested varargs": (
        "{% macro m(n) %}{% set n.x = varargs %}{% endmacro %}{% set ns = namespace(x='ha') %}"
        "{% for i in range(60) %}{{ m(ns, ns.x, ns.x) }}{% endfor %}{{ ns.x }}"
    ),
    "power": "{{ 10 ** (10 ** 8) }}",
    "squaring": grown("ns.x * ns.x", "7"),
    "width": "{{ '%1000000000d' % 1 }}",
    "width as an argument": "{{ '%*d' % (1000000000, 1) }}",
    "width of format": "{{ '{:>1000000000}'.format(1) }}",
    "replace": BIG + "{{ x.replace('a', x) }}",
    "replace filter": BIG + "{{ x|replace('a', x) }}",
    "join": BIG + "{{ x.join(['b'] * 1000) }}",
    "join filter": BIG + "{{ range(1000)|join(x) }}",
    "indent": "{{ 'a\nb'|indent(1000000000) }}",
    "indent of carriage returns": "{{ ('\\rx' * 60000)|indent(width=65000, blank=true) }}",
    "indent by text": "{{ ('\\rx' * 60000)|indent(width='abc' * 10000, blank=true) }}",
    "indent of JSON": "{{ [1]|tojson(indent=1000000000) }}",
    "slices": BIG + "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}"
    "{% set ns.x = ns.x + [x[i:]] %}{% endfor %}",
    "output": "{% for i in range(100000) %}{{ 'a' * 9999 }}{% endfor %}",
    "output of literals": LITERAL,
    "block of literals": "{% set x %}" + LITERAL + "{% endset %}",
    "macro of literals": "{% macro m() %}" + LITERAL + "{% endmacro %}{{ m() }}",
    "text just over the limit": "{{ 'a' * (16 * 2 ** 20 + 1) }}",
}  # fmt: skip


def busy_children() -> list[psutil.Process]:
    """Processes of ours that are not the worker in wait."""
    return [child for child in psutil.Process().children() if child.pid != worker.pid]


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    threads = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(isolated, "MAX_SECONDS", 0.5)
        with pytest.raises(PromptError) as error:
            IsolatedTemplate(ATTACKS[name]).render({"messages": [{"role": "user"}], "a": 1})
    assert str(error.value) in (TOO_MUCH, TOO_LONG)
    assert error.value.hint == HINT
    assert threading.active_count() == threads
    assert busy_children() == []
    assert IsolatedTemplate("{{ a }}").render({"a": 1}) == "1"
    assert psutil.Process(worker.pid).memory_info().rss < MAX_MEMORY // 2


def test_a_source_may_not_be_endless() -> None:
    with pytest.raises(PromptError) as error:
        IsolatedTemplate("a" * 70_000)
    assert str(error.value) == "The chat template has 70000 characters; at most 65536 are read."
    assert error.value.hint == HINT


def test_text_at_the_limit_is_whole() -> None:
    size = 16 * 2**20
    text = IsolatedTemplate("{{ 'a' * size }}").render({"size": size})
    assert (len(text), text.count("a")) == (size, size)


def test_the_worker_is_kept_between_renders_and_replaced_when_it_is_gone() -> None:
    template = IsolatedTemplate("{{ x }}")
    first = worker.pid
    assert first is not None
    assert [template.render({"x": x}) for x in "ab"] == ["a", "b"]
    assert worker.pid == first
    os.kill(first, signal.SIGKILL)
    psutil.Process(first).wait(DEADLINE)
    assert template.render({"x": "c"}) == "c"
    assert worker.pid not in (first, None)


def test_a_worker_that_dies_while_it_renders_is_named() -> None:
    template = IsolatedTemplate("{% for a in range(100000) %}{{ range(9999)|list }}{% endfor %}")
    pid = worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # it dies for certain before it answers
    timer = threading.Timer(0.2, os.kill, (pid, signal.SIGSEGV))
    timer.start()
    os.kill(pid, signal.SIGCONT)
    with pytest.raises(PromptError) as error:
        template.render({})
    timer.join(DEADLINE)
    assert str(error.value) == "The chat template brought down the process that renders it."


@pytest.mark.parametrize("size", [1, 10_000_000])  # the second is more than a socket holds
def test_a_worker_that_is_stopped_is_killed(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    template = IsolatedTemplate("{{ x }}")
    pid = worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(isolated, "MAX_SECONDS", 0.5)
    with pytest.raises(PromptError) as error:
        template.render({"x": "a" * size})
    assert str(error.value) == TOO_LONG
    assert not psutil.pid_exists(pid)


def test_threads_take_turns() -> None:
    template = IsolatedTemplate("{{ x * 1000 }}")
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda n: template.render({"x": f"<{n}>"}), range(100)))
    assert texts == [f"<{n}>" * 1000 for n in range(100)]


def test_an_interrupted_render_does_not_answer_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    template = IsolatedTemplate("{{ x }}")

    def interrupted(self: Worker, deadline: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            template.render({"x": "first"})
    assert template.render({"x": "second"}) == "second"


def test_memory_is_watched_where_the_system_sets_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = Worker()
    monkeypatch.setattr(isolated, "worker", unlimited)
    monkeypatch.setattr(isolated, "MAX_SECONDS", 20.0)
    monkeypatch.setattr(
        isolated,
        "PROGRAM",
        isolated.PROGRAM.replace("; main()", "").replace(
            "import main", "import LIMITS, main; LIMITS.clear(); main()"
        ),
    )
    source = (
        "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}"
        "{% set ns.x = [ns.x, range(100000)|list] %}{% endfor %}"
    )
    try:
        with pytest.raises(PromptError) as error:
            IsolatedTemplate(source).render({})
    finally:
        unlimited.stop()
    assert str(error.value) == TOO_MUCH


def test_a_system_without_processes_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "worker", Worker())
    for program, reason in (
        ("/nowhere/python", "[Errno 2] No such file or directory: '/nowhere/python'"),
        ("/bin/false", "it ended"),
    ):
        monkeypatch.setattr(sys, "executable", program)
        with pytest.raises(PromptError) as error:
            IsolatedTemplate("{{ x }}")
        assert str(error.value) == (
            f"The process that renders chat templates did not start: {reason}."
        )
        assert error.value.hint == "Close other programs and try again."
    assert busy_children() == []


PARENT = """
import os, signal, sys, threading
from phimlx.prompt.sandbox import isolated
template = isolated.IsolatedTemplate({source!r})
print(isolated.worker.pid, flush=True)
if {busy}:
    threading.Thread(target=template.render, args=({{}},), daemon=True).start()
{end}
"""
ENDS = {
    "the end of the program": "",
    "exit": "sys.exit(3)",
    "a crash": "os.kill(os.getpid(), signal.SIGKILL)",
    "no goodbye": "os._exit(0)",
}


@pytest.fixture
def orphans() -> Iterator[list[psutil.Process]]:
    """Processes that the test expects to end, ended where they have not."""
    found: list[psutil.Process] = []
    yield found
    for process in found:
        if process.is_running():
            process.kill()


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("end", ENDS)
def test_the_worker_ends_with_its_parent(
    orphans: list[psutil.Process], end: str, busy: bool
) -> None:
    source = ATTACKS["loops"] if busy else "{{ 1 }}"
    program = PARENT.format(source=source, busy=busy, end="sys.stdin.readline(); " + ENDS[end])
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        close_fds=True,
    )
    assert parent.stdout is not None
    orphans.append(psutil.Process(int(parent.stdout.readline())))
    parent.communicate("\n", timeout=DEADLINE)
    orphans[0].wait(DEADLINE)


def test_a_forked_process_starts_a_worker_of_its_own() -> None:
    template = IsolatedTemplate("{{ x }}")
    pid, sockets = worker.pid, psutil.Process().num_fds()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            text = template.render({"x": "forked"})
            mine = psutil.Process(worker.pid).ppid() == os.getpid()
            worker.stop()
            os.write(writer, f"{text} {worker.pid != pid} {mine}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        assert answer.read() == "forked True True"
    os.waitpid(child, 0)
    assert template.render({"x": "here"}) == "here"
    assert worker.pid == pid
    assert psutil.Process().num_fds() == sockets


def modules_of_the_worker() -> set[str]:
    program = isolated.PROGRAM.replace("main()", "print(*sys.modules)").replace(
        "import print(*sys.modules)", "import main"
    )
    folders = [isolated._folder(package) for package in isolated.PACKAGES]
    done = subprocess.run(
        [sys.executable, *isolated.OPTIONS, "-c", program, *folders],
        capture_output=True, text=True, check=True, timeout=DEADLINE,
    )  # fmt: skip
    return set(done.stdout.split())


def test_the_worker_imports_nothing_heavy() -> None:
    modules = modules_of_the_worker()
    assert "jinja2" in modules
    heavy: set[Any] = {"mlx", "numpy", "tokenizers", "huggingface_hub", "site", "psutil"}
    assert not heavy & modules
