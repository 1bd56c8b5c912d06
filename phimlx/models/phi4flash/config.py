"""The config of a phi4flash model, checked, and what each of its layers is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from phimlx.errors import ConfigError, shortened
from phimlx.models.config import ModelConfig, check_fixed, read_count, read_decoder, rope_values

# Keys that change the model, with the only values that the family uses.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mb_per_layer": (2,),
    "mamba_conv_bias": (True,),
    "mamba_proj_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
}

MAX_STATE = 1 << 10  # a hostile config must not make us build more
MAX_WIDTH = 64
MAX_EXPANSION = 16

MAMBA, WINDOW, FULL, CROSS, GMU = "mamba", "window", "full", "cross", "gmu"


@dataclass(frozen=True)
class Phi4FlashConfig(ModelConfig):
    """Shape of a phi4flash model.

    Attributes:
        window: how many tokens the windowed layers attend to, the token itself and those before.
        d_state: numbers in the state of one channel.
        d_conv: tokens that the convolution spans.
        d_inner: channels of a Mamba layer.
        dt_rank: width of what its step sizes are made of.
    """

    window: int
    d_state: int
    d_conv: int
    d_inner: int
    dt_rank: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        check_fixed(config, FIXED)
        if rope_values(config).get("rope_type", "default") != "default":
            raise ConfigError("config.json: rope_scaling is set, but this model has no positions.")
        window = read_count(config, "sliding_window")
        decoder = read_decoder(config, "layer_norm_eps")
        decoder["sliding_window"] = None  # not that of every layer
        layers, hidden = decoder["num_hidden_layers"], decoder["hidden_size"]
        if layers % 4:
            raise ConfigError(f"config.json: num_hidden_layers ({layers}) is not a multiple of 4.")
        for key in ("num_attention_heads", "num_key_value_heads"):
            if decoder[key] % 2:
                raise ConfigError(
                    f"config.json: {key} ({decoder[key]}) is odd, but heads come in pairs."
                )
        rank = config.get("mamba_dt_rank")
        automatic = rank in (None, "auto")
        return cls(
            **decoder,
            window=window,
            d_state=_read(config, "mamba_d_state", 16, MAX_STATE),
            d_conv=_read(config, "mamba_d_conv", 4, MAX_WIDTH),
            d_inner=hidden * _read(config, "mamba_expand", 2, MAX_EXPANSION),
            dt_rank=-(-hidden // 16) if automatic else _read(config, "mamba_dt_rank", 0, hidden),
        )

    @property
    def middle(self) -> int:
        """The layer whose memory the layers behind it gate."""
        return self.num_hidden_layers // 2

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each layer mixes tokens with (SambaY, arXiv 2507.06607, figure 1)."""
        middle = self.middle
        first = [WINDOW if layer % 2 else MAMBA for layer in range(middle)]
        last = [CROSS if layer % 2 else GMU for layer in range(middle + 2, self.num_hidden_layers)]
        return (*first, MAMBA, FULL, *last)

    def mixer_numbers(self, length: int) -> int:
        # Both halves that come in, the taps of the convolution and their sum; in float32 what goes
        # in and out of the scan.
        mamba = (4 + 2 * self.d_conv + 2 * 6) * self.d_inner
        return max(super().mixer_numbers(length), mamba)

    @property
    def kv_layers(self) -> int:
        return 1

    def constant_cache_bytes(self, itemsize: int) -> int:
        kinds = self.kinds
        keys = 2 * self.num_key_value_heads * self.head_dim * itemsize
        states = self.d_inner * (4 * self.d_state + (self.d_conv - 1) * itemsize)
        return kinds.count(WINDOW) * self.window * keys + kinds.count(MAMBA) * states

    @property
    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """Those of the widest layer that has each; see `layer_shapes`."""
        return {**self.shapes_of(GMU), **self.shapes_of(MAMBA), **self.shapes_of(FULL)}

    @property
    def layer_shapes(self) -> list[dict[str, tuple[int, int]]]:
        return [self.shapes_of(kind) for kind in self.kinds]

    def shapes_of(self, kind: str) -> dict[str, tuple[int, int]]:
        """Input and output width of the projections of a kind of layer, in calling order."""
        hidden, inner, intermediate = self.hidden_size, self.d_inner, self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        mixer = {
            MAMBA: {
                "attn.in_proj": (hidden, 2 * inner),
                "attn.x_proj": (inner, self.dt_rank + 2 * self.d_state),
                "attn.dt_proj": (self.dt_rank, inner),
                "attn.out_proj": (inner, hidden),
            },
            GMU: {"attn.in_proj": (hidden, inner), "attn.out_proj": (inner, hidden)},
            CROSS: {"attn.Wqkv": (hidden, queries), "attn.out_proj": (queries, hidden)},
        }
        whole = {"attn.Wqkv": (hidden, queries + 2 * keys), "attn.out_proj": (queries, hidden)}
        return {
            **mixer.get(kind, whole),
            "mlp.fc1": (hidden, 2 * intermediate),
            "mlp.fc2": (intermediate, hidden),
        }


def _read(config: Mapping[str, Any], key: str, default: int, limit: int) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value <= limit:
        raise ConfigError(
            f"config.json: {key} is {shortened(value)}, not a whole number from 1 to {limit}."
        )
    return value
