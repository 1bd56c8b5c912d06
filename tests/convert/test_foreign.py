"""Folders that other frameworks quantized -> MLX folders of the numbers their libraries decode.

The goldens come from `scripts/goldens/foreign_goldens.py`.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

from convert import Quantization
from convert import convert as convert_model
from convert import plan as plan_module
from convert.measure.compare import layer_errors, paired_tensors
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.foreign.methods import ForeignQuantization
from phimlx.checkpoint.load import load_model, map_model
from phimlx.checkpoint.tensors import StoredRows
from phimlx.cli.group import cli
from phimlx.models.registry import of_config
from tests.convert.test_streaming import World, world
from tests.convert.tiny import same_bits, weights_of, write_model

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
    remarks = {name: convert_model(GOLDENS / name, tmp_path / name).remarks for name in FOLDERS}
    told = {name: found[0] for name, found in remarks.items() if found}
    assert told == {
        "bitsandbytes-int8": "bitsandbytes also rounds activations while it runs, which phimlx "
        "does not.",
        "fp8": "fp8 also rounds activations while it runs, which phimlx does not.",
    }
    _, _, errors = run("convert", str(GOLDENS / "fp8"), "--mlx-path", str(tmp_path / "other"))
    assert f"Warning: {told['fp8']}\n" in errors


GROUPS: list[tuple[dict[str, Any], bool]] = [
    ({"config_groups": {"group_0": {"input_activations": None}}}, False),
    ({"config_groups": {"group_0": {"input_activations": {"num_bits": 8}}}}, True),
    ({"config_groups": {"group_0": {"output_activations": {"num_bits": 8}}}}, True),
    ({"kv_cache_scheme": {"num_bits": 8}}, True),
    ({"kv_cache_scheme": None}, False),
]


@pytest.mark.parametrize(("settings", "rounds"), GROUPS)
def test_what_compressed_tensors_rounds(settings: dict[str, Any], rounds: bool) -> None:
    config = {"quantization_config": {"quant_method": "compressed-tensors", **settings}}
    foreign = ForeignQuantization.of(config)
    assert foreign is not None
    assert bool(foreign.remarks) is rounds


def test_layers_compared_with_what_was_decoded(tmp_path: Path) -> None:
    convert_model(GOLDENS / "awq", tmp_path / "out")
    pairs = paired_tensors(Checkpoint(GOLDENS / "awq"), Checkpoint(tmp_path / "out"))
    errors = layer_errors(pairs, lambda percent: None)
    assert {each.error for each in errors} == {0.0}
    packed = [each.bits_before for each in errors if each.kind == "gate_up_proj"]
    assert packed == [4 + (4 + 16) / 32] * 2  # of each group of 32 a zero point and a scale


def test_layers_that_older_phi_keeps_together(data: Path, tmp_path: Path) -> None:
    """TheBloke's phi-2-GPTQ: queries, keys and values in one packed tensor."""
    source = data / "tiny" / "tiny-phi2-msft"
    config = json.loads((source / "config.json").read_text())
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    path = "transformer.h.1.mixer.Wqkv"
    rows, width = weights.pop(f"{path}.weight").shape
    group = width // 2
    numbers = mx.random.randint(0, 16, (rows, width), key=mx.random.key(1))
    scales = mx.random.uniform(0.01, 0.02, (rows, 2), mx.float16, key=mx.random.key(2))
    words = (numbers.T.reshape(width // 8, 8, rows) << (4 * mx.arange(8))[None, :, None]).sum(1)
    zeros = mx.full((2, rows // 8), 0x77777777, mx.int32)  # eights, less one as version 1 has it
    weights |= {
        f"{path}.qweight": words.astype(mx.uint32).view(mx.int32),
        f"{path}.qzeros": zeros,
        f"{path}.scales": mx.contiguous(scales.T),
    }
    settings = {"quant_method": "gptq", "bits": 4, "group_size": group}
    write_model(tmp_path / "source", {**config, "quantization_config": settings}, weights)
    convert_model(tmp_path / "source", tmp_path / "out", dtype="float32")
    found = weights_of(tmp_path / "out")
    made = mx.concatenate(
        [found[f"model.layers.1.self_attn.{name}_proj.weight"] for name in ("q", "k", "v")]
    )
    expected = (numbers - 8).astype(mx.float16) * mx.repeat(scales, group, axis=1)
    dtype = getattr(mx, str(config["torch_dtype"]))
    assert mx.array_equal(made, expected.astype(dtype).astype(mx.float32))


def test_show_from_the_hub(world: World) -> None:
    files = (GOLDENS / "bitsandbytes-nf4").iterdir()
    world.hub.repos["someone/tune"] = {file.name: file.read_bytes() for file in files}
    status, text, errors = run("show", "someone/tune")
    assert status == 0
    assert "6.04 bits per weight (4 bits, the rest BF16)" in text
    assert errors == (
        "Warning: bitsandbytes packed these weights, which phimlx converts but does not run: "
        "phimlx convert someone/tune --mlx-path OUT -q\n"
    )
