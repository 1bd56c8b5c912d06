"""Cues that people can read: two lines, seven seconds, no pause in the middle, all of the words."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phimlx.media.cues import COLUMNS, LONGEST, PAUSE, SHORTEST, Cue, columns, readable
from phimlx.media.segments import Segment, split_audio
from tests.media.sounds import noise

WORDS = st.lists(
    st.one_of(
        st.text(st.characters(min_codepoint=33, max_codepoint=0x24F), min_size=1, max_size=12),
        st.text("吾輩は猫である。ニャー、「」", min_size=1, max_size=40),
        st.sampled_from(
            ["said.", "so,", "한국어", "สวัสดีครับ", "e\u0301" * 60, "x" * 100, "👩\u200d🚀" * 30]
        ),
    ),
    max_size=60,
)


@st.composite
def stretches(draw: st.DrawFn) -> Cue:
    """A text said somehow in half a minute, with pauses of all lengths in it."""
    lengths = draw(st.lists(st.floats(0.1, 6.0), min_size=2, max_size=12))
    times = [round(draw(st.floats(0.0, 100.0)) + time, 3) for time in accumulate(lengths)]
    times.sort()
    spans = tuple(span for span in zip(times[::2], times[1::2], strict=False) if span[0] < span[1])
    return Cue(times[0], times[-1] + 0.5, " ".join(draw(WORDS)), spoken=spans)


@settings(max_examples=80, deadline=None)
@given(stretches())
def test_every_cue_can_be_read(cue: Cue) -> None:
    cues = readable(cue)
    assert "".join("".join(each.text.split()) for each in cues) == "".join(cue.text.split())
    for each in cues:
        lines = each.text.split("\n")
        assert 1 <= len(lines) <= 2
        assert all(0 < columns(line) <= COLUMNS for line in lines) or not columns(cue.text)
        assert cue.start <= each.start <= each.end <= cue.end + 1e-3
        assert each.end - each.start <= LONGEST + 1e-3
    for before, after in pairwise(cues):
        assert before.end <= after.start + 1e-3
        assert before.start <= after.start
    for (_, quiet), (loud, _) in pairwise(cue.spoken):
        if loud - quiet >= PAUSE:
            assert not [each for each in cues if each.start < quiet and each.end > loud + 1e-3]


def texts(cues: list[Cue]) -> list[str]:
    return [cue.text for cue in cues]


def test_pauses_part_what_is_said_where_it_was_said() -> None:
    """JFK's inauguration, its pauses as they are in the recording; two of three within a clause."""
    spoken = ((0.32, 2.13), (3.28, 3.71), (3.98, 4.31), (5.41, 7.69), (8.19, 11.0))
    said = (
        "And so, my fellow Americans, ask not what your country can do for you, "
        "ask what you can do for your country."
    )
    assert readable(Cue(0.0, 11.0, said, spoken=spoken)) == [
        Cue(0.32, 2.13, "And so, my fellow Americans,"),
        Cue(3.28, 4.31, "ask not"),
        Cue(5.41, 7.69, "what your country can do for you,"),
        Cue(8.19, 11.0, "ask what you can do for your country."),
    ]


def test_sentences_and_clauses_end_cues_and_lines() -> None:
    said = (
        "The first sentence is here. The second one, which is a good deal longer than the first, "
        "ends somewhat later than that."
    )
    cues = readable(Cue(0.0, 12.0, said))
    assert texts(cues) == [
        "The first sentence is here.",
        "The second one, which is a good\ndeal longer than the first,",
        "ends somewhat later than that.",
    ]


def test_scripts_without_blanks_break_where_they_may() -> None:
    said = (
        "吾輩は猫である。名前はまだ無い。どこで生れたかとんと「見当」がつかぬ。"
        "何でも薄暗いじめじめした所で泣いていた。"
    )
    cues = readable(Cue(0.0, 16.0, said))
    assert "".join(texts(cues)).replace("\n", "") == said
    lines = [line for cue in cues for line in cue.text.split("\n")]
    assert max(map(len, lines)) <= 21
    assert not [line for line in lines if line[0] in "。、」" or line[-1] == "「"]
    assert all(cue.text[-1] == "。" for cue in cues[:2])


def test_korean_breaks_at_blanks() -> None:
    said = (
        "한국어는 띄어쓰기를 하는 언어이므로 낱말 사이에서 줄을 바꾸어야 읽기에 좋습니다 그렇지요"
    )
    lines = [line for cue in readable(Cue(0.0, 9.0, said)) for line in cue.text.split("\n")]
    assert " ".join(lines) == said
    assert max(map(columns, lines)) <= COLUMNS


def test_a_short_cue_stays_until_it_is_read_or_the_next_one_comes() -> None:
    cues = readable(Cue(0.0, 6.0, "Yes. No.", spoken=((1.0, 1.3), (2.6, 2.8))))
    assert cues == [Cue(1.0, 2.0, "Yes."), Cue(2.6, 3.6, "No.")]
    (cue,) = readable(Cue(0.0, 1.3, "Yes.", spoken=((1.0, 1.3),), quiet_until=9.0))
    assert cue == Cue(1.0, 2.0, "Yes.")
    cues = readable(Cue(0.0, 6.0, "Yes. No.", spoken=((1.0, 1.3), (1.8, 2.5))))
    assert cues[0].end <= cues[1].start
    assert cues[1].end - cues[1].start >= SHORTEST - 1e-3


def test_nothing_said_and_nobody_known_to_speak() -> None:
    assert readable(Cue(0.0, 5.0, " \n ")) == []
    assert readable(Cue(5.0, 5.0, "At once.")) == [Cue(5.0, 5.0, "At once.")]
    assert texts(readable(Cue(0.0, 60.0, "Ah"))) == ["Ah"]


def test_where_somebody_speaks_is_found_in_the_sound() -> None:
    rate = 16_000
    quiet = noise(1.0, rate, loud=1e-4)
    samples = np.concatenate((quiet, noise(2.0, rate), quiet, noise(1.5, rate), quiet[: rate // 4]))
    (segment,) = split_audio((samples, rate))
    assert segment.spoken == ((1.0, 3.0), (4.0, 5.5))
    assert Segment(2.0, 3.0, np.zeros(rate, np.float32), rate).spoken == ()


def test_a_piece_knows_how_long_it_is_quiet_behind_it() -> None:
    rate = 16_000
    samples = np.concatenate((noise(3.0), np.zeros(4 * rate, np.float32), noise(3.0)))
    first, second = split_audio((samples, rate), segment_seconds=6)
    assert first.end == 3.25
    assert first.quiet_until == pytest.approx(4.5, abs=0.6)
    assert second.start >= (first.quiet_until or 0)
