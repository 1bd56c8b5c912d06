"""The doctor's findings: each state with what it says and what to do."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from phimlx.machine import doctor
from phimlx.machine.doctor import Finding
from tests.locked_out import locked_out, open_folder

Memory = namedtuple("Memory", "total available")


def test_versions_name_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._versions().state == "ok"
    monkeypatch.setattr(doctor, "_is_installed", lambda name: name != "tokenizers")
    assert doctor._versions() == Finding(
        "versions", "tokenizers is missing", "problem", "Install phimlx again: pip install ."
    )


@pytest.mark.parametrize(
    ("machine", "release", "finding"),
    [
        ("arm64", "15.5", Finding("system", "macOS 15.5 on arm64")),
        (
            "x86_64",
            "15.5",
            Finding(
                "system",
                "macOS 15.5 on x86_64",
                "problem",
                "MLX needs an Apple-silicon Python; this one runs on Intel or under Rosetta.",
            ),
        ),
        (
            "arm64",
            "13.7",
            Finding("system", "macOS 13.7 on arm64", "problem", "MLX needs macOS 14.0 or later."),
        ),
    ],
)
def test_macs(
    monkeypatch: pytest.MonkeyPatch, machine: str, release: str, finding: Finding
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: (release, ("", "", ""), machine))
    assert doctor._system() == finding


@pytest.mark.parametrize(
    ("system", "cuda", "hint"),
    [
        (
            "darwin",
            False,
            "This macOS offers MLX no Metal device; a virtual machine may hide it.",
        ),
        (
            "linux",
            False,
            "For an NVIDIA GPU: pip install mlx-cuda-12, then "
            "pip install --force-reinstall --no-deps mlx-cuda-12",
        ),
        (
            "linux",
            True,
            "MLX's CPU and CUDA packages hold the same file, and the CPU's is there: "
            "pip install --force-reinstall --no-deps mlx-cuda-12",
        ),
    ],
)
def test_the_cpu_backend(
    monkeypatch: pytest.MonkeyPatch, system: str, cuda: bool, hint: str
) -> None:
    import mlx.core as mx

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu, 0))
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(doctor, "_is_installed", lambda name: cuda)
    assert doctor._backend() == Finding("backend", "CPU, which is slow", "warning", hint)


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(4_000_000_000, 1_000_000_000))
    assert doctor._memory() == Finding(
        "memory",
        "4.00 GB, 1.00 GB of it free",
        "warning",
        "phi-4-mini at 4 bits takes 2.16 GB; try --model nano.",
    )


def test_the_model_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = tmp_path / "hub"
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9e9, 8e9, 1e9))
    assert doctor._store(store) == Finding(
        "model store",
        f"{store}, 1.00 GB free",
        "warning",
        "phi-4-mini at 4 bits takes 2.16 GB; set HF_HOME to a folder with more room.",
    )
    monkeypatch.setattr(os, "access", lambda _, mode, **__: mode != os.W_OK)
    assert doctor._store(store) == Finding(
        "model store",
        f"{store}, 1.00 GB free",
        "problem",
        "It cannot be written; set HF_HOME to another folder.",
    )


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert doctor._hub() == Finding(
        "Hub",
        "http://127.0.0.1:9 does not answer (ConnectError)",
        "warning",
        "Models on this machine still run; for others check the network and HF_ENDPOINT.",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert doctor._hub() == Finding(
        "Hub", "offline mode", "warning", "Unset HF_HUB_OFFLINE to download models."
    )


def test_a_model_store_that_cannot_be_read() -> None:
    with open_folder() as folder:
        (folder / "hub").mkdir()
        assert "free" in doctor._store(folder / "hub").found
        for locked in (folder / "hub", folder):
            with locked_out(locked):
                found = doctor._store(folder / "hub")
            assert (found.state, found.hint) == (
                "problem",
                "It cannot be read; set HF_HOME to another folder.",
            )
