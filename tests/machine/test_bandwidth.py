"""Bandwidth of a chip: the published figure where there is one for sure, else a measured one."""

from __future__ import annotations

import plistlib
import subprocess
import sys
from typing import Any

import pytest

from phimlx.machine import bandwidth
from phimlx.machine.bandwidth import (
    PUBLISHED,
    Bandwidth,
    gpu_cores,
    measured_bandwidth,
    memory_bandwidth,
    published_bandwidth,
)


@pytest.mark.parametrize(
    ("chip", "cores", "figure"),
    [
        ("Apple M1", None, 68.25e9),
        ("Apple M2 Ultra", None, 800e9),
        ("Apple M4 Pro", 20, 273e9),
        ("Apple M4 Max", 32, 410e9),
        ("Apple M4 Max", 40, 546e9),
        ("Apple M4 Max", None, None),
        ("Apple M3 Max", 38, None),
        ("Apple M9", None, None),
        ("AMD EPYC", None, None),
        ("", None, None),
    ],
)
def test_published_figures(chip: str, cores: int | None, figure: float | None) -> None:
    expected = None if figure is None else Bandwidth(figure, "published")
    assert published_bandwidth(chip, lambda: cores) == expected


def test_every_chip_has_a_figure_of_its_own_or_one_for_each_gpu() -> None:
    for variants in PUBLISHED.values():
        assert None in variants or len(variants) > 1
        assert all(50 < figure < 1000 for figure in variants.values())


def test_a_copy_where_nothing_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "device_name", lambda: "AMD EPYC")
    monkeypatch.setattr(bandwidth, "measured_bandwidth", lambda: Bandwidth(1.0, "measured"))
    assert memory_bandwidth() == Bandwidth(1.0, "measured")
    monkeypatch.setattr(bandwidth, "device_name", lambda: "Apple M5")
    assert memory_bandwidth() == Bandwidth(153e9, "published")


def test_what_a_copy_gives_is_a_rate() -> None:
    found = measured_bandwidth(1 << 16)
    assert found.source == "measured"
    assert found.bytes_per_second > 0


@pytest.mark.parametrize(
    ("printed", "cores"),
    [
        (plistlib.dumps([{"name": "x"}, {"gpu-core-count": 40}]), 40),
        (plistlib.dumps([{"gpu-core-count": "many"}]), None),
        (plistlib.dumps([]), None),
        (b"", None),
        (b"<plist", None),
    ],
)
def test_cores_of_a_mac(monkeypatch: pytest.MonkeyPatch, printed: bytes, cores: int | None) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        assert command[0] == "ioreg"
        return subprocess.CompletedProcess(command, 0, printed)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "platform", "linux")
    assert gpu_cores() is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert gpu_cores() == cores
