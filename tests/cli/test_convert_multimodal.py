"""`phimlx convert` and `phimlx show` of models that see and hear."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from phimlx import catalog
from phimlx.checkpoint.folder import Checkpoint
from phimlx.cli.group import cli
from phimlx.machine.memory import picture_bytes
from phimlx.models.phi4mm.config import VisionConfig
from tests.convert.test_multimodal import BAKED, BAKED_HINT, baked, mlx_vlm_config
from tests.convert.tiny import PHI_4, weights_of, write_config, write_model
from tests.multimodal import multimodal_folder

USAGE = (
    "Usage: phimlx convert [OPTIONS] MODEL\nTry 'phimlx convert --help' for help.\n\nError: {}\n"
)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)], prog_name="phimlx")


@pytest.fixture
def source(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "source").mkdir()
    return multimodal_folder(data, tmp_path / "source")


@pytest.fixture
def theirs(source: Path, tmp_path: Path) -> Path:
    """A conversion that baked the adapters into the base."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), baked(weights_of(source)))
    write_config(folder, mlx_vlm_config(json.loads((source / "config.json").read_text())))
    return folder


def test_what_a_person_reads(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("convert", source, "--out", out, "-q", "--q-bits", "8", "--q-group-size", "32")
    assert result.exit_code == 0
    begin, _, seconds = result.stdout.rpartition(", ")
    assert begin == f"{out}: 984 kB from 1.28 MB, 24.66 bits per weight, 200 tensors"
    assert seconds.endswith(" s\n")
    assert result.stderr == f"Try it: phimlx chat --model {out}\n"


@pytest.mark.parametrize("form", [["-q"], ["--recipe", "mixed-4-6"]])
def test_adapters_and_encoders_at_8_bits(source: Path, tmp_path: Path, form: list[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--out", out, *form, "--q-group-size", "32", "--q-adapters", "--q-encoders"]
    result = run("convert", source, *arguments)
    assert result.exit_code == 0
    assert result.stderr == (
        "Warning: 31 layers stay as they are, since groups do not divide their width: "
        "model.embed_tokens_extend.audio_embed.encoder.encoders.0.feed_forward_in.net.2 and 30 "
        f"more.\nTry it: phimlx chat --model {out}\n"
    )
    table = Checkpoint(out).quantization
    assert table is not None
    eight = {"group_size": 32, "bits": 8, "mode": "affine"}
    assert table["bits"] == 4
    assert table["model.layers.1.mlp.down_proj.lora_A.vision"] == eight
    assert table["model.embed_tokens_extend.audio_embed.encoder.embed.out"] == eight


@pytest.mark.parametrize("option", ["--q-adapters", "--q-encoders"])
def test_options_that_need_another(source: Path, tmp_path: Path, option: str) -> None:
    result = run("convert", source, "--out", tmp_path / "out", option)
    assert result.exit_code == 2
    assert result.stderr == USAGE.format(f"{option} goes with -q, which quantizes the weights.")


def test_a_model_without_adapters(source: Path, tmp_path: Path) -> None:
    text = write_model(tmp_path / "text", PHI_4)
    result = run("convert", text, "--out", tmp_path / "out", "-q", "--q-adapters")
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {text} takes text only, so it has no adapters.\nHint: Leave --q-adapters out.\n"
    )


def test_calibrated_quantization(source: Path, tmp_path: Path) -> None:
    result = run("convert", source, "--out", tmp_path / "out", "-q", "--q-method", "gptq")
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: GPTQ calibrates on text alone, and {source} is a phi4mm model, which sees and "
        "hears as well.\nHint: Convert it with -q alone.\n"
    )


def test_a_baked_conversion(theirs: Path, tmp_path: Path) -> None:
    message = f"Error: {BAKED.format(theirs)}\nHint: {BAKED_HINT}\n"
    for arguments in (["convert", theirs, "--out", tmp_path / "out", "-q"], ["show", theirs]):
        result = run(*arguments)
        assert result.exit_code == 1
        assert result.stderr == message


# What a model takes


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phimlx.machine.memory.crops_at_once", lambda: 4)  # as on a GPU
    monkeypatch.setattr("phimlx.machine.memory.machine_memory", lambda: 16_000_000_000)


def test_show_a_folder(source: Path, tmp_path: Path, machine: None) -> None:
    out = tmp_path / "out"
    run("convert", source, "--out", out, "-q", "--q-group-size", "32")
    result = run("show", out)
    assert result.exit_code == 0
    assert "  parameters    319,248, of which 212,432 in encoders and adapters\n" in result.stdout
    assert (
        "A picture of 36 crops, the largest, takes about 177 MB more while it is seen.\n"
        in result.stdout
    )
    about = json.loads(run("show", out, "--json").stdout)
    whole = sum(info.nbytes for info in Checkpoint(out).tensors.values())
    assert (about["whole_parameters"], about["bytes"]) == (212_432, whole)
    assert about["picture"] == {"crops": 36, "working": 176_521_216}


def test_show_the_published_model(source: Path, machine: None) -> None:
    """Quantized, the base alone becomes smaller: adapters and encoders keep 16 bits."""
    result = run("show", "phi-4-multimodal")
    known, mini = catalog.find("phi-4-multimodal"), catalog.find("phi-4-mini")
    assert known is not None
    assert mini is not None
    assert result.exit_code == 0
    about = json.loads(run("show", "phi-4-multimodal", "--json").stdout)
    beside = known.parameters - mini.parameters
    assert {row["bits"]: row["bytes"] for row in about["quantizations"]} == {
        16: 2 * known.parameters,
        **{bits: mini.parameters * (2 * bits + 1) // 16 + 2 * beside for bits in (8, 6, 5, 4, 3)},
    }
    assert about["picture"] == {
        "crops": 36,
        "working": picture_bytes(VisionConfig.from_dict({}), 36),
    }
    assert "Best here: 6 bits, with: phimlx convert microsoft/Phi-4-multimodal-instruct" in (
        result.stdout
    )


def test_a_picture_of_one_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeing it and its overview at once was measured on the CPU to take 241 MB in bfloat16,
    356 MB in float32."""
    monkeypatch.setattr("phimlx.machine.memory.crops_at_once", lambda: 4)
    vision = VisionConfig.from_dict({})
    for itemsize, measured in ((2, 241e6), (4, 356e6)):
        assert picture_bytes(vision, 1, itemsize) == pytest.approx(measured, rel=0.15)
