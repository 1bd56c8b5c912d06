"""The direction of imports between rooms, no circles, who prints, and what a start loads."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import phimlx

HOME = Path(phimlx.__file__).parents[1]

RANKS = (
    ("__main__",),
    ("cli",),
    ("terminal", "server"),
    ("evaluation",),
    ("training", "convert"),
    ("api", "remote"),
    ("extraction", "shared_model"),
    ("adapters", "transcription", "prompt_file", "tools"),
    ("hub", "generation", "history"),
    ("preferences",),
    ("checkpoint", "media", "prompt"),
    ("models",),
    ("machine",),
    ("options", "extras"),
    ("files", "folders"),
    ("errors", "sizes", "catalog", "launched"),
)
"""The rooms from the top down: a room imports itself and what stands below it, nothing else."""

WRONG_WAY_TO_BE_MENDED: tuple[tuple[str, str], ...] = ()
"""Imports that point up. To become empty."""

CIRCLES_TO_BE_MENDED: tuple[tuple[str, ...], ...] = ()
"""Modules that import each other. To become empty."""

PRINTERS = {"terminal"}

BESIDE_THE_GATE = {
    f"phimlx.terminal.{name}" for name in ("line", "output", "progress", "screen", "sink")
}
"""Modules that put escape sequences of their own on a terminal, around text that they clean."""

DRAWERS = {"prompt_toolkit", "rich", "tqdm"}
"""Packages that write to a terminal."""

WRITERS = {
    "click": {"echo", "secho", "confirm", "prompt", "echo_via_pager", "progressbar"},
    "contextlib": {"redirect_stdout", "redirect_stderr"},
    "sys": {"stdout", "stderr"},
    "traceback": {"print_exc", "print_exception"},
}
"""Names that write to one."""

HEAVY = {
    "PIL",
    "av",
    "httpx2",
    "huggingface_hub",
    "jinja2",
    "llguidance",
    "mlx",
    "mlx_lm",
    "numpy",
    "prompt_toolkit",
    "psutil",
    "pydantic",
    "rich",
    "safetensors",
    "sqlite3",
    "soundfile",
    "soxr",
    "starlette",
    "tokenizers",
    "tomlkit",
    "tomllib",
    "torch",
    "tqdm",
    "transformers",
    "uvicorn",
}
"""Packages that cost time to import."""


@cache
def sources() -> dict[str, ast.Module]:
    """Each module of phimlx and convert by its name."""
    found = {}
    for top in ("phimlx", "convert"):
        for path in sorted((HOME / top).rglob("*.py")):
            name = ".".join(path.relative_to(HOME).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(name: str, tree: ast.AST) -> Iterator[str]:
    """Our modules that a module imports, wherever in it: at its top, lazily or for types alone.

    `phimlx/__init__.py` names what it exports for type checkers, and loads none of it.
    """
    if name == "phimlx":
        return
    for node in ast.walk(tree):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import, which this test does not follow"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [full if full in sources() else str(node.module) for full in whole]
        yield from (target for target in targets if target in sources() and target != name)


@cache
def graph() -> dict[str, set[str]]:
    """What each module imports of ours."""
    return {name: set(imported(name, tree)) for name, tree in sources().items()}


def room(name: str) -> str | None:
    """The room of a module; None for `phimlx` itself, of which only the version is asked."""
    top, *rest = name.split(".")
    return top if top == "convert" else rest[0] if rest else None


def rank(name: str) -> int:
    return next((index for index, rooms in enumerate(RANKS) if room(name) in rooms), len(RANKS))


def circles(edges: dict[str, set[str]]) -> set[tuple[str, ...]]:
    """Groups of modules that can all reach each other, each sorted (Tarjan, 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found: set[tuple[str, ...]] = set()

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        path.append(name)
        for other in sorted(edges[name]):
            if other not in order:
                visit(other)
            if other in path:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == order[name]:
            start = path.index(name)
            group, path[start:] = tuple(sorted(path[start:])), []
            if len(group) > 1:
                found.add(group)

    for name in edges:
        if name not in order:
            visit(name)
    return found


def test_every_module_stands_in_a_room_of_the_table() -> None:
    known = [name for rooms in RANKS for name in rooms]
    assert len(known) == len(set(known))
    assert {room(name) for name in sources()} - {None} <= set(known)


def test_imports_point_down() -> None:
    wrong = {
        (name, other)
        for name, others in graph().items()
        for other in others
        if room(name) != room(other) and room(other) is not None and rank(name) >= rank(other)
    }
    assert wrong - set(WRONG_WAY_TO_BE_MENDED) == set()


def test_no_modules_import_each_other() -> None:
    assert circles(graph()) - set(CIRCLES_TO_BE_MENDED) == set()


@pytest.mark.parametrize(
    "line",
    [
        "from phimlx import api",
        "import phimlx.api",
        "from phimlx.api import load",
        "def f():\n    from phimlx.api import load",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from phimlx.api import Phi",
    ],
)
def test_no_import_is_overlooked(line: str) -> None:
    assert list(imported("phimlx.errors", ast.parse(line))) == ["phimlx.api"]


def test_a_circle_of_several_modules_is_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set()}
    assert circles(edges) == {("a", "b", "c")}


def touches_streams(tree: ast.AST) -> Iterator[int]:
    """Lines that print, ask, draw, or name stdout or stderr of the process."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="print" | "input" | "breakpoint")):
                yield node.lineno
            case ast.Attribute(
                value=ast.Name(id="sys"), attr="stdout" | "stderr" | "__stdout__" | "__stderr__"
            ):
                yield node.lineno
            case ast.Attribute(
                value=ast.Name(id="click"),
                attr="echo" | "secho" | "echo_via_pager" | "confirm" | "prompt" | "progressbar",
            ):
                yield node.lineno
            case ast.Call(func=ast.Attribute(attr="write"), args=[ast.Constant(value=1 | 2), *_]):
                yield node.lineno
            case ast.Attribute(attr="redirect_stdout" | "redirect_stderr" | "print_exc"):
                yield node.lineno
            case ast.Import(names=names):
                if {name.name.partition(".")[0] for name in names} & DRAWERS:
                    yield node.lineno
            case ast.ImportFrom(module=str(module), names=names):
                package = module.partition(".")[0]
                if package in DRAWERS or {name.name for name in names} & WRITERS.get(
                    package, set()
                ):
                    yield node.lineno
            case _:
                pass


def drawn_on(tree: ast.AST) -> Iterator[int]:
    """Lines that go around the gate, or write to a stream themselves."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module="phimlx.terminal.sink", names=names):
                if "drawing" in {name.name for name in names}:
                    yield node.lineno
            case ast.Attribute(attr="drawn" | "__stdout__" | "__stderr__"):
                yield node.lineno
            case _:
                pass


def test_the_terminal_room_alone_prints() -> None:
    outside = {name: tree for name, tree in sources().items() if room(name) not in PRINTERS}
    assert [name for name, tree in outside.items() if any(touches_streams(tree))] == []


def test_few_modules_draw_beside_the_gate() -> None:
    assert {name for name, tree in sources().items() if any(drawn_on(tree))} == BESIDE_THE_GATE


@pytest.mark.parametrize(
    "line",
    [
        "print(1)",
        "input('?')",
        "import sys\nsys.stderr.write('x')",
        "from sys import stdout",
        "import click\nclick.echo('x')",
        "from click import confirm",
        "def f():\n    from tqdm import tqdm",
        "import rich.console",
        "from prompt_toolkit import prompt",
        "import os\nos.write(1, b'x')",
        "import traceback\ntraceback.print_exc()",
        "with contextlib.redirect_stdout(None): pass",
    ],
)
def test_no_print_is_overlooked(line: str) -> None:
    assert list(touches_streams(ast.parse(line)))


def python(*arguments: str, cwd: Path = HOME) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds our modules, started in folder `cwd`."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(HOME)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def loaded_by(*arguments: str) -> set[str]:
    """The modules that a fresh interpreter has imported when it ends well."""
    done = python("-X", "importtime", *arguments)
    assert done.returncode == 0
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_importing_phimlx_loads_phimlx_alone() -> None:
    bare, ours = loaded_by("-c", ""), loaded_by("-c", "import phimlx")
    assert {name for name in ours - bare if name.partition(".")[0] == "phimlx"} == {"phimlx"}
    assert not {name.partition(".")[0] for name in ours - bare} & {*HEAVY, "click", "convert"}


@pytest.mark.parametrize("command", ["", "generate", "chat", "transcribe"])
def test_help_loads_click_and_nothing_heavy(command: str) -> None:
    arguments = ("-m", "phimlx", *command.split(), "--help")
    packages = {name.partition(".")[0] for name in loaded_by(*arguments)}
    assert "click" in packages
    assert not packages & HEAVY


def test_help_of_everything_loads_no_command() -> None:
    loaded = loaded_by("-m", "phimlx", "--help")
    modules = {name for name in loaded if name.startswith("phimlx.")}
    assert {name for name in modules if name.startswith("phimlx.cli.")} == {
        "phimlx.cli.group",
        "phimlx.cli.main",
        "phimlx.cli.options",
        "phimlx.cli.preferences",
        "phimlx.cli.together",
    }
