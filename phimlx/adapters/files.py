"""The files of an adapter folder, whichever format it has: headers checked, numbers finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from phimlx.checkpoint.arrays import write_arrays
from phimlx.checkpoint.header import read_header
from phimlx.checkpoint.tensors import FLOATING_DTYPES, TensorInfo
from phimlx.errors import CheckpointError, ConfigError, shortened, translate_shortage
from phimlx.files import replacing, translate_write_errors, write_json
from phimlx.models.lora import MAX_RANK

CONFIG = "adapter_config.json"
MAX_SCALE = 1e9  # a product with more leaves the range that numbers of a model have
PARTS = ("lora_a", "lora_b", "m")  # of a layer's adapter, in mlx-lm's names


def check_finite(arrays: Mapping[str, mx.array]) -> None:
    """Raise CheckpointError where a number is NaN or infinite."""
    for name, array in arrays.items():
        if not mx.isfinite(array).all().item():
            raise CheckpointError(f"{name} holds NaN or infinity: this adapter is damaged.")


def check_ranks(
    tensors: Mapping[str, tuple[int, ...]], rank_of: Callable[[str], int], dora: bool
) -> None:
    """Raise CheckpointError where a layer's tensors do not belong together.

    Args:
        tensors: the shape of each, under mlx-lm's names and in its layout.
        rank_of: what the config says of a layer, by path.
        dora: whether each has magnitudes.
    """
    paths = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    for path in paths:
        for part in PARTS if dora else PARTS[:2]:
            if f"{path}.{part}" not in tensors:
                raise CheckpointError(f"The adapter of {path} lacks {part}.")
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        rank = rank_of(path)
        if len(a) != 2 or len(b) != 2 or a[1] != rank or b[0] != rank:
            raise CheckpointError(
                f"The adapter of {path} has shapes {list(a)} and {list(b)}, which rank {rank} does "
                "not make."
            )


def read_floats(file: Path) -> dict[str, TensorInfo]:
    """The headers of a safetensors file that holds floating-point numbers alone.

    Raises:
        CheckpointError: where it is no such file.
    """
    tensors = dict(read_header(file))
    for name, info in tensors.items():
        if info.dtype not in FLOATING_DTYPES:
            raise CheckpointError(
                f"{name} in {file.name} is stored as {info.dtype}, not as floating-point numbers."
            )
    if not tensors:
        raise CheckpointError(f"{file.name} holds no tensors.")
    return tensors


def load_arrays(file: Path) -> dict[str, mx.array]:
    """The tensors of a file whose header has been accepted, read and finite."""
    with translate_shortage():
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        mx.eval(arrays)
    check_finite(arrays)
    return arrays


def number(place: str, value: Any, kind: type = float) -> Any:
    """A value above 0 from an adapter's config; `kind` int takes whole ones up to `MAX_RANK`."""
    allowed = (int,) if kind is int else (int, float)
    top = MAX_RANK if kind is int else MAX_SCALE
    if type(value) not in allowed or not 0 < value <= top:
        what = f"a whole number from 1 to {MAX_RANK}" if kind is int else "a number above 0"
        if type(value) in allowed and kind is not int and value > top:
            what = f"a number up to {MAX_SCALE:g}"
        raise ConfigError(f"{CONFIG}: {place} is {shortened(value)}, not {what}.")
    return kind(value)


def write_files(
    folder: Path, name: str, arrays: Mapping[str, mx.array], config: Mapping[str, Any]
) -> None:
    """Put weights and then their config into a folder, each file as a whole or not at all."""
    hint = "Choose a folder that can be written."
    with translate_write_errors(folder, CheckpointError, hint):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / name) as temporary:
            write_arrays(temporary, arrays)
        write_json(folder / CONFIG, config)
