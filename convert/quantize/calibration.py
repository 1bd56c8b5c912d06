"""A text -> windows of tokens that quantized weights are calibrated on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from convert.measure.compare import length_past, longrope_step
from convert.measure.report import BUNDLED_TEXT
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model
from phimlx.errors import ConversionError
from phimlx.prompt.tokenizer.tokenizer import Tokenizer

LEAST_TOKENS = 2048
LEAST_WINDOWS = 4
MULTIPLE = 32  # of which a window's length is one
SHARE_PAST = 4  # one token in so many is in a window past the LongRoPE step, in a long enough text


@dataclass(frozen=True)
class CalibrationWindows:
    """A text in windows, each of which the model reads from its first position on.

    Attributes:
        tokens: of the whole text.
        windows: spread evenly over it; those of one length follow each other, shorter ones first.
        digest: SHA-256 of the text, in UTF-8.
        bundled: whether the text is the one that comes along.
    """

    tokens: int
    windows: tuple[tuple[int, ...], ...]
    digest: str
    bundled: bool

    @cached_property
    def size(self) -> int:
        """Tokens of all windows."""
        return sum(map(len, self.windows))

    @property
    def longest(self) -> int:
        return max(map(len, self.windows))

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, text: str | None, samples: int, length: int, past_step: bool
    ) -> CalibrationWindows:
        """Cut a text.

        Args:
            text: in which control tokens are recognised; the bundled one where None.
            samples: most windows, not counting those past the LongRoPE step.
            length: tokens of one, rounded down to a multiple of 32; none is longer than a
                quarter of the text or the model's context, nor passes the LongRoPE step where
                `length` does not.
            past_step: whether windows past the LongRoPE step are wanted besides, where the text is
                long enough for them to be a quarter of what is read.

        Raises:
            ConversionError: where the text is none, or too short.
            TokenizerError: where the folder has no tokenizer.
        """
        config = build_model(checkpoint.config).config
        bundled = text is None
        text = BUNDLED_TEXT.read_text("utf-8") if text is None else text
        tokens = _tokens(checkpoint, text)
        step = longrope_step(config)
        limit = min(length, config.max_position_embeddings, len(tokens) // LEAST_WINDOWS)
        if step is not None and length <= max(step, MULTIPLE):
            limit = min(limit, step)
        usual = limit // MULTIPLE * MULTIPLE
        windows = spread(tokens, usual, min(samples, len(tokens) // usual))
        if past_step and step is not None and usual <= step:
            past = length_past(step) // MULTIPLE * MULTIPLE
            count = len(windows) * usual // (SHARE_PAST - 1) // past
            if past > step and past <= len(tokens):
                windows += spread(tokens, past, min(count, len(tokens) // past))
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls(len(tokens), tuple(windows), digest, bundled)


def spread(tokens: Sequence[int], length: int, count: int) -> list[tuple[int, ...]]:
    """`count` windows at even distances, the first at the beginning, the last at the end."""
    room = len(tokens) - length
    starts = [room * index // max(1, count - 1) for index in range(count)]
    return [tuple(tokens[start : start + length]) for start in starts]


def _tokens(checkpoint: Checkpoint, text: str) -> list[int]:
    if not text.strip():
        raise ConversionError(
            "The calibration text is empty.",
            hint="Give a text like those that the model will read, or none.",
        )
    if "\0" in text:
        raise ConversionError(
            "The calibration text holds NUL characters, so it is no text.",
            hint="Give a file of plain text in UTF-8.",
        )
    tokens = Tokenizer.load(checkpoint.folder).encode(text, control=True)
    if len(tokens) < LEAST_TOKENS:
        raise ConversionError(
            f"The calibration text has {len(tokens):,} tokens; calibration takes "
            f"{LEAST_TOKENS:,} at least, and 50,000 are better.",
            hint="Give a longer text, or none.",
        )
    return tokens
