"""Splits a model's reply, as it arrives, into text, reasoning and tool calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from phimlx.prompt.tools import ToolCall, read_calls, read_json_text

ReplyKind = Literal["text", "reasoning"]

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<|tool_call|>", "<|/tool_call|>"
MAX_SPACE = 64  # white space that may part what opens a call from its JSON


@dataclass(frozen=True)
class ReplyPart:
    """A stretch of a reply, of one kind, or the calls that stand there instead of text."""

    kind: ReplyKind
    text: str
    tool_calls: tuple[ToolCall, ...] = ()


def _partial(literal: str, then: str) -> str:
    """A pattern for `literal` broken off anywhere; after all of it, `then` may follow."""
    pattern = f"{re.escape(literal[-1])}{then}"
    for character in reversed(literal[:-1]):
        pattern = f"{re.escape(character)}(?:{pattern})?"
    return pattern


# `functools` opens a call where a JSON object, or a list of them, follows it. It is a word of prose
# and of Python programs everywhere else.
_SPACE = rf"\s{{0,{MAX_SPACE}}}"
_WORD = r"(?<![\w.])"
_TAG = re.escape(CALL)
_OPENED = re.compile(
    rf"{_TAG}{_SPACE}(?P<tag>[\[{{])"
    rf"|(?P<bare>{_TAG})(?={_SPACE}[^\s\[{{]|\s{{{MAX_SPACE + 1}}})"
    rf"|{_WORD}functools{_SPACE}(?P<word>\[{_SPACE}\{{|\{{)"
)
# The same, as far as it may have come when the next chunk arrives.
_WORD_BEGUN = _partial("functools", rf"{_SPACE}(?:\[{_SPACE})?")
_OPENING = re.compile(rf"(?:{_partial(CALL, _SPACE)}|{_WORD}{_WORD_BEGUN})\Z")
_BLANK = re.compile(r"\s+")
_STRING_OR_BRACKET = re.compile(rf'"|[\[{{]|[\]}}]|{re.escape(END_CALL)}')
_STRING_END = re.compile(r'["\\]')


class ReplyParser:
    """Reads one reply, given in chunks cut anywhere; the outcome does not depend on the cuts.

    Reasoning is what stands between `<think>` and `</think>` at the very start of the reply, or up
    to `</think>` with `starts_in_reasoning`; all of the reply where it is never closed. White space
    around the two tags is dropped. A reply that continues what was `said` goes on in its reasoning,
    or behind it.

    With `tools`, calls are read from `<|tool_call|>[…]<|/tool_call|>` and `functools[…]`: a list of
    `{"name": …, "arguments": {…}}`, or one of them alone. They go to `tool_calls` and leave the
    text. A call that cannot be read stays in the text as it is and adds to `warnings`; a missing
    `<|/tool_call|>` is forgiven. Without `tools` the text is left alone.

    What is `plain` is text throughout, tags and all.

    Text is handed on at once, but for what may still turn out to be a tag or a call. A chunk costs
    time in proportion to its own length; `text` and `reasoning` are joined when they are read.
    """

    def __init__(
        self, tools: bool, starts_in_reasoning: bool = False, said: str = "", plain: bool = False
    ) -> None:
        self.tool_calls: list[ToolCall] = []
        self.warnings: list[str] = []
        self._tools = tools and not plain
        self._decided: dict[ReplyKind, list[str]] = {"text": [], "reasoning": []}
        self._new: list[ReplyPart] = []
        # What is not decided on begins at `_at`; a character that is may stand before it.
        self._held = ""
        self._at = 0
        self._blank: list[str] = []  # white space that is dropped where a tag follows
        self._ended = False
        # A call that is open: what opened it, its JSON so far, and how that stands.
        self._opener = ""
        self._json: list[str] = []
        self._depth = 0
        self._quoted = False
        # Each step takes what it can decide from `_held` and says whether it is done with it.
        self._step: Callable[[], bool] = self._reason_start if starts_in_reasoning else self._start
        if said.strip():
            self._step = self._step_behind(said)
        if plain:
            self._step = self._text

    @property
    def text(self) -> str:
        """The answer so far: the reply without reasoning and calls."""
        return "".join(self._decided["text"])

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(self._decided["reasoning"])

    def feed(self, text: str) -> list[ReplyPart]:
        """Take the next chunk of the reply; return what it decides."""
        self._held += text
        return self._run()

    def finish(self) -> list[ReplyPart]:
        """Take the end of the reply; return what was held back."""
        self._ended = True
        return self._run()

    def _run(self) -> list[ReplyPart]:
        while self._step():
            pass
        seen = max(0, self._at - 1)
        self._held, self._at = self._held[seen:], self._at - seen
        new, self._new = self._new, []
        return [
            joined
            for (kind, is_call), parts in groupby(new, lambda part: (part.kind, not part.text))
            for joined in (list(parts) if is_call else [_joined(kind, parts)])
        ]

    def _emit(self, kind: ReplyKind, *texts: str) -> None:
        said = [text for text in texts if text]
        self._decided[kind] += said
        self._new += [ReplyPart(kind, text) for text in said]

    def _take(self, end: int) -> str:
        """Take what is held from `_at` to `end`: it is decided on."""
        text = self._held[self._at : end]
        self._at = end
        return text

    def _take_blank(self) -> bool:
        """Set leading white space aside; return whether anything follows it."""
        if blank := _BLANK.match(self._held, self._at):
            self._blank.append(self._take(blank.end()))
        return self._at < len(self._held)

    def _drop_blank(self) -> bool:
        """Drop leading white space; return whether anything follows it."""
        follows = self._take_blank()
        self._blank.clear()
        return follows

    def _step_behind(self, said: str) -> Callable[[], bool]:
        """Choose what comes next behind words that are there already."""
        if not said.lstrip().startswith(THINK):
            return self._text
        thought, closed, answer = said.partition(END_THINK)
        if closed:
            return self._text if answer.strip() else self._text_start
        return self._reason_start if thought.strip() == THINK else self._reason

    def _start(self) -> bool:
        """Tell whether the reply opens with reasoning."""
        self._take_blank()
        if self._held.startswith(THINK, self._at):
            self._take(self._at + len(THINK))
            self._step = self._reason_start
        elif self._ended or not self._may_follow(THINK):
            self._emit("text", *self._blank)
            self._blank.clear()
            self._step = self._text
        else:
            return False
        return True

    def _reason_start(self) -> bool:
        follows = self._drop_blank()
        if follows:
            self._step = self._reason
        return follows

    def _reason(self) -> bool:
        self._take_blank()
        found = self._held.find(END_THINK, self._at)
        closed = found >= 0
        if self._ended and not closed:
            self._emit("reasoning", *self._blank, self._take(len(self._held)))
            return False
        end = found if closed else len(self._held) - self._begun(END_THINK)
        said = self._held[self._at : end].rstrip()
        if said:
            self._emit("reasoning", *self._blank, self._take(self._at + len(said)))
            self._blank.clear()
        if closed:
            self._take(found + len(END_THINK))
            self._step = self._text_start
        return closed

    def _may_follow(self, tag: str) -> bool:
        """Tell whether a tag stands or begins where the reply is not decided on."""
        return tag.startswith(self._held[self._at : self._at + len(tag)])

    def _begun(self, tag: str) -> int:
        """Count the characters of a tag that have come at the end of what is held."""
        sizes = range(len(tag) - 1, 0, -1)
        return next((size for size in sizes if self._held.endswith(tag[:size], self._at)), 0)

    def _text_start(self) -> bool:
        follows = self._drop_blank()
        if follows:
            self._step = self._text
        return follows

    def _text(self) -> bool:
        """Text, up to where a call opens."""
        opened = _OPENED.search(self._held, self._at) if self._tools else None
        if opened and opened["bare"]:
            self._emit("text", self._take(opened.end()))
            self._warn("no JSON follows it")
            return True
        if opened:
            self._emit("text", self._take(opened.start()))
            self._opener = self._take(opened.start("tag" if opened["tag"] else "word"))
            self._json, self._depth, self._quoted = [], 0, False
            self._step = self._call
            return True
        begun = None
        if self._tools and not self._ended:
            begun = _OPENING.search(self._held, self._at)
        if self._tools and self._ended and CALL in self._held[self._at :]:
            self._warn("the reply ended inside it")
        self._emit("text", self._take(begun.start() if begun else len(self._held)))
        return False

    def _call(self) -> bool:
        """A call, up to where its JSON ends."""
        closed = self._scan()
        if not closed and not self._ended:
            return False
        if not closed:
            self._json.append(self._take(len(self._held)))
        self._step = self._text
        call = "".join(self._json)
        try:
            if not closed:
                raise ValueError("the reply ended inside it")
            calls = read_calls(read_json_text(call))
            self.tool_calls += calls
            self._new.append(ReplyPart("text", "", tuple(calls)))
            self._step = self._call_end
        except ValueError as error:
            self._warn(str(error))
            self._emit("text", self._opener, call)
        return closed

    def _call_end(self) -> bool:
        """After a call: white space, and its closing tag."""
        if not self._drop_blank():
            return False
        if self._held.startswith(END_CALL, self._at):
            self._take(self._at + len(END_CALL))
            self._step = self._text_start
        elif self._ended or not self._may_follow(END_CALL):
            self._step = self._text
        else:
            return False
        return True

    def _scan(self) -> bool:
        """Take the JSON of a call as far as it has come; return whether it ends there.

        The closing tag ends it too, as do brackets that close more than was opened.
        """
        place = self._at
        while found := (_STRING_END if self._quoted else _STRING_OR_BRACKET).search(
            self._held, place
        ):
            mark, place = found[0], found.end()
            if mark == "\\":
                if place == len(self._held):  # what is escaped has not come yet
                    self._json.append(self._take(found.start()))
                    return False
                place += 1
            elif mark == '"':
                self._quoted = not self._quoted
            else:
                self._depth += {"[": 1, "{": 1}.get(mark, -1)
                if self._depth <= 0 or mark == END_CALL:
                    self._json.append(self._take(place))
                    return True
        begun = 0 if self._quoted else self._begun(END_CALL)
        self._json.append(self._take(max(place, len(self._held) - begun)))
        return False

    def _warn(self, reason: str) -> None:
        self.warnings.append(f"A tool call could not be read and stays in the text: {reason}.")


def _joined(kind: ReplyKind, parts: Iterable[ReplyPart]) -> ReplyPart:
    return ReplyPart(kind, "".join(part.text for part in parts))
