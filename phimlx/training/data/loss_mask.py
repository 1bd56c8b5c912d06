"""Conversations and texts -> token ids and which of them are to be learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from phimlx.adapters.variants import STOP_TOKENS
from phimlx.errors import PromptError, TokenizerError
from phimlx.prompt.reply_parser import THINK
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from phimlx.training.data.media import MediaItem, MediaReader, beside_each_other
from phimlx.training.data.row_messages import RowError
from phimlx.training.data.row_types import Conversation

if TYPE_CHECKING:
    from phimlx.api import Phi
    from phimlx.media.limits import Limits
    from phimlx.models.base import CausalLM
    from phimlx.prompt.chat_template import ChatTemplate
    from phimlx.prompt.messages import Message
    from phimlx.prompt.rendering import EncodedConversation

LossOn = Literal["assistant", "last", "all"]

END_OF_TEXT = "<|endoftext|>"


class Encoded(NamedTuple):
    """Tokens int32 `[length]`, which are learned, bool `[length]`, and what fills placeholders."""

    tokens: np.ndarray
    supervised: np.ndarray
    media: tuple[MediaItem, ...] = ()


class RowEncoder:
    """Encoder of rows as training text, exactly as inference makes prompts.

    A conversation is trained on as `ChatTemplate.encode` encodes it, up to the token that ends its
    last reply (`<|end|>`, `<|im_end|>`), at which generation stops. What a template puts after
    that, such as Phi-4-mini's `<|endoftext|>`, inference never sees, and neither does training.
    A text gets `<|endoftext|>` after it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Callable[[], ChatTemplate],
        name: str | None = None,
        media: MediaReader | None = None,
    ) -> None:
        """`template` is called when there is a first conversation: texts need none. `name`, the
        model's, tells whether it reasons where its tokenizer does not. `media` opens pictures and
        sounds, for a model that takes some."""
        self.tokenizer = tokenizer
        self.media = media
        self.thinks = THINK in tokenizer.control_tokens or "reasoning" in (name or "").lower()
        self._make_template = template
        control = tokenizer.control_tokens
        self.stop_tokens = frozenset(control[name] for name in STOP_TOKENS if name in control)

    @classmethod
    def of(cls, phi: Phi) -> RowEncoder:
        """Raises TokenizerError where the model has no tokenizer."""
        if phi.tokenizer is None:
            return cls.load(phi.path, phi.name)
        media = MediaReader.of(phi.model, phi.path)
        return cls(phi.tokenizer, lambda: phi.template, phi.name, media)

    @classmethod
    def load(
        cls,
        folder: Path,
        name: str | None = None,
        model: CausalLM | None = None,
        limits: Limits | None = None,
    ) -> RowEncoder:
        """From a model's folder, without its weights; `name` as in `ChatTemplate.load`.

        Args:
            model: whose weights need not be there, for rows with pictures or sounds.
            limits: how large these may be.

        Raises:
            TokenizerError: where it has no tokenizer.
        """
        from phimlx.prompt.chat_template import ChatTemplate

        tokenizer = Tokenizer.load(folder)
        media = None if model is None else MediaReader.of(model, folder, limits)
        if model is None or media is None:
            return cls(tokenizer, lambda: ChatTemplate.load(folder, tokenizer, name), name)
        about, tokens = model.architecture, media.kinds
        names = {text: tokens[kind] for kind, text in about.placeholder_texts.items()}

        def template() -> ChatTemplate:
            known = tokenizer.extended(names)
            return ChatTemplate.load(folder, known, name, tokens, None, about.after_media)

        return cls(tokenizer, template, name, media)

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
        tokens, supervised, _ = self.encode(said, loss_on)
        return tokens, supervised

    def encode(self, said: Conversation, loss_on: LossOn = "assistant") -> Encoded:
        """The same as `conversation` gives, and the pictures and sounds among the tokens.

        These fill as many tokens as they have features, none of which is learned.
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
            return self._filled(tokens, supervised, messages)
        replies = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if loss_on == "last":
            replies = replies[-1:]
        for index in replies:
            if index >= said.given and index not in said.unlearned:
                supervised[self._reply(ids, encoded, index)] = True
        length = learned_length(supervised)
        return self._filled(tokens[:length], supervised[:length], messages)

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[int], tuple[MediaItem, ...]]:
        """Encode messages as the prompt for a reply; returns the items among its tokens too.

        Raises:
            PromptError: where the template has no place for a message.
        """
        tokens = np.array(self.template.encode(messages, tools), np.int32)
        filled = self._filled(tokens, np.zeros(len(tokens), bool), messages)
        return filled.tokens.tolist(), filled.media

    def _filled(
        self, tokens: np.ndarray, supervised: np.ndarray, messages: Sequence[Message]
    ) -> Encoded:
        """Repeat each placeholder as often as its picture or sound has features."""
        parts = [part for message in messages for part in message.parts if part.kind != "text"]
        if self.media is None:
            return Encoded(tokens, supervised)
        kinds = {token: kind for kind, token in self.media.kinds.items()}
        places = np.flatnonzero(np.isin(tokens, list(kinds)))
        items: list[MediaItem] = [part.value for part in parts[: len(places)]]
        if [kinds[int(tokens[place])] for place in places] != [item.kind for item in items]:
            raise RowError(
                "The tokens that stand for pictures and sounds are not those of its messages.",
                hint="Leave such tokens out of the text.",
            )
        repeats = np.ones(len(tokens), np.int64)
        repeats[places] = [item.tokens for item in items]
        supervised = supervised.copy()
        supervised[places] = False
        begins = (np.cumsum(repeats) - repeats)[places].tolist()
        placed = [replace(item, begin=at) for item, at in zip(items, begins, strict=True)]
        wide = np.repeat(tokens, repeats), np.repeat(supervised, repeats)
        return Encoded(*wide, beside_each_other(placed))

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
        tokens = np.array(ids, np.int32)
        self._filled(tokens, supervised, ())  # which holds no picture and no sound
        return tokens, supervised

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
