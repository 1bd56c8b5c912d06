"""Numbers of bytes as a person reads them: in decimal units, as disks and macOS count."""

from __future__ import annotations

UNITS = ("bytes", "kB", "MB", "GB", "TB")


def size_text(nbytes: float) -> str:
    """Write a number of bytes with three figures and a unit: `2.16 GB`, `559 kB`, `12 bytes`."""
    unit = 0
    while nbytes >= 999.5 and unit < len(UNITS) - 1:
        nbytes /= 1000
        unit += 1
    decimals = 0 if unit == 0 or nbytes >= 99.95 else 1 if nbytes >= 9.995 else 2
    return f"{nbytes:.{decimals}f} {UNITS[unit]}"
