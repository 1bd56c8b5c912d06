"""SURFACES.md: every test that it names is there, and every path that is served has a line."""

from __future__ import annotations

import re
from pathlib import Path

from phimlx.server.app import DIALECTS
from phimlx.server.ollama_models import REFUSED

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLE = HERE.joinpath("SURFACES.md").read_text()
NAMES = set(re.findall(r"`((?:\w+/)*\w+:\w+)`", TABLE))
PROGRAMS = set(re.findall(r"`clients/(\w+)`", TABLE))


def _functions(name: str) -> set[str]:
    """The functions of a file of tests, by its name in the table."""
    room, _, module = name.rpartition("/")
    file = HERE.parent / (room or "server") / f"test_{module}.py"
    assert file.is_file(), name
    return set(re.findall(r"^ *def test_(\w+)\(", file.read_text(), re.MULTILINE))


def test_every_test_is_there() -> None:
    assert len(NAMES) > 80
    gone = {name for name in NAMES if name.split(":")[1] not in _functions(name.split(":")[0])}
    assert not gone


def test_every_program_is_there() -> None:
    there = {file.stem for file in (ROOT / "scripts" / "clients").iterdir()}
    assert there >= PROGRAMS
    assert len(PROGRAMS) > 4


def test_every_path_has_a_line() -> None:
    served = {route.path for routes, _ in DIALECTS.values() for route in routes}
    refused = {
        route.path
        for routes, _ in DIALECTS.values()
        for route in routes
        if route.path in REFUSED or route.endpoint.__name__ == "refuse"
    }
    paths = {re.sub(r"/\{.*", "", path) for path in served - refused}
    named = {path.removesuffix("…") for path in re.findall(r"`(/[^`]*)`", TABLE)}
    lost = {path for path in paths if path not in named and not path.startswith("/ui/")}
    assert not lost
