"""Folders that other frameworks quantized -> MLX folders of the numbers their libraries decode.

The goldens come from `scripts/goldens/foreign_goldens.py`.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from convert import Quantization
from convert import convert as convert_model
from convert import plan as plan_module
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model, map_model
from phimlx.checkpoint.tensors import StoredRows
from phimlx.cli.group import cli
from phimlx.models.registry import of_config
from tests.convert.test_streaming import World, world
from tests.convert.tiny import same_bits, weights_of

__all__ = ["world"]  # a fixture

GOLDENS = Path(__file__).parents[1] / "goldens" / "foreign"
FOLDERS = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
FOUR = Quantization(32, 4)
TOLERANCE = 1e-5  # of the largest logit; what other rounding of a sum costs


def expected(name: str) -> dict[str, mx.array]:
    found = mx.load(str(GOLDENS / name / "expected.safetensors"))
    assert isinstance(found, dict)
    return found


def expected_weights(name: str) -> dict[str, mx.array]:
    """Decoded weights under the names of the architecture's own layout."""
    weights = {
        key.removeprefix("weight."): array
        for key, array in expected(name).items()
        if key.startswith("weight.")
    }
    architecture = of_config(Checkpoint(GOLDENS / name).config)
    for fused, pieces in architecture.fused_projections.items():
        for first in [key for key in weights if f".{pieces[0]}." in key]:
            names = [first.replace(pieces[0], piece) for piece in pieces]
            joined = mx.concatenate([weights.pop(each) for each in names])
            weights[first.replace(pieces[0], fused)] = joined
    return weights


def test_folders() -> None:
    assert FOLDERS == [
        "awq",
        "bitsandbytes-int8",
        "bitsandbytes-llama",
        "bitsandbytes-nf4",
        "compressed-int4",
        "fp8",
        "gptq-phi",
    ]


@pytest.mark.parametrize("name", FOLDERS)
def test_unquantized(name: str, tmp_path: Path) -> None:
    result = convert_model(GOLDENS / name, tmp_path / "out")
    assert same_bits(weights_of(tmp_path / "out"), expected_weights(name))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == result.dtype
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    found = expected(name)
    logits = load_model(Checkpoint(tmp_path / "out"), mx.float32)(found["input_ids"])[0]
    error = mx.abs(logits - found["logits"]).max() / mx.abs(found["logits"]).max()
    assert error.item() < TOLERANCE


@pytest.mark.parametrize("name", FOLDERS)
def test_quantized_as_what_was_decoded_is(name: str, tmp_path: Path) -> None:
    convert_model(GOLDENS / name, tmp_path / "direct", FOUR)
    convert_model(GOLDENS / name, tmp_path / "plain", dequantize=True)
    convert_model(tmp_path / "plain", tmp_path / "roundabout", FOUR)
    assert same_bits(weights_of(tmp_path / "direct"), weights_of(tmp_path / "roundabout"))
    one, other = (
        json.loads((tmp_path / each / "config.json").read_text())
        for each in ("direct", "roundabout")
    )
    assert one == other


@pytest.mark.parametrize("name", FOLDERS)
def test_blocks_of_any_size_read_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Counter[str]()
    read_into = StoredRows.read_into

    def counting(rows: StoredRows, descriptor: int, buffer: memoryview) -> None:
        read[rows.info.name] += rows.nbytes
        read_into(rows, descriptor, buffer)

    monkeypatch.setattr(StoredRows, "read_into", counting)
    monkeypatch.setattr(plan_module, "BATCH_BYTES", 3000)
    result = convert_model(GOLDENS / name, tmp_path / "out")
    assert same_bits(weights_of(tmp_path / "out"), expected_weights(name))
    assert sum(read.values()) == result.bytes_before


@pytest.mark.parametrize("name", FOLDERS)
def test_mapped_for_a_report(name: str) -> None:
    found = expected(name)
    model = map_model(Checkpoint(GOLDENS / name))
    model.set_dtype(mx.float32)
    logits = model(found["input_ids"])[0]
    error = mx.abs(logits - found["logits"]).max() / mx.abs(found["logits"]).max()
    assert error.item() < TOLERANCE


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "bitsandbytes-llama"])
def test_from_the_hub(name: str, world: World) -> None:
    files = [*(GOLDENS / name).iterdir()]
    world.hub.repos["someone/tune"] = {
        file.name: file.read_bytes() for file in files if "expected" not in file.name
    }
    source = world.out.with_name("expected")
    convert_model(GOLDENS / name, source, FOUR)
    world.convert()
    assert world.left == {"out"}
    assert same_bits(weights_of(world.out), weights_of(source))


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_commands(tmp_path: Path) -> None:
    folder = tmp_path / "awq"
    shutil.copytree(GOLDENS / "awq", folder)
    status, text, errors = run("show", str(folder))
    assert status == 0
    assert "6.70 bits per weight (4 bits in groups of 32, the rest F16)" in text
    assert errors == (
        "Warning: AWQ packed these weights, which phimlx converts but does not run: "
        f"phimlx convert {folder} --mlx-path OUT -q\n"
    )
    for command in (
        ["generate", "--model", str(folder), "--prompt", "hi"],
        ["train", "--model", str(folder), "--data", str(tmp_path), "--train"],
        ["evaluate", "--model", str(folder), "--data", str(tmp_path)],
    ):
        status, text, errors = run(*command)
        assert (status, text) == (1, "")
        assert errors == (
            "Error: config.json: quantization_config is another framework's (AWQ), whose weights "
            "phimlx converts but does not run.\n"
            f"Hint: Convert it: phimlx convert {folder} --mlx-path OUT -q\n"
        )
    status, text, errors = run("convert", str(folder), "--mlx-path", str(tmp_path / "out"), "-q")
    assert status == 0
    assert "Warning" not in errors


def test_activations_are_told_of(tmp_path: Path) -> None:
    remark = "fp8 also rounds what goes into its layers while it runs; here they take it as it is."
    result = convert_model(GOLDENS / "fp8", tmp_path / "out")
    assert result.remarks == (remark,)
    _, _, errors = run("convert", str(GOLDENS / "fp8"), "--mlx-path", str(tmp_path / "other"))
    assert f"Warning: {remark}\n" in errors
