"""A model's decoder layers shared by several machines: each has some heads and mlp channels.

What a layer's last projections give is summed over all; embedding, norms and output head are whole
everywhere. Source: Megatron-LM, arXiv 1909.08053, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_linear

from phimlx.errors import ConfigError
from phimlx.models import registry
from phimlx.models.base import CausalLM
from phimlx.models.lora import input_dims
from phimlx.models.registry import Sharding


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
            if isinstance(linear, nn.QuantizedLinear):
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
    config = model.config
    for layer in model.layers:
        for path in sharding.rows:
            borders = list(accumulate(config.fused_rows.get(path, ())))[:-1]
            _replace(layer, path, "all-to-sharded", borders or 1, group)
        for path in sharding.columns:
            _replace(layer, path, "sharded-to-all", 1, group)
        for path in sharding.counts:
            owner, name = _owner(layer, path)
            setattr(owner, name, getattr(owner, name) // size)
        layer.eval()
        if dtype is not None:
            layer.set_dtype(dtype)
        mx.eval(layer.parameters())
    # Memory is forecast from these: a machine's keys and values are those of its own heads.
    model.config = replace(
        config,
        num_attention_heads=config.num_attention_heads // size,
        num_key_value_heads=config.num_key_value_heads // size,
        intermediate_size=config.intermediate_size // size,
    )


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
