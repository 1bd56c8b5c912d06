"""A reply: chunks of text as tokens arrive, and text, reasoning, tool calls and statistics."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from phimlx.errors import TokenizerError
from phimlx.generation.stop import StopStrings

if TYPE_CHECKING:
    from phimlx.generation.logprobs import TokenLogprob
    from phimlx.prompt.reply_parser import ReplyParser, ReplyPart
    from phimlx.prompt.tokenizer.tokenizer import Tokenizer
    from phimlx.prompt.tools import ToolCall


@dataclass(frozen=True)
class Chunk:
    """Text that one token adds to a reply.

    Attributes:
        text: newly certain text, often empty while a character or a tag is incomplete.
        token: the token, or None for text that only became certain afterwards.
        kind: "text", or "reasoning" inside `<think>…</think>`.
        tool_calls: that are complete with it, in place of text.
        logprobs: where they are asked for, of the tokens, this one or earlier ones, of which it has
            become certain that they belong to the reply and not to a stop string.
    """

    text: str
    token: int | None
    kind: str = "text"
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass
class Stats:
    """Cost of a reply. Times in seconds, memory in bytes."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, not computed again
    prefill_seconds: float = 0.0
    generated_tokens: int = 0
    generate_seconds: float = 0.0
    forward_passes: int = 0  # pieces of the prompt and steps of decoding
    drafted_tokens: int = 0  # guessed, and computed together with a token that was known
    accepted_tokens: int = 0  # of these, those that the reply holds
    peak_memory: int = 0

    def as_object(self) -> dict[str, int | float]:
        """Make an object of JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated_tokens,
            "forward_passes": self.forward_passes,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "prefill_seconds": self.prefill_seconds,
            "generate_seconds": self.generate_seconds,
            "peak_memory": self.peak_memory,
        }

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens computed in a second."""
        return _rate(self.prompt_tokens - self.cached_tokens, self.prefill_seconds)

    @property
    def generate_rate(self) -> float:
        """Tokens generated in a second; the first belongs to the prefill."""
        return _rate(self.generated_tokens - 1, self.generate_seconds)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens of the reply for each pass over them: 1 where nothing was drafted."""
        passes = self.generated_tokens - self.accepted_tokens
        return self.generated_tokens / passes if passes else 0.0


class Content(Protocol):
    """Text and calls of a reply; a `ReplyParser` has them at any time."""

    @property
    def text(self) -> str: ...
    @property
    def reasoning(self) -> str: ...
    @property
    def tool_calls(self) -> list[ToolCall]: ...
    @property
    def warnings(self) -> list[str]: ...


@dataclass
class Reply:
    """A model's answer.

    Its text is put together when it is asked for.

    Attributes:
        seed: the seed that gives this reply again.
        content: text and calls; None where the model has no tokenizer.
        tokens: every token generated, the end-of-sequence token included.
        logprobs: one for each of `tokens`; none where they are not asked for.
        prompt_logprobs: one for each token of the prompt, of which the first has none, nor has what
            stands for media and is no token; likewise.
        said: how many of `tokens`, from the first, the reply's words are made of. Behind them come
            those of a stop string and the token that ended it, of which OpenAI's API tells nothing;
            a token that holds the end of the words and the beginning of a stop string is counted.
        remarks: what the user should know of how the prompt was read.
        finish_reason: "stop" (the model or a stop string ended it), "length", "tool_calls", or
            "cancelled" where the reader stopped early.
        stop_string: the stop string that ended it; None where none did.
        read_answer: makes a value of the answer's text, where a schema was asked for; ValueError
            for a text that is not whole.
    """

    seed: int
    content: Content | None = field(repr=False)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    said: int = 0
    remarks: list[str] = field(default_factory=list)
    finish_reason: str = "cancelled"
    stop_string: str | None = None
    stats: Stats = field(default_factory=Stats)
    read_answer: Callable[[str], Any] | None = field(default=None, repr=False)

    @property
    def text(self) -> str:
        """The answer, without reasoning and tool calls.

        Raises:
            TokenizerError: where the model folder holds no tokenizer.
        """
        if self.content is None:
            raise TokenizerError(
                "The model folder holds no tokenizer.json, so the reply has tokens but no text.",
                hint="Read reply.tokens, or add the tokenizer files to the folder.",
            )
        return self.content.text

    @property
    def parsed(self) -> Any:
        """The answer as its schema has it: plain data, or an object of the pydantic class.

        None where no schema was asked for, tools are called instead, or the reply is not whole.
        """
        if self.read_answer is None or self.finish_reason != "stop":
            return None
        try:
            return self.read_answer(self.text)
        except ValueError:  # a stop string cut it
            return None

    @property
    def reasoning(self) -> str | None:
        """Text in `<think>…</think>`; None where there was none."""
        return (self.content.reasoning or None) if self.content else None

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Calls that the model asks for."""
        return self.content.tool_calls if self.content else []

    @property
    def warnings(self) -> list[str]:
        """Remarks, and what looked like a tool call and was none; its text is in `text`."""
        return [*self.remarks, *(self.content.warnings if self.content else [])]

    def as_message(self) -> dict[str, Any]:
        """Make a message of it, with its calls and without its reasoning."""
        calls = [call.as_object() for call in self.tool_calls]
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        return message | ({"tool_calls": calls} if calls else {})

    def as_object(self, model: str) -> dict[str, Any]:
        """Make an object of JSON, as `phimlx generate --json` prints it; `model` is its name."""
        told: dict[str, Any] = {}
        if self.logprobs:
            told["logprobs"] = [found.as_object() for found in self.logprobs]
        if self.prompt_logprobs:
            told["prompt_logprobs"] = [
                found and found.as_object() for found in self.prompt_logprobs
            ]
        if self.read_answer is not None:
            told["parsed"] = self.parsed
        return {
            "text": self.text,
            "reasoning": self.reasoning,
            "tool_calls": [call.as_object() for call in self.tool_calls],
            "finish_reason": self.finish_reason,
            "model": model,
            "seed": self.seed,
            "warnings": list(self.warnings),
            **told,
            "stats": self.stats.as_object(),
        }


class ReplyReader:
    """Turns the tokens of one reply into chunks, up to the first stop string.

    Attributes:
        said: how many tokens, from the first, are certain to belong to the reply.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        parser: ReplyParser,
        stops: StopStrings,
        hidden_tokens: Collection[int] = (),
        at_start: bool = True,
    ) -> None:
        """`hidden_tokens` are control tokens that are left out of the text; `at_start` where the
        turn says nothing before."""
        self.parser = parser
        self._stops = stops
        self._detokenizer = tokenizer.detokenizer(hidden_tokens, at_start)
        self.said = 0
        self._begins: deque[int] = deque()  # where the text of each further token begins
        self._decoded = self._certain = 0  # characters

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self._stops.stopped

    @property
    def stop_string(self) -> str | None:
        """The stop string that has appeared."""
        return self._stops.found

    def read(self, token: int) -> list[Chunk]:
        """The chunks of a token: the first carries it, any further one has none."""
        self._begins.append(self._decoded)
        text = self._pass_on(self._detokenizer.add(token))
        first, *further = self._parse(text) or [Chunk("", None)]
        return [replace(first, token=token), *further]

    def finish(self) -> list[Chunk]:
        """Text that was held back until it was clear that nothing follows."""
        text = self._pass_on(self._detokenizer.finish()) + self._stops.finish()
        if not self._stops.stopped:
            self.said += len(self._begins)
            self._begins.clear()
        return self._parse(text) + _chunks(self.parser.finish())

    def _pass_on(self, text: str) -> str:
        """The text that is certain to belong to the reply; counts the tokens that it is made of."""
        self._decoded += len(text)
        text = self._stops.feed(text)
        self._certain += len(text)
        while self._begins and self._begins[0] < self._certain:
            self._begins.popleft()
            self.said += 1
        return text

    def _parse(self, text: str) -> list[Chunk]:
        return _chunks(self.parser.feed(text)) if text else []


def _chunks(parts: Iterable[ReplyPart]) -> list[Chunk]:
    return [Chunk(part.text, None, part.kind, tool_calls=part.tool_calls) for part in parts]


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if tokens > 0 and seconds > 0 else 0.0
