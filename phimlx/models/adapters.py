"""Linear layers with low-rank adapters beside them, chosen row by row in every call.

Knows adapters by name and keeps no choice; knows nothing of what calls for which adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from phimlx.errors import ConfigError, shortened

MAX_RANK = 1 << 14  # a hostile config must not make us build more


@dataclass(frozen=True)
class LoRA:
    """Shape of one adapter: W + (alpha / rank) · B A (arXiv 2106.09685)."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @classmethod
    def from_dict(cls, key: str, table: Any) -> LoRA:
        """Read `{"r": …, "lora_alpha": …}`.

        Args:
            key: where the table stands in config.json, for messages.

        Raises:
            ConfigError: where a value is missing or impossible.
        """
        values: Mapping[str, Any] = table if isinstance(table, Mapping) else {}
        rank: Any = values.get("r")
        alpha: Any = values.get("lora_alpha")
        if not _is_number(rank, int) or not 0 < rank <= MAX_RANK:
            raise ConfigError(
                f"config.json: {key}.r is {shortened(rank)}, not a whole number from 1 to "
                f"{MAX_RANK}."
            )
        if not _is_number(alpha, int | float) or not 0 < alpha < math.inf:
            raise ConfigError(
                f"config.json: {key}.lora_alpha is {shortened(alpha)}, not a number above 0."
            )
        return cls(rank, float(alpha))


class Routing:
    """Which rows of one forward pass use which adapter.

    Args:
        rows: for each row of the batch the name of its adapter, or None.
    """

    def __init__(self, rows: Sequence[str | None]) -> None:
        names = dict.fromkeys(name for name in rows if name is not None)
        # The rows of each adapter; None where they are all.
        self.groups: tuple[tuple[str, mx.array | None], ...] = tuple(
            (name, _rows_of(name, rows)) for name in names
        )


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _rows_of(name: str, rows: Sequence[str | None]) -> mx.array | None:
    chosen = [index for index, row in enumerate(rows) if row == name]
    return None if len(chosen) == len(rows) else mx.array(chosen)


class AdapterLinear(nn.Module):
    """A linear layer with named adapters as side paths; parameters carry peft's names.

    The base may be quantized, and so may the adapters: nothing is ever merged into it.
    """

    def __init__(self, input_dims: int, output_dims: int, adapters: Mapping[str, LoRA]) -> None:
        super().__init__()
        self.base_layer = nn.Linear(input_dims, output_dims, bias=False)
        self.lora_A = {
            name: nn.Linear(input_dims, lora.rank, bias=False) for name, lora in adapters.items()
        }
        self.lora_B = {
            name: nn.Linear(lora.rank, output_dims, bias=False) for name, lora in adapters.items()
        }
        self._scales = {name: lora.scale for name, lora in adapters.items()}

    def __call__(self, x: mx.array, routing: Routing | None = None) -> mx.array:
        """`[batch, length, input_dims]` to `[batch, length, output_dims]`."""
        y = self.base_layer(x)
        for name, rows in () if routing is None else routing.groups:
            given = x if rows is None else x[rows]
            inner = self.lora_A[name](given) * self._scales[name]  # [rows, length, rank]
            delta = self.lora_B[name](inner).astype(y.dtype)  # [rows, length, output_dims]
            y = y + delta if rows is None else y.at[rows].add(delta)
        return y


def project(layer: nn.Module, x: mx.array, routing: Routing | None) -> mx.array:
    """A layer's output; only one with adapters is ever given a routing."""
    return layer(x) if routing is None else layer(x, routing)
