"""A model's decoder layers shared by several machines: each has some heads and mlp channels.

What a layer's last projections give is summed over all; embedding, norms and output head are whole
everywhere. Source: Megatron-LM, arXiv 1909.08053, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_linear

from phimlx.errors import ConfigError
from phimlx.models import registry
from phimlx.models.base import CausalLM
from phimlx.models.config import ModelConfig
from phimlx.models.lora import input_dims, is_quantized
from phimlx.models.registry import Sharding
from phimlx.models.shares import Share, Shares


def check_shardable(model: CausalLM, size: int) -> Sharding:
    """Check that so many machines can share a model, and tell how.

    Raises:
        ConfigError: where they cannot, with the numbers of machines that can.
    """
    sharding = model.architecture.sharding
    if sharding is None:
        known = ", ".join(each.model_type for each in registry.ARCHITECTURES if each.sharding)
        raise ConfigError(
            f"Machines cannot share a model of the architecture {model.model_type}: it has to be "
            f"whole on one. Those that can be shared: {known}."
        )
    counts = list(_counts(model, sharding))
    if any(count % size for count, _ in counts):
        fewest = min(count for count, _ in counts)
        fits = [n for n in range(2, fewest + 1) if not any(count % n for count, _ in counts)]
        odd = next(f"{count:,} {what}" for count, what in counts if count % size)
        raise ConfigError(
            f"{size} machines cannot share this model evenly: it has {odd}.",
            hint=f"These numbers of machines can: {', '.join(map(str, fits))}."
            if fits
            else "Run it on one machine.",
        )
    return sharding


def _counts(model: CausalLM, sharding: Sharding) -> Iterator[tuple[int, str]]:
    """List what is shared, each of which all machines have to have as much of."""
    config = model.config
    yield config.num_attention_heads, "attention heads"
    yield config.num_key_value_heads, "key/value heads"
    yield config.intermediate_size, "mlp channels"
    for layer in model.layers:
        for path in sharding.columns:
            linear = _find(layer, path)
            if is_quantized(linear):
                group = linear.group_size
                yield input_dims(linear) // group, f"groups of {group} in a row of {path}"


def shard(model: CausalLM, group: mx.distributed.Group, dtype: mx.Dtype | None = None) -> None:
    """Keep this machine's share of a model whose weights are mapped, and read it.

    One layer is read after the other, so that a share and one layer are all that is ever held.

    Args:
        dtype: floating-point type to hold weights and compute in; as stored where None.

    Raises:
        ConfigError: where so many machines cannot share it.
    """
    size = group.size()
    sharding = check_shardable(model, size)
    config = shared_config(model.config, size)
    shares: dict[str, Share] = {}
    for layer in model.layers:
        for path in sharding.rows:
            pieces = config.fused_rows.get(path) or (_find(layer, path).weight.shape[0] // size,)
            shares[path] = Share(group, True, pieces)
            _replace(layer, path, "all-to-sharded", _borders(model.config, path), group)
        for path in sharding.columns:
            shares[path] = Share(group, False, (input_dims(_find(layer, path)) // size,))
            _replace(layer, path, "sharded-to-all", 1, group)
        for path in sharding.counts:
            owner, name = _owner(layer, path)
            setattr(owner, name, getattr(owner, name) // size)
        layer.eval()
        if dtype is not None:
            layer.set_dtype(dtype)
        mx.eval(layer.parameters())
    model.config = config
    model.shares = Shares(group, shares)


def shared_config(config: ModelConfig, size: int) -> ModelConfig:
    """Describe the part of a model that each of so many machines has.

    Memory is forecast from it: a machine's keys and values are those of its own heads.
    """
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // size,
        num_key_value_heads=config.num_key_value_heads // size,
        intermediate_size=config.intermediate_size // size,
    )


def shared_sizes(sharding: Sharding, sizes: Mapping[str, int], machines: int) -> dict[str, int]:
    """Count the bytes that each of so many machines has of tensors, by their names."""

    def is_shared(name: str) -> bool:
        path, _, part = name.rpartition(".")
        shared = sharding.rows if part == "bias" else (*sharding.rows, *sharding.columns)
        return path.endswith(tuple(f".{each}" for each in shared))

    return {
        name: nbytes // machines if is_shared(name) else nbytes for name, nbytes in sizes.items()
    }


def _borders(config: ModelConfig, path: str) -> int | list[int]:
    """Where the pieces of a fused projection end, but for the last; 1 for one that is not."""
    return list(accumulate(config.fused_rows.get(path, ())))[:-1] or 1


def _replace(
    layer: nn.Module, path: str, how: str, segments: int | list[int], group: mx.distributed.Group
) -> None:
    owner, name = _owner(layer, path)
    setattr(owner, name, shard_linear(owner[name], how, segments=segments, group=group))


def _owner(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return _find(layer, parent), name


def _find(layer: nn.Module, path: str) -> nn.Module:
    return reduce(getattr, path.split("."), layer)
