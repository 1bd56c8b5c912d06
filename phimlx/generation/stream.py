"""One reply while it is written, and when it is whole: text, reasoning, tool calls, statistics.

Knows tokens, their text and when to stop; knows nothing of how a token is chosen.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx

from phimlx.errors import TokenizerError
from phimlx.generation.stop import StopStrings

if TYPE_CHECKING:
    from phimlx.prompt.reply_parser import ReplyParser
    from phimlx.prompt.tokenizer.tokenizer import Tokenizer
    from phimlx.prompt.tools import ToolCall


@dataclass(frozen=True)
class Piece:
    """What one token adds to a reply.

    Attributes:
        text: newly certain text, often empty while a character or a tag is incomplete.
        token: the token, or None for text that only became certain afterwards.
        kind: "text", or "reasoning" inside `<think>…</think>`.
    """

    text: str
    token: int | None
    kind: str = "text"


@dataclass
class Stats:
    """What a reply cost. Times in seconds, memory in bytes."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, not computed again
    prefill_seconds: float = 0.0
    generated_tokens: int = 0
    generate_seconds: float = 0.0
    peak_memory: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens computed in a second."""
        return _rate(self.prompt_tokens - self.cached_tokens, self.prefill_seconds)

    @property
    def generate_rate(self) -> float:
        """Tokens generated in a second; the first belongs to the prefill."""
        return _rate(self.generated_tokens - 1, self.generate_seconds)


@dataclass
class Reply:
    """A model's answer.

    Attributes:
        tokens: every token generated, the end-of-sequence token included.
        finish_reason: "stop" (the model or a stop string ended it), "length", "tool_calls", or
            "cancelled" where the reader stopped early.
        reasoning: what stood in `<think>…</think>`, None where there was none.
        tool_calls: calls that the model asks for.
        warnings: what looked like a tool call and was none; its text is in `text`.
        seed: the seed that gives this reply again.
    """

    seed: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "cancelled"
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    visible_text: str | None = ""  # None where the model has no tokenizer

    @property
    def text(self) -> str:
        """The answer, without reasoning and tool calls.

        Raises:
            TokenizerError: where the model folder holds no tokenizer.
        """
        if self.visible_text is None:
            raise TokenizerError(
                "The model folder holds no tokenizer.json, so the reply has tokens but no text.",
                hint="Read reply.tokens, or add the tokenizer files to the folder.",
            )
        return self.visible_text


class Stream(Iterator[Piece]):
    """A reply being written: iterate over its pieces; `reply` holds what there is so far.

    Closing it early keeps what was said; so does an interrupt while a token is awaited.
    """

    def __init__(
        self,
        tokens: Generator[int],
        *,
        prompt_tokens: int,
        max_tokens: int,
        seed: int,
        eos: Collection[int],
        stops: StopStrings,
        tokenizer: Tokenizer | None,
        hidden: Collection[int],
        parser: ReplyParser | None,
    ) -> None:
        self.reply = Reply(seed=seed, visible_text=None if tokenizer is None else "")
        self.reply.stats.prompt_tokens = prompt_tokens
        self._tokens = tokens
        self._max_tokens = max_tokens
        self._eos = frozenset(eos)
        self._stops = stops
        self._detokenizer = None if tokenizer is None else tokenizer.detokenizer(skip=hidden)
        self._parser = parser
        self._pieces = self._run()

    def __next__(self) -> Piece:
        return next(self._pieces)

    def whole(self) -> Reply:
        """Read it to its end."""
        for _ in self:
            pass
        return self.reply

    def close(self) -> None:
        """Stop here. The reply stays readable, and the prompt cache usable."""
        self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> Generator[Piece]:
        reply, stats = self.reply, self.reply.stats
        mx.reset_peak_memory()
        started = first = time.perf_counter()
        try:
            for token in self._tokens:
                now = time.perf_counter()
                if not reply.tokens:
                    first, stats.prefill_seconds = now, now - started
                reply.tokens.append(token)
                stats.generated_tokens = len(reply.tokens)
                stats.generate_seconds = now - first
                if token in self._eos:
                    reply.finish_reason = "stop"
                    yield Piece("", token)
                    break
                yield from self._read(token)
                if self._stops.stopped:
                    reply.finish_reason = "stop"
                    break
                if len(reply.tokens) == self._max_tokens:
                    reply.finish_reason = "length"
                    break
            yield from self._rest()
        finally:
            self._tokens.close()
            self._take_parsed()
            stats.peak_memory = mx.get_peak_memory()

    def _read(self, token: int) -> Iterator[Piece]:
        """The pieces of one token: the first carries it, any further one has none."""
        text = "" if self._detokenizer is None else self._detokenizer.add(token)
        pieces = list(self._parse(self._stops.feed(text)))
        first, *further = pieces or [Piece("", None)]
        yield Piece(first.text, token, first.kind)
        yield from further

    def _rest(self) -> Iterator[Piece]:
        """Text that was held back until it was clear that nothing follows."""
        if self._detokenizer is not None:
            text = self._stops.feed(self._detokenizer.finish()) + self._stops.finish()
            yield from self._parse(text)
        if self._parser is not None:
            for part in self._parser.finish():
                yield Piece(part.text, None, part.kind)
        self._take_parsed()
        if self.reply.tool_calls and self.reply.finish_reason == "stop":
            self.reply.finish_reason = "tool_calls"

    def _parse(self, text: str) -> Iterator[Piece]:
        if not text or self._parser is None:
            return
        parts = self._parser.feed(text)
        self._take_parsed()
        for part in parts:
            yield Piece(part.text, None, part.kind)

    def _take_parsed(self) -> None:
        if self._parser is None:
            return
        self.reply.visible_text = self._parser.text
        self.reply.reasoning = self._parser.reasoning or None
        self.reply.tool_calls = self._parser.tool_calls
        self.reply.warnings = self._parser.warnings


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if tokens > 0 and seconds > 0 else 0.0
