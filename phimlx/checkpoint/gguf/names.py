"""Names of tensors in GGUF files, from ours and back: one table of the record, read both ways."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from phimlx.models.config import ModelConfig
from phimlx.models.registry import GGUF

_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(.+)")
_OUR_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor of a file.

    Attributes:
        rows: number of the first, and how many; None for all.
        paired: whether they stand in pairs that turn together, see `registry.GGUF`.
    """

    name: str
    rows: tuple[int, int] | None = None
    paired: bool = False


def gguf_name(name: str, form: GGUF) -> str:
    """Name one of our tensors as GGUF does."""
    path, _, kind = name.rpartition(".")
    layer = _OUR_LAYER.fullmatch(path)
    if layer is None:
        return f"{form.tensors[path]}.{kind}"
    return f"blk.{layer[1]}.{form.tensors[layer[2]]}.{kind}"


def our_pieces(names: Collection[str], form: GGUF, config: ModelConfig) -> dict[str, list[Piece]]:
    """Find our tensors in a file: the pieces of each, the rows of one below those of the other.

    A name that is none of the architecture's stays, in one piece.

    Args:
        names: of all tensors of the file.
    """
    found: dict[str, list[Piece]] = {}
    known = frozenset(names)
    for name in names:
        found.update(_places(name, known, form, config))
    return found


def _places(
    name: str, names: frozenset[str], form: GGUF, config: ModelConfig
) -> Iterator[tuple[str, list[Piece]]]:
    """Our tensors that one of a file is, or begins, or holds."""
    stem, _, kind = name.rpartition(".")
    layer = _LAYER.fullmatch(stem)
    before, part = (f"blk.{layer[1]}.", layer[2]) if layer else ("", stem)
    ours_before = f"model.layers.{layer[1]}." if layer else ""
    ours = {theirs: path for path, theirs in form.tensors.items()}

    def piece(part: str) -> Piece:
        return Piece(f"{before}{part}.{kind}", None, part in form.paired_rows)

    if part in ours:
        yield f"{ours_before}{ours[part]}.{kind}", [piece(part)]
        return
    for whole, parts in form.joined.items():
        if part in parts and whole in ours:
            pieces = [piece(each) for each in parts]
            if part == parts[0] or pieces[0].name not in names:
                yield f"{ours_before}{ours[whole]}.{kind}", pieces
            return
        if part == whole and all(each in ours for each in parts):
            top = 0
            for each in parts:
                height = config.projection_shapes[ours[each]][1]
                yield f"{ours_before}{ours[each]}.{kind}", [Piece(name, (top, height))]
                top += height
            return
    yield name, [Piece(name)]
