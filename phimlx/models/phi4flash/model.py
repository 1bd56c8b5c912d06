"""The phi4flash architecture: Phi-4-mini-flash-reasoning.

Half of the layers are a decoder of Mamba and windowed attention. Behind it stand one layer of full
attention, whose keys and values every later attention reads, and gates of the last Mamba layer's
memory. No layer knows positions. Fields carry the published checkpoint's names.

Source: SambaY (arXiv 2507.06607); its author's `modeling_phi3_samba_yocov2_da.py`; ArchScale of
microsoft on GitHub.
"""

from __future__ import annotations

import math
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from phimlx.errors import GenerationError
from phimlx.models.base import CausalLM, ForwardPass
from phimlx.models.cache.kv import Cache
from phimlx.models.cache.store import Held, KeysValues
from phimlx.models.lora import project
from phimlx.models.phi4flash.cache import KEPT, FlashStore, State
from phimlx.models.phi4flash.config import CROSS, FULL, GMU, MAMBA, WINDOW, Phi4FlashConfig
from phimlx.models.phi4flash.scan import BEGINS, selective_scan
from phimlx.models.rope import fuse

# What layers hand to later ones.
MEMORY, KEYS_VALUES = "memory", "keys_values"

SUBNORM_EPS = 1e-5


def _store(forward: ForwardPass) -> FlashStore | None:
    return None if forward.cache is None else cast(FlashStore, forward.cache.store)


@fuse
def _gated(gate: mx.array, x: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * x


class UnquantizedLinear(nn.Module):
    """A linear layer that stays as it is where others are quantized: it steers a state."""

    def __init__(self, input_dims: int, output_dims: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = mx.zeros((output_dims, input_dims))
        if bias:
            self.bias = mx.zeros((output_dims,))

    def __call__(self, x: mx.array) -> mx.array:
        x = x @ self.weight.T
        return x + self.bias if "bias" in self else x


class Convolution(nn.Module):
    """A causal convolution of each channel by itself."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = mx.zeros((channels, 1, width))
        self.bias = mx.zeros((channels,))

    def __call__(self, columns: mx.array, positions: mx.array) -> mx.array:
        """Convolve the last tokens of `[batch, width - 1 + length, channels]`.

        Args:
            positions: of these tokens, `[batch or 1, length]`; none reaches back beyond 0.
        """
        length, width = positions.shape[1], self.weight.shape[-1]
        y = self.bias
        for tap in range(width):
            x = columns[:, tap : tap + length] * self.weight[:, 0, tap]
            back = width - 1 - tap
            y = y + (mx.where((positions >= back)[..., None], x, 0) if back else x)
        return y


class Mamba(nn.Module):
    """A selective state space (Mamba, arXiv 2312.00752)."""

    def __init__(self, config: Phi4FlashConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.keeps_memory = layer == config.middle
        self.widths = (config.d_inner, config.d_state, config.d_conv, config.dt_rank)
        shapes = config.shapes_of(MAMBA)
        self.in_proj = nn.Linear(*shapes["attn.in_proj"], bias=False)
        self.conv1d = Convolution(config.d_inner, config.d_conv)
        self.x_proj = UnquantizedLinear(*shapes["attn.x_proj"])
        self.dt_proj = UnquantizedLinear(*shapes["attn.dt_proj"], bias=True)
        self.A_log = mx.zeros((config.d_inner, config.d_state))
        self.D = mx.zeros((config.d_inner,))
        self.out_proj = nn.Linear(*shapes["attn.out_proj"], bias=False)

    def __call__(self, x: mx.array, forward: ForwardPass) -> mx.array:
        inner, d_state, d_conv, rank = self.widths
        batch, length, _ = x.shape
        routing, positions = forward.routing, forward.positions
        x, gate = mx.split(project(self.in_proj, x, routing), 2, axis=-1)
        store = _store(forward)
        kept = None if store is None else store.state(self.layer)
        a = -mx.exp(self.A_log.astype(mx.float32))
        if kept is None:
            nothing = mx.zeros((batch, d_conv - 1, inner), x.dtype)
            kept = State.of(nothing, mx.zeros((batch, inner, d_state)), a)
        columns = mx.concatenate([kept.columns[:, kept.steps :], x], axis=1)
        x = nn.silu(self.conv1d(columns, positions))  # [batch, length, inner]
        sizes, b, c = mx.split(project(self.x_proj, x, routing), [rank, rank + d_state], axis=-1)
        # In float32, as the reference adds the bias: a step's size goes with its exponential.
        delta = nn.softplus(project(self.dt_proj, sizes.astype(mx.float32), routing))
        x, b, c = (array.astype(mx.float32) for array in (x, b, c))
        inputs = delta * x
        delta = mx.where((positions == 0)[..., None], BEGINS, delta)
        first = 0 if store is None else max(0, length - KEPT)
        state, read = kept.state, []
        for piece in (slice(first), slice(first, length))[not first :]:
            before = state
            y, state = selective_scan(
                state, delta[:, piece], inputs[:, piece], b[:, piece], c[:, piece], a, self.training
            )
            read.append(y)
        if store is not None:
            columns = columns[:, -(d_conv - 1 + length - first) :]
            steps = (delta[:, first:], inputs[:, first:], b[:, first:])
            made = State.after(columns, before, steps, a, state)
            store.put_state(self.layer, made, cast(Cache, forward.cache).length + length)
        memory = (mx.concatenate(read, axis=1) + self.D * x).astype(gate.dtype)
        if self.keeps_memory:
            forward.shared[MEMORY] = memory
        return project(self.out_proj, _gated(gate, memory), routing)


class GatedMemory(nn.Module):
    """A gated memory unit: another layer's memory, gated token by token."""

    def __init__(self, config: Phi4FlashConfig) -> None:
        super().__init__()
        shapes = config.shapes_of(GMU)
        self.in_proj = nn.Linear(*shapes["attn.in_proj"], bias=False)
        self.out_proj = nn.Linear(*shapes["attn.out_proj"], bias=False)

    def __call__(self, x: mx.array, forward: ForwardPass) -> mx.array:
        memory = forward.wanted(forward.shared[MEMORY], axis=1)
        gate = project(self.in_proj, x, forward.routing)
        return project(self.out_proj, _gated(gate, memory), forward.routing)


class DifferentialMaps(nn.Module):
    """The difference of two attention maps (arXiv 2410.05258, section 2.1).

    Heads come in pairs, a head for each map; the values of a pair stand side by side. They are held
    with all first heads before all second ones.
    """

    def __init__(self, config: Phi4FlashConfig, layer: int) -> None:
        super().__init__()
        self._usual = 0.8 - 0.6 * math.exp(-0.3 * layer)
        pairs = config.num_key_value_heads // 2
        self._halves = (slice(pairs), slice(pairs, None))
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            self[name] = mx.zeros((config.head_dim,))
        self.subln = nn.RMSNorm(2 * config.head_dim, eps=SUBNORM_EPS)

    def __call__(self, queries: mx.array, held: Held, mask: mx.array | str | None) -> mx.array:
        """Attend twice: `[batch, heads, length, head_dim]` to `[batch, length, hidden]`."""
        one, other = (
            mx.concatenate(
                [held.heads(keys, values).attend(half, mask) for values in self._halves], axis=-1
            ).astype(mx.float32)
            for half, keys in zip(mx.split(queries, 2, axis=1), self._halves, strict=True)
        )  # [batch, heads / 2, length, 2 · head_dim]
        x = (one - self._weight * other).astype(queries.dtype)
        return (self.subln(x) * (1 - self._usual)).transpose(0, 2, 1, 3).flatten(2)

    @property
    def _weight(self) -> mx.array:
        """Weight of the second map."""
        one, other = (
            (self[f"lambda_q{part}"].astype(mx.float32) * self[f"lambda_k{part}"]).sum()
            for part in (1, 2)
        )
        return mx.exp(one) - mx.exp(other) + self._usual


class Attention(nn.Module):
    """Differential attention: in a window, to every token, or to what another layer holds."""

    def __init__(self, config: Phi4FlashConfig, layer: int, kind: str) -> None:
        super().__init__()
        self.layer = layer
        self.kind = kind
        self.window = config.window
        self.head_dim = config.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads)
        shapes = config.shapes_of(kind)
        self.Wqkv = nn.Linear(*shapes["attn.Wqkv"])
        self.out_proj = nn.Linear(*shapes["attn.out_proj"])
        self.inner_cross_attn = DifferentialMaps(config, layer)

    def __call__(self, x: mx.array, forward: ForwardPass) -> mx.array:
        heads, kv_heads = self.heads
        rows = project(self.Wqkv, x, forward.routing)
        if self.kind == CROSS:
            queries, held = self._in_halves(rows), forward.shared[KEYS_VALUES]
        else:
            width = heads * self.head_dim
            ends = [width, width + kv_heads * self.head_dim]
            queries, keys, values = map(self._in_halves, mx.split(rows, ends, axis=-1))
            held = self._hold(keys, values, forward)
        mask = forward.mask
        if self.kind == WINDOW:
            mask = self._in_window(mask, queries.shape[2], held.columns)
        elif self.kind == FULL:
            forward.shared[KEYS_VALUES] = held
            queries = forward.wanted(queries, axis=2)
        out = self.inner_cross_attn(queries, held, mask)
        return project(self.out_proj, out, forward.routing)

    def _in_halves(self, rows: mx.array) -> mx.array:
        """Split rows into heads, the first of all pairs before the second of all."""
        batch, length, _ = rows.shape
        pairs = rows.reshape(batch, length, -1, 2, self.head_dim)
        return pairs.transpose(0, 3, 2, 1, 4).flatten(1, 2)  # [batch, heads, length, head_dim]

    def _hold(self, keys: mx.array, values: mx.array, forward: ForwardPass) -> Held:
        store = _store(forward)
        if store is None:
            return KeysValues(keys, values)
        return store.append(self.layer, cast(Cache, forward.cache).length, keys, values)

    def _in_window(
        self, mask: mx.array | str | None, length: int, columns: int
    ) -> mx.array | str | None:
        """Narrow a mask to the window, of which these are the last columns."""
        if isinstance(mask, mx.array):
            mask = mask[..., -columns:]
        if columns <= self.window or mask is None:
            return mask
        queries, keys = mx.arange(columns - length, columns)[:, None], mx.arange(columns)
        near = keys > queries - self.window
        return near & (mask if isinstance(mask, mx.array) else keys <= queries)


class MLP(nn.Module):
    def __init__(self, config: Phi4FlashConfig, kind: str) -> None:
        super().__init__()
        shapes = config.shapes_of(kind)
        self.fc1 = nn.Linear(*shapes["mlp.fc1"], bias=False)
        self.fc2 = nn.Linear(*shapes["mlp.fc2"], bias=False)

    def __call__(self, x: mx.array, forward: ForwardPass) -> mx.array:
        gate, up = mx.split(project(self.fc1, x, forward.routing), 2, axis=-1)
        return project(self.fc2, _gated(gate, up), forward.routing)


def _norm(norm: nn.LayerNorm, x: mx.array) -> mx.array:
    """Norm the residual stream in the dtype of the weights, as the reference does."""
    return norm(x.astype(norm.weight.dtype))


class DecoderLayer(nn.Module):
    """A mixer and an MLP, on a residual stream in float32."""

    def __init__(self, config: Phi4FlashConfig, layer: int) -> None:
        super().__init__()
        kind = config.kinds[layer]
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        if kind == MAMBA:
            self.attn: nn.Module = Mamba(config, layer)
        elif kind == GMU:
            self.attn = GatedMemory(config)
        else:
            self.attn = Attention(config, layer, kind)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config, kind)

    def __call__(self, x: mx.array, forward: ForwardPass) -> mx.array:
        mixed = self.attn(_norm(self.input_layernorm, x), forward)
        x = forward.wanted(x, axis=1).astype(mx.float32) + mixed
        return x + self.mlp(_norm(self.post_attention_layernorm, x), forward)


class Phi4FlashModel(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: Phi4FlashConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class Phi4FlashForCausalLM(CausalLM):
    """A phi4flash language model."""

    model_type = "phi4flash"
    config: Phi4FlashConfig

    def __init__(self, config: Phi4FlashConfig) -> None:
        super().__init__()
        self.config = config
        self.tail = config.num_hidden_layers - config.middle - 1
        self.model = Phi4FlashModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def norm(self, x: mx.array) -> mx.array:
        return _norm(self.model.final_layernorm, x)

    def make_cache(
        self,
        expected_length: int = 0,
        expected_adapters: tuple[str | None, ...] = (),
        kv_bits: int | None = None,
    ) -> Cache:
        """Make an empty cache; `kv_bits` are those of the one layer that keeps every token."""
        return Cache(
            FlashStore(self.config, kv_bits),
            self.config.rope,
            expected_length,
            default_adapter=self.default_adapter,
        )

    def forward_pass(
        self,
        input_ids: mx.array,
        cache: Cache | None = None,
        attention_mask: mx.array | None = None,
    ) -> ForwardPass:
        """Prepare a pass of `[batch, length]` tokens.

        Raises:
            GenerationError: where a row goes on after padding.
        """
        if cache is not None:
            _check_padding(cache, cast(FlashStore, cache.store), input_ids.shape, attention_mask)
        return super().forward_pass(input_ids, cache, attention_mask)


def _check_padding(
    cache: Cache, store: FlashStore, shape: tuple[int, ...], attention_mask: mx.array | None
) -> None:
    """Note which rows end with padding, and raise GenerationError where one goes on after it."""
    ended = store.ended or (False,) * shape[0]
    if attention_mask is None and not any(ended):
        return
    real = np.ones(shape, bool) if attention_mask is None else np.array(attention_mask) != 0
    begun = [count > 0 for count in cache.row_lengths] or [False] * shape[0]
    for row, places in enumerate(map(np.flatnonzero, real)):
        if not len(places):
            continue
        apart = places[-1] - places[0] >= len(places)
        if apart or ended[row] or (begun[row] and places[0] > 0):
            raise GenerationError(
                f"Row {row} goes on after padding, which this model's state cannot.",
                hint="Pad rows on the left.",
            )
    store.ended = tuple(
        bool(was or ((old or row.any()) and not row[-1]))
        for was, old, row in zip(ended, begun, real, strict=True)
    )
