"""The gate in place of stdout and stderr, and what becomes of streams that are closed or full."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import phimlx
from phimlx.terminal import sink
from phimlx.terminal.output import encode_json
from phimlx.terminal.sink import drawing, indented, one_line

HOME = Path(__file__).parents[2]

# What no terminal is to get; written down again here, not taken from the gate.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Pipe:
    """A stream on a pipe behind the gate."""

    def __init__(self, encoding: str = "utf-8") -> None:
        self._read, self._write = os.pipe()
        plain = open(self._write, "w", encoding=encoding, closefd=False)  # noqa: SIM115
        self.stream = sink._guarded(plain, self._write, "stdout")

    def written(self) -> bytes:
        self.stream.flush()
        os.close(self._write)
        with open(self._read, "rb") as file:
            return file.read()


@given(st.lists(st.text(st.characters())))
def test_whoever_prints_prints_nothing_that_a_terminal_obeys(texts: list[str]) -> None:
    pipe = Pipe()
    for text in texts:
        print(f"<{text}>", file=pipe.stream)
    assert not CONTROL.search(pipe.written().decode())


def test_what_is_drawn_beside_the_gate_keeps_its_place() -> None:
    pipe = Pipe()
    pipe.stream.write("a\x1b[2J")
    drawing(pipe.stream).write("\x1b[1mb\x1b[0m")
    pipe.stream.writelines(["c\x9b", "d\n"])
    assert pipe.written() == b"a[2J\x1b[1mb\x1b[0mcd\n"


def test_bars_of_other_libraries_still_draw() -> None:
    pipe = Pipe()
    for text in ("\r 5%\r|\x1b[2J", "\n\x1b[A", "\x1b[A\x1b[A", "\x1b[A.", "\n\x1b[2A"):
        pipe.stream.write(text)
    assert pipe.written() == b"\r 5%|[2J\n\x1b[A\x1b[A\x1b[A[A.\n[2A"


@pytest.mark.parametrize(
    ("encoding", "written"),
    [("ascii", "─é\x9b".encode()[:-2]), ("latin-1", b"?\xe9"), ("utf-8", "─é".encode())],
)
def test_no_encoding_fails_or_lets_through(encoding: str, written: bytes) -> None:
    pipe = Pipe(encoding)
    pipe.stream.write("─é\x9b")
    assert pipe.written() == written


def test_drawing_on_a_stream_without_gate() -> None:
    plain = io.StringIO()
    assert drawing(plain) is plain


def test_names_on_one_line_and_messages_of_several() -> None:
    assert one_line("a\x1b[2J\nError: b\t c") == "a[2J Error: b c"
    assert indented("a\nError: b\n") == "a\n  Error: b"


@given(st.recursive(st.floats() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)))
def test_json_is_json_whatever_the_numbers(value: object) -> None:
    def no_constant(name: str) -> object:
        raise AssertionError(name)

    json.loads(encode_json(value), parse_constant=no_constant)


def test_numbers_that_are_not_finite_become_null() -> None:
    assert encode_json({"NaN": [float("nan"), float("-inf"), 1.5]}) == (
        '{"NaN": [null, null, 1.5]}'
    )


def run(redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`phimlx ARGUMENT...` with redirections as a shell has them."""
    line = f'exec "$@" {redirection}'
    command = ["sh", "-c", line, "sh", sys.executable, "-m", "phimlx", *arguments]
    return subprocess.run(command, cwd=HOME, capture_output=True, text=True, timeout=120)


FULL = "Error: stdout cannot be written: No space left on device.\n"
CLOSED = "Error: stdout cannot be written: Bad file descriptor.\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
@pytest.mark.parametrize("arguments", [("--version",), ("list",), ("list", "--json"), ("--help",)])
def test_a_full_stdout_ends_with_one_sentence(arguments: tuple[str, ...]) -> None:
    done = run("> /dev/full", *arguments)
    assert (done.returncode, done.stderr) == (1, FULL)


@pytest.mark.parametrize(
    ("redirection", "code", "out", "err"),
    [
        (">&-", 1, "", CLOSED),
        ("<&-", 0, f"phimlx {phimlx.__version__}\n", ""),
        ("2>&-", 0, f"phimlx {phimlx.__version__}\n", ""),
        (">&- 2>&- <&-", 1, "", ""),
    ],
)
def test_streams_that_are_closed(redirection: str, code: int, out: str, err: str) -> None:
    done = run(redirection, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_a_closed_stdout_is_no_matter_where_nothing_goes_to_it() -> None:
    done = run(">&-", "remove", "nano", "--yes")
    assert (done.returncode, done.stderr) == (
        1,
        "Error: nano comes with phimlx and goes with it.\n",
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_a_full_stderr_is_no_matter() -> None:
    done = run("2> /dev/full", "remove", "nano", "--yes")
    assert (done.returncode, done.stdout) == (1, "")
