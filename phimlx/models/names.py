"""Tensor names of another layout -> ours, from one table of paths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_PEFT = re.compile(r"(?:base_model\.model\.)?(model\.layers\..+\.lora_[AB])(?:\.default)?\.weight")

Paths = Mapping[str | tuple[str, ...], str | tuple[str, ...]]


@dataclass(frozen=True)
class Place:
    """Our names of one tensor of theirs.

    Attributes:
        names: several are parts of it, as many rows each, one below the other.
        pieces: all tensors of theirs that together are ours, in the order of their rows.
    """

    names: tuple[str, ...]
    pieces: tuple[str, ...]


class Renames:
    """Renames tensors by the paths of the layers that they belong to.

    Args:
        paths: their path -> ours. `#` is a layer's number and `#+1` the number after it. Several
            paths of ours are parts of one tensor of theirs: as many rows each, one below the other.
            Several of theirs are pieces of one of ours, one below the other, of any number of rows.
            The last part of a tensor's name (weight, bias, scales …) is the same in both.
        tensors: their name -> ours, of what is a tensor itself.
    """

    def __init__(self, paths: Paths, tensors: Mapping[str, str] | None = None) -> None:
        self._tensors = dict(tensors or {})
        self._paths = [
            (_pattern(path), _tuple(theirs), _tuple(ours))
            for theirs, ours in paths.items()
            for path in _tuple(theirs)
        ]

    def place(self, name: str) -> Place:
        """Give our names of one tensor of theirs; a name that is the same in both stays."""
        if name in self._tensors:
            return Place((self._tensors[name],), (name,))
        for pattern, theirs, ours in self._paths:
            found = pattern.fullmatch(name)
            if found is None:
                continue
            parts = found.groupdict()
            number = int(parts["number"]) if "number" in parts else int(parts.get("next", 1)) - 1
            return Place(
                tuple(f"{_numbered(path, number)}.{parts['kind']}" for path in ours),
                tuple(f"{_numbered(path, number)}.{parts['kind']}" for path in theirs),
            )
        return Place((name,), (name,))


def _tuple(paths: str | tuple[str, ...]) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else paths


def _numbered(path: str, number: int) -> str:
    return path.replace("#+1", str(number + 1)).replace("#", str(number))


def _pattern(path: str) -> re.Pattern[str]:
    number = r"(?P<next>\d+)" if "#+1" in path else r"(?P<number>\d+)"
    literal = re.escape(path.replace("#+1", "#")).replace(r"\#", number, 1)
    return re.compile(literal + r"\.(?P<kind>\w+)")


def split_projections(
    projections: Iterable[str], fused: Mapping[str, tuple[str, ...]]
) -> dict[str | tuple[str, ...], str | tuple[str, ...]]:
    """Make the paths of a decoder layer's projections that are stored in pieces.

    Args:
        projections, fused: as in `registry.Architecture`.
    """
    paths: dict[str | tuple[str, ...], str | tuple[str, ...]] = {}
    for path in projections:
        pieces = piece_paths(path, fused)
        if pieces:
            paths[tuple(f"model.layers.#.{each}" for each in pieces)] = f"model.layers.#.{path}"
    return paths


def piece_paths(path: str, fused: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Name the paths that take the place of a fused projection; none for any other."""
    parent, _, name = path.rpartition(".")
    return tuple(f"{parent}.{piece}" for piece in fused.get(name, ()))


def adapter_tensor(name: str, adapter: str) -> str:
    """Name a tensor of an adapter's own file, as peft writes one, among its model's tensors.

    Others stay as they are.
    """
    found = _PEFT.fullmatch(name)
    return f"{found[1]}.{adapter}.weight" if found else name
