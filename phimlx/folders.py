"""The folders of this user that phimlx writes to, apart from the Hub's cache of models."""

from __future__ import annotations

import os
from pathlib import Path


def data_folder() -> Path:
    """Return the folder of what phimlx keeps: PHIMLX_DATA_DIR, else the system's for user data."""
    return _folder("PHIMLX_DATA_DIR", "user_data_path")


def config_folder() -> Path:
    """Return the folder of settings: PHIMLX_CONFIG_DIR, else the system's for configuration."""
    return _folder("PHIMLX_CONFIG_DIR", "user_config_path")


def runtime_folder() -> Path:
    """Return the folder of files of processes that run: PHIMLX_RUNTIME_DIR, else the system's."""
    return _folder("PHIMLX_RUNTIME_DIR", "user_runtime_path")


def cache_folder() -> Path:
    """Return the folder of what can be computed again."""
    return _usual_folder("user_cache_path")


def _folder(variable: str, usual: str) -> Path:
    if named := os.environ.get(variable):
        return Path(named).expanduser()
    return _usual_folder(usual)


def _usual_folder(usual: str) -> Path:
    import platformdirs

    path: Path = getattr(platformdirs, usual)("phimlx", appauthor=False)
    return path
