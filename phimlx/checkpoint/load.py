"""A model folder's weights -> a model in memory, each of them checked before it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.quantization import stored_form
from phimlx.checkpoint.tensors import FLOATING_DTYPES, PACKED_DTYPES, Tensor, Tensors
from phimlx.errors import CheckpointError, some, translate_shortage
from phimlx.machine.exiting import COMPUTING
from phimlx.models import registry
from phimlx.models.base import CausalLM
from phimlx.models.tensor_parallel import shard


@COMPUTING
def load_model(
    checkpoint: Checkpoint,
    dtype: mx.Dtype | None = None,
    group: mx.distributed.Group | None = None,
    prepare: Callable[[CausalLM], object] = lambda model: None,
) -> CausalLM:
    """The model of a folder, with its weights read.

    Args:
        dtype: floating-point type to hold weights and compute in; as stored where None.
        group: the machines that share the model, each of which reads its part alone.
        prepare: changes the model before anything of it is read.

    Raises:
        ConfigError, CheckpointError: naming what is missing, unexpected or of another shape; where
            machines cannot share the model; where
            another framework has packed the weights, which are converted first; where a file is
            cut short meanwhile.
        ResourceError: where memory does not suffice.
    """
    checkpoint.check_runs()
    model = map_model(checkpoint)
    if dtype is not None:
        model.set_dtype(dtype)
    prepare(model)
    with translate_shortage():
        if group is None:
            mx.eval(model.parameters())
        else:
            shard(model, group)
    return model


def map_model(checkpoint: Checkpoint) -> CausalLM:
    """Make the model of a folder with its weights mapped from the files, each read when it is used.

    What another framework has packed is decoded then.

    Raises:
        ConfigError, CheckpointError: naming what is missing, unexpected or of another shape.
    """
    model = build_model(checkpoint.config)
    names = stored_parameters(checkpoint, model)
    weights = checkpoint.weights()
    model.load_weights([(name, weights[name]) for name in names])
    model.eval()
    return model


def stored_parameters(checkpoint: Checkpoint, model: CausalLM) -> dict[str, Tensor]:
    """The stored tensors that are the model's parameters, all of them and in the right form.

    The model's layers are quantized on the way where the stored ones are.

    Raises:
        ConfigError, CheckpointError: naming what is missing, unexpected or of another form.
    """
    tensors = needed_tensors(checkpoint, model)
    _check_adapters(checkpoint, model, tensors)
    quantize_layers(model, checkpoint.quantization, tensors)
    check_parameters(dict(tree_flatten(model.parameters())), tensors)
    return tensors


def needed_tensors(checkpoint: Checkpoint, model: CausalLM) -> dict[str, Tensor]:
    """Select the stored tensors that a model does not do without."""
    return {
        name: info
        for name, info in checkpoint.tensors.items()
        if not any(fnmatchcase(name, pattern) for pattern in model.unused)
    }


def _check_adapters(checkpoint: Checkpoint, model: CausalLM, tensors: Tensors) -> None:
    """Raise CheckpointError where a model that has adapters is stored without them."""
    if not model.architecture.adapters or any(".lora_A." in name for name in tensors):
        return
    dialect = checkpoint.dialect
    if dialect is not None and checkpoint.config.get("quantization") is None:
        folders = " and ".join(f"{name}/" for name in dialect.adapter_folders.values())
        raise CheckpointError(
            f"{checkpoint.folder} holds no adapters, without which this model neither sees nor "
            f"hears: it lacks {folders}.",
            hint="Download these folders too, each with adapter_model.safetensors.",
        )
    raise CheckpointError(
        f"{checkpoint.folder} holds no adapters: they were merged into its base, where they change "
        "every answer and can no longer be switched.",
        hint="Make a conversion that keeps them: phimlx convert "
        "microsoft/Phi-4-multimodal-instruct --mlx-path OUT -q",
    )


def build_model(config: Mapping[str, Any]) -> CausalLM:
    """Make an empty model of the architecture that a config names.

    Raises:
        ConfigError: where phimlx does not run it, or a value is missing or impossible.
    """
    dialect = registry.dialect_of(config)
    own = config if dialect is None else dialect.own_config(config, {})
    architecture = registry.of_config(own)
    model: CausalLM = architecture.model_class()(architecture.read_config(own))
    return model


def quantize_layers(
    model: nn.Module, quantization: Mapping[str, Any] | None, tensors: Tensors
) -> None:
    """Give every layer that is stored quantized the form that its tensors have.

    Their shapes tell it, for a table may leave layers out; where they fit no form, the table says
    what they should have been.

    Raises:
        CheckpointError: for a layer that groups do not divide.
    """
    if quantization is None:
        return
    default = {key: quantization[key] for key in ("group_size", "bits", "mode")}

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in tensors or not hasattr(module, "to_quantized"):
            return False
        width = module.weight.shape[-1]
        if f"{path}.weight" in tensors:
            stored = stored_form(path, width, tensors)
            if stored is not None:
                return stored
        chosen = quantization.get(path, default)
        chosen = chosen if isinstance(chosen, dict) else default
        if width % chosen["group_size"]:
            raise CheckpointError(
                f"{path} is {width} wide, which groups of {chosen['group_size']} do not divide."
            )
        return chosen

    nn.quantize(
        model,
        group_size=default["group_size"],
        bits=default["bits"],
        mode=default["mode"],
        class_predicate=settings,
    )


def check_parameters(parameters: Mapping[str, mx.array], tensors: Tensors) -> None:
    """The stored tensors are exactly the model's parameters.

    Raises:
        CheckpointError: naming the first few that are missing, unexpected or of another form.
    """
    missing = [name for name in parameters if name not in tensors]
    if missing:
        raise CheckpointError(f"The checkpoint lacks {some(missing)}.")
    unexpected = [name for name in tensors if name not in parameters]
    if unexpected:
        raise CheckpointError(
            f"The checkpoint holds {some(unexpected)}, which this architecture does not have."
        )
    for name, array in parameters.items():
        stored = tensors[name]
        if stored.shape != array.shape:
            raise CheckpointError(
                f"{name} has shape {list(stored.shape)}; config.json makes it {list(array.shape)}."
            )
        allowed = PACKED_DTYPES.get(array.dtype, FLOATING_DTYPES)
        if stored.dtype not in allowed:
            raise CheckpointError(
                f"{name} is stored as {stored.dtype}; config.json makes it {' or '.join(allowed)}."
            )
