"""Memory bandwidth of this machine: Apple's published figure for its chip, else measured by a copy.

Decoding reads every weight once a token, so bandwidth over bytes read is the most tokens a second
that a chip can give.
"""

from __future__ import annotations

import plistlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from xml.parsers.expat import ExpatError

from phimlx.machine.device import device_name

PUBLISHED: dict[str, dict[int | None, float]] = {
    "M1": {None: 68.25},
    "M1 Pro": {None: 200},
    "M1 Max": {None: 400},
    "M1 Ultra": {None: 800},
    "M2": {None: 100},
    "M2 Pro": {None: 200},
    "M2 Max": {None: 400},
    "M2 Ultra": {None: 800},
    "M3": {None: 100},
    "M3 Pro": {None: 150},
    "M3 Max": {30: 300, 40: 400},
    "M3 Ultra": {None: 819},
    "M4": {None: 120},
    "M4 Pro": {None: 273},
    "M4 Max": {32: 410, 40: 546},
    "M5": {None: 153},
    "M5 Pro": {None: 307},
    "M5 Max": {32: 460, 40: 614},
}
"""GB/s of each chip; by the number of GPU cores where there are several.

Source: Apple's technical specifications of the Macs that have them (support.apple.com/specs).
"""

COPIED = 256 << 20  # bytes of the array that is copied to measure; far beyond any cache
COPIES = 7


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second between memory and the default device.

    Attributes:
        source: "published" or "measured".
    """

    bytes_per_second: float
    source: str


def memory_bandwidth() -> Bandwidth:
    """Find this machine's; measuring takes a second or so, and twice `COPIED` bytes."""
    found = published_bandwidth(device_name(), gpu_cores)
    return measured_bandwidth() if found is None else found


def published_bandwidth(chip: str, count_cores: Callable[[], int | None]) -> Bandwidth | None:
    """Look up a chip, such as "Apple M4 Pro"; None where nothing is published of it.

    Args:
        count_cores: counts those of its GPU; called where they decide.
    """
    variants = PUBLISHED.get(chip.removeprefix("Apple "), {})
    figure = variants.get(None if None in variants else count_cores()) if variants else None
    return None if figure is None else Bandwidth(figure * 1e9, "published")


def gpu_cores() -> int | None:
    """Count the cores of a Mac's GPU; None where they cannot be counted."""
    if sys.platform != "darwin":
        return None
    command = ["ioreg", "-a", "-r", "-d", "1", "-c", "IOAccelerator"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=True)
        entries = plistlib.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError, ExpatError):
        return None
    counts = (entry.get("gpu-core-count") for entry in entries)
    return next((count for count in counts if isinstance(count, int)), None)


def measured_bandwidth(nbytes: int = COPIED) -> Bandwidth:
    """Measure a copy of an array on the default device: each byte is read once and written once.

    The quickest of several counts: what else the machine does makes one slower, never quicker.
    """
    import mlx.core as mx

    source = mx.zeros((nbytes // 4,), mx.float32)
    mx.eval(source)
    seconds = []
    for _ in range(COPIES):
        start = time.perf_counter()
        mx.eval(source + 1)
        seconds.append(time.perf_counter() - start)
    return Bandwidth(2 * nbytes / min(seconds), "measured")
