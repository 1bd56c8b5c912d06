"""Tensor names of another layout -> ours, from one table of paths."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
        self._paths = [
            (_pattern(theirs), (ours,) if isinstance(ours, str) else ours)
            for theirs, ours in paths.items()
        ]

    def ours(self, name: str) -> tuple[str, ...]:
        """Give our names of one tensor of theirs; a name that is the same in both stays."""
        if name in self._tensors:
            return (self._tensors[name],)
        for pattern, paths in self._paths:
            found = pattern.fullmatch(name)
            if found is None:
                continue
            parts = found.groupdict()
            number = int(parts["number"]) if "number" in parts else int(parts.get("next", 1)) - 1
            return tuple(f"{path.replace('#', str(number))}.{parts['kind']}" for path in paths)
        return (name,)


def _pattern(path: str) -> re.Pattern[str]:
    number = r"(?P<next>\d+)" if "#+1" in path else r"(?P<number>\d+)"
    literal = re.escape(path.replace("#+1", "#")).replace(r"\#", number, 1)
    return re.compile(literal + r"\.(?P<kind>\w+)")


def adapter_tensor(name: str, adapter: str) -> str:
    """Name a tensor of an adapter's own file, as peft writes one, among its model's tensors.

    Others stay as they are.
    """
    found = _PEFT.fullmatch(name)
    return f"{found[1]}.{adapter}.weight" if found else name
