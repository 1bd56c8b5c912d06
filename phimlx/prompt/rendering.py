"""A conversation on its way through a chat template: marked strings in, text and token ids out."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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
        given = {"add_generation_prompt": add_generation_prompt, "messages": self.turns[:turns]}
        return self.template.render({**self.variables, **given})

    def complete_text(self, add_generation_prompt: bool) -> str:
        """Render all turns, and see that none but a reply is left out.

        Raises:
            PromptError: naming the message that the template has no place for.
        """
        text = self.text(add_generation_prompt)
        for index, turn in enumerate(self.turns):
            if turn["role"] != "assistant" and turn["content"].strip() not in text:
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

    Each prompt is rendered by itself, whatever the template does with what comes later, but only
    what stands behind its last control token is encoded again.

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
        turns = rendering.turns
        self._seen = list(accumulate(map(self._end_of, turns), max))
        systems = (i for i, turn in enumerate(turns) if turn["role"] == "system")
        self._first_system = next(systems, 0)

    def prompt_length(self, index: int) -> int | None:
        """Count the ids that are the prompt for a reply at `messages[index]`.

        None where they do not begin with it: of the messages before the reply the template then
        makes another prompt than it does of these in the whole conversation.

        Raises:
            PromptError: where the template has no place for one of them.
        """
        prompt = self._prompt(index)
        if prompt is None:
            ids = self._encode_prompt(index)
            return len(ids) if self.ids[: len(ids)] == ids else None
        border = bisect_right(self._borders, (len(prompt), len(self.ids))) - 1
        end, count = self._borders[border]
        rest = [token for ids, _, _ in self._rendering.encode(prompt, end) for token in ids]
        length = count + len(rest)
        return length if self.ids[count:length] == rest else None

    def _prompt(self, index: int) -> str | None:
        """Render a prompt; None where it is not simply the beginning of the whole text."""
        turns = index + self._added
        if self._first_system >= turns:
            return None  # alone, it may get a system message that the whole lacks, to hold tools
        prompt = self._rendering.text(True, turns)
        inside = self._seen[turns - 1] <= len(prompt)
        return prompt if inside and self._text.startswith(prompt) else None

    def _end_of(self, turn: Mapping[str, Any]) -> float:
        """Find where in the text a turn that must not be left out ends first."""
        if turn["role"] == "assistant":
            return 0
        content = turn["content"].strip()
        start = self._text.find(content)
        return math.inf if start < 0 else start + len(content)
