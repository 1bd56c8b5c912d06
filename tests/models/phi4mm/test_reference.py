"""Our logits against transformers' with peft's live adapters, in transformers' own layout.

The goldens are made by `scripts/goldens/mm_goldens.py`: text, pictures, sound and both, on either
side of the LongRoPE step, which slots count towards.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from phimlx.evaluation import parity as selftest

FOLDER = Path(__file__).parents[2] / "goldens" / "mm-native"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "copy"))


def run(folder: Path) -> dict[str, selftest.Result]:
    """Each case by its name without the count of tokens."""
    results = selftest.run(folder, folder / "reference.safetensors")
    return {result.case.partition(",")[0]: result for result in results}


def test_every_case_equals_the_reference() -> None:
    results = run(FOLDER)
    assert len(results) == 9
    assert [result for result in results.values() if not result.passed] == []
    assert min(result.top1 for result in results.values()) == pytest.approx(1)


def test_swapped_adapters_are_seen(copy: Path) -> None:
    """Text needs none; every other case is far off with the other one."""
    (copy / "vision-lora").rename(copy / "other")
    (copy / "speech-lora").rename(copy / "vision-lora")
    (copy / "other").rename(copy / "speech-lora")
    results = run(copy)
    for name, result in results.items():
        assert result.passed == name.startswith("text"), name
        assert result.passed or result.difference > 0.05, name


def test_a_wrong_scale_is_seen(copy: Path) -> None:
    config = json.loads((copy / "vision-lora" / "adapter_config.json").read_text())
    config["lora_alpha"] = 8
    (copy / "vision-lora" / "adapter_config.json").write_text(json.dumps(config))
    results = run(copy)
    assert {name for name, result in results.items() if not result.passed} == {
        name for name in results if name.startswith(("image", "two images"))
    }


def test_a_wrong_table_is_seen(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    rope = config["rope_parameters"]
    rope["short_factor"] = rope["long_factor"]
    (copy / "config.json").write_text(json.dumps(config))
    for name, result in run(copy).items():
        assert result.passed == ("long table" in name), name
