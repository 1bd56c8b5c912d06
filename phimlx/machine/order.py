"""Order between computations that would otherwise run, and hold their memory, together."""

from __future__ import annotations

import mlx.core as mx


def after(x: mx.array, *earlier: mx.array) -> mx.array:
    """`x`, which nothing is computed of before `earlier` has been.

    It bounds memory where a long input is computed in pieces, as evaluating each of them would, and
    may stand in functions that are differentiated or compiled.
    """
    return mx.depends([x], list(earlier))[0] if earlier else x
