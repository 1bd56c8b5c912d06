"""Stop strings: the same text comes out however it is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phimlx.errors import GenerationError
from phimlx.generation.stop import StopStrings


def run(stops: list[str], chunks: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    text = "".join(matcher.feed(chunk) for chunk in chunks)
    return text + matcher.finish(), matcher.stopped


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_any_cutting_gives_the_text_before_the_first_stop(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    chunks = [text[a:b] for a, b in pairwise(edges)]
    starts = [text.find(stop) for stop in stops if stop in text]
    # Matching as the text comes may see a short stop before a longer one that began earlier.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    got, stopped = run(stops, chunks)
    assert stopped == bool(starts)
    if not starts:
        assert got == text
    else:
        assert text.startswith(got)
        assert min(starts) <= len(got) <= min(ends)
        assert run(stops, list(text))[1]


def test_nothing_is_held_back_without_need() -> None:
    matcher = StopStrings(["END"])
    assert matcher.feed("abc") == "abc"
    assert matcher.feed(" E") == " "
    assert matcher.feed("N") == ""
    assert matcher.feed("x") == "ENx"
    assert matcher.feed("EN") == ""
    assert matcher.feed("D and more") == ""
    assert matcher.stopped
    assert matcher.feed("more") == ""


@pytest.mark.parametrize("stop", ["", 5])
def test_a_stop_must_be_text(stop: object) -> None:
    with pytest.raises(GenerationError) as error:
        StopStrings([stop])  # type: ignore[list-item]
    assert str(error.value) == f"stop is {stop!r}; it must be a text of at least one letter."


@pytest.mark.parametrize(
    ("stops", "chunks", "found"),
    [
        (["c", "ab"], ["xa", "bc"], "ab"),
        (["ab", "abc"], ["abc"], "ab"),
        (["ab"], ["a"], None),
    ],
)
def test_the_stop_that_ended_the_reply_is_known(
    stops: list[str], chunks: list[str], found: str | None
) -> None:
    matcher = StopStrings(stops)
    for chunk in chunks:
        matcher.feed(chunk)
    assert matcher.found == found
