"""Ctrl-C ends a reply at a whole token, or at once where there is none yet."""

from __future__ import annotations

import signal
from typing import cast

import pytest

from phimlx.generation.stream import Stream
from phimlx.terminal.interrupt import Interruptible
from tests.terminal.fake_phi import INTERRUPT, FakeStream, Script


def answer(*pieces: str) -> tuple[Interruptible, FakeStream]:
    stream = FakeStream(Script(pieces), prompt_tokens=1)
    return Interruptible(cast(Stream, stream)), stream


def test_without_an_interrupt_all_comes() -> None:
    interruptible, stream = answer("a", "b")
    assert [piece.text for piece in interruptible] == ["a", "b"]
    assert not interruptible.interrupted
    assert stream.reply.finish_reason == "stop"


def test_an_interrupt_waits_for_the_token() -> None:
    interruptible, stream = answer("a", INTERRUPT, INTERRUPT, "b", "c")
    assert [piece.text for piece in interruptible] == ["a", "b"]
    assert interruptible.interrupted
    assert not interruptible.cut
    assert stream.closed
    assert (stream.reply.text, stream.reply.finish_reason) == ("ab", "cancelled")


def test_before_the_first_token_it_cuts_in() -> None:
    interruptible, stream = answer(INTERRUPT, "a")
    assert list(interruptible) == []
    assert interruptible.interrupted
    assert interruptible.cut
    assert stream.closed


@pytest.mark.parametrize("pieces", [("a",), ("a", INTERRUPT, "b"), (INTERRUPT, "a")])
def test_the_handler_is_put_back(pieces: tuple[str, ...]) -> None:
    before = signal.getsignal(signal.SIGINT)
    list(answer(*pieces)[0])
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interruptible, _ = answer("a", INTERRUPT, "b")
        assert [piece.text for piece in interruptible] == ["a", "b"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_reader_that_fails_closes_the_stream() -> None:
    before = signal.getsignal(signal.SIGINT)
    interruptible, stream = answer("a", "b")
    pieces = iter(interruptible)
    next(pieces)
    del pieces
    assert stream.closed
    assert signal.getsignal(signal.SIGINT) is before
