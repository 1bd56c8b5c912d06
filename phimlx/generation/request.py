"""A request: one prompt, how its reply is to be made, and how far it has come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from phimlx.generation.reply import Chunk, Reply, ReplyReader
from phimlx.generation.sampler import Sampler
from phimlx.models.lora import DEFAULT

if TYPE_CHECKING:
    from phimlx.generation.grammar.constraint import Constraint
    from phimlx.generation.logprobs import TokenLogprob
    from phimlx.generation.placed_media import Media
    from phimlx.generation.prompt_cache import PromptCache


@dataclass(eq=False)
class Request:
    """One reply to be generated; an `Engine` takes it there step by step.

    Attributes:
        prompt: tokens, at least one.
        sampler: chooses the reply's tokens, with a random stream of its own.
        max_tokens: of the reply; 0 where only the prompt is to be scored.
        stop_tokens: tokens that end the reply.
        media: images and sounds that stand at the prompt's placeholder tokens.
        reader: makes text of the tokens and knows the stop strings; None where tokens will do.
        cache: what earlier requests left, and this one leaves to later ones.
        on_prefill: called with the tokens computed and the tokens to compute, after each piece of
            the prompt.
        prompt_lookup: whether tokens may be drafted from what prompt and reply hold.
        kv_bits: 8 or 4, to hold keys and values quantized; a cache that is given has its own.
        top_logprobs: alternatives to be told of each token with its log-probability; None where
            neither is wanted.
        prompt_logprobs: the same of the prompt's tokens, all of which are then computed; only for a
            request without a cache.
        constraint: the grammar that the reply is held to.
        adapter: name of the one that the model was given to use; None for the model alone.
        read_answer: as the `Reply` has it.
        computed: tokens of prompt and reply whose keys and values are there.
        finished: whether the reply is complete, or the request was ended before.
        error: why it was ended, where its reader did not end it.
        arrival: which it was of those that its scheduler admitted.
        reply: the reply so far.
    """

    prompt: list[int]
    sampler: Sampler
    max_tokens: int
    stop_tokens: frozenset[int] = frozenset()
    media: Media | None = None
    reader: ReplyReader | None = None
    cache: PromptCache | None = None
    on_prefill: Callable[[int, int], None] | None = None
    prompt_lookup: bool = True
    kv_bits: int | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    adapter: str | None = DEFAULT
    read_answer: Callable[[str], Any] | None = None
    computed: int = field(default=0, init=False)
    finished: bool = field(default=False, init=False)
    error: Exception | None = field(default=None, init=False)
    arrival: int = field(default=0, init=False)
    reply: Reply = field(init=False)

    def __post_init__(self) -> None:
        self.reply = Reply(self.sampler.seed, None if self.reader is None else self.reader.parser)
        self.reply.read_answer = self.read_answer
        self.reply.stats.prompt_tokens = len(self.prompt)
        if self.prompt_logprobs is not None:
            self.reply.prompt_logprobs.append(None)
        if self.media is not None and self.media.cut:
            self.reply.remarks.append(
                f"With pictures the model reads the first {len(self.prompt):,} tokens of a prompt: "
                f"the last {self.media.cut:,} of this one were left out. Show fewer or smaller "
                "pictures."
            )
        self._started = self._first = 0.0

    @property
    def tokens(self) -> list[int]:
        """Prompt and reply so far."""
        return self.prompt + self.reply.tokens

    @property
    def remaining(self) -> int:
        """Tokens that the reply may still have."""
        return self.max_tokens - len(self.reply.tokens)

    def start(self) -> None:
        """Time runs from here."""
        self._started = time.perf_counter()

    def end_prompt(self) -> None:
        """End a request that wants no reply, now that its prompt has been computed."""
        if not self.finished:
            self.reply.stats.prefill_seconds = time.perf_counter() - self._started
            self._finish("length")

    def take(self, token: int, logprob: TokenLogprob | None = None) -> list[Chunk]:
        """Add a token to the reply, and end it where the token does; the chunks that it makes."""
        said = self.reply.said
        first, *further = self._take(token)
        if logprob is None:
            return [first, *further]
        self.reply.logprobs.append(logprob)
        new = tuple(self.reply.logprobs[said : self.reply.said])
        return [replace(first, logprobs=new), *further]

    def _take(self, token: int) -> list[Chunk]:
        reply, stats, now = self.reply, self.reply.stats, time.perf_counter()
        if not reply.tokens:
            self._first, stats.prefill_seconds = now, now - self._started
        reply.tokens.append(token)
        stats.generated_tokens = len(reply.tokens)
        stats.generate_seconds = now - self._first
        if token in self.stop_tokens:
            return [Chunk("", token), *self._finish("stop")]
        if self.reader is None:
            chunks = [Chunk("", token)]
            reply.said += 1
        else:
            chunks = self.reader.read(token)
            reply.said = self.reader.said
        if self.reader is not None and self.reader.stopped:
            return chunks + self._finish("stop")
        if self.remaining == 0:
            return chunks + self._finish("length")
        return chunks

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """End the request with what the block raises: what is its own ends nobody else."""
        try:
            yield
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End the request with an error, even while it is about to finish."""
        self.finished, self.error = True, error

    def restart(self) -> None:
        """Go on from the tokens so far, whatever has been drawn or computed behind them."""
        self.computed = 0
        self.sampler.rewind(self.reply.tokens)
        if self.constraint is not None:
            self.constraint.restart(self.reply.tokens)
        if self.prompt_logprobs is not None and not self.reply.tokens:
            self.reply.prompt_logprobs = [None]

    def cancel(self, error: Exception | None = None) -> None:
        """End the request here; nothing where it has ended. `error` is for who still reads it."""
        if not self.finished:
            self.finished, self.error = True, error

    def _finish(self, reason: str) -> list[Chunk]:
        self.finished = True
        chunks = []
        if self.reader is not None:
            chunks = self.reader.finish()
            self.reply.said = self.reader.said
            self.reply.stop_string = self.reader.stop_string
        called = reason == "stop" and self.reply.tool_calls
        self.reply.finish_reason = "tool_calls" if called else reason
        return chunks
