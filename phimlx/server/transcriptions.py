"""OpenAI's transcriptions and translations: a recording of any length, in a form.

Its pieces are heard by one model several at a time, and told in their order. Source: the OpenAPI
description of OpenAI's API.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ConfigDict, Field
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from phimlx.generation.reply import Stats
from phimlx.media.cues import Cue
from phimlx.media.segments import Segment, split_audio
from phimlx.media.subtitles import FORMATS
from phimlx.prompt.media_parts import no_media
from phimlx.server.errors import bad_request, explain
from phimlx.server.http import Body, Streamed, event, validate
from phimlx.server.models import Loaded
from phimlx.server.openai import error_object
from phimlx.server.service import Answer, Ask, Service
from phimlx.transcription import (
    SEGMENT_SECONDS,
    TranscriptSegment,
    cut_loop,
    listening,
    question,
    understood,
)

AHEAD = 4  # pieces that are heard together
MAX_FIELDS = 32
MEDIA_TYPES = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}
WRITERS = {"text": "txt", "srt": "srt", "vtt": "vtt"}


class TranscriptionForm(Body):
    """The fields of the form beside the recording."""

    model_config = ConfigDict(extra="forbid", strict=False, frozen=True)

    model: str
    language: str | None = None
    prompt: str | None = None
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: float = Field(0.0, ge=0, le=1)
    timestamp_granularities: list[Literal["segment", "word"]] = Field(default_factory=list)
    include: list[str] = Field(default_factory=list)
    chunking_strategy: str | None = None
    stream: bool = False

    def check(self) -> None:
        """Raise RequestError for what no model here can do."""
        refusals = {
            "prompt": (self.prompt, "These models take no words that guide a transcript."),
            "timestamp_granularities": (
                "word" in self.timestamp_granularities,
                "There are times of segments, not of words.",
            ),
            "include": (self.include, "Log-probabilities of a transcript are not told."),
        }
        for name, (given, why) in refusals.items():
            if given:
                raise bad_request(why, name)


@dataclass(frozen=True)
class Heard:
    """A piece of the recording, and what hearing it took."""

    segment: TranscriptSegment
    stats: Stats


class Transcript:
    """One recording on its way to text.

    Attributes:
        heard: what has been understood so far.
        seconds: the recording's length, where it says it.
    """

    def __init__(
        self, service: Service, loaded: Loaded, data: bytes, form: TranscriptionForm, asked: str
    ) -> None:
        self.heard: list[Heard] = []
        self.seconds: float | None = None
        self._service = service
        self._loaded = loaded
        self._form = form
        self._asked = asked
        limits = replace(service.limits, max_seconds=math.inf)
        self._segments = split_audio(data, limits, SEGMENT_SECONDS, self._note_length)

    @property
    def text(self) -> str:
        return " ".join(each.segment.text for each in self.heard if each.segment.text)

    @property
    def duration(self) -> float:
        ends = [each.segment.end for each in self.heard]
        return self.seconds if self.seconds is not None else max(ends, default=0.0)

    async def listen(self) -> AsyncIterator[TranscriptSegment]:
        """Hand over segments as they are understood, in their order.

        Raises:
            RequestError, MediaError: where the recording, or a part of it, cannot be read.
        """
        words = len(self._loaded.phi.encode(self._asked))
        pending: deque[tuple[Segment, Answer]] = deque()
        async with AsyncExitStack() as begun:
            while True:
                while len(pending) < AHEAD:
                    segment = await self._service.run(lambda: next(self._segments, None))
                    if segment is None:
                        break
                    answer = await begun.enter_async_context(self._begin(segment, words))
                    pending.append((segment, answer))
                if not pending:
                    return
                heard = await self._hear(*pending.popleft())
                self.heard.append(heard)
                yield heard.segment

    def _begin(self, segment: Segment, words: int) -> Any:
        options = listening(self._loaded.phi, segment, words)
        options["temperature"] = self._form.temperature
        return self._service.begin(self._loaded, Ask(self._form.model, self._asked, options))

    async def _hear(self, segment: Segment, answer: Answer) -> Heard:
        request = answer.requests[0]
        async with aclosing(answer.chunks()) as chunks:  # type: ignore[type-var]
            async for _ in chunks:
                cut = cut_loop(self._loaded.phi, segment, request.reply)
                if cut is not None:
                    answer.cancel()
                    return Heard(cut, request.reply.stats)
        return Heard(understood(segment, request.reply), request.reply.stats)

    def _note_length(self, seconds: float | None) -> None:
        self.seconds = seconds


def _endpoint(translates: bool) -> Callable[[Request], Any]:
    async def transcribe(request: Request) -> Response:
        """`POST /v1/audio/transcriptions` and `/v1/audio/translations`."""
        service: Service = request.app.service
        form, data = await _read_form(request)
        async with AsyncExitStack() as stack:
            loaded = await stack.enter_async_context(service.hold(form.model))
            if not loaded.phi.hears:
                raise no_media(loaded.phi.name, loaded.phi.takes_media)
            asked = question(translate_to="English" if translates else None)
            transcript = Transcript(service, loaded, data, form, asked)
            if form.stream:
                return Streamed(_stream(transcript), stack.pop_all())
            async for _ in transcript.listen():
                pass
            return _whole(transcript, form, "translate" if translates else "transcribe")

    return transcribe


async def _read_form(request: Request) -> tuple[TranscriptionForm, bytes]:
    """Read the fields and the recording.

    Raises:
        RequestError: where something is missing or wrong.
    """
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):  # of others any number of fields is read
        raise bad_request(
            "file is missing: the recording, in a form (multipart/form-data).", "file"
        )
    async with request.form(max_files=1, max_fields=MAX_FIELDS) as form:
        fields = _fields(form)
        read = validate(TranscriptionForm, fields)
        read.check()
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            raise bad_request("file is missing: the recording.", "file")
        return read, await upload.read()


def _fields(form: FormData) -> dict[str, Any]:
    """Make an object of a form, names that end in [] as lists, without the recording."""
    found: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name == "file":
            continue
        if name.endswith("[]"):
            name = name.removesuffix("[]")
            found[name] = [*(found[name] if isinstance(found.get(name), list) else ()), value]
        elif value != "":
            found[name] = value
    return found


def _whole(transcript: Transcript, form: TranscriptionForm, task: str) -> Response:
    kind = form.response_format
    if kind in WRITERS:
        cues: list[Cue] = [each.segment for each in transcript.heard]
        text = FORMATS[WRITERS[kind]].write(cues)
        return PlainTextResponse(text, media_type=MEDIA_TYPES[kind])
    if kind == "json":
        return JSONResponse({"text": transcript.text, "usage": _usage(transcript)})
    return JSONResponse(
        {
            "task": task,
            "language": form.language,
            "duration": round(transcript.duration, 3),
            "text": transcript.text,
            "segments": [
                {
                    "id": number,
                    "start": round(each.segment.start, 3),
                    "end": round(each.segment.end, 3),
                    "text": each.segment.text,
                    "temperature": form.temperature,
                }
                for number, each in enumerate(transcript.heard)
            ],
            "usage": {"type": "duration", "seconds": math.ceil(transcript.duration)},
        }
    )


async def _stream(transcript: Transcript) -> AsyncIterator[bytes]:
    try:
        gap = ""
        async for segment in transcript.listen():
            if segment.text:
                delta = {"type": "transcript.text.delta", "delta": gap + segment.text}
                yield event(delta, "transcript.text.delta")
                gap = " "
        done = {"text": transcript.text, "usage": _usage(transcript)}
        yield event({"type": "transcript.text.done", **done}, "transcript.text.done")
    except Exception as error:
        yield event(error_object(explain(error)), "error")


def _usage(transcript: Transcript) -> dict[str, Any]:
    stats = [each.stats for each in transcript.heard]
    inputs = sum(each.prompt_tokens for each in stats)
    outputs = sum(each.generated_tokens for each in stats)
    return {
        "type": "tokens",
        "input_tokens": inputs,
        "output_tokens": outputs,
        "total_tokens": inputs + outputs,
    }


ROUTES = (
    Route("/v1/audio/transcriptions", _endpoint(translates=False), methods=["POST"]),
    Route("/v1/audio/translations", _endpoint(translates=True), methods=["POST"]),
)
