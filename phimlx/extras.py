"""Modules that come with an extra of phimlx, imported where something asks for them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
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
        raise error(without, hint=_hint(extra)) from missing


def require_extra(
    modules: Iterable[str], extra: str, without: str, error: type[PhimlxError] = PhimlxError
) -> None:
    """Raise as `import_extra` does where a module of an extra is missing, and import none."""
    if not all(map(_is_installed, modules)):
        raise error(without, hint=_hint(extra))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # where sys.modules holds None for it
        return False


def _hint(extra: str) -> str:
    return f"Install it with: pip install 'phimlx[{extra}]'"
