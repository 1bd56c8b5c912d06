"""Prompt tokens -> reply tokens: prefill in pieces, then decoding one token ahead of the reader.

Knows a model, its cache and a sampler; knows nothing of text, stop strings or templates.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile

import mlx.core as mx
import numpy as np

from phimlx.errors import GenerationError, PromptError
from phimlx.generation.sampler import Sampler
from phimlx.machine.device import suited
from phimlx.models.base import CausalLM
from phimlx.models.cache.kv import Cache
from phimlx.models.phi4mm.audio import MAX_TOKENS
from phimlx.models.phi4mm.features import ADAPTERS, TEXT, Features, MediaCache, Placeholders
from phimlx.models.phi4mm.model import Phi4MMForCausalLM

# Tokens of a prompt in one forward pass, which bounds working memory
PREFILL_TOKENS = suited(gpu=2048, cpu=512)
CLEAR_EVERY = 256  # tokens between handing freed buffers back to the system

# The arrays of each kind of media, under the names of the checkpoint's processor: a row an item.
ARRAYS = (
    ("input_image_embeds", "image_sizes", "image_attention_mask"),
    ("input_audio_embeds", "audio_embed_sizes", "audio_attention_mask"),
)

Key = int | tuple[bytes, int, bool, int]
"""What a place of a prompt holds: a token, or a piece of an item (its digest, its pieces, whether
it was folded with its padding masked, the piece's number)."""


@dataclass(frozen=True)
class Media:
    """Pictures and sounds of one prompt.

    Attributes:
        arrays: what `encode_media` takes, under its names, all of the prompt's items.
        digests: each item's digest and how many slots it fills, in the order of the prompt.
    """

    arrays: Mapping[str, mx.array]
    digests: tuple[tuple[bytes, int], ...]


@dataclass(frozen=True)
class Item:
    """One picture or sound: its slots are `begin` to `end` of the prompt.

    Attributes:
        kind: 0 a picture, 1 a sound, as everywhere that the two are counted side by side.
    """

    kind: int
    digest: bytes
    begin: int
    end: int


@dataclass(frozen=True)
class Inputs:
    """A prompt with what stands at its slots.

    Attributes:
        keys: what each place holds; equal keys mean equal content.
    """

    prompt: list[int]
    keys: list[Key]
    items: tuple[Item, ...] = ()
    arrays: Mapping[str, mx.array] = field(default_factory=dict)

    @classmethod
    def of(cls, prompt: list[int], media: Media | None, slots: Placeholders | None) -> Inputs:
        """Find each item's place.

        Raises:
            GenerationError: for media that the model has no slots for.
            PromptError: where the items do not fit the prompt's slots.
        """
        if slots is None:
            if media is not None:
                raise GenerationError(
                    "This model takes text only.", hint="phi-4-multimodal sees and hears."
                )
            return cls(prompt, list(prompt))
        digests = () if media is None else media.digests
        places = [place for place, token in enumerate(prompt) if token in slots.tokens]
        filled = sum(count for _, count in digests)
        if len(places) != filled:
            raise PromptError(
                f"The prompt has {len(places)} slots for pictures and sounds, but those given fill "
                f"{filled}."
            )
        arrays = {} if media is None else media.arrays
        masked = "audio_attention_mask" in arrays
        keys: list[Key] = list(prompt)
        items: list[Item] = []
        for digest, count in digests:
            begin = places[sum(item.end - item.begin for item in items)]
            end, token = begin + count, prompt[begin]
            if prompt[begin:end] != [token] * count:
                raise PromptError("The pictures and sounds given are not in the prompt's order.")
            items.append(Item(slots.tokens.index(token), digest, begin, end))
            # A long clip hears the padding of its last chunk where it is alone, and not beside
            # others: with another clip it is another sound.
            folded = masked and items[-1].kind == 1 and count > MAX_TOKENS
            keys[begin:end] = [(digest, count, folded, index) for index in range(count)]
        return cls(prompt, keys, tuple(items), arrays)

    @property
    def adapter(self) -> str | None:
        """What the whole of the prompt calls for."""
        return ADAPTERS[min(item.kind for item in self.items)] if self.items else None

    def features_from(self, start: int, model: Phi4MMForCausalLM) -> Features:
        """What fills the slots from `start` on; items that end before it are not looked at."""
        arrays: dict[str, mx.array] = {}
        skipped, ends = [], []
        for kind, names in enumerate(ARRAYS):
            items = [item for item in self.items if item.kind == kind]
            rest = [item for item in items if item.end > start]
            done = len(items) - len(rest)
            if rest:
                arrays |= {n: self.arrays[n][done:] for n in names if n in self.arrays}
            skipped.append(max(0, start - rest[0].begin) if rest else 0)
            ends.append(sum(item.end - item.begin for item in rest))
        if not arrays:
            return TEXT
        features = model.encode_media(**arrays).between(
            (skipped[0], skipped[1]), (ends[0], ends[1])
        )
        mx.eval([rows for rows in features.parts if rows is not None])
        mx.clear_cache()
        return features


class PromptCache:
    """Keys and values kept from one call to the next, with what they belong to.

    Attributes:
        tokens: what was fed, as keys: what stood at a slot, not the slot's token.
    """

    def __init__(self, model: CausalLM) -> None:
        self.kv = model.make_cache()
        self.tokens: list[Key] = []

    def reuse(self, inputs: Inputs) -> tuple[int, int, Features]:
        """Keep what the prompt shares with the tokens here.

        The last token of a prompt is always computed, since its logits are wanted. Nothing is kept
        where the prompt needs the other LongRoPE table or another adapter.

        Returns:
            How many tokens need not be computed; how many need not be seen, and their features
            where they need to be computed all the same.
        """
        pairs = zip(self.tokens, inputs.keys[:-1], strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        long = self.kv.rope.is_long(len(inputs.keys))
        self.kv.expected_length = len(inputs.keys)
        features, adapters = TEXT, self.kv.adapters
        self.keep(self.tokens[:shared])
        if isinstance(self.kv, MediaCache):
            self.kv.expected_adapters = (inputs.adapter,)
            adapters = self.kv.expected_adapters
            features = self.kv.features[0] if self.kv.features else TEXT
        if (self.kv.long, self.kv.adapters) == ((long,), adapters):
            return shared, shared, TEXT
        self.keep([])
        return 0, shared, features

    def keep(self, tokens: list[Key]) -> None:
        """`tokens` are what was fed; those count whose keys and values are complete."""
        self.kv.trim(len(tokens))
        self.tokens = tokens[: self.kv.length]


def generate_tokens(
    model: CausalLM,
    prompt: list[int],
    sampler: Sampler,
    max_tokens: int,
    cache: PromptCache,
    on_prefill: Callable[[int, int], None] | None = None,
    media: Media | None = None,
) -> Generator[int]:
    """Yield up to `max_tokens` tokens that follow the prompt.

    While one token is read the next is already being computed. However the reader stops, the cache
    is left holding what has been computed, ready for the next prompt.

    Args:
        prompt: at least one token.
        cache: what earlier calls left; what the prompt shares with it is not computed again.
        on_prefill: called with the tokens computed and the tokens to compute, after each piece.
        media: what fills the prompt's slots.

    Raises:
        GenerationError: for media given to a model that takes text only.
        PromptError: where the media do not fit the prompt's slots.
    """
    inputs = Inputs.of(prompt, media, model.placeholders)
    tokens = inputs.keys
    try:
        with wired_memory():
            start, seen, features = cache.reuse(inputs)
            if isinstance(model, Phi4MMForCausalLM):
                features = features.then(inputs.features_from(seen, model))
            hidden = _prefill(model, prompt[start:], features, cache.kv, on_prefill)
            token = sampler(_logits(model, hidden))  # [1]
            mx.async_eval(token)
            for count in range(1, max_tokens + 1):
                current = token
                if count < max_tokens:
                    hidden = _hidden_states(model, current[:, None], cache.kv, TEXT)[:, -1]
                    token = sampler(_logits(model, hidden))
                    mx.async_eval(token)
                tokens.append(current.item())  # type: ignore[arg-type]
                yield tokens[-1]  # type: ignore[misc]
                if count % CLEAR_EVERY == 0:
                    mx.clear_cache()
    finally:
        cache.keep(tokens)


def _prefill(
    model: CausalLM,
    prompt: list[int],
    features: Features,
    kv: Cache,
    on_prefill: Callable[[int, int], None] | None,
) -> mx.array:
    """Feed a prompt in pieces; returns the hidden states of its last token, `[1, hidden]`."""
    length, used = len(prompt), (0, 0)
    for begin in range(0, length, PREFILL_TOKENS):
        piece = mx.array([prompt[begin : begin + PREFILL_TOKENS]])  # [1, length]
        filling = TEXT
        if features is not TEXT and model.placeholders is not None:
            images, audio = model.placeholders.count(np.array(piece))[0]
            start, used = used, (used[0] + images, used[1] + audio)
            filling = features.between(start, used)
        hidden = _hidden_states(model, piece, kv, filling)
        if begin + PREFILL_TOKENS < length:
            mx.eval(kv.state)
            mx.clear_cache()
        if on_prefill is not None:
            on_prefill(min(begin + PREFILL_TOKENS, length), length)
    return hidden[:, -1]


def _hidden_states(model: CausalLM, input_ids: mx.array, kv: Cache, features: Features) -> mx.array:
    if isinstance(model, Phi4MMForCausalLM):
        return model.hidden_states(input_ids, kv, features=features)
    return model.hidden_states(input_ids, kv)


def _logits(model: CausalLM, hidden: mx.array) -> mx.array:
    """Logits `[1, vocab]`; a slot has no chance, since a reply has nothing to fill it with."""
    logits = model.head(hidden)
    if model.placeholders is not None:
        logits[:, mx.array(model.placeholders.tokens)] = -mx.inf
    return logits


@contextmanager
def wired_memory() -> Iterator[None]:
    """Keep the weights resident while a reply is generated, where the system can (Metal)."""
    if not mx.metal.is_available():
        yield
        return
    limit = mx.device_info()["max_recommended_working_set_size"]
    before = mx.set_wired_limit(int(limit))
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)
