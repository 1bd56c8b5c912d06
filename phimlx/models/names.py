"""Tensor names of another layout and ours, from one table read in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_PEFT = re.compile(r"(?:base_model\.model\.)?(model\.layers\..+\.lora_[AB])(?:\.default)?\.weight")

Paths = Mapping[str, str | tuple[str, ...]]


class Renames:
    """Renames tensors by the paths of the layers that they belong to.

    Args:
        paths: their path -> ours. `#` is a layer's number and `#+1` the number after it. Several
            paths of ours are parts of one tensor of theirs: as many rows each, one below the other.
            The last part of a tensor's name (weight, bias, scales …) is the same in both.
        tensors: their name -> ours, of what is a tensor itself.
    """

    def __init__(self, paths: Paths, tensors: Mapping[str, str] | None = None) -> None:
        self._tensors = dict(tensors or {})
        self._tensors_back = {ours: theirs for theirs, ours in self._tensors.items()}
        several = {
            theirs: (ours,) if isinstance(ours, str) else ours for theirs, ours in paths.items()
        }
        self._forwards = [(_pattern(theirs), ours) for theirs, ours in several.items()]
        self._backwards = [
            (_pattern(ours[0]), (theirs,)) for theirs, ours in several.items() if len(ours) == 1
        ]

    def ours(self, name: str) -> tuple[str, ...]:
        """Give our names of one tensor of theirs; a name that is the same in both stays."""
        if name in self._tensors:
            return (self._tensors[name],)
        return _renamed(name, self._forwards)

    def theirs(self, name: str) -> str:
        """Give their name of one tensor of ours that is a whole tensor there."""
        if name in self._tensors_back:
            return self._tensors_back[name]
        return _renamed(name, self._backwards)[0]


Table = Sequence[tuple[re.Pattern[str], tuple[str, ...]]]


def _pattern(path: str) -> re.Pattern[str]:
    number = r"(?P<next>\d+)" if "#+1" in path else r"(?P<number>\d+)"
    literal = re.escape(path.replace("#+1", "#")).replace(r"\#", number, 1)
    return re.compile(literal + r"\.(?P<kind>\w+)")


def _renamed(name: str, table: Table) -> tuple[str, ...]:
    for pattern, paths in table:
        found = pattern.fullmatch(name)
        if found is None:
            continue
        parts = found.groupdict()
        number = int(parts["number"]) if "number" in parts else int(parts.get("next", 1)) - 1
        return tuple(
            f"{path.replace('#+1', str(number + 1)).replace('#', str(number))}.{parts['kind']}"
            for path in paths
        )
    return (name,)


def adapter_tensor(name: str, adapter: str) -> str:
    """Name a tensor of an adapter's own file, as peft writes one, among its model's tensors.

    Others stay as they are.
    """
    found = _PEFT.fullmatch(name)
    return f"{found[1]}.{adapter}.weight" if found else name
