"""Progress is drawn where somebody watches, and leaves nothing behind."""

from __future__ import annotations

import pytest

from phimlx.terminal.output import Output
from phimlx.terminal.progress import ERASE_LINE


def watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)


def use(output: Output) -> None:
    with output.progress(2048, "Converting", "B") as bar:
        bar.update(1024)
        bar.update(1024)
    with output.status("Loading\x1b…"):
        pass
    with output.prompt_progress() as report:
        report(2048, 5000)
        report(4096, 5000)
        report(5000, 5000)


def test_silent_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    use(Output())
    assert capsys.readouterr() == ("", "")


def test_silent_with_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch)
    use(Output(json=True))
    assert capsys.readouterr() == ("", "")


def test_drawn_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch)
    use(Output())
    out, err = capsys.readouterr()
    assert out == ""
    assert "Converting" in err
    assert "2.05k/2.05k" in err or "0.00/2.05k" in err
    assert f"Loading…{ERASE_LINE}" in err
    assert "Reading the prompt" in err


def test_a_prompt_of_one_step_draws_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch)
    with Output().prompt_progress() as report:
        report(12, 12)
    assert capsys.readouterr() == ("", "")


def test_a_bar_is_taken_away_when_reading_is_cut_short(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch)
    with Output().prompt_progress() as report:
        report(2048, 5000)
    assert capsys.readouterr().err.endswith("\r")
