"""Checks of this machine and installation: what helps or hinders phimlx, one finding a check."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import phimlx
from phimlx import catalog
from phimlx.sizes import size_text

OLDEST_MACOS = (14, 0)  # of MLX's wheels
HUB_SECONDS = 5  # to wait for an answer
CUDA_PACKAGE = "mlx-cuda-12"
USE_FLOAT16 = "with --dtype float16 a model that is stored in it reads prompts quicker."
USE_CUDA = f"pip install --force-reinstall --no-deps {CUDA_PACKAGE}"


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        state: "ok", "warning" (works, but less well) or "problem".
        hint: what to do about it.
    """

    subject: str
    found: str
    state: str = "ok"
    hint: str | None = None


def run_checks(cache: Path) -> Iterator[Finding]:
    """Yield every finding, in order; the last one may wait for the network.

    Args:
        cache: the folder that models are kept in.
    """
    for check in (_versions, _system, _backend, _memory, lambda: _store(cache), _hub):
        yield check()


def _versions() -> Finding:
    packages = []
    for name in ("mlx", "tokenizers", "huggingface_hub"):
        if not _is_installed(name):
            return Finding(
                "versions", f"{name} is missing", "problem", "Install phimlx again: pip install ."
            )
        packages.append(f"{name} {version(name)}")
    found = [f"phimlx {phimlx.__version__}", f"Python {platform.python_version()}", *packages]
    return Finding("versions", ", ".join(found))


def _system() -> Finding:
    machine = platform.machine()
    if sys.platform != "darwin":
        return Finding("system", f"{platform.system()} {platform.release()} on {machine}")
    release = platform.mac_ver()[0]
    found = f"macOS {release} on {machine}"
    if machine != "arm64":
        return Finding(
            "system",
            found,
            "problem",
            "MLX needs an Apple-silicon Python; this one runs on Intel or under Rosetta.",
        )
    if tuple(int(part) for part in release.split(".")[:2]) < OLDEST_MACOS:
        oldest = ".".join(map(str, OLDEST_MACOS))
        return Finding("system", found, "problem", f"MLX needs macOS {oldest} or later.")
    return Finding("system", found)


def _backend() -> Finding:
    from phimlx.machine.device import backend, device_name, emulates_bfloat16

    name = {"metal": "Metal", "cuda": "CUDA"}.get(backend())
    if name is not None:
        hint = f"This chip emulates bfloat16: {USE_FLOAT16}" if emulates_bfloat16() else None
        return Finding("backend", f"{name}, {device_name()}", hint=hint)
    if sys.platform == "darwin":
        hint = "This macOS offers MLX no Metal device; a virtual machine may hide it."
    elif _is_installed(CUDA_PACKAGE):
        hint = f"MLX's CPU and CUDA packages hold the same file, and the CPU's is there: {USE_CUDA}"
    else:
        hint = f"For an NVIDIA GPU: pip install {CUDA_PACKAGE}, then {USE_CUDA}"
    return Finding("backend", "CPU, which is slow", "warning", hint)


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{size_text(memory.total)}, {size_text(memory.available)} of it free"
    needed = catalog.DEFAULT.quantized_nbytes
    if memory.total < 2 * needed:
        return Finding(
            "memory",
            found,
            "warning",
            f"{catalog.DEFAULT.alias} at 4 bits takes {size_text(needed)}; try --model nano.",
        )
    return Finding("memory", found)


def _store(cache: Path) -> Finding:
    there = next(folder for folder in (cache, *cache.parents) if os.path.isdir(folder))
    free = shutil.disk_usage(there).free
    found = f"{cache}, {size_text(free)} free"
    for mode, what in ((os.R_OK | os.X_OK, "read"), (os.W_OK, "written")):
        if not os.access(there, mode, effective_ids=os.access in os.supports_effective_ids):
            hint = f"It cannot be {what}; set HF_HOME to another folder."
            return Finding("model store", found, "problem", hint)
    needed = catalog.DEFAULT.quantized_nbytes
    if free < 1.05 * needed:
        hint = f"{catalog.DEFAULT.alias} at 4 bits takes {size_text(needed)}; set HF_HOME to a "
        return Finding("model store", found, "warning", hint + "folder with more room.")
    return Finding("model store", found)


def _hub() -> Finding:
    from huggingface_hub import constants, get_session, get_token

    if constants.HF_HUB_OFFLINE:
        return Finding("Hub", "offline mode", "warning", "Unset HF_HUB_OFFLINE to download models.")
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # whatever the transport raises means the same to a person
        return Finding(
            "Hub",
            f"{constants.ENDPOINT} does not answer ({type(error).__name__})",
            "warning",
            "Models on this machine still run; for others check the network and HF_ENDPOINT.",
        )
    token = "with a token" if get_token() else "without a token, which public models do not need"
    return Finding("Hub", f"{constants.ENDPOINT} answers, {token}")


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
