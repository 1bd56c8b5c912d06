"""`phimlx bench`: the tables, --json, what Ctrl-C keeps, and wrong usage. No times."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from phimlx.cli.group import cli
from phimlx.errors import PhimlxError
from phimlx.evaluation import bench
from phimlx.evaluation.bench import BenchReport, ContextSpeed, RowsSpeed
from phimlx.machine import bandwidth, pass_cost
from phimlx.machine.bandwidth import Bandwidth
from phimlx.machine.pass_cost import PassCost

COST = PassCost(((1, 1.0), (2, 1.5), (32, 9.0)), measured=True)


def run(*arguments: str | Path) -> Result:
    words = ["bench", "--model", "nano", *map(str, arguments)]
    return CliRunner().invoke(cli, words, prog_name="phimlx")


def lines(result: Result) -> list[str]:
    """Of stdout, one blank between two words."""
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


class Measured:
    """Stands for what takes time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.interrupted = False
        self.settings: Any = None
        self.theirs: Any = None
        self.first_token: tuple[Path, int, list[str]] | None = None
        self.saved: list[PassCost] = []
        monkeypatch.setattr(bench, "measure", self.measure)
        monkeypatch.setattr(bench, "first_token_seconds", self.first_token_seconds)
        monkeypatch.setattr(bandwidth, "memory_bandwidth", lambda: Bandwidth(4e9, "published"))
        monkeypatch.setattr(pass_cost, "save_curve", lambda _, curve: self.saved.append(curve))
        monkeypatch.setattr(bench, "device_name", lambda: "Apple M9")
        monkeypatch.setattr(bench, "backend", lambda: "metal")

    def measure(self, phi: Any, report: BenchReport, settings: Any, theirs: Any) -> Iterator[None]:
        self.settings, self.theirs = settings, theirs
        report.load_seconds = 0.25
        compared = (500.0, 50.0) if theirs else (None, None)
        report.contexts.append(ContextSpeed(512, 1000, 40, 50_000_000, 80, 60_000_000, *compared))
        yield
        if self.interrupted:
            raise KeyboardInterrupt
        report.rows += [RowsSpeed(1, 40.0), RowsSpeed(4, 100.0)]
        report.pass_cost = COST
        report.notes.append("Left out, since they do not fit: 4,096 tokens.")
        yield

    def first_token_seconds(self, folder: Path, runs: int, flags: list[str]) -> float:
        self.first_token = (folder, runs, flags)
        return 0.5


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    return Measured(monkeypatch)


def test_the_tables(measured: Measured) -> None:
    result = run("--tokens", "8", "--dtype", "float32", "--context", "9", "--batch-size", "2")
    assert result.exit_code == 0
    assert [line for line in lines(result) if line and "─" not in line] == [
        "nano in float32 on Apple M9 (metal)",
        "loaded in 0.25 s",
        "first token 0.50 s after the command",
        "bandwidth 4.00 GB a second, as Apple publishes it",
        "tokens prefill/s decode/s read a token at most/s share peak",
        "512 1,000.0 40.0 50.0 MB 80.0 50% 60.0 MB",
        "at once decode/s × one",
        "1 40.0 1.00",
        "4 100.0 2.50",
        "tokens of a pass 1 2 3 4 6 8 12 16 24 32",
        "cost 1.00 1.50 1.75 2.00 2.50 3.00 4.00 5.00 7.00 9.00",
    ]
    assert result.stderr == "Left out, since they do not fit: 4,096 tokens.\n"
    assert measured.settings == bench.BenchSettings(contexts=(9,), tokens=8, rows=(2,))
    assert measured.first_token is not None
    assert measured.first_token[1:] == (3, ["--dtype", "float32"])
    assert measured.saved == [COST]


def test_json(measured: Measured) -> None:
    result = run("--json")
    assert result.exit_code == 0
    assert measured.settings == bench.BenchSettings()
    assert json.loads(result.stdout) == {
        "model": "nano",
        "device": "Apple M9",
        "backend": "metal",
        "dtype": "bfloat16",
        "bandwidth": {"bytes_per_second": 4e9, "source": "published"},
        "load_seconds": 0.25,
        "first_token_seconds": 0.5,
        "contexts": [
            {
                "context": 512,
                "prefill": 1000,
                "decode": 40,
                "bytes_per_token": 50_000_000,
                "ceiling": 80,
                "share": 0.5,
                "peak_memory": 60_000_000,
                "mlx_lm_prefill": None,
                "mlx_lm_decode": None,
            }
        ],
        "rows": [{"rows": 1, "decode": 40.0}, {"rows": 4, "decode": 100.0}],
        "pass_cost": [[1, 1.0], [2, 1.5], [32, 9.0]],
        "notes": ["Left out, since they do not fit: 4,096 tokens."],
        "complete": True,
        "machines": 1,
    }


def test_an_interrupt_keeps_what_was_measured(measured: Measured) -> None:
    measured.interrupted = True
    result = run()
    assert result.exit_code == 130
    assert "512 1,000.0 40.0 50.0 MB 80.0 50% 60.0 MB" in lines(result)
    assert result.stderr.splitlines()[0] == "Stopped. This was measured before:"
    assert (measured.saved, measured.first_token) == ([], None)
    found = json.loads(run("--json").stdout)
    assert (found["complete"], len(found["contexts"]), found["pass_cost"]) == (False, 1, None)


def test_beside_mlx_lm(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "phimlx.evaluation.mlx_lm_speed.load_mlx_lm", lambda folder, dtype: (folder.name, dtype)
    )
    result = run("--vs", "mlx-lm")
    assert measured.theirs == ("nano", None)
    assert "512 1,000.0 40.0 50.0 MB 80.0 50% 60.0 MB 2.00 0.80" in lines(result)
    found = json.loads(run("--vs", "mlx-lm", "--json").stdout)["contexts"][0]
    assert (found["prefill_ratio"], found["decode_ratio"]) == (2.0, 0.8)


def test_a_cache_that_cannot_be_written_is_told(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pass_cost, "save_curve", full)
    result = run()
    assert result.exit_code == 0
    assert "could not be kept: no space left on device." in result.stderr


def test_a_picture_is_drawn_of_what_there_is(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[tuple[BenchReport, Path]] = []
    monkeypatch.setattr("phimlx.evaluation.bench_plot.check_plot", lambda path: None)
    monkeypatch.setattr(
        "phimlx.evaluation.bench_plot.draw_png", lambda report, path: drawn.append((report, path))
    )
    file = tmp_path / "speed.png"
    result = run("--plot", file)
    assert result.exit_code == 0
    assert [(report.pass_cost, path) for report, path in drawn] == [(COST, file)]
    assert result.stderr.splitlines()[-1] == f"Drawn in {file}."


def test_without_matplotlib_nothing_is_measured(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(*_: object) -> Any:
        raise PhimlxError("A picture of the speeds needs matplotlib, which is not installed.")

    monkeypatch.setattr("phimlx.evaluation.bench_plot.import_extra", missing)
    assert run("--plot", tmp_path / "speed.png").exit_code == 1
    assert measured.settings is None


@pytest.mark.parametrize(
    "arguments",
    [
        ("--tokens", "1"),
        ("--runs", "0"),
        ("--context", "0"),
        ("--vs", "vllm"),
        ("--vs", "mlx-lm", "--adapter-path", "mine"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2
