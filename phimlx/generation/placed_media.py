"""Images and sounds of a prompt, each at its place among the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from phimlx.errors import GenerationError, PromptError
from phimlx.models.base import CausalLM
from phimlx.models.features import TEXT, Features, Placeholders
from phimlx.models.phi4mm.conformer import MAX_TOKENS, audio_tokens

IMAGE, AUDIO = 0, 1
FRAMES = 8  # that a sound's token is made of


@dataclass(frozen=True)
class Media:
    """Images and sounds of one prompt, prepared for the encoders.

    Attributes:
        arrays: arguments of `encode_media`, under their names, all of the prompt's items: a row an
            item, of a sound where the name says audio.
        digests: each item's digest and how many placeholder tokens it fills, in the order of the
            prompt; an item that was cut off with the end of the prompt fills fewer than it has
            features.
        cut: tokens of the prompt that were left out, behind the last that the model reads.
    """

    arrays: Mapping[str, mx.array]
    digests: tuple[tuple[bytes, int], ...]
    cut: int = 0

    def beginning(self, tokens: int) -> Media:
        """What of it fills the first of the prompt's placeholder tokens. Arrays stay whole."""
        kept = []
        for digest, count in self.digests:
            if tokens > 0:
                kept.append((digest, min(count, tokens)))
            tokens -= count
        return replace(self, digests=tuple(kept))


@dataclass(frozen=True)
class MediaItem:
    """An image or a sound at its place; equal items have equal features.

    Attributes:
        kind: IMAGE or AUDIO.
        begin, end: its placeholder tokens among the prompt's.
        beyond: frames of padding that a sound's last token hears, and whether it hears that of its
            last chunk. Beside other sounds a sound is another one.
    """

    kind: int
    digest: bytes
    begin: int
    end: int
    beyond: tuple[int, bool] = (0, False)


@dataclass(frozen=True)
class PlacedMedia:
    """Items in the order of the prompt, and the arrays that they are encoded from.

    Attributes:
        adapter: the one of the checkpoint's own that the whole of the prompt calls for.
    """

    items: tuple[MediaItem, ...] = ()
    arrays: Mapping[str, mx.array] = field(default_factory=dict)
    adapter: str | None = None

    @classmethod
    def place(
        cls, prompt: Sequence[int], media: Media | None, placeholders: Placeholders | None
    ) -> PlacedMedia:
        """Find each item's place.

        Raises:
            GenerationError: for media that the model has no placeholder tokens for.
            PromptError: where the items do not fit the prompt's placeholders.
        """
        if placeholders is None:
            if media is not None:
                raise GenerationError(
                    "This model takes text only.", hint="phi-4-multimodal sees and hears."
                )
            return cls()
        digests = () if media is None else media.digests
        places = [place for place, token in enumerate(prompt) if token in placeholders.tokens]
        filled = sum(count for _, count in digests)
        if len(places) != filled:
            raise PromptError(
                f"The prompt has {len(places)} placeholder tokens for pictures and sounds, but "
                f"those given fill {filled}."
            )
        if media is None:
            return cls()
        beyond = iter(_heard_beyond(media.arrays))
        items: list[MediaItem] = []
        used = 0
        for digest, count in digests:
            begin = places[used]
            end, token = begin + count, prompt[begin]
            if list(prompt[begin:end]) != [token] * count:
                raise PromptError("The pictures and sounds given are not in the prompt's order.")
            kind = placeholders.tokens.index(token)
            heard = next(beyond) if kind == AUDIO else (0, False)
            items.append(MediaItem(kind, digest, begin, end, heard))
            used += count
        held = [any(item.kind == kind for item in items) for kind in (IMAGE, AUDIO)]
        return cls(tuple(items), media.arrays, placeholders.adapter_for(held))

    def encode(self, model: CausalLM, start: int) -> Features:
        """Features for the placeholder tokens from `start` on; items that end before it are not
        looked at."""
        arrays: dict[str, mx.array] = {}
        skipped, filled = [], []
        for kind in (IMAGE, AUDIO):
            items = [item for item in self.items if item.kind == kind]
            rest = [item for item in items if item.end > start]
            done = len(items) - len(rest)
            if rest:
                own = {n: rows for n, rows in self.arrays.items() if ("audio" in n) == kind}
                arrays |= {name: rows[done : len(items)] for name, rows in own.items()}
            skipped.append(max(0, start - rest[0].begin) if rest else 0)
            filled.append(sum(item.end - item.begin for item in rest))
        if not arrays:
            return TEXT
        features = model.encode_media(**arrays).between(
            (skipped[0], skipped[1]), (filled[0], filled[1])
        )
        mx.eval([rows for rows in features.parts if rows is not None])
        mx.clear_cache()
        return features


def _heard_beyond(arrays: Mapping[str, mx.array]) -> list[tuple[int, bool]]:
    """Count the padding that each sound hears behind its own frames, in `AudioEmbedding.encode`.

    A token is made of eight frames. Those that a sound's last token lacks are silence where another
    sound is longer, since the array is padded there before it is normalized, and zeros of the
    convolution where none is. A sound of several chunks hears its last chunk's padding where it is
    alone.
    """
    if "input_audio_embeds" not in arrays:
        return []
    sounds, longest, _ = arrays["input_audio_embeds"].shape
    mask = arrays.get("audio_attention_mask")
    if mask is None:
        return [(0, audio_tokens(longest) > MAX_TOKENS)] * sounds
    lengths = (np.array(mask) != 0).sum(axis=1).tolist()
    return [(min(FRAMES * audio_tokens(n), longest) - n, False) for n in lengths]
