"""Transcripts in the formats that players and programs read."""

from __future__ import annotations

import json

import pytest

from phimlx.media.cues import Cue
from phimlx.media.subtitles import FORMATS

CUES = [
    Cue(5.5, 12.3456, "Ask not what your country\ncan do for you."),
    Cue(12.3456, 13.0, "  "),
    Cue(359_999.9996, 360_000.5, 'R&D <i>"1 --> 2"</i>\n\n \nÄ 中'),
]


def test_txt() -> None:
    assert FORMATS["txt"].write(CUES) == (
        'Ask not what your country can do for you.\nR&D <i>"1 --> 2"</i> Ä 中\n'
    )


def test_srt() -> None:
    assert FORMATS["srt"].write(CUES) == (
        "1\n"
        "00:00:05,500 --> 00:00:12,346\n"
        "Ask not what your country can do for you.\n"
        "\n"
        "2\n"
        "100:00:00,000 --> 100:00:00,500\n"
        'R&D <i>"1 → 2"</i> Ä 中\n'
        "\n"
    )


def test_vtt() -> None:
    assert FORMATS["vtt"].write(CUES) == (
        "WEBVTT\n"
        "\n"
        "00:00:05.500 --> 00:00:12.346\n"
        "Ask not what your country can do for you.\n"
        "\n"
        "100:00:00.000 --> 100:00:00.500\n"
        'R&amp;D &lt;i&gt;"1 --&gt; 2"&lt;/i&gt; Ä 中\n'
    )


def test_json() -> None:
    text = FORMATS["json"].write(CUES)
    assert json.loads(text) == {
        "segments": [
            {"start": 5.5, "end": 12.346, "text": "Ask not what your country\ncan do for you."},
            {"start": 360000.0, "end": 360000.5, "text": 'R&D <i>"1 --> 2"</i>\n\n \nÄ 中'},
        ]
    }
    assert "中" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [("txt", ""), ("srt", ""), ("vtt", "WEBVTT\n"), ("json", '{"segments": [\n]}\n')],
)
def test_nothing_said(name: str, expected: str) -> None:
    assert FORMATS[name].write([]) == expected
    assert FORMATS[name].write([Cue(0.0, 1.0, "")]) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_streamed_pieces_are_the_whole(name: str) -> None:
    kind = FORMATS[name]
    parts = [part for cue in CUES for part in kind.split(cue)]
    streamed = kind.head + "".join(map(kind.cue, (1, 2), parts)) + kind.tail
    assert len(parts) == 2
    assert streamed == kind.write(CUES)
