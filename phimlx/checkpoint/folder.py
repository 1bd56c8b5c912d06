"""A folder on disk <-> a model in memory.

Knows config.json, safetensors shards and MLX's quantized layers; knows nothing of tokenizers, the
Hub or conversion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from phimlx.checkpoint.quantization import read_quantization
from phimlx.errors import CheckpointError, ConfigError, shortened
from phimlx.models.config import Phi3Config
from phimlx.models.phi3 import Phi3ForCausalLM
from phimlx.models.phi4mm import names as phi4mm_names
from phimlx.models.phi4mm.model import Phi4MMConfig, Phi4MMForCausalLM

MAX_JSON_BYTES = 64 << 20  # an index of a sharded model is some 100 kB

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

# Element types that a checkpoint may hold, in safetensors' names.
STORED_DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
FLOATING_DTYPES = ("F32", "F16", "BF16")
PACKED_DTYPES = {mx.uint32: ("U32",), mx.uint8: ("U8",)}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.

    Attributes:
        dtype: safetensors' name: BF16, F32, U32 …
        name: under which it is stored, in a layout whose names are not the model's.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    name: str

    @property
    def nbytes(self) -> int:
        size = STORED_DTYPES[self.dtype].size
        for dimension in self.shape:
            size *= dimension
        return size


class Checkpoint:
    """A model folder, read but not loaded: its config and the headers of its weights.

    Nothing is mapped into memory before safetensors' own parser has accepted every header.
    A folder in transformers' own layout of Phi-4-multimodal appears as one in the published layout.

    Attributes:
        config: of the published layout.
        is_native: whether the files have transformers' own layout.
        adapter_files: adapters that lie in files of their own, by name.

    Raises:
        ConfigError, CheckpointError: where the folder is not a whole model.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder.")
        if not (self.folder / "config.json").is_file():
            raise ConfigError(f"{self.folder} holds no config.json, so it is not a model folder.")
        self.config = read_json(self.folder / "config.json")
        self.adapter_files: dict[str, Path] = {}
        self.is_native = self.config.get("model_type") == phi4mm_names.NATIVE_TYPE
        if self.is_native:
            self._read_native()

    @cached_property
    def files(self) -> list[Path]:
        """All files with weights, in order."""
        return [*self._shards, *self.adapter_files.values()]

    def _read_native(self) -> None:
        configs = {}
        for adapter, name in phi4mm_names.ADAPTER_FOLDERS.items():
            folder = self.folder / name
            if (folder / "adapter_model.safetensors").is_file():
                self.adapter_files[adapter] = folder / "adapter_model.safetensors"
                if (folder / "adapter_config.json").is_file():
                    configs[adapter] = read_json(folder / "adapter_config.json")
        self.config = phi4mm_names.published_config(self.config, configs)

    @cached_property
    def _shards(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(self._weight_map(index).values()))
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                raise CheckpointError(
                    f"{self.folder} lacks {_some(missing)}, which model.safetensors.index.json "
                    "names.",
                    hint="Download or convert the model again.",
                )
            return [self.folder / name for name in names]
        files = sorted(self.folder.glob("model*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{self.folder} holds no model.safetensors and no model.safetensors.index.json.",
                hint="Only safetensors weights are read, never .bin or .pt files.",
            )
        return files

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of every file, under the model's names; the index, where there is one,
        agrees with the files."""
        stored: dict[str, TensorInfo] = {}
        for file in self._shards:
            for name, info in read_header(file):
                if name in stored:
                    raise CheckpointError(
                        f"{name} stands in both {stored[name].file.name} and {file.name}."
                    )
                stored[name] = info
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = self._weight_map(index)
            for name, file_name in weight_map.items():
                if name not in stored or stored[name].file.name != file_name:
                    raise CheckpointError(
                        f"{index.name} says that {name} is in {file_name}, but it is not."
                    )
            unnamed = [name for name in stored if name not in weight_map]
            if unnamed:
                raise CheckpointError(f"{index.name} does not name {_some(unnamed)}.")
        return self._renamed(stored) if self.is_native else stored

    def _renamed(self, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Native tensors and those of adapter files, under the published names."""
        named = [(phi4mm_names.published_name(name), info) for name, info in stored.items()]
        for adapter, file in self.adapter_files.items():
            named += [
                (phi4mm_names.adapter_name(name, adapter), info) for name, info in read_header(file)
            ]
        found: dict[str, TensorInfo] = {}
        for name, info in named:
            if name in found:
                raise CheckpointError(
                    f"{info.name} of {info.file.relative_to(self.folder)} and {found[name].name} "
                    f"of {found[name].file.relative_to(self.folder)} are the same tensor."
                )
            found[name] = info
        return found

    @property
    def quantization(self) -> dict[str, Any] | None:
        """MLX's quantization table, checked, or None for a model that is not quantized."""
        return read_quantization(self.config)

    def weights(self) -> dict[str, mx.array]:
        """All tensors under the model's names, mapped from the files and not yet read."""
        known = self.tensors  # every header is checked before MLX sees a file
        loaded: dict[Path, dict[str, mx.array]] = {}
        for file in self.files:
            mapped = mx.load(str(file))
            assert isinstance(mapped, dict)  # as it is for every safetensors file
            loaded[file] = mapped
        return {name: loaded[info.file][info.name] for name, info in known.items()}

    def _weight_map(self, index: Path) -> Mapping[str, str]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index.name} has no weight_map.")
        for name, file_name in weight_map.items():
            if not isinstance(file_name, str) or not re.fullmatch(
                r"[\w][\w.-]*\.safetensors", file_name
            ):
                raise CheckpointError(
                    f"{index.name} puts {name} in {file_name!r}, which is not a plain "
                    "*.safetensors file name."
                )
        return weight_map


def load_model(checkpoint: Checkpoint, dtype: mx.Dtype | None = None) -> Phi3ForCausalLM:
    """The model of a folder, with its weights read.

    Args:
        dtype: floating-point type to hold weights and compute in; as stored where None.

    Raises:
        ConfigError, CheckpointError: naming what is missing, unexpected or of another shape.
    """
    model = build_model(checkpoint.config)
    tensors = stored_parameters(checkpoint, model)
    weights = checkpoint.weights()
    model.load_weights([(name, weights[name]) for name in tensors])
    if dtype is not None:
        model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def stored_parameters(checkpoint: Checkpoint, model: Phi3ForCausalLM) -> dict[str, TensorInfo]:
    """The stored tensors that are the model's parameters, all of them and in the right form.

    The model's layers are quantized on the way where the stored ones are.

    Raises:
        ConfigError, CheckpointError: naming what is missing, unexpected or of another form.
    """
    tensors = {
        name: info for name, info in checkpoint.tensors.items() if not name.startswith(model.unused)
    }
    _check_adapters(checkpoint, model, tensors)
    quantize_layers(model, checkpoint.quantization, tensors)
    check_parameters(dict(tree_flatten(model.parameters())), tensors)
    return tensors


def _check_adapters(
    checkpoint: Checkpoint, model: Phi3ForCausalLM, tensors: Mapping[str, TensorInfo]
) -> None:
    """Raise CheckpointError where a model that has adapters is stored without them."""
    if model.slots is None or any(".lora_A." in name for name in tensors):
        return
    if checkpoint.is_native and checkpoint.config.get("quantization") is None:
        folders = " and ".join(f"{name}/" for name in phi4mm_names.ADAPTER_FOLDERS.values())
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


def build_model(config: Mapping[str, Any]) -> Phi3ForCausalLM:
    """An empty model of the architecture that a config names."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ConfigError(
            f"config.json: model_type is {shortened(model_type)}, but phimlx runs the Phi-4 "
            f"family: {known}."
        )
    return ARCHITECTURES[model_type](config)


ARCHITECTURES: dict[str, Callable[[Mapping[str, Any]], Phi3ForCausalLM]] = {
    "phi3": lambda config: Phi3ForCausalLM(Phi3Config.from_dict(config)),
    "phi4mm": lambda config: Phi4MMForCausalLM(Phi4MMConfig.from_dict(config)),
    "phi4_multimodal": lambda config: Phi4MMForCausalLM(
        Phi4MMConfig.from_dict(phi4mm_names.published_config(config))
    ),
}


def quantize_layers(
    model: nn.Module, quantization: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]
) -> None:
    """Give every layer that is stored quantized the form that its tensors need."""
    if quantization is None:
        return
    default = {key: quantization[key] for key in ("group_size", "bits", "mode")}

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in tensors or not hasattr(module, "to_quantized"):
            return False
        chosen = quantization.get(path, default)
        chosen = chosen if isinstance(chosen, dict) else default
        if module.weight.shape[-1] % chosen["group_size"]:
            raise CheckpointError(
                f"{path} is {module.weight.shape[-1]} wide, which groups of "
                f"{chosen['group_size']} do not divide."
            )
        return chosen

    nn.quantize(
        model,
        group_size=default["group_size"],
        bits=default["bits"],
        mode=default["mode"],
        class_predicate=settings,
    )


def check_parameters(parameters: Mapping[str, mx.array], tensors: Mapping[str, TensorInfo]) -> None:
    """The stored tensors are exactly the model's parameters.

    Raises:
        CheckpointError: naming the first few that are missing, unexpected or of another form.
    """
    missing = [name for name in parameters if name not in tensors]
    if missing:
        raise CheckpointError(f"The checkpoint lacks {_some(missing)}.")
    unexpected = [name for name in tensors if name not in parameters]
    if unexpected:
        raise CheckpointError(
            f"The checkpoint holds {_some(unexpected)}, which this architecture does not have."
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


def read_header(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    """Names, shapes and types of a safetensors file, through the reference parser."""
    try:
        with safe_open(str(file), framework="mlx") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                tensor = opened.get_slice(name)
                dtype = tensor.get_dtype()
                if dtype not in STORED_DTYPES:
                    raise CheckpointError(
                        f"{name} in {file.name} is stored as {dtype}, which phimlx does not read."
                    )
                yield name, TensorInfo(file, tuple(tensor.get_shape()), dtype, name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file.name} is not a whole safetensors file ({error}).",
            hint="Download or convert the model again.",
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a model folder, within a size limit."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{file.name} is larger than {MAX_JSON_BYTES >> 20} MB.")
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file.name} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{file.name} is not valid JSON ({error}).") from error
    except RecursionError as error:
        raise ConfigError(f"{file.name} is nested too deeply.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file.name} is not a JSON object.")
    return value


def _some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(name if len(name) <= 100 else f"{name[:97]}..." for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
