"""What stays of a model, written as a folder like any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

import phimlx
from convert.folder import (
    check_space,
    copy_companions,
    new_folder,
    refuse_existing,
    size_of,
    stamps,
)
from convert.prune.plan import Pruning
from convert.prune.widths import cut
from convert.request import SHARD_BYTES
from convert.split import WHOLE, ProjectionSplit
from convert.write import ShardLayout, ShardWriter, write_index
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, needed_tensors
from phimlx.hub import model_files
from phimlx.models.config import hub_dialect

LAYERS = "model.layers."


def write_pruned(
    checkpoint: Checkpoint,
    out: Path,
    pruning: Pruning,
    advance: Callable[[int], object],
    split: bool = False,
) -> int:
    """Write a folder with what stays, all else as it is; returns the bytes of weights.

    It is in the layout of the Hub, which MLX reads too; in MLX's alone where it is quantized.

    Args:
        advance: called with the bytes that have been written.
        split: whether it is written in the layout with split projections.

    Raises:
        ConversionError: where `out` exists, or cannot be written. Nothing is left behind then.
    """
    refuse_existing(out)
    config = pruned_config(checkpoint.config, pruning)
    parts = ProjectionSplit.of(config) if split else WHOLE
    if split:
        config = _in_split_layout(config, parts)
    tensors = dict(_tensors(checkpoint, pruning, parts))
    quantized = checkpoint.quantization is not None
    layout = ShardLayout.of(tensors.items(), SHARD_BYTES, "mlx" if quantized else "pt")
    companions = model_files.companions(checkpoint.folder)
    check_space(out, layout.nbytes + size_of(companions))
    kept = {name: choice.kept for name, choice in pruning.widths.items()}
    decisive = (phimlx.__version__, stamps(checkpoint.files), pruning.layers, kept, split)
    plan = hashlib.sha256(repr(decisive).encode()).hexdigest()
    with new_folder(out, plan, layout.shards) as journal:
        with ShardWriter.open(journal.folder, layout) as writer:
            for name in list(tensors):
                array = tensors.pop(name)
                writer.write(name, 0, array)
                advance(array.nbytes)
                del array
                mx.clear_cache()
            writer.sync()
        write_index(journal.folder, layout)
        copy_companions(companions, journal.folder)
        (journal.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return layout.nbytes


def _tensors(
    checkpoint: Checkpoint, pruning: Pruning, parts: ProjectionSplit
) -> Iterator[tuple[str, mx.array]]:
    """Cut and rename what stays of each tensor; nothing is read yet."""
    model = build_model(checkpoint.config)
    numbers = _numbers(model.config.num_hidden_layers, pruning)
    weights, needed = checkpoint.weights(), needed_tensors(checkpoint, model)
    for name in [name for name in weights if name in needed]:
        array, renamed = weights.pop(name), _renumbered(name, numbers)
        if renamed is None:
            continue
        if renamed.startswith(LAYERS):
            number, _, inner = renamed.removeprefix(LAYERS).partition(".")
            kept = {name: each.kept[int(number)] for name, each in pruning.widths.items()}
            array = cut(inner, array, model.architecture, model.config, kept)
        for part, _, rows in parts.parts(renamed, 0, array):
            yield part, rows


def pruned_config(config: Mapping[str, Any], pruning: Pruning) -> dict[str, Any]:
    """Write the config of what stays of a model."""
    model = build_model(config)
    numbers = _numbers(model.config.num_hidden_layers, pruning)
    pruned = hub_dialect(config)
    for key in ("auto_map", "_name_or_path"):
        pruned.pop(key, None)
    pruned["num_hidden_layers"] = len(numbers)
    for name, choice in pruning.widths.items():
        width = model.architecture.widths[name]
        for key in width.sizes:
            pruned[key] = getattr(model.config, key) * choice.count // choice.units
        for key in width.stated:
            pruned[key] = getattr(model.config, key)
    _rename_forms(pruned, lambda name: [_renumbered(name, numbers)])
    return dict(sorted(pruned.items()))


def _in_split_layout(config: Mapping[str, Any], parts: ProjectionSplit) -> dict[str, Any]:
    """Write a config, and the forms of single layers, for the layout with split projections."""
    split = dict(build_model(config).architecture.in_split_layout(config))
    _rename_forms(split, parts.paths)
    return dict(sorted(split.items()))


def _rename_forms(config: dict[str, Any], rename: Callable[[str], Sequence[str | None]]) -> None:
    """Rename layers in the tables of quantization; those that go have no name."""
    for key in ("quantization", "quantization_config"):
        if isinstance(config.get(key), Mapping):
            config[key] = {
                new: value
                for name, value in config[key].items()
                for new in rename(name)
                if new is not None
            }


def _numbers(count: int, pruning: Pruning) -> dict[int, int]:
    """Map the numbers of the layers that stay to their new ones."""
    kept = range(count) if pruning.layers is None else pruning.layers.kept
    return {old: new for new, old in enumerate(kept)}


def _renumbered(name: str, numbers: Mapping[int, int]) -> str | None:
    """The new name of what belongs to a layer; None where that goes."""
    if not name.startswith(LAYERS):
        return name
    number, _, rest = name.removeprefix(LAYERS).partition(".")
    new = numbers.get(int(number)) if number.isdecimal() else None
    return None if new is None else f"{LAYERS}{new}.{rest}"
