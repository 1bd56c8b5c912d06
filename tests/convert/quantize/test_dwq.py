"""DWQ and sensitivity against mlx-lm's own functions, and what they leave alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from convert import Quantization
from convert.quantize import dwq as dwq_module
from convert.quantize.dwq import batches, dwq, sensitivities, split
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from tests.convert.tiny import MINI, PHI_4, parameters, write_model

LOW, HIGH = Quantization(32, 3), Quantization(32, 5)
WINDOWS = [tuple((7 * n + k * k) % 48 for k in range(32)) for n in range(10)]
CONFIGS = pytest.mark.parametrize("config", [PHI_4, MINI], ids=["untied", "tied"])


def forms_of(checkpoint: Checkpoint, form: Quantization) -> dict[str, Quantization | None]:
    modules = load_model(checkpoint).named_modules()
    return {path: form for path, module in modules if hasattr(module, "to_quantized")}


@CONFIGS
def test_sensitivities_are_mlx_lms(tmp_path: Path, config: dict[str, Any]) -> None:
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities

    checkpoint = Checkpoint(write_model(tmp_path / "m", config))
    expected = dict(
        estimate_sensitivities(
            load_model(checkpoint, mx.float32), mx.array(WINDOWS), 3, 32, 5, 32, batch_size=16
        )
    )
    shares: list[float] = []
    found = sensitivities(checkpoint, forms_of(checkpoint, LOW), WINDOWS, LOW, HIGH, shares.append)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6 * max(expected.values()))
    assert sum(shares) == pytest.approx(100)


@CONFIGS
def test_training_is_mlx_lms(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps over one window, whose order cannot differ."""
    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize

    checkpoint = Checkpoint(write_model(tmp_path / "m", config))
    monkeypatch.setattr(dwq_module, "STEP_TOKENS", 64)  # two windows
    train, valid = WINDOWS[0], WINDOWS[1]
    original, student = load_model(checkpoint, mx.float32), load_model(checkpoint, mx.float32)
    nn.quantize(student, 32, 3)
    student.freeze()
    dwq_quantize(
        student,
        lambda batch, index, split: original(batch),
        Adam(learning_rate=1e-3, bias_correction=True),
        [((*window, 0), 0) for window in [train] * 6],
        [((*window, 0), 0) for window in [valid] * 2],
        batch_size=2,
        max_seq_length=33,
        seed=0,
        dtype=mx.float32,
    )
    trained, before, after = dwq(
        checkpoint,
        forms_of(checkpoint, LOW),
        [valid, *[train] * 7],
        mx.float32,
        steps=3,
        learning_rate=1e-3,
        seed=0,
        advance=lambda percent: None,
    )
    assert after < before
    expected = {
        f"{path}.{name}": module[name]
        for path, module in student.named_modules()
        if hasattr(module, "scales")
        for name in ("weight", "scales", "biases")
    }
    assert trained.keys() == expected.keys()
    for name, array in expected.items():
        assert mx.allclose(trained[name], array, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("method", ["dwq", "sensitivity"])
def test_a_process_stays_as_it_is(
    method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Checkpoint(write_model(tmp_path / "m", PHI_4, parameters(PHI_4, mx.bfloat16)))
    layer = type(load_model(checkpoint).layers[0])

    def state() -> tuple[Any, ...]:
        return sys.stdout, sys.stderr, layer.__call__, np.random.get_state()[1].tobytes()

    before, during = state(), set()

    def advance(percent: float) -> None:
        during.add(state() == before)

    forms = forms_of(checkpoint, LOW)
    if method == "dwq":
        dwq(checkpoint, forms, WINDOWS, mx.bfloat16, 1, 1e-3, 0, advance)
    else:
        sensitivities(checkpoint, forms, WINDOWS, LOW, HIGH, advance)
    assert during == {True}
    assert state() == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("count", [4, 8, 9, 64, 130])
def test_windows_are_kept_from_training_by_their_place(count: int) -> None:
    """A text may say the same again and again, and may be short."""
    windows = [(0,)] * count
    train, valid = split(windows)
    assert len(valid) == max(1, count // 8)
    assert len(train) + len(valid) == count
    drawn = batches(train, 16, 5, seed=0)
    assert [len(batch) for batch in drawn] == [16] * 5
