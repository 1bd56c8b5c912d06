"""A language model that takes media: features stand in the places of placeholder tokens."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from phimlx.errors import PromptError
from phimlx.models.base import CausalLM, ForwardPass
from phimlx.models.cache.kv import Cache, with_past
from phimlx.models.cache.media import MediaCache
from phimlx.models.cache.store import Store
from phimlx.models.features import Features, Placeholders


class MultimodalLM(CausalLM):
    """A language model that takes media.

    Where the checkpoint holds adapters, each row's follows from the whole of that row, cached part
    included. Nothing of a call is left behind but what its cache holds.
    """

    placeholders: Placeholders

    def encode_frozen(self, **inputs: mx.array | None) -> Features:
        """Run the encoders as `encode_media` does, up to where training may change something.

        Features of images are then `project_images`' to finish.
        """
        return self.encode_media(**inputs)

    def project_images(self, rows: mx.array) -> mx.array:
        """Turn what `encode_frozen` makes of images into rows of the language model."""
        return rows

    def project_audio(self, rows: mx.array, adapter: str | None) -> mx.array:
        """Turn features of sounds `[tokens, width]` into rows of the language model.

        Args:
            adapter: of the row that they stand in.
        """
        raise NotImplementedError  # of a model that hears nothing there are no such features

    def _begin(
        self,
        input_ids: mx.array,
        cache: Cache | None,
        attention_mask: mx.array | None,
        features: Features | None,
    ) -> tuple[mx.array, ForwardPass]:
        batch, length = input_ids.shape
        # Without a cache, one without layers still says where the tokens stand.
        kept = self._media_cache(cache) or self._make_cache(Store(0))
        rows = self.placeholders.by_row(input_ids, features)
        held = kept.features_with(rows)
        adapters = kept.adapters_of(held)
        past = kept.tokens_to_recompute((batch, length), attention_mask, adapters)
        if past is not None:
            input_ids, attention_mask = with_past(past, input_ids, attention_mask)
            rows = held
        positions, long, mask, routing = kept.extend(input_ids, attention_mask, adapters, held)
        rope = self.config.rope(positions, long)
        forward = ForwardPass(positions, mask, rope, cache, routing)
        return self._embed(input_ids, rows, adapters), forward

    def _make_cache(
        self,
        store: Store,
        expected_length: int = 0,
        expected_adapters: tuple[str | None, ...] = (),
    ) -> MediaCache:
        return MediaCache(
            store,
            self.config.rope,
            self.placeholders,
            expected_length,
            expected_adapters,
            self.config.sliding_window,
            self.default_adapter,
            self.loaded_routes,
        )

    @staticmethod
    def _media_cache(cache: Cache | None) -> MediaCache | None:
        if cache is not None and not isinstance(cache, MediaCache):
            raise TypeError("a multimodal model's cache comes from its own make_cache")
        return cache

    def _embed(
        self, input_ids: mx.array, rows: tuple[Features, ...], adapters: tuple[str | None, ...]
    ) -> mx.array:
        """Embeddings `[batch, length, hidden]`, with each row's features at its placeholders."""
        x = self.embed(input_ids)
        if not any(any(row.counts) for row in rows):
            return x
        values = (
            [row.images for row in rows if row.images is not None],
            [
                self.project_audio(row.audio, adapter)
                for row, adapter in zip(rows, adapters, strict=True)
                if row.audio is not None
            ],
        )
        flat = x.reshape(-1, x.shape[-1])
        places = self.placeholders.places(np.array(input_ids))
        for indices, given in zip(places, values, strict=True):
            if given:
                flat[mx.array(indices)] = mx.concatenate(given).astype(x.dtype)
        return flat.reshape(x.shape)


def given(array: Any) -> mx.array | None:
    """An array; None for one without numbers, as the references' processors make for no media."""
    if array is None or array.size == 0:
        return None
    return array if isinstance(array, mx.array) else mx.array(array)  # which would be a copy


def needed(array: Any, name: str, beside: str) -> mx.array:
    """An array that another one cannot do without.

    Raises:
        PromptError: where it is not there.
    """
    found = given(array)
    if found is None:
        raise PromptError(f"{beside} comes without {name}.")
    return found
