"""Transcriptions: what comes back is what `Phi.transcribe` understands."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import openai
import pytest
import soundfile  # type: ignore[import-untyped]

from phimlx.api import Phi, load
from phimlx.hub.resolve import NANO_MULTIMODAL
from phimlx.media.subtitles import FORMATS
from phimlx.transcription import TranscriptSegment
from tests.server.running import Running

PATH = "/v1/audio/transcriptions"
MODEL = "nano-multimodal"
CLIPS = sorted((NANO_MULTIMODAL / "clips").iterdir())


@pytest.fixture(scope="module")
def hearing() -> Phi:
    return load(MODEL)


@pytest.fixture(scope="module")
def recording() -> bytes:
    """Several clips with pauses between them, longer than what is heard at once."""
    parts, rate = [], 16_000
    for clip in CLIPS * 10:
        samples, rate = soundfile.read(clip, dtype="float32")
        parts += [samples, np.zeros(rate * 2, np.float32)]
        if sum(map(len, parts)) > 75 * rate:
            break
    file = io.BytesIO()
    soundfile.write(file, np.concatenate(parts), rate, format="WAV")
    return file.getvalue()


@pytest.fixture(scope="module")
def expected(hearing: Phi, recording: bytes) -> list[TranscriptSegment]:
    found = list(hearing.transcribe(recording))
    assert len(found) > 2
    return found


def joined(segments: list[TranscriptSegment]) -> str:
    return " ".join(segment.text for segment in segments if segment.text)


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def send(server: Running, data: bytes, **fields: Any) -> Any:
    files = {"file": ("speech.wav", data)}
    return server.client.post(PATH, data={"model": MODEL} | fields, files=files)


@pytest.mark.slow
def test_every_format_says_what_was_heard(
    client: openai.OpenAI, recording: bytes, expected: list[TranscriptSegment]
) -> None:
    file = ("speech.wav", recording)
    create = client.audio.transcriptions.create
    text = joined(expected)
    assert create(model=MODEL, file=file).text == text
    detailed = create(model=MODEL, file=file, response_format="verbose_json")
    assert detailed.text == text
    times = [(round(each.start, 3), round(each.end, 3), each.text) for each in expected]
    assert [(each.start, each.end, each.text) for each in detailed.segments or ()] == times
    for kind, writer in (("srt", "srt"), ("vtt", "vtt"), ("text", "txt")):
        found = create(model=MODEL, file=file, response_format=kind)  # type: ignore[call-overload]
        assert found == FORMATS[writer].write(list(expected))
    events = list(create(model=MODEL, file=file, stream=True))
    assert "".join(each.delta for each in events[:-1]) == events[-1].text == text


def test_a_translation_is_asked_for_in_english(client: openai.OpenAI, hearing: Phi) -> None:
    clip = CLIPS[0].read_bytes()
    found = client.audio.translations.create(model=MODEL, file=("a.wav", clip))
    assert found.text == joined(list(hearing.transcribe(clip, translate_to="English")))


@pytest.mark.parametrize(
    ("fields", "data", "param"),
    [
        ({"response_format": "docx"}, b"x", "response_format"),
        ({"temperature": "hot"}, b"x", "temperature"),
        ({"prompt": "Names: Ada"}, b"x", "prompt"),
        ({"timestamp_granularities[]": "word"}, b"x", "timestamp_granularities"),
        ({"nonsense": "1"}, b"x", "nonsense"),
        ({"language": "en", "language[]": "de"}, b"x", "language"),
        ({}, b"no sound at all", None),
        ({}, b"", None),
        ({"model": "nano"}, b"x", None),
    ],
)
def test_what_is_wrong_is_named(
    server: Running, fields: dict[str, str], data: bytes, param: str | None
) -> None:
    answer = send(server, data, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_form_without_a_recording(server: Running) -> None:
    answer = server.client.post(PATH, data={"model": MODEL})
    assert answer.status_code == 400
    assert "file is missing" in answer.json()["error"]["message"]
    assert server.client.post(PATH, content=b"{}").status_code == 400
    broken = server.client.post(
        PATH,
        content=b"--x\r\nnonsense",
        headers={"content-type": "multipart/form-data; boundary=x"},
    )
    assert broken.status_code == 400
