"""A model folder -> an MLX folder, or one in Hub layout, one block of rows at a time.

What can be checked is checked before the first byte is written.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

import phimlx
from convert.card import model_card, model_config, scaling_markdown
from convert.folder import (
    Journal,
    check_space,
    copy_companions,
    new_folder,
    refuse_existing,
    size_of,
    stamps,
)
from convert.fuse import AdapterFusion, stored_recipe
from convert.quantize.calibrated import CalibrationPlan
from convert.quantize.recipe import UNIFORM, Quantization, Recipe, named
from convert.quantize.tensor import batched, parallel_streams
from convert.read import WeightFiles, read_blocks
from convert.request import LAYOUTS, ConversionRequest
from convert.source import Source, refuse_gguf
from convert.split import WHOLE, ProjectionSplit
from convert.tensor_plan import TensorPlan
from convert.write import ShardLayout, ShardWriter, write_index
from phimlx import catalog
from phimlx.checkpoint.folder import Checkpoint
from phimlx.errors import ConversionError
from phimlx.hub.layout import model_name
from phimlx.models import registry
from phimlx.models.config import hub_dialect
from phimlx.models.registry import Architecture

BATCH_BYTES = 16 << 20  # computed at once, unquantized
BATCHES_AHEAD = 3  # read before they are asked for, which a cold disk needs
JOURNAL_BYTES = 256 << 20  # read between two notes of how far the work has come


@dataclass(frozen=True)
class ConversionResult:
    """The folder or file that was made.

    Attributes:
        parameters: numbers that the model has, however they are stored.
        bits_per_weight: what each of them takes on disk, scales and biases included.
        bytes_before, bytes_after: of weights.
        tensors: how many were written.
        dtype: of what is not quantized; None where that is of several.
        quantization: of layers that no rule of the recipe gives another.
        undivided: layers that stayed as they are, since groups do not divide their width.
        continued: bytes of the source that an interrupted run had dealt with already.
        remarks: what of the source did not go along, in sentences.
    """

    path: Path
    source: Path
    parameters: int
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    tensors: int
    dtype: str | None
    recipe: str | None
    quantization: Quantization | None
    undivided: tuple[str, ...]
    continued: int
    seconds: float
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion to a folder, checked and laid out, not yet begun.

    Attributes:
        source: the model, and the small files that go along.
        recipe: None where every layer becomes unquantized.
        layout: of the output's weights.
        calibration: how quantized weights are found; None where they are rounded.
        fusion: the adapter that is merged into the weights.
        split: of projections in the output.
    """

    request: ConversionRequest
    source: Source
    tensors: TensorPlan
    recipe: Recipe | None
    layout: ShardLayout
    files: WeightFiles
    calibration: CalibrationPlan | None = None
    fusion: AdapterFusion | None = None
    split: ProjectionSplit = WHOLE

    @property
    def checkpoint(self) -> Checkpoint:
        return self.source.checkpoint

    @property
    def bytes_before(self) -> int:
        return self.tensors.bytes_before

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides the bytes of the output's weights."""
        decisive = (
            (phimlx.__version__, version("mlx"), str(mx.default_device())),
            stamps(self.checkpoint.files),
            self.tensors.conversions,
            self.layout.headers,
            None if self.calibration is None else self.calibration.digest,
            None if self.fusion is None else self.fusion.digest,
        )
        return hashlib.sha256(repr(decisive).encode()).hexdigest()

    def run(
        self,
        advance: Callable[[int], object] = lambda nbytes: None,
        calibrating: Callable[[float], object] = lambda percent: None,
    ) -> ConversionResult:
        """Convert.

        Args:
            advance: called with the bytes of each block that has been dealt with.
            calibrating: called with hundredths of what comes before that, where weights are
                calibrated.

        Raises:
            ConversionError: where a weight is not finite or the output cannot be written. Nothing
                is left behind then.
        """
        start = time.perf_counter()
        calibration = self.calibration
        if calibration is not None and calibration.settings.method == "sensitivity":
            chosen = self._with_recipe(calibration.choose_bits(calibrating))
            continued = chosen._write(advance)
            return chosen.result(continued, time.perf_counter() - start)
        if calibration is not None:
            self._write_calibrated(calibration, advance, calibrating)
            return self.result(0, time.perf_counter() - start)
        continued = self._write(advance)
        return self.result(continued, time.perf_counter() - start)

    def _with_recipe(self, recipe: Recipe) -> ConversionPlan:
        """Plan the same by another recipe."""
        tensors = TensorPlan.of(self.checkpoint, recipe, self.tensors.dtype)
        layout = _shards(tensors, self.request, self.split)
        return replace(self, recipe=recipe, tensors=tensors, layout=layout)

    def _write(self, advance: Callable[[int], object]) -> int:
        """Write the folder; returns the bytes that an interrupted run had dealt with."""
        out, files = self.request.out_path, self.files
        with new_folder(out, self.digest, self.layout.shards, files.keep_after) as journal:
            return self.fill(journal, advance)

    def fill(self, journal: Journal, advance: Callable[[int], object]) -> int:
        """Write the files to a journal's folder, where it has `layout.shards` for names.

        Returns:
            Bytes of the source that an interrupted run had dealt with.
        """
        continued = sum(tensor.nbytes for tensor in self.tensors.conversions[: journal.done])
        if continued:
            advance(continued)
        self._write_weights(journal, advance)
        self._write_companions(journal.folder)
        return continued

    def _write_calibrated(
        self,
        calibration: CalibrationPlan,
        advance: Callable[[int], object],
        calibrating: Callable[[float], object],
    ) -> None:
        """Write the folder with calibrated weights, which its journal counts instead of blocks."""
        out = self.request.out_path
        with new_folder(out, self.digest, calibration.files, calibration.keep_after) as journal:
            calibrated = calibration.run(journal, calibrating)
            self._write_weights(replace(journal, done=0), advance, calibrated)
            for name in calibration.files:
                (journal.folder / name).unlink()
            self._write_companions(journal.folder)

    def result(self, continued: int, seconds: float) -> ConversionResult:
        """Say what was made."""
        parameters = sum(tensor.size for tensor in self.tensors.conversions)
        return ConversionResult(
            path=self.request.out_path,
            source=self.checkpoint.folder,
            parameters=parameters,
            bits_per_weight=8 * self.layout.nbytes / parameters,
            bytes_before=self.bytes_before,
            bytes_after=self.layout.nbytes,
            tensors=len(self.layout.tensors),
            dtype=self.tensors.dtype,
            recipe=None if self.recipe is None else self.recipe.name,
            quantization=None if self.recipe is None else self.recipe.default,
            undivided=self.tensors.undivided,
            continued=continued,
            seconds=seconds,
            remarks=() if self.checkpoint.foreign is None else self.checkpoint.foreign.remarks,
        )

    def _write_weights(
        self,
        journal: Journal,
        advance: Callable[[int], object],
        calibrated: Mapping[str, mx.array] | None = None,
    ) -> None:
        streams = parallel_streams()
        work = [
            (number, tensor.transform, rows)
            for number, tensor in enumerate(self.tensors.conversions)
            if number >= journal.done
            for rows in tensor.blocks(BATCH_BYTES // len(streams))
        ]
        unrecorded = 0
        with ShardWriter.open(journal.folder, self.layout) as writer:
            blocks = read_blocks(
                [rows for _, _, rows in work], BATCHES_AHEAD * len(streams), self.files
            )
            for batch in batched(zip(work, blocks, strict=True), len(streams)):
                made = []
                for stream, ((number, transform, rows), stored) in zip(
                    streams, batch, strict=False
                ):
                    with mx.stream(stream):
                        block = transform.apply(stored, rows.first)
                        if calibrated:
                            block = block.with_parts(rows.first, rows.last, calibrated)
                        made.append((number, rows, block))
                mx.eval(
                    [(block.parts, block.source_finite, block.result_finite) for *_, block in made]
                )
                for number, rows, block in made:
                    block.check()
                    for name, array in block.parts.items():
                        for part in self.split.parts(name, rows.first, array):
                            writer.write(*part)
                    advance(rows.nbytes)
                    unrecorded += rows.nbytes
                    if unrecorded >= JOURNAL_BYTES and rows.is_last and calibrated is None:
                        writer.sync()
                        journal.record(number + 1)
                        unrecorded = 0
                del batch, made, block, stored
                mx.clear_cache()
        write_index(journal.folder, self.layout)

    def _write_companions(self, folder: Path) -> None:
        """Write the tokenizer's files, the model card and, last of all, config.json."""
        copy_companions(self.source.companions, folder)
        source = self.source.folder.resolve()
        known = catalog.by_config(self.checkpoint.config, model_name(source))
        card = model_card(
            self.request.out_path.name,
            source,
            known,
            self.tensors.dtype,
            self.recipe,
            self.layout.format,
            self.tensors.layers,
            registry.of_config(self.checkpoint.config).task,
        )
        card += "" if self.calibration is None else self.calibration.markdown()
        card += "" if self.fusion is None else self.fusion.markdown()
        architecture = registry.of_config(self.checkpoint.config)
        scaling = architecture.read_config(self.checkpoint.config).rope.scaling
        card += "" if scaling is None else scaling_markdown(scaling)
        # The folder's name may hold bytes that are no UTF-8.
        (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")
        config: Mapping[str, Any] = self.checkpoint.config
        config = config if self.fusion is None else self.fusion.config(config)
        config = model_config(config, known, self.tensors.dtype, self.recipe, self.tensors.layers)
        if self.request.split_projections:
            config = dict(sorted(architecture.in_split_layout(config).items()))
        (folder / "config.json").write_text(json.dumps(config, indent=4) + "\n")


def plan_folder(request: ConversionRequest, files: WeightFiles) -> ConversionPlan:
    """Plan a folder of safetensors; see `convert.api.plan_conversion`."""
    out = request.out_path
    refuse_existing(out)
    source = Source.of(request)
    checkpoint = source.checkpoint
    fusion = None if request.adapter is None else AdapterFusion.of(request.adapter, checkpoint)
    split = WHOLE
    if request.split_projections:
        split = ProjectionSplit.of(checkpoint.config)
        registry.of_config(checkpoint.config).in_split_layout(hub_dialect(checkpoint.config))
    recipe = _recipe(request, checkpoint)
    unpacks = source.is_gguf  # whether --dequantize is given or not
    check_purpose(checkpoint, recipe, request.dequantize and not unpacks)
    if recipe is not None and request.parts:
        architecture = registry.of_config(checkpoint.config)
        check_parts(checkpoint, architecture, request.parts)
        recipe = recipe.with_parts(architecture, request.parts)
    tensors = TensorPlan.of(checkpoint, recipe, request.dtype, whole=request.layout == "hf")
    if fusion is not None:
        tensors = fusion.applied_to(tensors)
    settings, calibration = request.calibration_settings, None
    if settings is not None:
        refuse_gguf(source, "Calibration")
        calibration = CalibrationPlan.of(settings, checkpoint, recipe, tensors)
    layout = _shards(tensors, request, split)
    planned = ConversionPlan(
        request, source, tensors, recipe, layout, files, calibration, fusion, split
    )
    smaller = layout.nbytes < planned.bytes_before
    if fusion is None and checkpoint.quantization and recipe and not smaller:
        raise ConversionError(
            f"{checkpoint.folder} is already quantized, to {checkpoint.quantization['bits']} bits: "
            "this would make it no smaller, and no better.",
            hint="Choose fewer bits, or convert the original model: what quantization took away "
            "does not come back.",
        )
    spare = (
        files.spare(tensors.file_order) if calibration is None else calibration.spare(layout.nbytes)
    )
    check_space(out, layout.nbytes + spare + size_of(source.companions))
    return planned


def _recipe(request: ConversionRequest, checkpoint: Checkpoint) -> Recipe | None:
    """Find the recipe that a request means; None where every layer becomes unquantized."""
    wanted = request.quantization
    if wanted is None:
        keeps = request.adapter is not None and not request.dequantize and request.layout == "mlx"
        return stored_recipe(checkpoint) if keeps else None
    if isinstance(wanted, str):
        recipe = named(wanted, registry.of_config(checkpoint.config))
    else:
        recipe = wanted if isinstance(wanted, Recipe) else Recipe(UNIFORM, wanted)
    return recipe if request.group_size is None else recipe.in_groups_of(request.group_size)


def _shards(tensors: TensorPlan, request: ConversionRequest, split: ProjectionSplit) -> ShardLayout:
    results = (
        (part, rows)
        for tensor in tensors.conversions
        for name, array in tensor.result().items()
        for part, _, rows in split.parts(name, 0, array)
    )
    return ShardLayout.of(results, request.shard_bytes, LAYOUTS[request.layout])


def check_purpose(checkpoint: Checkpoint, recipe: Recipe | None, dequantize: bool) -> None:
    """Refuse what would come from, or lead to, a misunderstanding."""
    quantized = checkpoint.quantization is not None
    if dequantize and not quantized and checkpoint.foreign is None:
        raise ConversionError(
            f"{checkpoint.folder} is not quantized, so there is nothing to dequantize.",
            hint="Leave --dequantize out.",
        )
    if quantized and not dequantize and recipe is None:
        assert checkpoint.quantization is not None
        raise ConversionError(
            f"{checkpoint.folder} is already quantized, to {checkpoint.quantization['bits']} bits.",
            hint="Quantize it further with -q, or make it unquantized with --dequantize.",
        )


def _without_parts(architecture: Architecture) -> str:
    return "has no" if architecture.takes_media else "takes text only, so it has no"


def check_parts(checkpoint: Checkpoint, architecture: Architecture, parts: Collection[str]) -> None:
    """Refuse to quantize what a model does not have."""
    missing = [part for part in parts if part not in architecture.parts]
    if missing:
        raise ConversionError(
            f"{checkpoint.folder} {_without_parts(architecture)} {' and no '.join(missing)}.",
            hint=f"Leave {' and '.join(f'--q-{part}' for part in missing)} out.",
        )
