"""Fixtures that every test shares, and a fast BLAS where the machine has one."""

from __future__ import annotations

import ctypes
import glob
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.bundled import unpack

# MLX's Linux wheel carries a slow BLAS; the system's, loaded first, takes its place, here and in
# the commands that tests start. One kernel, so that it rounds as on any other machine; one thread,
# since its threads wait busily, which would take the time of other workers.
os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
for library in glob.glob("/usr/lib/*/openblas-pthread/libopenblas.so.0"):
    os.environ.setdefault("LD_PRELOAD", library)
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)

# A shell that runs the tests in the background has them ignore Ctrl-C, and so every process they
# start; what a test interrupts must listen.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes depends on what else the machine does.
settings.register_profile("phimlx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("phimlx")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of real tokenizers, configs and checkpoints: what travels with the tests.

    PHIMLX_TEST_DATA names a folder that takes its place and has more.
    """
    if folder := os.environ.get("PHIMLX_TEST_DATA"):
        return Path(folder).resolve()
    return unpack(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True, scope="session")
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep conversations and settings of the tests away from the user's, in processes too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATA", "CONFIG", "RUNTIME"):
            patch.setenv(f"PHIMLX_{name}_DIR", str(tmp_path_factory.mktemp(name.lower())))
        patch.delenv("PHIMLX_HISTORY", raising=False)
        yield
