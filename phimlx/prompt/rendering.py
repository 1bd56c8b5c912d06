"""A conversation on its way through a chat template: marked strings in, text and token ids out."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

from phimlx.errors import PromptError
from phimlx.prompt.sandbox.escape import ControlTokenEscaper
from phimlx.prompt.tokenizer.tokenizer import Tokenizer

PROBE = "qpzvkxw"  # a word that no conversation holds
END = "xwkvzpq"  # and another


class Renders(Protocol):
    """A compiled template."""

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the text; raises PromptError where the template fails."""

    def render_turns(self, variables: Mapping[str, Any]) -> list[str] | None:
        """Return the text in parts, as `Template.render_turns`, where messages are on their own."""


@dataclass(frozen=True)
class Rendering:
    """A conversation as its template sees it.

    Attributes:
        variables: beside messages and add_generation_prompt.
        turns: the messages, their strings marked.
        mark: what keeps text of messages apart from control tokens.
    """

    template: Renders
    variables: Mapping[str, Any]
    turns: list[dict[str, Any]]
    mark: str
    tokenizer: Tokenizer
    escaper: ControlTokenEscaper

    def text(self, add_generation_prompt: bool, turns: int | None = None) -> str:
        """Render all turns, or so many."""
        return self.template.render(self._given(add_generation_prompt, turns))

    def _given(self, add_generation_prompt: bool, turns: int | None = None) -> dict[str, Any]:
        given = {"add_generation_prompt": add_generation_prompt, "messages": self.turns[:turns]}
        return {**self.variables, **given}

    def complete_text(self, add_generation_prompt: bool) -> str:
        """Render all turns, and see that none but a reply is left out.

        Raises:
            PromptError: naming the message that the template has no place for.
        """
        text = self.text(add_generation_prompt)
        for index, end in enumerate(self.ends_of_words(text)):
            if end is None:
                turn = self.turns[index]
                # Left out, or only changed? A plain word in its place tells.
                probe = [*self.turns[:index], turn | {"content": PROBE}, *self.turns[index + 1 :]]
                probed = replace(self, turns=probe).text(add_generation_prompt)
                if PROBE not in probed.lower():
                    raise PromptError(
                        f"messages[{index}] would be left out: the model's chat template has no "
                        f"place for the role {turn['role']} there.",
                        hint="Put what it says into a user's message.",
                    )
        return text

    def ends_of_words(self, text: str) -> Iterator[int | None]:
        """Find where in the rendered text the words of each turn end, at the latest.

        None where they are nowhere; 0 for a reply, of which a template may leave some out.
        """
        done = 0
        for turn in self.turns:
            if turn["role"] == "assistant":
                yield 0
                continue
            words = turn["content"].strip()
            # Behind those before it, as a rule: looking from there on, no text is read twice.
            if (start := text.find(words, done)) >= 0:
                done = start + len(words)
                yield done
            else:
                start = text.find(words, 0, done + len(words))
                yield None if start < 0 else start + len(words)

    def ends_of_prompts(self, text: str) -> list[int | None] | None:
        """Find where in the rendered text the prompt ends that so many turns make, from none on.

        Of each None where the text may not begin with it. All in one rendering, for a template
        that writes each message by itself; None for another.

        Raises:
            PromptError: where the template fails.
        """
        parts = self.template.render_turns(self._given(True))
        if parts is None:
            return None
        # Once through the turns, or several times: only the last time ends where a prompt does.
        turns = len(self.turns)
        last = len(parts) - turns - 1
        head, pieces, closing = "".join(parts[:last]), parts[last:-1], parts[-1]
        settled = max(place % (turns + 1) for place in range(last) if place == 0 or parts[place])
        found: list[int | None] = []
        end, begins = len(head), text.startswith(head)
        for count in range(turns + 1):
            is_prompt = begins and count >= settled and text.startswith(closing, end)
            found.append(end + len(closing) if is_prompt else None)
            if count < turns:
                begins = begins and text.startswith(pieces[count], end)
                end += len(pieces[count])
        return found

    def open_text(self) -> str:
        """Render all turns up to where the last one's words end: the turn goes on there.

        Raises:
            PromptError: where the template leaves a message out, or changes the last one.
        """
        *before, last = self.turns
        marked = replace(self, turns=[*before, last | {"content": last["content"] + END}])
        text, _, _ = marked.complete_text(add_generation_prompt=False).rpartition(END)
        if not text.endswith(last["content"].lstrip()):
            raise PromptError(
                f"messages[{len(before)}] cannot be continued: the model's chat template leaves "
                "out some of it.",
                hint="Give it without the reasoning, or let the model begin its reply anew.",
            )
        return text

    def encode(self, text: str, start: int = 0) -> Iterator[tuple[list[int], int, bool]]:
        """Encode rendered text from `start` on, piece by piece.

        Yields:
            Token ids of the piece, where in the text it ends, and whether it is a control token.
        """
        at_start = not start
        for piece, end in self.tokenizer.split_with_ends(text, start):
            if isinstance(piece, int):
                yield [piece], end, True
            else:
                said = self.escaper.unescape(piece, self.mark)
                yield self.tokenizer.encode(said, at_start=at_start), end, False
            at_start = False


class EncodedConversation:
    """The token ids of a conversation, and where in them the prompts of its replies end.

    All prompts are found in one rendering where the template writes each message by itself. By
    another each is rendered, whatever the template does with what comes later. Either way only what
    stands behind a prompt's last control token is encoded again.

    Args:
        rendering: of the whole conversation.
        added: how many of its turns, at the beginning, are not among the messages.
        encode_prompt: encodes the prompt for a reply at `messages[index]` by itself.

    Attributes:
        ids: as `ChatTemplate.encode` gives them without a prompt for generation.
    """

    def __init__(
        self, rendering: Rendering, added: int, encode_prompt: Callable[[int], list[int]]
    ) -> None:
        self._rendering, self._added, self._encode_prompt = rendering, added, encode_prompt
        self._text = rendering.complete_text(add_generation_prompt=False)
        self.ids: list[int] = []
        self._borders = [(0, 0)]  # after each control token: characters, ids
        for ids, end, is_control in rendering.encode(self._text):
            self.ids += ids
            if is_control:
                self._borders.append((end, len(self.ids)))
        words = rendering.ends_of_words(self._text)
        self._seen = list(accumulate((math.inf if end is None else end for end in words), max))
        systems = (i for i, turn in enumerate(rendering.turns) if turn["role"] == "system")
        self._first_system = next(systems, 0)

    def prompt_length(self, index: int) -> int | None:
        """Count the ids that are the prompt for a reply at `messages[index]`.

        None where they do not begin with it: of the messages before the reply the template then
        makes another prompt than it does of these in the whole conversation.

        Raises:
            PromptError: where the template has no place for one of them.
        """
        prompt_end = self._end_of_prompt(index)
        if prompt_end is None:
            ids = self._encode_prompt(index)
            return len(ids) if self.ids[: len(ids)] == ids else None
        border = bisect_right(self._borders, (prompt_end, len(self.ids))) - 1
        end, count = self._borders[border]
        start = max(end - 1, 0)  # a token may depend on the character before it
        rest = [
            token
            for ids, _, _ in self._rendering.encode(self._text[start:prompt_end], end - start)
            for token in ids
        ]
        length = count + len(rest)
        return length if self.ids[count:length] == rest else None

    def _end_of_prompt(self, index: int) -> int | None:
        """Find where a prompt ends; None where it is not simply the beginning of the text."""
        turns = index + self._added
        if self._first_system >= turns:
            return None  # alone, it may get a system message that the whole lacks, to hold tools
        if self._ends is None:
            prompt = self._rendering.text(True, turns)
            end = len(prompt) if self._text.startswith(prompt) else None
        else:
            end = self._ends[turns]
        return end if end is not None and self._seen[turns - 1] <= end else None

    @cached_property
    def _ends(self) -> list[int | None] | None:
        """Where the prompts of so many turns end; None where each has to be rendered."""
        return self._rendering.ends_of_prompts(self._text)
