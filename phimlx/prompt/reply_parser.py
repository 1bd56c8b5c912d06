"""Splits a model's reply, as it arrives, into text, reasoning and tool calls.

Knows nothing of the prompt: what a user wrote cannot change how the reply is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from phimlx.prompt.tools import ToolCall, read_calls, read_json_text

Kind = Literal["text", "reasoning"]

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<|tool_call|>", "<|/tool_call|>"


@dataclass(frozen=True)
class Part:
    """A stretch of a reply, of one kind."""

    kind: Kind
    text: str


def _partial(literal: str, then: str = "") -> str:
    """A pattern for `literal` broken off anywhere; after all of it, `then` may follow."""
    pattern = f"{re.escape(literal[-1])}{then}"
    for character in reversed(literal[:-1]):
        pattern = f"{re.escape(character)}(?:{pattern})?"
    return pattern


# `functools` opens a call where a JSON object, or a list of them, follows it. It is a word of prose
# and of Python programs everywhere else.
_WORD = r"(?<![\w.])"
_OPENED = re.compile(
    rf"{re.escape(CALL)}\s*(?P<tag>[\[{{])|{_WORD}functools\s*(?P<word>\[\s*\{{|\{{)"
)
_BARE_CALL = re.compile(rf"{re.escape(CALL)}(?=\s*[^\s\[{{])")
_CLOSED = re.compile(rf"\s*(?:{re.escape(END_CALL)}\s*)?")
# The same, as far as they may have come when the next piece arrives.
_OPENING = re.compile(
    "(?:" + _partial(CALL, r"\s*") + "|" + _WORD + _partial("functools", r"\s*(?:\[\s*)?") + r")\Z"
)
_CLOSING = re.compile(r"\s*(?:" + _partial(END_CALL, r"\s*") + r")?\Z")
_STRING_OR_BRACKET = re.compile(rf'"|[\[{{]|[\]}}]|{re.escape(END_CALL)}')
_STRING_END = re.compile(r'["\\]')


class ReplyParser:
    """Reads one reply, given in pieces cut anywhere; the outcome does not depend on the cuts.

    Reasoning is what stands between `<think>` and `</think>` at the very start of the reply, or up
    to `</think>` with `starts_in_reasoning`; all of the reply where it is never closed. White space
    around the two tags is dropped.

    With `tools`, calls are read from `<|tool_call|>[…]<|/tool_call|>` and `functools[…]`: a list of
    `{"name": …, "arguments": {…}}`, or one of them alone. They go to `tool_calls` and leave the
    text. A call that cannot be read stays in the text as it is and adds to `warnings`; a missing
    `<|/tool_call|>` is forgiven. Without `tools` the text is left alone.

    Text is handed on at once, but for what may still turn out to be a tag or a call.
    """

    def __init__(self, tools: bool, starts_in_reasoning: bool = False) -> None:
        self.tool_calls: list[ToolCall] = []
        self.warnings: list[str] = []
        self._tools = tools
        self._said: dict[Kind, list[str]] = {"text": [], "reasoning": []}
        self._parts: list[Part] = []
        self._held = ""  # arrived, and not decided on yet
        self._before = ""  # the last character handed on as text
        self._ended = False
        # The JSON of an open call: how far it is scanned, how deep, and whether inside a string.
        self._scanned = self._json = self._depth = 0
        self._quoted = False
        # Each step takes what it can decide from `_held` and says whether it is done with it.
        self._step: Callable[[], bool] = self._reason_start if starts_in_reasoning else self._start

    @property
    def text(self) -> str:
        """The answer so far: the reply without reasoning and calls."""
        return "".join(self._said["text"])

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(self._said["reasoning"])

    def feed(self, text: str) -> list[Part]:
        """Take the next piece of the reply; what it decides."""
        self._held += text
        return self._run()

    def finish(self) -> list[Part]:
        """The reply has ended; what was held back."""
        self._ended = True
        return self._run()

    def _run(self) -> list[Part]:
        while self._held and self._step():
            pass
        parts, self._parts = self._parts, []
        return parts

    def _say(self, kind: Kind, size: int) -> None:
        """Hand on the first `size` characters held."""
        said, self._held = self._held[:size], self._held[size:]
        if not said:
            return
        self._said[kind].append(said)
        if kind == "text":
            self._before = said[-1]
        if self._parts and self._parts[-1].kind == kind:
            said = self._parts.pop().text + said
        self._parts.append(Part(kind, said))

    def _start(self) -> bool:
        """Whether the reply opens with reasoning."""
        opening = self._held.lstrip()
        if opening.startswith(THINK):
            self._held = opening[len(THINK) :]
            self._step = self._reason_start
        elif self._ended or not THINK.startswith(opening):
            self._step = self._text
        else:
            return False
        return True

    def _reason_start(self) -> bool:
        self._held = self._held.lstrip()
        if self._held:
            self._step = self._reason
        return bool(self._held)

    def _reason(self) -> bool:
        found = self._held.find(END_THINK)
        if found >= 0:
            kept = len(self._held[:found].rstrip())
            self._say("reasoning", kept)
            self._held = self._held[found - kept + len(END_THINK) :]
            self._step = self._text_start
            return True
        self._say("reasoning", len(self._held) if self._ended else self._before_tag())
        return False

    def _before_tag(self) -> int:
        """How much is held before white space and a `</think>` that may have begun."""
        sizes = range(len(END_THINK) - 1, 0, -1)
        begun = next((size for size in sizes if self._held.endswith(END_THINK[:size])), 0)
        return len(self._held[: len(self._held) - begun].rstrip())

    def _text_start(self) -> bool:
        self._held = self._held.lstrip()
        if self._held:
            self._step = self._text
        return bool(self._held)

    def _text(self) -> bool:
        """Text, up to where a call opens."""
        if not self._tools:
            self._say("text", len(self._held))
            return False
        window = self._before + self._held
        base = len(self._before)
        opened = _OPENED.search(window, base)
        bare = _BARE_CALL.search(window, base)
        if bare and not (opened and opened.start() < bare.start()):
            self._say("text", bare.end() - base)
            self._warn("no JSON follows it")
            return True
        if opened:
            self._say("text", opened.start() - base)
            self._json = len(opened[0]) - len(opened["tag"] or opened["word"])
            self._scanned, self._depth, self._quoted = self._json, 0, False
            self._step = self._call
            return True
        if self._ended:
            if CALL in self._held:
                self._warn("the reply ended inside it")
            self._say("text", len(self._held))
            return False
        begun = _OPENING.search(window, base)
        self._say("text", (begun.start() if begun else len(window)) - base)
        return False

    def _call(self) -> bool:
        """A call, up to where its JSON ends."""
        end = self._scan()
        if end is None and not self._ended:
            return False
        self._step = self._text
        if end is None:
            self._warn("the reply ended inside it")
            self._say("text", len(self._held))
            return False
        try:
            calls = read_calls(read_json_text(self._held[self._json : end]))
        except ValueError as error:
            self._warn(str(error))
            self._say("text", end)
            return True
        self.tool_calls += calls
        self._held = self._held[end:]
        self._before = ""
        self._step = self._call_end
        return True

    def _call_end(self) -> bool:
        """After a call: its closing tag, and white space."""
        if not self._ended and _CLOSING.match(self._held):
            return False
        self._held = self._held[_CLOSED.match(self._held).end() :]  # type: ignore[union-attr]
        self._step = self._text
        return True

    def _scan(self) -> int | None:
        """Where the JSON that is held ends; None where it does not end yet.

        The closing tag ends it too, as do brackets that close more than was opened.
        """
        while True:
            found = (_STRING_END if self._quoted else _STRING_OR_BRACKET).search(
                self._held, self._scanned
            )
            if found is None:
                # A closing tag may be cut off at the end.
                self._scanned = max(self._scanned, len(self._held) - len(END_CALL) + 1)
                return None
            mark, end = found[0], found.end()
            if mark == "\\":
                self._scanned = end + 1  # whatever is escaped, once it is there
                continue
            self._scanned = end
            if mark == '"':
                self._quoted = not self._quoted
            elif mark == END_CALL:
                return end
            else:
                self._depth += 1 if mark in "[{" else -1
                if self._depth <= 0:
                    return end

    def _warn(self, reason: str) -> None:
        self.warnings.append(f"A tool call could not be read and stays in the text: {reason}.")
