"""A model folder: its config and the headers of its weights, read but not loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from phimlx.checkpoint.foreign.methods import ForeignQuantization, is_packed
from phimlx.checkpoint.head import EMBEDDING, HEAD, has_own_head, with_embedding
from phimlx.checkpoint.header import check_type, list_tensors, read_header
from phimlx.checkpoint.quantization import read_quantization
from phimlx.checkpoint.tensors import (
    JoinedTensor,
    PartialTensor,
    StoredRows,
    Tensor,
    TensorInfo,
    Tensors,
)
from phimlx.errors import CheckpointError, ConfigError, shortened, some
from phimlx.files import is_file, read_json
from phimlx.models import registry
from phimlx.models.config import with_rope_scaling
from phimlx.models.names import Renames, adapter_tensor

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


class Checkpoint:
    """A model folder, read but not loaded: its config and the headers of its weights.

    Nothing is mapped into memory before safetensors' own parser has accepted every header.
    A folder in another dialect of its architecture appears as one in the architecture's own layout.

    Args:
        rope_scaling: in place of the config's own, in its form.

    Attributes:
        config: in the architecture's own terms; where it ties the output head and the weights hold
            a head of other values, it says that it does not.
        dialect: that the files are in; None for the architecture's own layout, or where phimlx
            does not run the architecture.
        adapter_files: adapters that lie in files of their own, by name.

    Raises:
        ConfigError, CheckpointError: where the folder is not a whole model.
    """

    def __init__(self, folder: str | Path, rope_scaling: Mapping[str, Any] | None = None) -> None:
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
        if rope_scaling is not None:
            self._config = with_rope_scaling(self._config, rope_scaling)

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
        told = ForeignQuantization.of(config) is not None
        architecture = registry.find(config.get("model_type"))
        if architecture is None or not (self.is_tied or told):
            return config
        untied = {**config, "tie_word_embeddings": False}
        architecture.read_config(untied)  # what is wrong with it is said before weights are read
        if self.is_tied and has_own_head(self.tensors):
            config = untied
        if told:  # its weights are plain, or decoded to plain ones, or refused
            self._check_readable()
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
        missing = [name for name in names if not is_file(self.folder / name)]
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
        if not files and self._told is not None:
            files = sorted(self.folder.glob("gptq_model*.safetensors"))  # AutoGPTQ's names
            if refusal := self._told.refusal():
                raise refusal
        if not files:
            raise CheckpointError(
                f"{self.folder} holds no {WHOLE} and no {INDEX}.",
                hint=_other_weights(self.folder)
                or "Only safetensors weights are read, never .bin or .pt files.",
            )
        return files

    @cached_property
    def _stored(self) -> dict[str, TensorInfo]:
        """Every tensor of the weight files, of whatever type; the index, where there is one, agrees
        with the files.

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
                        f"{INDEX} says that {some([name])} is in {file_name}, but it is not."
                    )
            unnamed = [name for name in stored if name not in weight_map]
            if unnamed:
                raise CheckpointError(f"{INDEX} does not name {some(unnamed)}.")
        architecture = registry.find(self._config.get("model_type"))
        unused = () if architecture is None else architecture.unused
        return {
            name: info
            for name, info in stored.items()
            if not any(fnmatchcase(name, pattern) for pattern in unused)
        }

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of every file, under the model's names, in the architecture's own layout.

        What another framework has packed is decoded as it is read.
        """
        stored: dict[str, Tensor] = dict(self._stored)
        if self.foreign is not None:
            self._check_readable()
            stored = self.foreign.decoded(self._stored, self._width)
        for tensor in stored.values():
            if isinstance(tensor, TensorInfo):
                check_type(tensor)
        named = stored if self._renames is None else self._renamed(self._renames, stored)
        return with_embedding(named) if self.is_tied else named

    @cached_property
    def _renames(self) -> Renames | None:
        """Stored names -> the architecture's; None where phimlx does not run it."""
        architecture = registry.find(self._config.get("model_type"))
        return None if architecture is None else architecture.names(self.dialect, self._config)

    @cached_property
    def _told(self) -> ForeignQuantization | None:
        """Another framework's quantization as it is told of, whatever the weights are."""
        return ForeignQuantization.of(self._config) or ForeignQuantization.of_folder(
            self.folder, self._config
        )

    @cached_property
    def foreign(self) -> ForeignQuantization | None:
        """Another framework's quantization of these weights; None where they are plain, or MLX's.

        A `quantization_config` that was left over plain weights means nothing.
        """
        if self._told is None or not any(is_packed(name, self._stored) for name in self._stored):
            return None
        return self._told

    def check_runs(self) -> None:
        """Raise ConfigError for weights that must be converted before they are run or trained."""
        if self.foreign is not None:
            raise self.foreign.refusal() or self.foreign.needs_conversion(self.folder)

    def _check_readable(self) -> None:
        """Raise ConfigError for weights that another framework has packed as phimlx cannot read."""
        if self.foreign is not None and (refusal := self.foreign.refusal()) is not None:
            raise refusal

    def _width(self, path: str) -> int:
        """Numbers in a row of the weight that is stored under a path, as config.json has it."""
        name = f"{path}.weight"
        if self._renames is not None:
            name = self._renames.place(name).names[0]
        width = self._widths.get(name)
        if width is None:
            raise CheckpointError(
                f"The checkpoint holds {some([path])}, which this architecture does not have."
            )
        return width

    @cached_property
    def _widths(self) -> dict[str, int]:
        architecture = registry.of_config(self._config)
        model = architecture.model_class()(architecture.read_config(self._config))
        parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        widths = {name: array.shape[-1] for name, array in parameters.items() if array.ndim == 2}
        return {f"{HEAD}.weight": widths.get(f"{EMBEDDING}.weight", 0), **widths}

    def _renamed(self, renames: Renames, stored: Tensors) -> dict[str, Tensor]:
        """Tensors of the weight files and of adapter files, under the architecture's names."""
        named = list(_under_our_names(renames, stored))
        for adapter, file in self.adapter_files.items():
            named += [(adapter_tensor(name, adapter), info) for name, info in read_header(file)]
        found: dict[str, Tensor] = {}
        for name, tensor in named:
            if name in found:
                one, other = (each.reads(0, each.count)[0].info for each in (tensor, found[name]))
                raise CheckpointError(
                    f"{one.name} of {one.file.relative_to(self.folder)} and {other.name} of "
                    f"{other.file.relative_to(self.folder)} are the same tensor."
                )
            found[name] = tensor
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

        def load(rows: StoredRows) -> mx.array:
            info = rows.info
            if info.file not in loaded:  # not safetensors
                return rows.array(rows.read())
            array = loaded[info.file][info.name]
            if rows.last - rows.first == info.count:
                return array
            return array[rows.first : rows.last]

        return {name: tensor.whole(load) for name, tensor in known.items()}


def _other_weights(folder: Path) -> str | None:
    """Say what a folder without a model holds instead: a GGUF file; None where there is none."""
    file = min(folder.glob("*.gguf"), default=None)
    return None if file is None else f"Convert it with: phimlx convert {file} --mlx-path OUT -q"


def _read_index(index: Path) -> Mapping[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index.name} has no weight_map.")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not re.fullmatch(
            r"[\w][\w.-]*\.safetensors", file_name
        ):
            raise CheckpointError(
                f"{index.name} puts {some([name])} in {shortened(file_name)}, which is not a plain "
                "*.safetensors file name."
            )
    return weight_map


def _under_our_names(renames: Renames, stored: Tensors) -> Iterator[tuple[str, Tensor]]:
    """Stored tensors under the architecture's names: as they are, in parts, or joined."""
    for name, tensor in stored.items():
        place = renames.place(name)
        if len(place.pieces) == 1:
            yield from _parts(place.names, name, tensor)
            continue
        missing = [piece for piece in place.pieces if piece not in stored]
        if missing:
            raise CheckpointError(f"The checkpoint holds {name}, but lacks {some(missing)}.")
        if name == place.pieces[0]:
            pieces = {piece: stored[piece] for piece in place.pieces}
            yield place.names[0], JoinedTensor.of(place.names[0], pieces)


def _parts(
    names: tuple[str, ...], stored_name: str, tensor: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of ours that one stored tensor holds, as many rows each, one below the other."""
    if len(names) == 1:
        yield names[0], tensor
        return
    if not tensor.shape or tensor.shape[0] % len(names):
        raise CheckpointError(
            f"{stored_name} has shape {list(tensor.shape)}, of which {len(names)} equal parts of "
            "rows cannot be made."
        )
    rows = tensor.shape[0] // len(names)
    for index, name in enumerate(names):
        yield name, PartialTensor(tensor, index * rows, rows)
