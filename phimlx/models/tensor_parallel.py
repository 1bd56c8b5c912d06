"""A model's decoder layers shared by several machines: each has some heads and mlp channels.

What a layer's last projections give is summed over all; embedding, norms and output head are whole
everywhere, and the first machine alone sees and hears.
Source: Megatron-LM, arXiv 1909.08053, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_linear
from mlx.utils import tree_flatten, tree_unflatten

from phimlx.errors import ConfigError
from phimlx.models import registry
from phimlx.models.base import CausalLM
from phimlx.models.config import ModelConfig
from phimlx.models.lora import LoRALinear, input_dims, is_quantized
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
            linear = _base(layer, path)
            if is_quantized(linear):
                group = linear.group_size
                yield input_dims(linear) // group, f"groups of {group} in a row of {path}"


def shard(model: CausalLM, group: mx.distributed.Group) -> None:
    """Keep this machine's share of a model whose weights are mapped, and read it.

    One layer is read after the other, so that a share and one layer are all that is ever held. Of
    the encoders only the first machine's are read.

    Raises:
        ConfigError: where so many machines cannot share it.
    """
    size = group.size()
    sharding = check_shardable(model, size)
    config = shared_config(model.config, size)
    shares: dict[str, Share] = {}
    for layer in model.layers:
        shares = _divide(layer, model.config, sharding, group)
        layer.eval()
        for module in layer.modules():
            if isinstance(module, LoRALinear):
                module.settle()
        mx.eval(layer.parameters())
    model.config = config
    model.shares = Shares(group, shares)
    parameters: Any = tree_flatten(model.parameters())
    mx.eval([array for name, array in parameters if group.rank() == 0 or _is_needed(model, name)])


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


def _is_needed(model: CausalLM, name: str) -> bool:
    """Whether a machine that is given features needs a parameter."""
    return registry.part_of(name) != "encoders" or model.architecture.is_projector(name)


def own_adapter(whole: CausalLM, name: str, group: mx.distributed.Group) -> dict[str, LoRALinear]:
    """Read this machine's share of an adapter of the layers' projections.

    Args:
        whole: the model, all of it mapped and none of it read, with the adapter beside its layers.

    Returns:
        By path, layers with nothing in the place of the weight.
    """
    sharding = check_shardable(whole, group.size())
    found = {}
    for number, layer in enumerate(whole.layers):
        _divide(layer, whole.config, sharding, group)
        for path, module in layer.named_modules():
            if isinstance(module, LoRALinear):
                module.base_layer = nn.Identity()
                own = LoRALinear(module.base_layer)
                if own.take(module, name):
                    own.settle()
                    found[f"model.layers.{number}.{path}"] = module
    return found


def adopt(model: CausalLM, whole: CausalLM, share: dict[str, LoRALinear], name: str) -> None:
    """Put what `own_adapter` gave beside the layers of a model that this machine has a share of."""
    for path, theirs in share.items():
        module = reduce(_step, path.split("."), model)
        layer = module if isinstance(module, LoRALinear) else LoRALinear(module)
        layer.take(theirs, name)
        if layer is not module:
            model.update_modules(tree_unflatten([(path, layer.eval())]))
    model.loaded_adapters |= whole.loaded_adapters
    model.loaded_routes.modalities |= whole.loaded_routes.modalities
    model.loaded_routes.copies |= whole.loaded_routes.copies


def _divide(
    layer: nn.Module, config: ModelConfig, sharding: Sharding, group: mx.distributed.Group
) -> dict[str, Share]:
    """Keep this machine's share of a decoder layer, of which nothing is read; by projection."""
    size = group.size()
    shares = {}
    own = shared_config(config, size)
    for path in sharding.rows:
        rows = own.fused_rows.get(path) or (_base(layer, path).weight.shape[0] // size,)
        shares[path] = share = Share(group, True, rows)
        part = partial(
            shard_linear, sharding="all-to-sharded", segments=share.borders or 1, group=group
        )
        _replace(layer, path, part, partial(share.part, axis=0))
    for path in sharding.columns:
        shares[path] = Share(group, False, (input_dims(_base(layer, path)) // size,))
        _replace(layer, path, partial(shard_linear, sharding="sharded-to-all", group=group), None)
    for path in sharding.counts:
        owner, name = _owner(layer, path)
        setattr(owner, name, getattr(owner, name) // size)
    return shares


def _replace(layer: nn.Module, path: str, part: Any, rows: Any) -> None:
    owner, name = _owner(layer, path)
    linear = owner[name]
    if isinstance(linear, LoRALinear):
        linear.divide(part, rows)
    else:
        setattr(owner, name, part(linear))


def _owner(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return _find(layer, parent), name


def _find(layer: nn.Module, path: str) -> nn.Module:
    return reduce(getattr, path.split("."), layer)


def _base(layer: nn.Module, path: str) -> nn.Module:
    """The linear layer of a projection, below its adapters."""
    found = _find(layer, path)
    return found.base_layer if isinstance(found, LoRALinear) else found


def _step(module: Any, key: str) -> Any:
    return module[int(key)] if isinstance(module, list) else module[key]
