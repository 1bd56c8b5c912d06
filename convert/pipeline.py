"""A model folder in Hub layout -> an MLX folder, one tensor at a time.

Knows the order of the work, and checks what can be checked before the first byte is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import mlx.core as mx

from convert.card import model_card, model_config
from convert.folder import companions, copy_companions, new_folder, refuse_existing
from convert.quantize import cast, quantize
from convert.recipe import RECIPES, Quantization, assign
from convert.shards import Layout, write_shards
from phimlx import catalog, hub
from phimlx.checkpoint import DTYPES, Checkpoint, TensorInfo, build_model, stored_parameters
from phimlx.errors import ConversionError
from phimlx.sizes import size_text

SHARD_BYTES = 5 << 30  # as mlx-lm's

STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Conversion:
    """What was made.

    Attributes:
        parameters: numbers that the model has, however they are stored.
        bits_per_weight: what each of them takes on disk, scales and biases included.
        bytes_before, bytes_after: of weights.
        tensors: how many were written.
        dtype: of what is not quantized; None where that is of several.
        unquantized: layers that stayed as they are, since groups do not divide their width.
    """

    path: Path
    source: Path
    parameters: int
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    tensors: int
    dtype: str | None
    quantization: Quantization | None
    unquantized: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A conversion, checked and laid out, not yet begun.

    Attributes:
        sources: the tensors to read, in the order of the files.
        layers: what becomes of each layer that can be quantized; empty where none is to be.
        to_dtype: what to convert to; None keeps each tensor's own.
        dtype: of what is not quantized; None where that is of several.
    """

    checkpoint: Checkpoint
    out: Path
    sources: Mapping[str, TensorInfo]
    layers: Mapping[str, Quantization | None]
    quantization: Quantization | None
    to_dtype: mx.Dtype | None
    dtype: str | None
    layout: Layout

    @property
    def bytes_before(self) -> int:
        return sum(info.nbytes for info in self.sources.values())

    def run(self, advance: Callable[[int], object] = lambda nbytes: None) -> Conversion:
        """Convert.

        Args:
            advance: called with the bytes of each tensor when it has been read.

        Raises:
            ConversionError: where a weight is not finite or the output cannot be written. Nothing
                is left behind then.
        """
        start = time.perf_counter()
        with new_folder(self.out) as folder:
            write_shards(folder, self.layout, self._tensors(advance))
            copy_companions(self.checkpoint.folder, folder)
            self._describe(folder)
        parameters = sum(prod(info.shape) for info in self.sources.values())
        return Conversion(
            path=self.out,
            source=self.checkpoint.folder,
            parameters=parameters,
            bits_per_weight=8 * self.layout.nbytes / parameters,
            bytes_before=self.bytes_before,
            bytes_after=self.layout.nbytes,
            tensors=len(self.layout.tensors),
            dtype=self.dtype,
            quantization=self.quantization,
            unquantized=tuple(path for path, chosen in self.layers.items() if chosen is None),
            seconds=time.perf_counter() - start,
        )

    def _tensors(self, advance: Callable[[int], object]) -> Iterator[tuple[str, mx.array]]:
        """The output's tensors in order, each computed when it is asked for."""
        weights = self.checkpoint.weights()
        for name, info in self.sources.items():
            array = cast(name, weights.pop(name), self.to_dtype)
            parts = quantize(name, array, self.layers.get(layer_of(name)))
            del array
            mx.eval(parts)
            yield from parts.items()
            del parts
            mx.clear_cache()
            advance(info.nbytes)

    def _describe(self, folder: Path) -> None:
        """Write the model card and, last of all, config.json."""
        source = self.checkpoint.folder.resolve()
        known = catalog.by_config(self.checkpoint.config, source)
        form = f"weights in {self.dtype or 'their own types'}"
        if self.quantization is not None:
            form = (
                f"weights at {self.quantization.bits} bits in groups of "
                f"{self.quantization.group_size}"
            )
        card = model_card(self.out.name, source, known, form, self.quantization is not None)
        (folder / "README.md").write_text(card, encoding="utf-8")
        config = model_config(
            self.checkpoint.config, known, self.dtype, self.quantization, self.layers
        )
        (folder / "config.json").write_text(json.dumps(config, indent=4) + "\n")


def plan(
    source: str | Path,
    out: str | Path,
    quantization: Quantization | None = None,
    dtype: str | None = None,
    recipe: str = "uniform",
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Check everything that can be known from the headers, and lay the output out.

    Args:
        source: a model's folder, in Hub layout or MLX's, not quantized.
        out: the folder to make.
        quantization: None keeps every weight as it is.
        dtype: "float32", "float16" or "bfloat16" for what is not quantized; None keeps each
            tensor's own.
        recipe: which of the architecture's recipes says what is quantized, and to how many bits.
        shard_bytes: largest weight file; a tensor that is larger has one of its own.

    Raises:
        ConfigError, CheckpointError: where the source is not a whole Phi-4 model.
        ConversionError: where it is quantized already, the output exists, or has no room.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
    out = Path(out).absolute()
    refuse_existing(out)
    checkpoint = Checkpoint(source)
    if checkpoint.quantization is not None:
        raise ConversionError(
            f"{checkpoint.folder} is already quantized, to {checkpoint.quantization['bits']} bits.",
            hint="Convert the original model: what quantization took away does not come back.",
        )
    model = build_model(checkpoint.config)
    sources = stored_parameters(checkpoint, model)
    layers: dict[str, Quantization | None] = {}
    if quantization is not None:
        modules = dict(model.named_modules())
        widths = {
            layer_of(name): info.shape[-1]
            for name, info in sources.items()
            if hasattr(modules.get(layer_of(name)), "to_quantized")
        }
        recipes = RECIPES[checkpoint.config["model_type"]]
        if recipe not in recipes:
            raise ConversionError(f"There is no recipe {recipe}; there is {', '.join(recipes)}.")
        layers = assign(recipes[recipe], quantization, widths)
        if not any(layers.values()):
            raise ConversionError(
                f"Groups of {quantization.group_size} divide the width of no layer of this model "
                f"({', '.join(map(str, sorted(set(widths.values()))))}).",
                hint="Choose a smaller group size.",
            )
    to_dtype = None if dtype is None else DTYPES[dtype]
    templates = {  # of the right shape and type, and never computed
        name: mx.zeros(info.shape, to_dtype or DTYPES[STORED[info.dtype]])
        for name, info in sources.items()
    }
    parts = (
        part
        for name, template in templates.items()
        for part in quantize(name, template, layers.get(layer_of(name))).items()
    )
    layout = Layout.of(parts, shard_bytes)
    stored = {STORED[info.dtype] for info in sources.values()}
    _check_space(checkpoint.folder, out, layout.nbytes)
    return Plan(
        checkpoint=checkpoint,
        out=out,
        sources=sources,
        layers=layers,
        quantization=quantization,
        to_dtype=to_dtype,
        dtype=dtype or (stored.pop() if len(stored) == 1 else None),
        layout=layout,
    )


def convert(
    source: str | Path,
    out: str | Path,
    quantization: Quantization | None = None,
    dtype: str | None = None,
    recipe: str = "uniform",
) -> Conversion:
    """Make an MLX folder of a model; arguments and errors as for `plan` and `Plan.run`."""
    return plan(source, out, quantization, dtype, recipe).run()


def layer_of(name: str) -> str:
    """The path of the layer that a tensor is the weight of."""
    return name.removesuffix(".weight")


def _check_space(source: Path, out: Path, weights: int) -> None:
    needed = weights + sum(file.stat().st_size for file in companions(source).values())
    free = hub.free_space(out.parent)
    if needed > free:
        raise ConversionError(
            f"{out} needs {size_text(needed)} of disk space, but its disk has {size_text(free)}.",
            hint="Free some space, or choose a folder on another disk.",
        )
