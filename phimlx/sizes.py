"""Numbers of bytes and of other things as a person reads them."""

from __future__ import annotations

UNITS = ("bytes", "kB", "MB", "GB", "TB")


def size_text(nbytes: float) -> str:
    """Write a number of bytes with three figures and a unit: `2.16 GB`, `559 kB`, `12 bytes`.

    Units are decimal, as disks and macOS count.
    """
    unit = 0
    while nbytes >= 999.5 and unit < len(UNITS) - 1:
        nbytes /= 1000
        unit += 1
    decimals = 0 if unit == 0 or nbytes >= 99.95 else 1 if nbytes >= 9.995 else 2
    return f"{nbytes:.{decimals}f} {UNITS[unit]}"


def counted(count: int, one: str, several: str | None = None) -> str:
    """Write how many there are: `1 row`, `2,048 rows`, `3 replies are`.

    Args:
        one: what stands behind the number 1.
        several: what stands behind any other; `one` and an s where None.
    """
    words = one if count == 1 else several or f"{one}s"
    return f"{count:,} {words}"
