"""Modules that come with an extra of phimlx, imported where something asks for them."""

from __future__ import annotations

import importlib
from typing import Any

from phimlx.errors import PhimlxError


def import_extra(
    module: str, extra: str, without: str, error: type[PhimlxError] = PhimlxError
) -> Any:
    """Import a module of an extra.

    Args:
        without: what cannot be done where it is not installed, a sentence.

    Raises:
        PhimlxError: of the class `error`, where it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        hint = f"Install it with: pip install 'phimlx[{extra}]'"
        raise error(without, hint=hint) from missing
