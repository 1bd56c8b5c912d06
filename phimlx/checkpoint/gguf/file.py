"""A GGUF file, or several that are one model, as a checkpoint: its config and its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.gguf.find import SPLIT
from phimlx.checkpoint.gguf.header import GgufHeader, GgufTensor, Setting, damaged, read_header
from phimlx.checkpoint.gguf.names import Piece, our_pieces
from phimlx.checkpoint.gguf.packed import PackedTensor, UnpairedTensor
from phimlx.checkpoint.gguf.settings import ROPE_TENSORS, read_config, shortest
from phimlx.checkpoint.tensors import (
    FLOATING_DTYPES,
    STORED_DTYPES,
    JoinedTensor,
    PartialTensor,
    Tensor,
    TensorInfo,
)
from phimlx.errors import CheckpointError, ConfigError, shortened, some
from phimlx.models import registry
from phimlx.models.registry import GGUF, Architecture

ORIGINAL = "Get the original model's folder, and convert that."
MAX_SPLITS = 1000
MAX_FACTORS = 1 << 13  # half of the largest head
MAX_VECTORS = 64 << 20  # bytes of all norms and biases that are read to choose their type

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
PACKED_BECOME = "F16"  # which rounds them eight times finer than bfloat16


class GgufCheckpoint(Checkpoint):
    """A GGUF file, read but not loaded, as a checkpoint of its architecture's own layout.

    Args:
        file: or the first of those that a model is split into.
        dtype: "float32", "float16" or "bfloat16", that all numbers become. Where None, packed ones
            become float16 and others stay; a norm or bias is kept in float32 by the format whatever
            the model's type, and takes that of the matrices where this loses nothing.

    Raises:
        ConfigError, CheckpointError: where it is not a whole model of an architecture that phimlx
            runs, in types that it reads.
    """

    def __init__(self, file: str | Path, dtype: str | None = None) -> None:
        self.folder = Path(file)
        headers = _read_all(self.folder)
        self._files = [header.file for header in headers]
        self.settings: Mapping[str, Setting] = headers[0].settings
        self._packed = _merged(headers)
        self._dtype = None if dtype is None else DTYPES[dtype]
        self.adapter_files = {}
        self.dialect = None
        architecture, self._form = self._architecture()
        self._config = self._read_config(architecture)
        self._model_config = architecture.read_config(self._config)

    @property
    def files(self) -> list[Path]:  # type: ignore[override]
        return self._files

    @property
    def config(self) -> dict[str, Any]:  # type: ignore[override]
        return self._config

    @property
    def is_tied(self) -> bool:
        return False  # no head is stored beside the embedding that it is tied to

    @property
    def foreign(self) -> None:  # type: ignore[override]
        return None  # what the file packs is decoded as it is read

    @property
    def text_split(self) -> str | None:
        """How the tokenizer splits text, where the file does not say it; see `registry.GGUF`."""
        return self._form.text_split

    @property
    def packed_types(self) -> list[str]:
        """llama.cpp's names of the types of its matrices, the most frequent first."""
        matrices = [each for each in self._packed.values() if len(each.shape) > 1]
        return [name for name, _ in Counter(each.type_name for each in matrices).most_common()]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        names = [name for name in self._packed if name not in ROPE_TENSORS]
        found = our_pieces(names, self._form, self._model_config)
        return {name: self._tensor(name, pieces) for name, pieces in found.items()}

    def weights(self) -> dict[str, mx.array]:
        """Read and unpack all tensors."""
        return {name: _read_whole(tensor) for name, tensor in self.tensors.items()}

    def _architecture(self) -> tuple[Architecture, GGUF]:
        name = self.settings.get("general.architecture")
        if name is None:
            raise ConfigError(
                f"{self.folder.name} does not say which architecture its model has.", hint=ORIGINAL
            )
        found = registry.of_gguf(name)
        if found is None:
            known = ", ".join(
                form.architecture
                for each in registry.ARCHITECTURES
                for form in (each.gguf, *each.gguf_dialects)
                if form is not None
            )
            raise ConfigError(
                f"{self.folder.name} holds a model of the architecture {shortened(name)}, and "
                f"phimlx reads GGUF files of the Phi family: {known}.",
                hint="Use llama.cpp for it, or give a Phi model.",
            )
        return found

    def _read_config(self, architecture: Architecture) -> dict[str, Any]:
        factors = {
            name: [shortest(factor) for factor in _read_factors(tensor)]
            for name, tensor in self._packed.items()
            if name in ROPE_TENSORS
        }
        try:
            config = read_config(self.settings, architecture, self._form, self._packed, factors)
            architecture.read_config(config)
        except (ConfigError, CheckpointError) as error:
            said = str(error).removeprefix("config.json: ")
            raise type(error)(f"{self.folder.name}: {said}", error.hint or ORIGINAL) from error
        return config

    def _tensor(self, name: str, pieces: Sequence[Piece]) -> Tensor:
        missing = [piece.name for piece in pieces if piece.name not in self._packed]
        if missing:
            held = next(piece.name for piece in pieces if piece.name in self._packed)
            raise CheckpointError(f"{self.folder.name} holds {held}, but lacks {some(missing)}.")
        stored = [self._packed[piece.name] for piece in pieces]
        dtypes = {self._becomes(tensor) for tensor in stored}
        dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        made = {
            piece.name: self._piece(piece, tensor, dtype)
            for piece, tensor in zip(pieces, stored, strict=True)
        }
        return made[pieces[0].name] if len(made) == 1 else JoinedTensor.of(name, made)

    def _piece(self, piece: Piece, stored: GgufTensor, dtype: str) -> Tensor:
        tensor: Tensor = _packed(stored, dtype)
        head_dim = self._model_config.head_dim
        if piece.paired:
            if tensor.count % head_dim or head_dim % 2:
                raise _misshapen(stored, f"heads of {head_dim} do not divide")
            tensor = UnpairedTensor(tensor, head_dim)
        if piece.rows is not None:
            first, length = piece.rows
            if first + length > tensor.count:
                raise _misshapen(stored, f"its settings make {first + length}")
            tensor = PartialTensor(tensor, first, length)
        return tensor

    def _becomes(self, stored: GgufTensor) -> str:
        """The type that a tensor's numbers become, by safetensors' name."""
        if self._dtype is not None or stored.type is None:
            return self._dtype or PACKED_BECOME
        if stored.type.unpack is not None:
            return PACKED_BECOME
        if len(stored.shape) > 1 or stored.type.name != "F32" or not self._vectors_are_small:
            return stored.type.name
        numbers = _read_whole(_packed(stored, "F32"))
        rounded = numbers.astype(STORED_DTYPES[self._usual]).astype(mx.float32)
        return self._usual if mx.array_equal(rounded, numbers) else "F32"

    @cached_property
    def _vectors_are_small(self) -> bool:
        vectors = (each for each in self._packed.values() if len(each.shape) == 1)
        return sum(each.nbytes for each in vectors if each.type is not None) <= MAX_VECTORS

    @cached_property
    def _usual(self) -> str:
        """What most of the matrices become."""
        sizes = dict.fromkeys(FLOATING_DTYPES, 0)
        for stored in self._packed.values():
            if len(stored.shape) > 1 and stored.type is not None:
                is_plain = stored.type.unpack is None
                sizes[stored.type.name if is_plain else PACKED_BECOME] += stored.nbytes
        return max(sizes, key=lambda name: sizes[name])


def _packed(stored: GgufTensor, dtype: str) -> PackedTensor:
    """A tensor whose numbers become `dtype`.

    Raises:
        CheckpointError: where they are packed in a way that is not read.
    """
    if stored.type is None:
        raise CheckpointError(
            f"{stored.file.name}: {stored.name} is stored as {stored.type_name}, which phimlx does "
            "not read.",
            hint="Get the same model as Q4_K_M, Q8_0 or F16, or the original model's folder.",
        )
    if len(stored.shape) == 1 and stored.type.numbers > 1:
        raise _misshapen(stored, "which are packed together")
    rows, row_bytes = stored.shape[0], stored.nbytes // stored.shape[0]
    info = TensorInfo(stored.file, (rows, row_bytes), "U8", stored.name, stored.offset)
    return PackedTensor(info, stored.type, stored.shape, dtype)


def _read_factors(stored: GgufTensor) -> list[float]:
    if len(stored.shape) > 1 or stored.shape[0] > MAX_FACTORS:
        raise damaged(stored.file, f"{stored.name} has the shape {list(stored.shape)}")
    factors: list[float] = _read_whole(_packed(stored, "F32")).tolist()  # type: ignore[assignment]
    return factors


def _misshapen(stored: GgufTensor, why: str) -> CheckpointError:
    return CheckpointError(
        f"{stored.file.name}: {stored.name} has {stored.shape[0]} rows, {why}.", hint=ORIGINAL
    )


def _read_whole(tensor: Tensor) -> mx.array:
    return tensor.whole(lambda rows: rows.array(rows.read()))


def _read_all(file: Path) -> list[GgufHeader]:
    """Headers of a file and of the others that it was split into, in order."""
    header = read_header(file)
    count = header.settings.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= MAX_SPLITS:
        raise damaged(file, f"it is one of {shortened(count)} files")
    if count < 2:
        return [header]
    found = SPLIT.fullmatch(file.name)
    if found is None or int(found[3]) != count:
        raise CheckpointError(
            f"{file.name} is one of {count} files that are one model, and its name does not tell "
            f"which: it should end in -00001-of-{count:05d}.gguf.",
            hint="Give all of them the names that they were published with.",
        )
    headers = []
    for number in range(1, count + 1):
        part = file.with_name(f"{found[1]}-{number:05d}-of-{count:05d}{file.suffix}")
        if not part.exists():
            raise CheckpointError(
                f"{file.name} is one of {count} files that are one model, and {part.name} is not "
                "beside it.",
                hint="Download all of them into one folder.",
            )
        header = read_header(part)
        place = header.settings.get("split.count"), header.settings.get("split.no")
        if place != (count, number - 1):
            raise damaged(part, f"it does not say that it is number {number} of {count}")
        headers.append(header)
    return headers


def _merged(headers: Sequence[GgufHeader]) -> dict[str, GgufTensor]:
    """Tensors of all files of a model."""
    tensors: dict[str, GgufTensor] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{name} stands in both {tensors[name].file.name} and {header.file.name}."
                )
            tensors[name] = tensor
    expected = headers[0].settings.get("split.tensors.count", len(tensors))
    if len(headers) > 1 and expected != len(tensors):
        raise CheckpointError(
            f"{headers[0].file.name} and the files beside it hold {len(tensors)} tensors, of "
            f"{shortened(expected)}.",
            hint="Download all of them again.",
        )
    return tensors
