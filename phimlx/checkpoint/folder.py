"""A model folder: its config and the headers of its weights, read but not loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from phimlx.checkpoint.head import has_own_head, with_embedding
from phimlx.checkpoint.header import TensorInfo, check_type, list_tensors, read_header
from phimlx.checkpoint.quantization import is_foreign, read_quantization, refuse_foreign
from phimlx.errors import CheckpointError, ConfigError, some
from phimlx.files import read_json
from phimlx.models import registry
from phimlx.models.names import adapter_tensor

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


class Checkpoint:
    """A model folder, read but not loaded: its config and the headers of its weights.

    Nothing is mapped into memory before safetensors' own parser has accepted every header.
    A folder in another dialect of its architecture appears as one in the architecture's own layout.

    Attributes:
        config: in the architecture's own terms; where it ties the output head and the weights hold
            a head of other values, it says that it does not.
        dialect: that the files are in; None for the architecture's own layout, or where phimlx
            does not run the architecture.
        adapter_files: adapters that lie in files of their own, by name.

    Raises:
        ConfigError, CheckpointError: where the folder is not a whole model.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder.")
        if not (self.folder / "config.json").is_file():
            raise ConfigError(
                f"{self.folder} holds no config.json, so it is not a model folder.",
                hint=_other_weights(self.folder),
            )
        self._config = read_json(self.folder / "config.json")
        self.adapter_files: dict[str, Path] = {}
        self.dialect = registry.dialect_of(self._config)
        if self.dialect is not None:
            self._read_dialect(self.dialect)

    @cached_property
    def files(self) -> list[Path]:
        """All files with weights, in order."""
        return [*self._shards, *self.adapter_files.values()]

    def _read_dialect(self, dialect: registry.Dialect) -> None:
        configs = {}
        for adapter, name in dialect.adapter_folders.items():
            folder = self.folder / name
            if (folder / "adapter_model.safetensors").is_file():
                self.adapter_files[adapter] = folder / "adapter_model.safetensors"
                if (folder / "adapter_config.json").is_file():
                    configs[adapter] = read_json(folder / "adapter_config.json")
        self._config = dialect.own_config(self._config, configs)

    @cached_property
    def config(self) -> dict[str, Any]:
        config = self._config
        architecture = registry.find(config.get("model_type"))
        if architecture is None or not (self.is_tied or is_foreign(config)):
            return config
        untied = {**config, "tie_word_embeddings": False}
        architecture.read_config(untied)  # what is wrong with it is said before weights are read
        if self.is_tied and has_own_head(self.tensors):
            config = untied
        if is_foreign(config) and self.tensors:  # which are plain then
            config = {key: value for key, value in config.items() if key != "quantization_config"}
        return config

    @property
    def is_tied(self) -> bool:
        """Whether config.json ties the output head to the embedding, whatever the weights do."""
        return self._config.get("tie_word_embeddings") is True

    @cached_property
    def _weight_map(self) -> Mapping[str, str] | None:
        """The index: tensor name -> file name. None where there is none, or it is of other weights.

        As in transformers, model.safetensors is the whole model wherever it is there, unless an
        index names files beside it that are there too.
        """
        index = self.folder / INDEX
        whole = (self.folder / WHOLE).is_file()
        if not index.is_file():
            return None
        try:
            weight_map = _read_index(index)
        except (CheckpointError, ConfigError):
            if whole:
                return None
            raise
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (self.folder / name).is_file()]
        if whole and (missing or names == [WHOLE] or WHOLE not in names):
            return None
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks {some(missing)}, which {INDEX} names.",
                hint="Download or convert the model again.",
            )
        return weight_map

    @cached_property
    def _shards(self) -> list[Path]:
        if self._weight_map is not None:
            return [self.folder / name for name in sorted(set(self._weight_map.values()))]
        files = sorted(self.folder.glob("model*.safetensors"))
        if self.folder / WHOLE in files:
            return [file for file in files if not SHARD.fullmatch(file.name)]
        if not files:
            refuse_foreign(self._config, None)
            raise CheckpointError(
                f"{self.folder} holds no {WHOLE} and no {INDEX}.",
                hint=_other_weights(self.folder)
                or "Only safetensors weights are read, never .bin or .pt files.",
            )
        return files

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of every file, under the model's names; the index, where there is one,
        agrees with the files.

        Buffers that the architecture computes itself are left out.
        """
        stored: dict[str, TensorInfo] = {}
        for file in self._shards:
            for name, info in list_tensors(file):
                if name in stored:
                    raise CheckpointError(
                        f"{name} stands in both {stored[name].file.name} and {file.name}."
                    )
                stored[name] = info
        weight_map = self._weight_map
        if weight_map is not None:
            for name, file_name in weight_map.items():
                if name not in stored or stored[name].file.name != file_name:
                    raise CheckpointError(
                        f"{INDEX} says that {name} is in {file_name}, but it is not."
                    )
            unnamed = [name for name in stored if name not in weight_map]
            if unnamed:
                raise CheckpointError(f"{INDEX} does not name {some(unnamed)}.")
        architecture = registry.find(self._config.get("model_type"))
        unused = () if architecture is None else architecture.unused
        stored = {
            name: info
            for name, info in stored.items()
            if not any(fnmatchcase(name, pattern) for pattern in unused)
        }
        refuse_foreign(self._config, stored)
        for info in stored.values():
            check_type(info)
        named = stored if self.dialect is None else self._renamed(self.dialect, stored)
        return with_embedding(named) if self.is_tied else named

    def _renamed(
        self, dialect: registry.Dialect, stored: Mapping[str, TensorInfo]
    ) -> dict[str, TensorInfo]:
        """Tensors of a dialect and those of adapter files, under the architecture's names."""
        renames = dialect.names(self._config)
        named = [part for name, info in stored.items() for part in _parts(renames.ours(name), info)]
        for adapter, file in self.adapter_files.items():
            named += [(adapter_tensor(name, adapter), info) for name, info in read_header(file)]
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
        return read_quantization(self._config)

    def weights(self) -> dict[str, mx.array]:
        """All tensors under the model's names, mapped from the files and not yet read."""
        known = self.tensors  # every header is checked before MLX sees a file
        loaded: dict[Path, dict[str, mx.array]] = {}
        for file in self.files:
            try:
                mapped = mx.load(str(file))
            except RuntimeError as error:  # a type in an accepted header that MLX does not know
                raise CheckpointError(f"{file.name} cannot be read by MLX: {error}.") from error
            assert isinstance(mapped, dict)  # as it is for every safetensors file
            loaded[file] = mapped
        shared = Counter((info.file, info.name) for info in known.values())
        weights = {}
        for name, info in known.items():
            array = loaded[info.file][info.name]
            if shared[info.file, info.name] > 1:
                array = array[info.first_row : info.first_row + info.shape[0]]
            weights[name] = array
        return weights


def _other_weights(folder: Path) -> str | None:
    """Say what a folder without a model holds instead: GGUF files; None where there are none."""
    if any(folder.glob("*.gguf")):
        return "It holds GGUF files, which are not read: get the original model's folder."
    return None


def _read_index(index: Path) -> Mapping[str, str]:
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


def _parts(names: tuple[str, ...], info: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
    """Tensors of ours that one stored tensor holds, as many rows each, one below the other."""
    if len(names) == 1:
        yield names[0], info
        return
    if not info.shape or info.shape[0] % len(names):
        raise CheckpointError(
            f"{info.name} has shape {list(info.shape)}, of which {len(names)} equal parts of rows "
            "cannot be made."
        )
    rows = info.shape[0] // len(names)
    for index, name in enumerate(names):
        yield name, replace(info, shape=(rows, *info.shape[1:]), first_row=index * rows)
