"""Speech of any length to text with times, segment by segment, each as soon as it is understood."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol

from phimlx.errors import PromptError
from phimlx.media.audio_file import AudioSource, AudioStream
from phimlx.media.cues import Cue
from phimlx.media.limits import Limits
from phimlx.media.log_mel import frame_count, token_count
from phimlx.media.segments import split_audio
from phimlx.media.speech import split_live
from phimlx.prompt.media_parts import no_media

if TYPE_CHECKING:
    from phimlx.generation.reply import Reply
    from phimlx.generation.stream import Stream
    from phimlx.media.segments import Segment
    from phimlx.prompt.tokenizer.tokenizer import Tokenizer

# What the model was trained on; source: the model card of microsoft/Phi-4-multimodal-instruct.
TRANSCRIBE = "Transcribe the audio clip into text."
TRANSLATE = "Translate the audio to {language}."

SEGMENT_SECONDS = 30.0
# Nobody says more in a second: the fastest speakers say seven words, and a word in a script that
# the vocabulary knows badly takes several tokens.
TOKENS_PER_SECOND = 20
SPARE_TOKENS = 32

# A phrase said so many times on end, over so many tokens, will be said for ever.
ROUNDS = 8
LOOP_TOKENS = 32
LONGEST_PHRASE = 48


@dataclass(frozen=True)
class TranscriptSegment(Cue):
    """Text of what was said from `start` to `end`, in seconds from the beginning.

    `finish_reason` is "stop"; "length" where the answer was cut for its length; "loop" where it
    was cut because it repeated itself, the repetitions left out.
    """

    finish_reason: str = "stop"


class SpeechModel(Protocol):
    """The part of `phimlx.Phi` that hears."""

    name: str
    context_length: int

    @property
    def takes_media(self) -> bool: ...
    @property
    def hears(self) -> bool: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    def encode(self, prompt: str) -> list[int]: ...
    def new_cache(self, kv_bits: int | None = None) -> Any: ...
    def stream(self, prompt: str, **options: Any) -> Stream: ...


def question(prompt: str | None = None, translate_to: str | None = None) -> str:
    """The question that the model is asked about each segment.

    Raises:
        PromptError: where both are given, or one is blank.
    """
    if prompt is not None and translate_to is not None:
        raise PromptError(
            "A prompt and a language to translate to were given; one of them says what to do.",
            hint='Name the language in the prompt: "Translate the audio to French."',
        )
    for name, text in (("prompt", prompt), ("language", translate_to)):
        if text is not None and not text.strip():
            raise PromptError(f"The {name} is empty.")
    if translate_to is not None:
        return TRANSLATE.format(language=translate_to.strip())
    return TRANSCRIBE if prompt is None else prompt


def transcribe(
    phi: SpeechModel,
    source: AudioSource | AudioStream,
    *,
    prompt: str | None = None,
    translate_to: str | None = None,
    segment_seconds: float = SEGMENT_SECONDS,
    limits: Limits | None = None,
    kv_bits: int | None = None,
    on_open: Callable[[float | None], None] | None = None,
) -> Iterator[TranscriptSegment]:
    """Transcribe a recording, cut at silences; segments come as they are understood.

    Decoding is greedy, so that a recording always has the same transcript.

    Args:
        source: path, https URL, bytes, file object or (samples, rate), of any length; or a stream,
            as of a microphone, whose pieces end where its speaker pauses.
        prompt: what to ask about each segment; to transcribe it where None.
        translate_to: the language of the text, such as "French", where it is not that of the
            speech.
        segment_seconds: the longest segment, from 1 to 40.
        limits: how large the source may be; of any length where None.
        kv_bits: 8 or 4, to hold keys and values quantized; as they come where None.
        on_open: called with the recording's length in seconds, None where it does not say.

    Raises:
        MediaError: where the source is no sound; for damage further on, when it is reached.
        PromptError: where the model does not hear, or there is nothing to ask.
        GenerationError: where keys and values cannot be quantized so.
    """
    asked = question(prompt, translate_to)
    if not phi.hears:
        raise no_media(phi.name, phi.takes_media)
    limits = limits or Limits(max_seconds=math.inf)
    cache = phi.new_cache(kv_bits)
    segments = (
        split_live(source, segment_seconds)
        if isinstance(source, AudioStream)
        else split_audio(source, limits, segment_seconds, on_open)
    )
    return _segments(phi, segments, asked, cache)


def _segments(
    phi: SpeechModel, segments: Iterator[Segment], asked: str, cache: Any
) -> Iterator[TranscriptSegment]:
    words = len(phi.encode(asked))
    for segment in segments:
        options = listening(phi, segment, words)
        with phi.stream(asked, **options, temperature=0, cache=cache) as stream:
            for _ in stream:
                cut = cut_loop(phi, segment, stream.reply)
                if cut is not None:
                    break
            else:
                cut = understood(segment, stream.reply)
        yield cut


def listening(phi: SpeechModel, segment: Segment, question_tokens: int) -> dict[str, Any]:
    """Options of a request about a segment: its sound, and how long the answer may be."""
    sounds = token_count(frame_count(len(segment.samples), segment.rate))
    room = phi.context_length - question_tokens - sounds
    wanted = SPARE_TOKENS + math.ceil(TOKENS_PER_SECOND * (segment.end - segment.start))
    return {"audio": segment.clip, "max_tokens": max(1, min(wanted, room))}


def understood(segment: Segment, reply: Reply) -> TranscriptSegment:
    """An answer that has ended, with its times."""
    return _heard(segment, reply.text, reply.finish_reason)


def _heard(segment: Segment, text: str, finish_reason: str) -> TranscriptSegment:
    return TranscriptSegment(
        segment.start,
        segment.end,
        text.strip(),
        finish_reason,
        spoken=segment.spoken,
        quiet_until=segment.quiet_until,
    )


def cut_loop(phi: SpeechModel, segment: Segment, reply: Reply) -> TranscriptSegment | None:
    """An answer that repeats itself, cut after its first round; None where it does not."""
    repeated = looping(reply.tokens)
    if not repeated or phi.tokenizer is None:
        return None
    control = phi.tokenizer.control_tokens.values()
    text = phi.tokenizer.decode(reply.tokens[:-repeated], skip=set(control))
    return _heard(segment, text, "loop")


def looping(tokens: Sequence[int]) -> int:
    """Count tokens at the end that only repeat a phrase before them; 0 where it may be speech."""
    for period in range(1, min(LONGEST_PHRASE, len(tokens) // ROUNDS) + 1):
        pairs = zip(reversed(tokens), reversed(tokens[:-period]), strict=False)
        repeated = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if repeated + period >= max(LOOP_TOKENS, ROUNDS * period):
            return repeated
    return 0
