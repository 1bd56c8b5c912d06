"""Fixtures that every test shares, and a fast BLAS where the machine has one."""

from __future__ import annotations

import ctypes
import glob
import os
from pathlib import Path

import pytest

# MLX's Linux wheel carries a slow BLAS; the system's, loaded first, takes its place.
for library in glob.glob("/usr/lib/*/openblas-pthread/libopenblas.so.0"):
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of real tokenizers, configs and checkpoints, named by PHIMLX_TEST_DATA."""
    folder = os.environ.get("PHIMLX_TEST_DATA")
    if not folder:
        pytest.skip("PHIMLX_TEST_DATA is not set: no folder of real tokenizers and checkpoints")
    return Path(folder).resolve()
