"""Conversations and texts -> token ids and which of them are to be learned."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from phimlx.adapters.variants import STOP_TOKENS
from phimlx.errors import PromptError, TokenizerError
from phimlx.prompt.reply_parser import THINK
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from phimlx.training.data.row_messages import RowError
from phimlx.training.data.row_types import Conversation

if TYPE_CHECKING:
    from phimlx.api import Phi
    from phimlx.prompt.chat_template import ChatTemplate
    from phimlx.prompt.rendering import EncodedConversation

LossOn = Literal["assistant", "last", "all"]

END_OF_TEXT = "<|endoftext|>"


class RowEncoder:
    """Encoder of rows as training text, exactly as inference makes prompts.

    A conversation is trained on as `ChatTemplate.encode` encodes it, up to the token that ends its
    last reply (`<|end|>`, `<|im_end|>`), at which generation stops. What a template puts after
    that, such as Phi-4-mini's `<|endoftext|>`, inference never sees, and neither does training.
    A text gets `<|endoftext|>` after it.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: Callable[[], ChatTemplate], name: str | None = None
    ) -> None:
        """`template` is called when there is a first conversation: texts need none. `name`, the
        model's, tells whether it reasons where its tokenizer does not."""
        self.tokenizer = tokenizer
        self.thinks = THINK in tokenizer.control_tokens or "reasoning" in (name or "").lower()
        self._make_template = template
        control = tokenizer.control_tokens
        self.stop_tokens = frozenset(control[name] for name in STOP_TOKENS if name in control)

    @classmethod
    def of(cls, phi: Phi) -> RowEncoder:
        """Raises TokenizerError where the model has no tokenizer."""
        if phi.tokenizer is None:
            return cls.load(phi.path, phi.name)
        return cls(phi.tokenizer, lambda: phi.template, phi.name)

    @classmethod
    def load(cls, folder: Path, name: str | None = None) -> RowEncoder:
        """From a model's folder, without its weights; `name` as in `ChatTemplate.load`.

        Raises:
            TokenizerError: where it has no tokenizer.
        """
        from phimlx.prompt.chat_template import ChatTemplate

        tokenizer = Tokenizer.load(folder)
        return cls(tokenizer, lambda: ChatTemplate.load(folder, tokenizer, name), name)

    @cached_property
    def template(self) -> ChatTemplate:
        return self._make_template()

    def conversation(
        self, said: Conversation, loss_on: LossOn = "assistant"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 `[length]` and which are learned, bool `[length]`.

        Of a reply its text, its calls and the token that ends it are learned: what stands after
        the prompt that inference would give for it. What follows the
        last token that is learned is left out. With "all" every token is learned but the first.
        Replies of weight 0 never are.

        Raises:
            PromptError: where the template has no place for a message.
            RowError: where a reply does not follow its prompt, or is not ended, or where weights
                do not go with what is to be learned.
        """
        messages = said.messages
        encoded = self.template.encode_conversation(messages, said.tools)
        ids = list(encoded.ids)
        while len(ids) > 1 and ids[-1] in self.stop_tokens and ids[-2] in self.stop_tokens:
            ids.pop()
        tokens = np.array(ids, np.int32)
        supervised = np.zeros(len(ids), bool)
        if loss_on == "all":
            supervised[1:] = True
            for index in sorted(said.unlearned):
                if messages[index].role != "assistant":
                    raise RowError(
                        f"messages[{index}] has the weight 0, but is no reply, and all is to be "
                        "learned.",
                        hint="Learn replies alone (--loss-on assistant), or leave the weight out.",
                    )
                supervised[self._reply(ids, encoded, index)] = False
            return tokens, supervised
        replies = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if loss_on == "last":
            replies = replies[-1:]
        for index in replies:
            if index >= said.given and index not in said.unlearned:
                supervised[self._reply(ids, encoded, index)] = True
        length = learned_length(supervised)
        return tokens[:length], supervised[:length]

    def text(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 `[length]` and which are learned: all but the first.

        Control tokens are recognised, so that text which a template has rendered elsewhere means
        what it meant there; `<|endoftext|>` follows unless a token that ends a turn is last.

        Raises:
            TokenizerError: where the tokenizer has no end of text.
        """
        control = self.tokenizer.control_tokens
        if END_OF_TEXT not in control:
            raise TokenizerError(
                f"The tokenizer has no {END_OF_TEXT}, so that nothing can end a text.",
                hint="Get the tokenizer files that belong to the model into its folder.",
            )
        ids = self.tokenizer.encode(text, control=True)
        if not ids or ids[-1] not in self.stop_tokens:
            ids.append(control[END_OF_TEXT])
        supervised = np.ones(len(ids), bool)
        supervised[0] = False
        return np.array(ids, np.int32), supervised

    def _reply(self, ids: list[int], encoded: EncodedConversation, index: int) -> slice:
        """Find where a reply and the token that ends it stand in a whole conversation."""
        place = f"messages[{index}]"
        if not index:
            raise RowError(f"{place} is a reply to nothing.", hint="Put a user's message first.")
        start = encoded.prompt_length(index)
        if start is None or start > len(ids):
            raise RowError(
                f"{place} does not follow the prompt that the chat template makes of the messages "
                "before it, so that training would teach what inference never asks.",
                hint="Where replies begin with reasoning, write it as the model does; or learn the "
                "last reply only.",
            )
        end = next((i for i in range(start, len(ids)) if ids[i] in self.stop_tokens), None)
        if end is None:
            raise PromptError(
                f"The chat template does not end {place} with a token at which generation stops.",
                hint="Use the chat template that the model's publisher ships.",
            )
        return slice(start, end + 1)


def learned_length(supervised: np.ndarray) -> int:
    """Count the tokens up to the last that is learned; all where none is."""
    places = np.flatnonzero(supervised)
    return int(places[-1]) + 1 if len(places) else len(supervised)
