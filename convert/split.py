"""Fused projections written as the tensors that other architectures have in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from phimlx.errors import ConversionError
from phimlx.models import registry


@dataclass(frozen=True)
class ProjectionSplit:
    """Projections that are written in pieces.

    Attributes:
        pieces: path of a projection, without its decoder layer's prefix -> the paths that take its
            place, and the rows of each, in order; empty where all stays as it is.
    """

    pieces: Mapping[str, Mapping[str, int]]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ProjectionSplit:
        """Split the projections of a model, given its config in the architecture's own terms.

        Raises:
            ConversionError: where its architecture has no layout that stores them apart.
        """
        architecture = registry.of_config(config)
        if architecture.split_config is None:
            raise ConversionError(
                f"{architecture.model_type} models have no layout with split projections.",
                hint="Leave --split-projections out.",
            )
        rows = architecture.read_config(config).fused_rows
        return cls({path: architecture.pieces(path, rows[path]) for path in rows})

    def parts(self, name: str, first: int, rows: mx.array) -> Iterator[tuple[str, int, mx.array]]:
        """Divide rows of a tensor, from number `first` on.

        Returns:
            Names of tensors of the output, where in them rows begin, and these rows.
        """
        layer, _, kind = name.rpartition(".")
        for path, pieces in self.pieces.items():
            if not layer.endswith(f".{path}"):
                continue
            prefix = layer.removesuffix(path)
            top, last = 0, first + rows.shape[0]
            for piece, count in pieces.items():
                begin, end = max(first, top), min(last, top + count)
                if begin < end:
                    part = rows[begin - first : end - first]
                    yield f"{prefix}{piece}.{kind}", begin - top, part
                top += count
            return
        yield name, first, rows

    def paths(self, path: str) -> list[str]:
        """List the paths that take a layer's place, or its own."""
        for fused, pieces in self.pieces.items():
            if path.endswith(f".{fused}"):
                return [f"{path.removesuffix(fused)}{piece}" for piece in pieces]
        return [path]


WHOLE = ProjectionSplit({})
