"""Numbers of bytes as a person reads them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from phimlx.sizes import counted, size_text

HOME = Path(__file__).parents[1]
SOURCES = [path for room in ("phimlx", "convert") for path in sorted((HOME / room).rglob("*.py"))]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_995, "10.0 kB"),
        (99_949, "99.9 kB"),
        (99_951, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (2_157_762_240, "2.16 GB"),
        (29_319_014_400, "29.3 GB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_three_figures_and_a_unit(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


@pytest.mark.parametrize(
    ("count", "words", "text"),
    [
        (0, ("row",), "0 rows"),
        (1, ("row",), "1 row"),
        (2048, ("row",), "2,048 rows"),
        (1, ("reply is", "replies are"), "1 reply is"),
        (0, ("reply is", "replies are"), "0 replies are"),
    ],
)
def test_one_and_several(count: int, words: tuple[str, ...], text: str) -> None:
    assert counted(count, *words) == text


OTHERS = re.compile(r"\{[^{}\n]*(?:>>|/ ?1024|/ ?2 ?\*\* ?[123]0)[^{}\n]*\}|[KMG]iB\b")


def test_no_message_counts_bytes_in_another_way() -> None:
    found = {path.name: OTHERS.findall(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {name: texts for name, texts in found.items() if texts} == {}
