"""What comes through stdin, and what is said while nothing comes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from phimlx.cli import stdin
from phimlx.cli.stdin import WAITING, read_prompt


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The end at which another program would write."""
    reader, writer = os.pipe()
    with open(reader) as opened:
        monkeypatch.setattr("sys.stdin", opened)
        monkeypatch.setattr(stdin, "PATIENCE", 0.01)
        yield writer


def test_a_pipe_in_which_nothing_comes_is_told(pipe: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    said = threading.Event()

    class Told:
        def note(self, text: str) -> None:
            told.append(text)
            said.set()

    monkeypatch.setattr(stdin, "Output", Told)

    def write() -> None:
        said.wait(60)
        os.write(pipe, b"notes\n")
        os.close(pipe)

    writing = threading.Thread(target=write)
    writing.start()
    assert read_prompt(None, "Sum up.", raw=False) == "notes\n\nSum up."
    writing.join()
    assert told == [WAITING]


@pytest.mark.parametrize("data", [b"notes", b""])
def test_one_that_speaks_or_ends_is_not(
    data: bytes, pipe: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdin, "Output", None)
    os.write(pipe, data)
    os.close(pipe)
    assert read_prompt(None, "Hi", raw=False) == "\n\n".join([*filter(None, [data.decode()]), "Hi"])
