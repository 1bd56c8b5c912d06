"""Keys and values that one request leaves to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from phimlx.errors import GenerationError, PhimlxError
from phimlx.generation.placed_media import MediaItem, PlacedMedia
from phimlx.models.base import CausalLM
from phimlx.models.cache.kv import Cache
from phimlx.models.features import TEXT, Features
from phimlx.models.lora import DEFAULT


class Prefixes(Protocol):
    """Where prompt caches are kept beyond a process."""

    def find(
        self,
        prompt: list[int],
        items: tuple[MediaItem, ...],
        adapter: str | None,
        loaded: str | None,
        kv_bits: int | None,
        shared: int,
    ) -> PromptCache | None:
        """Read the cache that shares most with a prompt, where that is more than `shared`."""


class Holder(Protocol):
    """A request, as a cache knows it."""

    def cancel(self, error: PhimlxError) -> None: ...


@dataclass(frozen=True)
class Prefix:
    """Part of a prompt that is there already.

    Attributes:
        computed: tokens whose keys and values are in the cache.
        encoded: tokens whose media need not be encoded again, at least as many.
        features: theirs, where keys and values have to be computed all the same.
    """

    computed: int
    encoded: int
    features: Features


class PromptCache:
    """A key/value cache that requests use one after the other, each computing only what is new.

    It belongs to one model, and to one request at a time: a request that takes it ends the one that
    had it. What the cache says of itself is what was fed to the model, so it is right wherever a
    request stopped.

    Attributes:
        kv: keys, values and tokens of one row.
        prefixes: looked in for more of a prompt than is here; None where nothing is.
    """

    def __init__(
        self, model: CausalLM, kv_bits: int | None = None, prefixes: Prefixes | None = None
    ) -> None:
        """Make an empty cache.

        Args:
            kv_bits: 8 or 4, to hold keys and values quantized; as they come where None.
            prefixes: looked in for more of a prompt than is here.

        Raises:
            GenerationError: where the model's cannot be quantized so.
        """
        self.model = model
        self.kv = model.make_cache(kv_bits=kv_bits)
        self.prefixes = prefixes
        self._items: tuple[MediaItem, ...] = ()  # those of the last prompt
        self._holder: Holder | None = None

    @classmethod
    def restored(cls, model: CausalLM, kv: Cache, items: tuple[MediaItem, ...]) -> PromptCache:
        """Make a cache that holds what another one held."""
        cache = cls(model, kv.kv_bits)
        cache.kv, cache._items = kv, items
        return cache

    @property
    def items(self) -> tuple[MediaItem, ...]:
        """Images and sounds among the tokens."""
        return self.items_within(self.kv.length)

    def items_within(self, length: int) -> tuple[MediaItem, ...]:
        """Images and sounds among so many tokens of the last prompt and its reply."""
        return tuple(item for item in self._items if item.begin < length)

    @property
    def tokens(self) -> list[int]:
        """Tokens whose keys and values are here."""
        return [] if self.kv.tokens is None else self.kv.tokens[0, : self.kv.length].tolist()  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take."""
        return self.kv.nbytes

    @property
    def kv_bits(self) -> int | None:
        """What keys and values are quantized to; None where they are not."""
        return self.kv.kv_bits

    def check(self, model: CausalLM, kv_bits: int | None = None) -> None:
        """Check that a request can use the cache.

        Args:
            model: the request's.
            kv_bits: which it asks for; those of the cache where None.

        Raises:
            GenerationError: where the cache belongs to another model or has other bits.
        """
        if model is not self.model:
            raise GenerationError(
                "The cache belongs to another model, or to the same one loaded another time.",
                hint="Give each model a cache of its own: phi.new_cache().",
            )
        if kv_bits not in (None, self.kv_bits):
            held = "unquantized" if self.kv_bits is None else f"at {self.kv_bits} bits"
            raise GenerationError(
                f"The cache holds keys and values {held}, but kv_bits is {kv_bits}.",
                hint=f"Make one for it: phi.new_cache(kv_bits={kv_bits}).",
            )

    def lease(self, request: Holder) -> None:
        """Hand the cache to a request, and end the one that had it."""
        if self._holder is not None and self._holder is not request:
            self._holder.cancel(
                GenerationError(
                    "This reply was ended: another one was begun with the same cache.",
                    hint="Give replies that are read at the same time a cache each.",
                )
            )
        self._holder = request

    def release(self, request: Holder) -> None:
        """Take the cache back from a request; nothing where another one has it."""
        if self._holder is request:
            self._holder = None

    def reuse(self, prompt: list[int], media: PlacedMedia, loaded: str | None = DEFAULT) -> Prefix:
        """Keep what a prompt shares with the tokens here.

        The last token of a prompt is always computed, since its logits are wanted. Nothing is kept
        where the prompt needs other rope factors or another adapter.

        Args:
            loaded: the adapter that it uses of those that were loaded beside the model.
        """
        shared = self._trim(prompt, media, loaded)
        if self.prefixes is not None:
            usable = shared if self.kv.serves() else 0
            own = self.kv.expected_loaded[0]
            found = self.prefixes.find(
                prompt, media.items, media.adapter, own, self.kv_bits, usable
            )
            if found is not None and (kept := found._trim(prompt, media, loaded)) > usable:
                self.kv, self._items, shared = found.kv, found.items, kept
        self._items = media.items
        if self.kv.serves():
            return Prefix(shared, shared, TEXT)
        features = self.kv.features[0] if self.kv.features else TEXT
        self.kv.trim(0)
        return Prefix(0, shared, features)

    def take(self) -> Cache:
        """Hand over keys and values; the cache is empty then."""
        kv, self.kv = self.kv, self.model.make_cache(kv_bits=self.kv_bits)
        return kv

    def _trim(self, prompt: list[int], media: PlacedMedia, loaded: str | None) -> int:
        """Forget what a prompt does not share; the number of tokens that are left."""
        self.kv.trim(shared_tokens(self.tokens, self._items, prompt[:-1], media.items))
        self.kv.trim(self.kv.held)  # what is between is computed with the prompt, in its pieces
        self.kv.expect([len(prompt)], (media.adapter,), (loaded,))
        return self.kv.length


def shared_tokens(
    ours: Sequence[int] | np.ndarray,
    our_items: Sequence[MediaItem],
    theirs: Sequence[int] | np.ndarray,
    their_items: Sequence[MediaItem],
) -> int:
    """Count the first tokens that are the same and stand for the same media."""
    count = min(len(ours), len(theirs))
    differs = np.asarray(ours[:count]) != np.asarray(theirs[:count])
    shared = int(differs.argmax()) if differs.any() else count
    for one, other in zip(our_items, their_items, strict=False):
        if one != other:
            return min(shared, one.begin, other.begin)
    return shared
