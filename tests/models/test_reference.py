"""Our logits and greedy tokens against transformers', case by case.

The goldens are made by `scripts/goldens/model_goldens.py`; a difference is relative to the
reference's largest logit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from phimlx.evaluation import parity as selftest

MODELS = Path(__file__).parents[1] / "goldens" / "models"
NAMES = ["mini-step-32", "mini-window", "phi-3-window", "phi-4"]


@pytest.mark.parametrize("name", [pytest.param("mini", marks=pytest.mark.slow), *NAMES])
def test_every_case_equals_the_reference(name: str) -> None:
    results = list(selftest.run(MODELS / name, MODELS / name / "reference.safetensors"))
    assert len(results) >= 10
    failed = [result for result in results if not result.passed]
    assert failed == []
    exact = [result for result in results if result.allowed <= 1e-4]
    assert all(result.top1 == 1 for result in exact)


def test_a_window_that_is_ignored_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "without-window"
    shutil.copytree(MODELS / "phi-3-window", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    by_name = {r.case: r for r in selftest.run(folder, folder / "reference.safetensors")}
    assert by_name["24 tokens"].passed
    assert by_name["64 tokens"].difference > 0.05


def test_a_wrong_table_is_seen(tmp_path: Path) -> None:
    """The cases can fail: with the long factors everywhere the short lengths differ."""
    folder = tmp_path / "always-long"
    shutil.copytree(MODELS / "mini-step-32", folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"]["short_factor"] = config["rope_scaling"]["long_factor"]
    (folder / "config.json").write_text(json.dumps(config))
    results = selftest.run(folder, folder / "reference.safetensors")
    by_name = {result.case: result for result in results}
    assert by_name["64 tokens (long table)"].passed
    assert by_name["16 tokens (short table)"].difference > 0.05
    assert not by_name["greedy, 20 + 40 tokens, across the step"].passed
