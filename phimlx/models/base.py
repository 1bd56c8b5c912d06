"""The protocol of every architecture's model, by which layers are walked.

Generation, training, measuring and calibration all do the same few lines:

    x, forward = model.embed(input_ids), model.forward_pass(input_ids)
    for layer in model.layers:
        x = layer(x, forward)
    logits = model.head(model.norm(x))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import mlx.core as mx
import mlx.nn as nn

from phimlx.errors import GenerationError
from phimlx.models import registry
from phimlx.models.cache.kv import Cache, with_past
from phimlx.models.cache.quantized import make_store
from phimlx.models.cache.store import Store, attention
from phimlx.models.config import ModelConfig as ModelConfig
from phimlx.models.features import TEXT, Features, Placeholders
from phimlx.models.lora import DEFAULT, LoadedRoutes, Routing
from phimlx.models.registry import Architecture
from phimlx.models.shares import Shares


@dataclass
class ForwardPass:
    """One pass through the layers: all that they share.

    Attributes:
        positions: `[batch or 1, length]`, counted from 0 in each row.
        mask: for `mx.fast.scaled_dot_product_attention`.
        rope: cos and sin, as a `Rope` makes them and `rotate` takes them.
        cache: which each layer's keys and values go to; None where nothing is kept.
        routing: which rows use which adapters; None where none does.
        shared: what a layer hands to later ones, by a name that they agree on.
        outputs: how many positions, counted from the end, a layer's output is wanted of; None for
            all. Less than all is wanted of the model's `tail` alone.
    """

    positions: mx.array
    mask: mx.array | str | None
    rope: tuple[mx.array, mx.array]
    cache: Cache | None = None
    routing: Routing | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    outputs: int | None = None

    def ending(self, outputs: int) -> ForwardPass:
        """The same pass, for the last layers, of which so many positions are wanted."""
        mask = self.mask
        if isinstance(mask, mx.array):
            mask = mask[..., -outputs:, :]
        elif outputs == 1:
            mask = None  # the last one looks at all
        return replace(self, mask=mask, outputs=outputs)

    def wanted(self, x: mx.array, axis: int) -> mx.array:
        """Take the positions along an axis, 1 or 2, whose output is wanted, where all are there."""
        if self.outputs is None:
            return x
        return x[:, -self.outputs :] if axis == 1 else x[:, :, -self.outputs :]

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Attend to the tokens of this pass and to those that the cache holds.

        Args:
            layer: counted from 0; the cache takes its new keys and values.
            queries: `[batch, heads, length, head_dim]`.
            keys, values: `[batch, kv_heads, length, head_dim]`.

        Returns:
            `[batch, heads, length, head_dim]`, computed in the dtype of the queries.
        """
        if self.cache is None:
            return attention(queries, keys, values, self.mask)
        return self.cache.attend(layer, queries, keys, values, self.mask)


class Leading(Protocol):
    """What does a model's passes together with other machines; see `models.lockstep`."""

    def note(self, name: str, *arguments: Any) -> None: ...

    def share(
        self,
        cache: Cache,
        expected_length: int,
        expected_adapters: Sequence[str | None],
        kv_bits: int | None,
    ) -> Cache: ...

    def run(
        self,
        model: CausalLM,
        input_ids: mx.array,
        cache: Cache | None,
        attention_mask: mx.array | None,
        features: Features | None,
        outputs: int | None,
    ) -> mx.array: ...

    def load_adapter(self, model: CausalLM, folder: Path, name: str) -> Any: ...


class CausalLM(nn.Module):
    """A language model. Parameters carry the names of the published checkpoints.

    Attributes:
        model_type: of its record in the registry.
        placeholders: tokens that stand for media in a prompt; None where only text is taken.
        tail: how many of the last layers need be computed only where their output is wanted: the
            first of them keeps what others of its pass attend to.
        loaded_adapters: names of those that were put beside the layers. All rows use `DEFAULT`,
            where it is among them, unless their cache is told otherwise.
        is_changed: whether the default one also changed what all rows share.
        longest_with_media: tokens that the model was made to read of a prompt with media; None for
            all of its context.
        loaded_routes: which rows the loaded adapters are for.
        leader: by which all machines that share the model do its passes; None for a whole one, and
            where none of them leads.
        shares: what this machine has of a model that several share; None for a whole one.
        model: embedding, decoder layers and final norm.
    """

    model_type: ClassVar[str]
    placeholders: Placeholders | None = None
    tail: int = 1
    loaded_adapters: frozenset[str] = frozenset()
    is_changed: bool = False
    longest_with_media: int | None = None
    leader: Leading | None = None
    shares: Shares | None = None
    loaded_routes: LoadedRoutes
    config: ModelConfig
    model: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.loaded_routes = LoadedRoutes()

    @property
    def architecture(self) -> Architecture:
        """The record of what the rest of phimlx needs to know of this architecture."""
        architecture = registry.find(self.model_type)
        assert architecture is not None
        return architecture

    @property
    def feature_widths(self) -> tuple[int, int]:
        """Numbers in one feature of an image and in one of audio; 0 where it takes none."""
        return 0, 0

    @property
    def layers(self) -> list[nn.Module]:
        """Decoder layers, each called as `layer(x, forward)`; taking one out frees its weights."""
        return self.model.layers

    def embed(self, input_ids: mx.array) -> mx.array:
        """Look up `[batch, length]` tokens: `[batch, length, hidden]`."""
        return self.model.embed_tokens(input_ids)

    def norm(self, x: mx.array) -> mx.array:
        """Apply the final norm to `[..., hidden]`."""
        return self.model.norm(x)

    def head(self, x: mx.array) -> mx.array:
        """Turn normed hidden states `[..., hidden]` into logits `[..., vocab]`."""
        layer = self.output_layer
        return layer.as_linear(x) if hasattr(layer, "as_linear") else layer(x)

    @property
    def output_layer(self) -> nn.Module:
        """The layer whose weight makes logits: a linear one, or the embedding where it is tied."""
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    @property
    def default_adapter(self) -> str | None:
        """Name of the adapter that a row uses of which nothing else is said."""
        return DEFAULT if DEFAULT in self.loaded_adapters else None

    @property
    def compute_dtype(self) -> mx.Dtype:
        """The type of the numbers that it computes with, whatever its weights are stored in."""
        return self.embed(mx.zeros((1, 1), mx.int32)).dtype

    def check_adapter(self, name: str | None) -> None:
        """Raise GenerationError where rows cannot use a loaded adapter, or cannot do without."""
        if self.is_changed and name != DEFAULT:
            raise GenerationError(
                "The model was loaded with an adapter that changes more than the layers' "
                "projections, so every request uses it.",
                hint="Load the model without it: phimlx.load(source).",
            )
        if name not in (None, DEFAULT, *self.loaded_adapters):
            raise GenerationError(
                "The request names an adapter that is not loaded, or has been deleted."
            )

    def untie(self) -> None:
        """Give a tied model an output head of its own, which shares the embedding's numbers."""
        embedding = self.model.embed_tokens
        head: nn.Module = nn.Linear(1, 1, bias=False)
        if isinstance(embedding, nn.QuantizedEmbedding):
            form = (embedding.group_size, embedding.bits, embedding.mode)
            head = nn.QuantizedLinear(embedding.group_size, 1, False, *form)
        head.update(embedding.parameters())
        self.lm_head = head.eval()
        self.config = replace(self.config, tie_word_embeddings=False)

    @property
    def unused(self) -> tuple[str, ...]:
        """Patterns of the names of stored tensors that this model does without."""
        # A tied model has no head of its own; some checkpoints store a copy all the same.
        tied = ("lm_head.*",) if self.config.tie_word_embeddings else ()
        return (*self.architecture.unused, *tied)

    def make_cache(
        self,
        expected_length: int = 0,
        expected_adapters: tuple[str | None, ...] = (),
        kv_bits: int | None = None,
    ) -> Cache:
        """Make an empty cache.

        Args:
            expected_length: a length that the sequence is known to reach.
            expected_adapters: for each row the adapter that it is known to need, of a model whose
                checkpoint holds some.
            kv_bits: 8 or 4, to hold keys and values quantized; as they come where None.

        Raises:
            GenerationError: where they cannot be quantized so.
        """
        config = self.config
        store = make_store(config.num_hidden_layers, config.head_dim, kv_bits)
        cache = self._make_cache(store, expected_length, expected_adapters)
        if self.leader is None:
            return cache
        return self.leader.share(cache, expected_length, expected_adapters, kv_bits)

    def _make_cache(
        self,
        store: Store,
        expected_length: int = 0,
        expected_adapters: tuple[str | None, ...] = (),
    ) -> Cache:
        config = self.config
        return Cache(
            store, config.rope, expected_length, config.sliding_window, self.default_adapter
        )

    def forward_pass(
        self,
        input_ids: mx.array,
        cache: Cache | None = None,
        attention_mask: mx.array | None = None,
    ) -> ForwardPass:
        """Prepare a pass of `[batch, length]` tokens; arguments as in a call.

        Nothing is recomputed here: see `Cache.tokens_to_recompute`.
        """
        config = self.config
        # Without a cache, one without layers still says where the tokens stand.
        kept = cache or Cache(Store(0), config.rope, 0, config.sliding_window, self.default_adapter)
        positions, long, mask, routing = kept.extend(input_ids, attention_mask)
        return ForwardPass(positions, mask, config.rope(positions, long), cache, routing)

    def hidden_states(
        self,
        input_ids: mx.array,
        cache: Cache | None = None,
        attention_mask: mx.array | None = None,
        features: Features | None = None,
        outputs: int | None = None,
    ) -> mx.array:
        """Compute what the output head sees, `[batch, outputs, hidden]`; arguments as in a call.

        Args:
            features: of the media that fill these tokens' placeholders, from `encode_media`.
            outputs: how many of the tokens, counted from the last, it is wanted of; None for all.

        Raises:
            MachineLostError: where one of the machines that share the model is gone.
        """
        if self.leader is None:
            return self.own_hidden_states(input_ids, cache, attention_mask, features, outputs)
        return self.leader.run(self, input_ids, cache, attention_mask, features, outputs)

    def own_hidden_states(
        self,
        input_ids: mx.array,
        cache: Cache | None = None,
        attention_mask: mx.array | None = None,
        features: Features | None = None,
        outputs: int | None = None,
    ) -> mx.array:
        """Do this machine's part of `hidden_states`: all of it, where the model is whole."""
        x, forward = self._begin(input_ids, cache, attention_mask, features)
        layers, first = self.layers, len(self.layers) - self.tail
        for layer in layers[:first]:
            x = layer(x, forward)
        ending = forward.ending(outputs or input_ids.shape[1])
        for layer in layers[first:]:
            x = layer(x, ending)
        if cache is not None:
            cache.commit()
        return self.norm(x)

    def _begin(
        self,
        input_ids: mx.array,
        cache: Cache | None,
        attention_mask: mx.array | None,
        features: Features | None,
    ) -> tuple[mx.array, ForwardPass]:
        """Embed the given tokens, after those of the cache that have to be computed again."""
        if features is not None and features is not TEXT:
            raise self._no_media()
        past = None
        if cache is not None:
            batch, length = input_ids.shape
            past = cache.tokens_to_recompute((batch, length), attention_mask)
        if past is not None:
            input_ids, attention_mask = with_past(past, input_ids, attention_mask)
        return self.embed(input_ids), self.forward_pass(input_ids, cache, attention_mask)

    def __call__(
        self,
        input_ids: mx.array,
        cache: Cache | None = None,
        attention_mask: mx.array | None = None,
        **inputs: mx.array | None,
    ) -> mx.array:
        """Compute the logits of every given token.

        Args:
            input_ids: `[batch, length]`.
            cache: what came before, from `make_cache`; extended by this call. The logits are those
                of one pass over everything seen so far: where the sequence crosses the LongRoPE
                step, what the cache held is computed again with the other factors. Keys that
                dynamic NTK scaling turned stay as they are, as in transformers.
            attention_mask: `[batch, length]`, 0 at padding, on either side of a row. Each row's
                logits are those of the row alone; at padding they mean nothing.
            inputs: media, as `encode_media` takes them: they fill the placeholders of this call,
                row after row.

        Returns:
            `[batch, length, vocab]`.

        Raises:
            GenerationError: for media given to a model that takes text only.
        """
        features = self.encode_media(**inputs) if inputs else None
        return self.head(self.hidden_states(input_ids, cache, attention_mask, features))

    def encode_media(self, **inputs: mx.array | None) -> Features:
        """Run the encoders over media, under the names of the checkpoint's own processor.

        Raises:
            GenerationError: for a model that takes text only.
        """
        raise self._no_media()

    @staticmethod
    def _no_media() -> GenerationError:
        return GenerationError(
            "This model takes text only.", hint="phi-4-multimodal sees and hears."
        )
