"""Speech to text: what is asked, what a piece may cost, and what becomes of loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phimlx
from phimlx.errors import MediaError, PhimlxError, PromptError
from phimlx.media.segments import split_audio
from phimlx.transcription import looping, question
from tests.media.sounds import noise, sound_file
from tests.multimodal import multimodal_folder


@pytest.fixture(scope="module")
def phi(data: Path, tmp_path_factory: pytest.TempPathFactory) -> phimlx.Phi:
    return phimlx.load(multimodal_folder(data, tmp_path_factory.mktemp("model")), dtype="float32")


@pytest.fixture
def asked(phi: phimlx.Phi, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each piece asked of the model."""
    calls: list[dict[str, Any]] = []
    stream = phimlx.Phi.stream

    def noting(self: phimlx.Phi, prompt: str, **options: Any) -> Any:
        calls.append({"prompt": prompt, **options})
        return stream(self, prompt, **options | {"max_tokens": min(options["max_tokens"], 3)})

    monkeypatch.setattr(phimlx.Phi, "stream", noting)
    return calls


def recording() -> np.ndarray[Any, Any]:
    """Three seconds of noise, a pause, and two more."""
    return np.concatenate((noise(3.0), np.zeros(8000, np.float32), noise(2.0)))


def test_a_recording_is_asked_about_piece_by_piece(
    phi: phimlx.Phi, asked: list[dict[str, Any]]
) -> None:
    source = (recording(), 16_000)
    pieces = list(phi.transcribe(source, segment_seconds=4))
    expected = list(split_audio(source, segment_seconds=4))
    assert [(p.start, p.end) for p in pieces] == [(s.start, s.end) for s in expected]
    assert len(pieces) == 2
    for call, segment in zip(asked, expected, strict=True):
        assert call["prompt"] == "Transcribe the audio clip into text."
        assert call["temperature"] == 0
        assert call["max_tokens"] == 32 + int(np.ceil(20 * (segment.end - segment.start)))
        assert np.array_equal(call["audio"].samples, segment.samples)
    alone = phi.generate(
        "Transcribe the audio clip into text.",
        audio=expected[1].clip,
        temperature=0,
        max_tokens=3,
    )
    assert (pieces[1].text, pieces[1].finish_reason) == (alone.text.strip(), "length")


def test_pieces_come_as_they_are_understood(phi: phimlx.Phi, asked: list[dict[str, Any]]) -> None:
    file = sound_file(np.tile(recording(), 4), 16_000)
    pieces = phi.transcribe(file, segment_seconds=4)
    next(pieces)
    assert len(asked) == 1
    next(pieces)
    assert len(asked) == 2


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "FLAC", "MP3"])
def test_a_recording_cut_short_is_asked_about_as_far_as_it_goes(
    kind: str, phi: phimlx.Phi, asked: list[dict[str, Any]]
) -> None:
    file = sound_file(recording(), 16_000, kind)
    pieces = phi.transcribe(file[: len(file) // 2])
    first = next(pieces)
    assert first.start == 0.0
    assert first.end == pytest.approx(2.7, abs=0.6)
    with pytest.raises(MediaError, match=r"^The data ends after [23]\.\d s of 5\.5 s\.$"):
        next(pieces)
    assert len(asked) == 1


def test_what_is_asked_can_be_changed(phi: phimlx.Phi, asked: list[dict[str, Any]]) -> None:
    source = (noise(1.0), 16_000)
    list(phi.transcribe(source, translate_to=" French "))
    list(phi.transcribe(source, prompt="Who speaks?"))
    assert [call["prompt"] for call in asked] == [
        "Translate the audio to French.",
        "Who speaks?",
    ]


def test_an_answer_has_no_more_room_than_there_is(
    phi: phimlx.Phi, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (noise(10.0), 16_000)
    words = len(phi.encode("Transcribe the audio clip into text."))
    monkeypatch.setattr(phi, "context_length", words + 125 + 20)
    list(phi.transcribe(source))
    assert asked[0]["max_tokens"] == 20
    assert len(phi.encode(asked[0]["prompt"], audio=source)) + 20 == phi.context_length


def test_silence_is_not_asked_about(phi: phimlx.Phi, asked: list[dict[str, Any]]) -> None:
    assert list(phi.transcribe((np.zeros(160_000, np.float32), 16_000))) == []
    assert asked == []


def test_an_answer_that_loops_is_cut(phi: phimlx.Phi) -> None:
    """Untrained weights say one byte for ever."""
    (piece,) = phi.transcribe((noise(5.0), 16_000))
    assert phi.tokenizer is not None
    reply = phi.generate(question(), audio=(noise(5.0), 16_000), temperature=0, max_tokens=132)
    assert len(set(reply.tokens[20:])) == 1
    assert piece.finish_reason == "loop"
    assert len(piece.text) < len(reply.text)
    assert reply.text.startswith(piece.text)


@pytest.mark.parametrize(
    ("tokens", "repeated"),
    [
        ([], 0),
        ([5] * 31, 0),
        ([5] * 32, 31),
        ([1, 2, 3] + [5] * 40, 39),
        ([1, 2, 3, 4] * 7, 0),
        ([1, 2, 3, 4] * 8, 28),
        ([9, 9] + [1, 2, 3, 4] * 8 + [1], 29),
        (list(range(48)) * 8, 48 * 7),
        (list(range(49)) * 9, 0),
        ([5] * 32 + [6], 0),
    ],
)
def test_what_counts_as_a_loop(tokens: list[int], repeated: int) -> None:
    assert looping(tokens) == repeated


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"prompt": "a", "translate_to": "French"},
            "A prompt and a language to translate to were given; one of them says what to do.",
        ),
        ({"prompt": " "}, "The prompt is empty."),
        ({"translate_to": ""}, "The language is empty."),
    ],
)
def test_what_cannot_be_asked(phi: phimlx.Phi, options: dict[str, str], error: str) -> None:
    with pytest.raises(PromptError) as raised:
        phi.transcribe((noise(1.0), 16_000), **options)
    assert str(raised.value) == error


def test_what_cannot_be_transcribed(phi: phimlx.Phi) -> None:
    refused: list[tuple[dict[str, Any], type[PhimlxError], str]] = [
        ({"source": "none.wav"}, MediaError, "There is no file none.wav."),
        (
            {"source": (noise(1.0), 16_000), "segment_seconds": 50},
            MediaError,
            "Pieces of 50 s cannot be transcribed.",
        ),
    ]
    for options, kind, error in refused:
        with pytest.raises(kind) as raised:
            list(phi.transcribe(**options))
        assert str(raised.value) == error
    with pytest.raises(PromptError) as deaf:
        phimlx.load("nano").transcribe((noise(1.0), 16_000))
    assert str(deaf.value) == "nano reads text alone: it takes no pictures or sounds."
