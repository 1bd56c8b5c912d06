"""`phimlx convert`: flags, what is printed, and how errors end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants
from safetensors import safe_open

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.cli.group import cli
from phimlx.hub.resolve import NANO
from tests.convert.tiny import MINI, PHI_4, parameters, write_model

USAGE = (
    "Usage: phimlx convert [OPTIONS] MODEL\nTry 'phimlx convert --help' for help.\n\nError: {}\n"
)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)], prog_name="phimlx")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return write_model(tmp_path / "source", PHI_4, parameters(PHI_4, mx.bfloat16))


def test_what_a_person_reads(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(source, "--mlx-path", out, "-q", "--q-group-size", "32")
    assert result.exit_code == 0
    begin, _, seconds = result.stdout.rpartition(", ")
    assert begin == f"{out}: 42.9 kB from 136 kB, 5.05 bits per weight, 35 tensors"
    assert seconds.endswith(" s\n")
    assert result.stderr == f"Try it: phimlx chat --model {out}\n"


def test_layers_that_stay_unquantized_are_named(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(source, "--mlx-path", out, "-q")
    assert result.exit_code == 0
    assert result.stderr == (
        "Warning: 2 layers stay as they are, since groups do not divide their width: "
        "model.layers.0.mlp.down_proj and 1 more.\n"
        f"Try it: phimlx chat --model {out}\n"
    )


def test_json_is_one_object_and_nothing_else(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(source, "--mlx-path", out, "-q", "--q-bits", "8", "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    written: dict[str, Any] = json.loads(result.stdout)
    assert written.pop("seconds") > 0
    matrices, down = 67_904 - 320, 2 * 64 * 96
    nbytes = (matrices - down) * 17 // 16 + 2 * (down + 320)
    assert written == {
        "path": str(out),
        "source": str(source),
        "parameters": 67_904,
        "bits_per_weight": 8 * nbytes / 67_904,
        "bytes_before": 2 * 67_904,
        "bytes_after": nbytes,
        "tensors": 31,
        "dtype": "bfloat16",
        "recipe": "uniform",
        "quantization": {"group_size": 64, "bits": 8, "mode": "affine"},
        "continued": 0,
        "undivided": ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"],
    }


@pytest.mark.parametrize("option", ["--model", "--hf-path"])
def test_mlx_lms_names_for_the_model(source: Path, tmp_path: Path, option: str) -> None:
    result = run(option, source, "--mlx-path", tmp_path / "out", "--dtype", "float16")
    assert result.exit_code == 0
    tensors = Checkpoint(tmp_path / "out").tensors.values()
    assert {info.dtype for info in tensors} == {"F16"}


def test_quantized_by_default_to_4_bits_in_groups_of_64(source: Path, tmp_path: Path) -> None:
    run(source, "--mlx-path", tmp_path / "out", "-q")
    form = {"group_size": 64, "bits": 4, "mode": "affine"}
    assert Checkpoint(tmp_path / "out").quantization == form


def test_nano(tmp_path: Path) -> None:
    result = run("nano", "--mlx-path", tmp_path / "out", "-q")
    assert result.exit_code == 0
    assert Checkpoint(tmp_path / "out").quantization is not None
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        NANO / "tokenizer.json"
    ).read_bytes()
    tokens = mx.array([[1, 2, 3]])
    logits = load_model(Checkpoint(tmp_path / "out"), mx.float32)(tokens)
    assert mx.all(mx.isfinite(logits)).item()


@pytest.mark.parametrize(
    ("arguments", "form"),
    [
        (["-q"], (64, 4, "affine")),
        (["-q", "--q-bits", "3"], (64, 3, "affine")),
        (["-q", "--q-mode", "mxfp4"], (32, 4, "mxfp4")),
        (["-q", "--q-mode", "mxfp8"], (32, 8, "mxfp8")),
        (["-q", "--q-mode", "nvfp4"], (16, 4, "nvfp4")),
        (["--recipe", "mixed-6-8", "--q-group-size", "32"], (32, 6, "affine")),
        (["-q", "--recipe", "OWN.toml"], (32, 2, "affine")),
    ],
)
def test_modes_and_recipes(
    source: Path, tmp_path: Path, arguments: list[str], form: tuple[int, int, str]
) -> None:
    own = tmp_path / "own.toml"
    own.write_text("bits = 2\ngroup_size = 32")
    arguments = [str(own) if argument == "OWN.toml" else argument for argument in arguments]
    result = run(source, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 0
    stored = Checkpoint(tmp_path / "out").quantization
    assert stored is not None
    assert (stored["group_size"], stored["bits"], stored["mode"]) == form


def test_bits_that_a_mode_does_not_have(source: Path, tmp_path: Path) -> None:
    result = run(source, "--out", tmp_path / "out", "-q", "--q-mode", "mxfp4", "--q-bits", "8")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: MLX has no mxfp4 quantization to 8 bits in groups of 32.\n"
        "Hint: mxfp4 has 4 bits in groups of 32.\n"
    )


def test_there_and_back(source: Path, tmp_path: Path) -> None:
    run(source, "--out", tmp_path / "small", "-q", "--q-group-size", "32")
    result = run(tmp_path / "small", "--out", tmp_path / "plain", "--dequantize")
    assert result.exit_code == 0
    assert Checkpoint(tmp_path / "plain").quantization is None
    result = run(tmp_path / "small", "--out", tmp_path / "hub", "-d", "--export", "hf")
    assert result.exit_code == 0
    with safe_open(str(tmp_path / "hub" / "model.safetensors"), framework="mlx") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mlx-path", "x"], "MODEL is missing: name one model to convert."),
        (
            ["a", "--model", "b", "--mlx-path", "x"],
            "MODEL is given twice: name one model to convert.",
        ),
        (["a"], "Missing option '--mlx-path' / '--out'."),
        (
            ["a", "--mlx-path", "x", "--q-bits", "4"],
            "--q-bits goes with -q, which quantizes the weights.",
        ),
        (
            ["a", "--mlx-path", "x", "--q-group-size", "64"],
            "--q-group-size goes with -q, which quantizes the weights.",
        ),
        (
            ["a", "--mlx-path", "x", "-q", "--q-bits", "7"],
            "Invalid value for '--q-bits': '7' is not one of '2', '3', '4', '5', '6', '8'.",
        ),
        (
            ["a", "--mlx-path", "x", "-q", "--q-group-size", "48"],
            "Invalid value for '--q-group-size': '48' is not one of '16', '32', '64', '128'.",
        ),
        (
            ["a", "--mlx-path", "x", "-q", "--q-mode", "int8"],
            "Invalid value for '--q-mode': 'int8' is not one of 'affine', 'mxfp4', 'mxfp8', "
            "'nvfp4'.",
        ),
        (
            ["a", "--mlx-path", "x", "--q-mode", "mxfp4"],
            "--q-mode goes with -q, which quantizes the weights.",
        ),
        (
            ["a", "--mlx-path", "x", "--recipe", "mixed-4-6", "--q-bits", "4"],
            "--q-bits and --recipe exclude each other: the recipe says it.",
        ),
        (
            ["a", "--mlx-path", "x", "-q", "--recipe", "mixed-4-6", "--q-mode", "mxfp4"],
            "--q-mode and --recipe exclude each other: the recipe says it.",
        ),
        (
            ["a", "--mlx-path", "x", "-q", "-d"],
            "--dequantize writes weights that are not quantized: leave -q out.",
        ),
        (
            ["a", "--mlx-path", "x", "--recipe", "mixed-4-6", "--export", "hf"],
            "--export writes weights that are not quantized: leave --recipe out.",
        ),
        (
            ["a", "--mlx-path", "x", "--dtype", "int8"],
            "Invalid value for '--dtype': 'int8' is not one of 'float16', 'bfloat16', 'float32'.",
        ),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == USAGE.format(message)


def test_errors_are_one_sentence_and_the_next_step(source: Path, tmp_path: Path) -> None:
    result = run(source, "--mlx-path", source)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        f"Error: {source} exists already.\nHint: Choose another folder, or remove it first.\n"
    )


def test_an_alias_means_the_original(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = run("phi-4-mini", "--mlx-path", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: microsoft/Phi-4-mini-instruct is not on this machine.\n"
        "Hint: Get it with: phimlx download microsoft/Phi-4-mini-instruct\n"
    )


def test_another_architecture(tmp_path: Path) -> None:
    source = write_model(tmp_path / "llama", MINI)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    result = run(source, "--mlx-path", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "Error: config.json: model_type is 'gpt2', but phimlx runs the Phi family: "
    )


def test_an_interrupt_ends_with_130_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("convert.plan.read_blocks", interrupted)
    result = run(source, "--mlx-path", tmp_path / "out", "-q")
    assert result.exit_code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
