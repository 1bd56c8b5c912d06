"""The examples that mlx-examples trains on, through the command line: the loss falls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from phimlx.cli.group import cli
from tests.everything import everything


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mlx-examples-lora", pytest.param("mlx-examples-wwdc25", marks=everything)]
)
def test_validation_loss_falls(name: str, data: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(
        cli,
        [
            *("train", "--model", "nano", "--data", str(data / "text" / name)),
            *("--adapter-path", str(tmp_path / "run"), "--iters", "8", "--batch-size", "2"),
            *("--learning-rate", "3e-3", "--max-seq-length", "256", "--overlong", "cut"),
            *("--steps-per-eval", "4", "--val-batches", "2", "--json"),
        ],
        catch_exceptions=False,
    )
    assert run.exit_code == 0, run.output
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, log) if row["kind"] == "validation"]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1
