"""A model folder -> an MLX folder, or one in Hub layout, one block of rows at a time.

Knows the order of the work, and checks what can be checked before the first byte is written.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

import phimlx
from convert.card import model_card, model_config
from convert.folder import (
    Journal,
    check_space,
    copy_companions,
    new_folder,
    refuse_existing,
    stamps,
)
from convert.fuse import Fusion, as_stored
from convert.quantize.calibrated import Learning, Lesson
from convert.quantize.recipe import UNIFORM, Quantization, Recipe, named
from convert.quantize.tensor import batched, parallel_streams
from convert.read import WeightFiles, read_blocks
from convert.steps import Steps
from convert.write import Layout, ShardWriter, write_index
from phimlx import catalog
from phimlx.checkpoint.folder import DTYPES, Checkpoint
from phimlx.checkpoint.load import build_model
from phimlx.errors import ConversionError
from phimlx.hub import model_files
from phimlx.hub.layout import model_name
from phimlx.models import registry

SHARD_BYTES = 5 << 30  # as mlx-lm's
BATCH_BYTES = 16 << 20  # computed at once, as plain numbers
BATCHES_AHEAD = 3  # read before they are asked for, which a cold disk needs
JOURNAL_BYTES = 256 << 20  # read between two notes of how far the work has come

FORMATS = {"mlx": "mlx", "hf": "pt"}  # a folder's layout, and what its safetensors files say


@dataclass(frozen=True)
class Conversion:
    """What was made.

    Attributes:
        parameters: numbers that the model has, however they are stored.
        bits_per_weight: what each of them takes on disk, scales and biases included.
        bytes_before, bytes_after: of weights.
        tensors: how many were written.
        dtype: of what is not quantized; None where that is of several.
        quantization: of layers that no rule of the recipe gives another.
        undivided: layers that stayed as they are, since groups do not divide their width.
        continued: bytes of the source that an interrupted run had dealt with already.
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


@dataclass(frozen=True)
class Plan:
    """A conversion, checked and laid out, not yet begun.

    Attributes:
        recipe: None where every layer becomes plain numbers.
        layout: of the output's weights.
        lesson: how the quantized weights are learned; None where they are rounded.
        fusion: the adapter that is merged into the weights.
    """

    checkpoint: Checkpoint
    out: Path
    steps: Steps
    recipe: Recipe | None
    layout: Layout
    files: WeightFiles
    lesson: Lesson | None = None
    fusion: Fusion | None = None

    @property
    def bytes_before(self) -> int:
        return self.steps.bytes_before

    @property
    def digest(self) -> str:
        """Of everything that decides the bytes of the output's weights."""
        versions = (phimlx.__version__, version("mlx"), str(mx.default_device()))
        files = stamps(self.checkpoint.files)
        lesson = None if self.lesson is None else self.lesson.digest
        adapter = None if self.fusion is None else self.fusion.digest
        decisive = repr((versions, files, self.steps.steps, self.layout.headers, lesson, adapter))
        return hashlib.sha256(decisive.encode()).hexdigest()

    def run(
        self,
        advance: Callable[[int], object] = lambda nbytes: None,
        learning: Callable[[float], object] = lambda percent: None,
    ) -> Conversion:
        """Convert.

        Args:
            advance: called with the bytes of each block that has been dealt with.
            learning: called with hundredths of what comes before that, where weights are learned.

        Raises:
            ConversionError: where a weight is not finite or the output cannot be written. Nothing
                is left behind then.
        """
        start = time.perf_counter()
        lesson = self.lesson if self.lesson is not None and self.lesson.is_to_come else None
        if lesson is not None and lesson.learning.method == "sensitivity":
            chosen = self._by(lesson.choose(learning), replace(lesson, is_to_come=False))
            return replace(chosen.run(advance), seconds=time.perf_counter() - start)
        names = self.layout.shards if lesson is None else lesson.files
        keep_after = self.files.keep_after if lesson is None else lesson.keep_after
        with new_folder(self.out, self.digest, names, keep_after) as journal:
            continued = 0
            if lesson is None:
                continued = sum(step.nbytes for step in self.steps.steps[: journal.done])
                if continued:
                    advance(continued)
                self._write_weights(journal, advance)
            else:
                learned = lesson.learn(journal, learning)
                self._write_weights(replace(journal, done=0), advance, learned)
                for name in lesson.files:
                    (journal.folder / name).unlink()
            copy_companions(self.checkpoint.folder, journal.folder)
            self._describe(journal.folder)
        parameters = sum(step.size for step in self.steps.steps)
        return Conversion(
            path=self.out,
            source=self.checkpoint.folder,
            parameters=parameters,
            bits_per_weight=8 * self.layout.nbytes / parameters,
            bytes_before=self.bytes_before,
            bytes_after=self.layout.nbytes,
            tensors=len(self.layout.tensors),
            dtype=self.steps.dtype,
            recipe=None if self.recipe is None else self.recipe.name,
            quantization=None if self.recipe is None else self.recipe.default,
            undivided=self.steps.undivided,
            continued=continued,
            seconds=time.perf_counter() - start,
        )

    def _by(self, recipe: Recipe, lesson: Lesson) -> Plan:
        """The same by another recipe."""
        steps = Steps.of(self.checkpoint, recipe, self.steps.dtype)
        results = (item for step in steps.steps for item in step.result().items())
        layout = Layout.of(results, SHARD_BYTES, self.layout.format)
        return replace(self, recipe=recipe, steps=steps, layout=layout, lesson=lesson)

    def _write_weights(
        self,
        journal: Journal,
        advance: Callable[[int], object],
        learned: Mapping[str, mx.array] | None = None,
    ) -> None:
        streams = parallel_streams()
        work = [
            (number, step.change, rows)
            for number, step in enumerate(self.steps.steps)
            if number >= journal.done
            for rows in step.blocks(BATCH_BYTES // len(streams))
        ]
        unrecorded = 0
        with ShardWriter.open(journal.folder, self.layout) as writer:
            blocks = read_blocks(
                [rows for _, _, rows in work], BATCHES_AHEAD * len(streams), self.files
            )
            for batch in batched(zip(work, blocks, strict=True), len(streams)):
                made = []
                for stream, ((number, change, rows), stored) in zip(streams, batch, strict=False):
                    with mx.stream(stream):
                        block = change.apply(stored, rows.first)
                        if learned:
                            block = block.with_parts(rows.first, rows.last, learned)
                        made.append((number, rows, block))
                mx.eval([(block.parts, block.sound, block.fits) for _, _, block in made])
                for number, rows, block in made:
                    block.check()
                    for name, array in block.parts.items():
                        writer.write(name, rows.first, array)
                    advance(rows.nbytes)
                    unrecorded += rows.nbytes
                    if unrecorded >= JOURNAL_BYTES and rows.is_last and learned is None:
                        writer.sync()
                        journal.record(number + 1)
                        unrecorded = 0
                del batch, made, block, stored
                mx.clear_cache()
        write_index(journal.folder, self.layout)

    def _describe(self, folder: Path) -> None:
        """Write the model card and, last of all, config.json."""
        source = self.checkpoint.folder.resolve()
        known = catalog.by_config(self.checkpoint.config, model_name(source))
        card = model_card(
            self.out.name,
            source,
            known,
            self.steps.dtype,
            self.recipe,
            self.layout.format,
            self.steps.layers,
            registry.of_config(self.checkpoint.config).task,
        )
        card += "" if self.lesson is None else self.lesson.markdown()
        card += "" if self.fusion is None else self.fusion.markdown()
        (folder / "README.md").write_text(card, encoding="utf-8")
        config = model_config(
            self.checkpoint.config, known, self.steps.dtype, self.recipe, self.steps.layers
        )
        (folder / "config.json").write_text(json.dumps(config, indent=4) + "\n")


def plan(
    source: str | Path,
    out: str | Path,
    recipe: Quantization | Recipe | str | None = None,
    dtype: str | None = None,
    *,
    dequantize: bool = False,
    group_size: int | None = None,
    parts: Collection[str] = (),
    layout: str = "mlx",
    files: WeightFiles | None = None,
    shard_bytes: int = SHARD_BYTES,
    method: Learning | str | None = None,
    adapter: str | Path | None = None,
) -> Plan:
    """Check everything that can be known from the headers, and lay the output out.

    Args:
        source: a model's folder, in Hub layout or MLX's.
        out: the folder to make.
        recipe: what to quantize to: all layers alike, by a recipe, or by the recipe of this name
            that the model's architecture has. None makes plain numbers.
        dtype: "float32", "float16" or "bfloat16" for what is not quantized; None keeps each
            tensor's own.
        dequantize: that plain numbers are meant where the source is quantized.
        group_size: other than the recipe's own.
        parts: "adapters", "encoders": what of a multimodal model is quantized too, to 8 bits. Else
            it stays as it is, where no rule of the recipe names it.
        layout: "mlx", or "hf" as published on the Hub, which has no quantized weights.
        files: how the source's weight files are opened; they are here where None.
        shard_bytes: largest weight file; a tensor that is larger has one of its own.
        method: how quantized weights are learned, "gptq" or "dwq" for that with its defaults; they
            are rounded where None.
        adapter: a folder whose adapter is fused into the weights. Quantized ones are quantized
            again as they were, where nothing else is asked for.

    Raises:
        ConfigError, CheckpointError: where the source is not a whole Phi-4 model, or the adapter
            not one for it.
        ConversionError: where the two make no sense together, or the output exists or has no room.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
    if recipe is not None and (dequantize or layout == "hf"):
        what = "dequantized" if dequantize else "written in Hub layout"
        raise ConversionError(f"A model is either quantized or {what}.")
    out = Path(out).absolute()
    refuse_existing(out)
    checkpoint = Checkpoint(source)
    if isinstance(recipe, str):
        recipe = named(recipe, registry.of_config(checkpoint.config))
    elif isinstance(recipe, Quantization):
        recipe = Recipe(UNIFORM, recipe)
    if recipe is not None and group_size is not None:
        recipe = recipe.in_groups_of(group_size)
    fusion = None if adapter is None else Fusion.of(adapter, checkpoint)
    if fusion is not None and method is not None:
        raise ConversionError(
            "Weights are learned from a model's own: fuse the adapter first.",
            hint="phimlx fuse --model MODEL --adapter-path ADAPTER --save-path FUSED",
        )
    if fusion is not None and recipe is None and not dequantize and layout == "mlx":
        recipe = as_stored(checkpoint)
    check_purpose(checkpoint, recipe, dequantize)
    if recipe is not None and parts:
        check_parts(checkpoint, parts)
        recipe = recipe.with_parts(*parts)
    steps = Steps.of(checkpoint, recipe, dtype, whole=layout == "hf")
    if fusion is not None:
        steps = fusion.into(steps)
    learning = Learning(method) if isinstance(method, str) else method
    lesson = None if learning is None else Lesson.of(learning, checkpoint, recipe, steps)
    results = (item for step in steps.steps for item in step.result().items())
    planned = Plan(
        checkpoint=checkpoint,
        out=out,
        steps=steps,
        recipe=recipe,
        layout=Layout.of(results, shard_bytes, FORMATS[layout]),
        files=files or WeightFiles(),
        lesson=lesson,
        fusion=fusion,
    )
    if (
        fusion is None
        and checkpoint.quantization
        and recipe
        and planned.layout.nbytes >= planned.bytes_before
    ):
        raise ConversionError(
            f"{checkpoint.folder} is already quantized, to {checkpoint.quantization['bits']} bits: "
            "this would make it no smaller, and no better.",
            hint="Choose fewer bits, or convert the original model: what quantization took away "
            "does not come back.",
        )
    small = sum(file.stat().st_size for file in model_files.companions(checkpoint.folder).values())
    spare = planned.files.spare if lesson is None else lesson.spare(planned.layout.nbytes)
    check_space(out, planned.layout.nbytes + spare + small)
    return planned


def convert(
    source: str | Path,
    out: str | Path,
    recipe: Quantization | Recipe | str | None = None,
    dtype: str | None = None,
    *,
    dequantize: bool = False,
    group_size: int | None = None,
    parts: Collection[str] = (),
    layout: str = "mlx",
    method: Learning | str | None = None,
    adapter: str | Path | None = None,
) -> Conversion:
    """Make a folder of a model; arguments and errors as for `plan` and `Plan.run`."""
    planned = plan(
        source,
        out,
        recipe,
        dtype,
        dequantize=dequantize,
        group_size=group_size,
        parts=parts,
        layout=layout,
        method=method,
        adapter=adapter,
    )
    return planned.run()


def check_purpose(checkpoint: Checkpoint, recipe: Recipe | None, dequantize: bool) -> None:
    """Refuse what would come from, or lead to, a misunderstanding."""
    quantized = checkpoint.quantization is not None
    if dequantize and not quantized:
        raise ConversionError(
            f"{checkpoint.folder} is not quantized, so there is nothing to dequantize.",
            hint="Leave --dequantize out.",
        )
    if quantized and not dequantize and recipe is None:
        assert checkpoint.quantization is not None
        raise ConversionError(
            f"{checkpoint.folder} is already quantized, to {checkpoint.quantization['bits']} bits.",
            hint="Quantize it further with -q, or make plain numbers of it with --dequantize.",
        )


def check_parts(checkpoint: Checkpoint, parts: Collection[str]) -> None:
    """Refuse to quantize what a model does not have."""
    model = build_model(checkpoint.config)
    if model.placeholders is None:
        raise ConversionError(
            f"{checkpoint.folder} takes text only, so it has no {' and no '.join(parts)}.",
            hint=f"Leave {' and '.join(f'--q-{part}' for part in parts)} out.",
        )
