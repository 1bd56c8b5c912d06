"""Every command of click's tree: one object with --json, and one sentence for each fault."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

import pytest

from tests.cli.lines import CLOSED, FAULTS, LINES, USER, Place, leaves
from tests.hostile.sample import sample
from tests.locked_out import open_folder


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with open_folder() as home:
        yield Place(home)


def test_every_command_has_a_line() -> None:
    assert LINES.keys() == leaves().keys()


@pytest.mark.parametrize("name", LINES)
def test_the_result_is_one_object(name: str, place: Place) -> None:
    ran = place.run(f"{LINES[name]} --json")
    assert ran.code == 0, ran
    assert isinstance(json.loads(ran.out), dict)
    assert "Traceback" not in ran.err


def a_pipe_without_a_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


STREAMS = {
    "closed": (lambda: CLOSED, "stdout cannot be written: Bad file descriptor."),
    "full": (
        lambda: os.open("/dev/full", os.O_WRONLY),
        "stdout cannot be written: No space left on device.",
    ),
    "unread": (a_pipe_without_a_reader, None),
}


@pytest.mark.parametrize(
    ("name", "how", "form"),
    sample([(name, how, form) for name in LINES for how in STREAMS for form in ("", " --json")],
           14, "streams"),
)  # fmt: skip
def test_stdout_that_cannot_be_written(name: str, how: str, form: str, place: Place) -> None:
    if how == "full" and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    opened, message = STREAMS[how]
    stdout = opened()
    try:
        ran = place.run(LINES[name] + form, stdout)
    finally:
        if stdout != CLOSED:
            os.close(stdout)
    assert ran.code == 1
    said = [line for line in ran.err.splitlines() if line.startswith(("Error", "Trace"))]
    assert said == ([] if message is None else [f"Error: {message}"])


@pytest.mark.parametrize("name", sample(list(LINES), 6, "ascii"))
def test_a_locale_that_knows_ascii_alone(name: str, place: Place) -> None:
    usual, narrow = place.run(LINES[name]), place.run(LINES[name], encoding="ascii")
    assert (narrow.code, usual.code) == (0, 0)
    assert without_times(narrow.out) == without_times(usual.out)


def without_times(text: str) -> str:
    """A text without numbers and what aligns them."""
    return re.sub(r"[\d.,: ─]+", "", text)


CASES = [(name, folder, how) for name in LINES for folder in USER for how in FAULTS]


@pytest.mark.parametrize(("name", "folder", "how"), sample(CASES, 24, "folders"))
def test_a_folder_that_cannot_be_used(name: str, folder: str, how: str, place: Place) -> None:
    ran = place.run(f"{LINES[name]} --json", fault=FAULTS[how](place.home, place.home / folder))
    assert "Traceback" not in ran.err
    assert "unexpected" not in ran.err
    told = json.loads(ran.out)
    assert ran.code == (1 if "error" in told else 0)
    if name not in ("doctor", "transcribe"):  # whose findings are its result
        assert ran.err.count("Error: ") == ran.code
