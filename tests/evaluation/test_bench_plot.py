"""The picture of a bench: written whole where matplotlib is, refused in a sentence where not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from phimlx.errors import PhimlxError
from phimlx.evaluation.bench import BenchReport, ContextSpeed
from phimlx.evaluation.bench_plot import check_plot, draw_png
from phimlx.machine.pass_cost import PUBLISHED


def report(*, compared: bool) -> BenchReport:
    theirs = (900.0, 45.0) if compared else (None, None)
    speeds = [ContextSpeed(context, 1000, 40, 10**9, 80, 10**9, *theirs) for context in (512, 4096)]
    return BenchReport("tiny", "a chip", "cpu", "float32", contexts=speeds, pass_cost=PUBLISHED)


@pytest.mark.parametrize("compared", [False, True])
def test_a_picture(compared: bool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "speed.png"
    check_plot(file)
    draw_png(report(compared=compared), file)
    assert file.read_bytes().startswith(b"\x89PNG\r\n")
    assert list(tmp_path.iterdir()) == [file]


def test_of_an_interrupted_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = report(compared=False)
    found.pass_cost = None
    draw_png(found, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_where_matplotlib_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("phimlx.extras.importlib", SimpleNamespace(import_module=missing))
    with pytest.raises(PhimlxError) as raised:
        check_plot(tmp_path / "speed.png")
    assert str(raised.value) == "A picture of the speeds needs matplotlib, which is not installed."
    assert raised.value.hint == "Install it with: pip install 'phimlx[plots]'"


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phimlx.evaluation.bench_plot._figure_class", lambda: None)
    with pytest.raises(PhimlxError, match=r"^There is no folder .*nowhere\.$"):
        check_plot(tmp_path / "nowhere" / "speed.png")
