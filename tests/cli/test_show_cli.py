"""`phimlx show`: what it says of models that are here, and of models that are not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from convert import Quantization, convert
from phimlx import catalog
from phimlx.cli.group import cli
from phimlx.machine.memory import cache_bytes_per_token, footprint, longest_context
from tests.convert.tiny import MINI, PHI_4, parameters, write_model
from tests.hub.loopback_hub import Hub, serve_alone


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["show", *map(str, arguments)], prog_name="phimlx")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GB, prompts computed as on a GPU, and no model."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("phimlx.machine.memory.machine_memory", lambda: 16_000_000_000)
    monkeypatch.setattr("phimlx.machine.memory.prefill_tokens", lambda: 2048)
    monkeypatch.chdir(tmp_path)


ABSENT = """\
phi-4-mini
  folder        not on this machine
  repository    mlx-community/Phi-4-mini-instruct-4bit
  architecture  phi3
  parameters    3,836,021,760
  weights       2.16 GB, 4.50 bits per weight (4 bits in groups of 64, the rest BF16)
  context       131,072 tokens, LongRoPE's long factors beyond 4,096
  vocabulary    200,064, tied to the output head
  licence       MIT
  sampling      the likeliest token

tokens    weights   cache     working (about)   memory    fits
──────────────────────────────────────────────────────────────
4,096     2.16 GB   537 MB    352 MB            3.05 GB   yes
131,072   2.16 GB   17.2 GB   352 MB            19.7 GB   no

It fits this machine's 16.0 GB up to about 102,000 tokens.
With --kv-bits 8 it fits at every length.

bits   weights   on this machine
────────────────────────────────────────────────
  16   7.67 GB   fits up to about 60,000 tokens
   8   4.08 GB   fits up to about 88,000 tokens
   6   3.12 GB   fits up to about 95,000 tokens
   5   2.64 GB   fits up to about 99,000 tokens
   4   2.16 GB   fits up to about 102,000 tokens
   3   1.68 GB   fits up to about 106,000 tokens

Best here: 8 bits, with: phimlx convert microsoft/Phi-4-mini-instruct --mlx-path phi-4-mini-8bit \
-q --q-bits 8
"""


@pytest.mark.parametrize("arguments", [[], ["phi-4-mini"], ["Phi-4-mini-instruct"]])
def test_a_model_that_is_not_here(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    assert result.stdout == ABSENT
    name = arguments[0] if arguments else "phi-4-mini"
    assert result.stderr == f"Get it with: phimlx download {name}\n"


def test_an_original_that_is_not_here() -> None:
    result = run("microsoft/Phi-4-reasoning", "--context", "1000")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "  weights       29.3 GB, 16.00 bits per weight (BF16)" in lines
    assert "  sampling      temperature 0.8, top_p 0.95, top_k 50" in lines
    assert "  vocabulary    100,352, with an output head of its own" in lines
    assert "  context       32,768 tokens" in lines
    assert "It does not fit this machine's 16.0 GB." in lines
    assert [line.split()[:3] for line in lines[-8:-2]] == [
        ["16", "29.3", "GB"],
        ["8", "15.6", "GB"],
        ["6", "11.9", "GB"],
        ["5", "10.1", "GB"],
        ["4", "8.25", "GB"],
        ["3", "6.41", "GB"],
    ]
    assert lines[-1] == ("Best here: 4 bits, with: phimlx download phi-4-reasoning")
    assert result.stderr == "Get it with: phimlx download microsoft/Phi-4-reasoning\n"


def test_a_scaled_model_is_marked(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4, "beta_slow": 2}
    result = run(write_model(tmp_path / "far", {**PHI_4, "rope_scaling": scaling}))
    assert (
        "  context       1,024 tokens, by yarn scaling of 256 by 4: not the published model"
        in result.stdout.splitlines()
    )
    result = run(tmp_path / "far", "--json")
    assert json.loads(result.stdout)["rope_scaling"] == {
        "kind": "yarn",
        "factor": 4.0,
        "original": 256,
        "beta_fast": 32.0,
        "beta_slow": 2.0,
        "truncate": True,
    }


HERE = """\
source
  folder        {folder}
  architecture  phi3
  parameters    67,904
  weights       272 kB, 32.00 bits per weight (F32)
  context       256 tokens
  vocabulary    48, with an output head of its own
  sampling      temperature 0.7

tokens   weights   cache    working (about)   memory    fits
────────────────────────────────────────────────────────────
256      272 kB    131 kB   1.38 MB           1.78 MB   yes

It fits this machine's 16.0 GB at every length.
"""


def test_a_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "source", PHI_4)
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7}')
    result = run(folder)
    assert result.exit_code == 0
    assert result.stdout == HERE.format(folder=folder)
    assert result.stderr == ""


def test_json(tmp_path: Path) -> None:
    convert(write_model(tmp_path / "source", MINI), tmp_path / "mini", Quantization(32, 4))
    result = run("./mini", "--context", "100", "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    count = 67_904 - 48 * 64
    nbytes = (count - 320) * 3 // 4 + 4 * 320  # a scale and a bias of 4 bytes for 32 weights
    cache, working = 100 * 2 * 2 * 2 * 16 * 4, 100 * (6 * 96 + 12 * 64) * 4
    assert json.loads(result.stdout) == {
        "name": "mini",
        "path": "mini",
        "download": None,
        "repository": None,
        "architecture": "phi3",
        "parameters": count,
        "whole_parameters": 0,
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / count,
        "dtype": "F32",
        "bits": 4,
        "group_size": 32,
        "file_bytes": (tmp_path / "mini" / "model.safetensors").stat().st_size,
        "context_length": 256,
        "longrope_step": 32,
        "rope_scaling": None,
        "vocabulary": 48,
        "tied": True,
        "licence": None,
        "sampling": {},
        "memory": [
            {
                "context": 100,
                "weights": nbytes,
                "cache": cache,
                "working": working,
                "total": nbytes + cache + working,
                "fits": True,
            }
        ],
        "machine_memory": 16_000_000_000,
        "longest_context_here": 256,
        "kv_bits": None,
        "with_kv_bits": [],
        "float16_pays": False,
    }


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_float16_is_advised_where_bfloat16_is_emulated(
    dtype: mx.Dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phimlx.machine.device.emulates_bfloat16", lambda: True)
    weights = {name: array.astype(dtype) for name, array in parameters(MINI).items()}
    write_model(tmp_path / "m", MINI, weights)
    pays = dtype == mx.bfloat16
    assert json.loads(run(tmp_path / "m", "--json").stdout)["float16_pays"] is pays
    advice = "This chip emulates bfloat16: with --dtype float16 it reads prompts quicker."
    assert (advice in run(tmp_path / "m").stdout) is pays


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "source", PHI_4)
    monkeypatch.setattr("mlx.core.load", lambda file: pytest.fail("a weight was read"))
    monkeypatch.setattr("mlx.core.eval", lambda *arrays: pytest.fail("something was computed"))
    assert run(folder).exit_code == 0


def test_nano() -> None:
    result = run("nano", "--json")
    assert result.exit_code == 0
    about = json.loads(result.stdout)
    nano = catalog.find("nano")
    assert nano is not None
    assert about["name"] == "nano"
    assert about["parameters"] == nano.parameters
    assert about["bytes"] == nano.nbytes
    assert about["context_length"] == nano.context_length


def test_a_context_that_the_model_does_not_have() -> None:
    result = run("phi-4", "--context", "16385")
    assert result.exit_code == 2
    assert result.stderr.endswith(
        "Error: Invalid value for --context: phi-4 holds 16,384 tokens.\n"
    )


@pytest.mark.parametrize(
    ("model", "stderr"),
    [
        (
            "phi-4-minni",
            "Error: phi-4-minni is neither a folder, an alias nor a Hub id.\n"
            "Hint: Did you mean phi-4-mini?\n",
        ),
        (
            "./none",
            "Error: ./none is no folder on this machine.\n"
            "Hint: Give a model's folder, or an alias such as phi-4-mini.\n",
        ),
    ],
)
def test_models_that_are_not_known(model: str, stderr: str) -> None:
    result = run(model)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == stderr


# A model of the Hub


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_alone(monkeypatch, tmp_path / "hub") as running:
        yield running


def test_a_model_of_the_hub_by_its_headers(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "tune", PHI_4)
    server.repos["someone/tune"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("phimlx.hub.preview.FIRST_BYTES", 100)
    result = run("someone/tune")
    assert result.exit_code == 0
    expected = HERE.format(folder="not on this machine").removeprefix("source\n")
    expected = expected.replace(
        "  sampling      temperature 0.7", "  sampling      the likeliest token"
    )
    lines = result.stdout.splitlines()
    assert lines[:2] == ["tune", "  folder        not on this machine"]
    assert [line for line in expected.splitlines() if line not in lines] == []
    assert "  repository    someone/tune" in lines
    assert lines[-1] == (
        "Best here: 8 bits, with: phimlx convert someone/tune --mlx-path tune-8bit -q --q-bits 8"
    )
    assert result.stderr == "Get it with: phimlx download someone/tune\n"
    weights = server.repos["someone/tune"]["model.safetensors"]
    assert server.ranges["model.safetensors"] == [0, 100]
    assert server.served["model.safetensors"] == 8 + int.from_bytes(weights[:8], "little")
    assert not (tmp_path / "hub").exists()


def test_a_quantized_model_of_the_hub_gets_no_further_choices(server: Hub, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", MINI)
    convert(source, tmp_path / "mini", Quantization(32, 4))
    mini = {path.name: path.read_bytes() for path in (tmp_path / "mini").iterdir()}
    server.repos["someone/mini"] = mini
    here = json.loads(run("./mini", "--json").stdout)
    about = json.loads(run("someone/mini", "--json").stdout)
    assert (about.pop("quantizations"), about.pop("recommended")) == ([], None)
    differing = {key for key in here if here[key] != about[key]}
    assert differing == {"path", "download", "repository"}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (b"short", "is not a whole safetensors file"),
        (b"\xff" * 100, "so it is no safetensors file."),
        ((50).to_bytes(8, "little") + b"{}", "is not a whole safetensors file"),
    ],
)
def test_weights_of_the_hub_that_are_none(
    server: Hub, tmp_path: Path, weights: bytes, message: str
) -> None:
    folder = write_model(tmp_path / "tune", PHI_4)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.repos["someone/tune"] = {**files, "model.safetensors": weights}
    result = run("someone/tune")
    assert result.exit_code == 1
    assert message in result.stderr


def test_sizes_that_no_model_has(server: Hub, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tune", PHI_4)
    server.repos["someone/tune"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    lfs = {"sha256": "0" * 64, "size": 10**15, "pointerSize": 130}
    server.listed["someone/tune", "model.safetensors"] = {"lfs": lfs}
    result = run("someone/tune")
    assert result.exit_code == 1
    assert result.stderr == ("Error: model.safetensors has 1000 TB, more than any model needs.\n")


def test_a_model_that_the_hub_does_not_have(server: Hub) -> None:
    result = run("someone/none")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: The Hub has no model someone/none, or it is private.\n"
        "Hint: Check the name; for a private one log in first with: hf auth login\n"
    )


def test_offline_only_the_catalogue_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = run("someone/tune")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: someone/tune is not on this machine.\n"
        "Hint: If it is a Phi model, get it with: phimlx download someone/tune\n"
    )


@pytest.mark.parametrize(("alias", "per_token"), [("phi-4-mini", 131_072), ("phi-4", 204_800)])
def test_the_cache_of_the_published_models(alias: str, per_token: int) -> None:
    model = catalog.find(alias)
    assert model is not None
    assert cache_bytes_per_token(model) == per_token
    assert footprint(model, 0, 131_072).cache == 131_072 * per_token


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
def test_the_longest_context_is_the_last_that_fits(kv_bits: int | None) -> None:
    model = catalog.DEFAULT
    weights, memory = model.quantized_nbytes, 16_000_000_000
    longest = longest_context(model, weights, memory, kv_bits=kv_bits)
    assert footprint(model, weights, longest, kv_bits=kv_bits).total <= memory
    assert footprint(model, weights, longest + 1, kv_bits=kv_bits).total > memory
    assert longest_context(model, weights, weights, kv_bits=kv_bits) == 0


# Quantized keys and values


def test_the_whole_context_of_mini_at_4_bits_is_forecast_within_16_gb() -> None:
    result = run("phi-4-mini", "--context", "131072", "--kv-bits", "4", "--json")
    assert result.exit_code == 0
    about = json.loads(result.stdout)
    (row,) = about["memory"]
    per_token = 131_072 * 4.5 / 16  # of bfloat16's 16 bits: 4, and a scale and a bias for 64 values
    layer = 2 * 8 * 128 * 2 * 131_072  # keys and values of one, dequantized
    assert row["cache"] == 131_072 * per_token
    assert row["working"] == footprint(catalog.DEFAULT, 0, 131_072).working + layer
    assert row["total"] == row["weights"] + row["cache"] + row["working"] < 8e9
    assert (row["fits"], about["kv_bits"], about["with_kv_bits"]) == (True, 4, [])
    assert about["longest_context_here"] == 131_072


@pytest.mark.parametrize(
    ("here", "arguments", "advice"),
    [
        (16e9, ["phi-4-mini"], "With --kv-bits 8 it fits at every length."),
        (16e9, ["phi-4-mini", "--context", "100000"], None),
        (16e9, ["phi-4-mini", "--kv-bits", "8"], None),
        (9e9, ["phi-4-mini"], "With --kv-bits 4 it fits at every length."),
        (9e9, ["phi-4-mini", "--context", "60000"], "With --kv-bits 8 it fits up to about"),
        (5e9, ["phi-4-mini"], "With --kv-bits 4 it fits up to about 60,000 tokens."),
        (2e9, ["phi-4-mini"], None),
        (10e9, ["phi-4"], "With --kv-bits 4 it fits at every length."),
        (5.6e9, ["microsoft/phi-2"], None),  # heads that no groups divide
    ],
)
def test_kv_bits_are_suggested_where_a_context_does_not_fit_otherwise(
    here: float, arguments: list[str], advice: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phimlx.machine.memory.machine_memory", lambda: int(here))
    result = run(*arguments)
    assert result.exit_code == 0
    found = [line for line in result.stdout.splitlines() if "--kv-bits" in line]
    assert [line.startswith(advice or "-") for line in found] == ([True] if advice else [])


def test_heads_that_cannot_be_quantized() -> None:
    result = run("phi-2", "--kv-bits", "8")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: This model's heads have 80 channels, which groups of 32 do not divide, so its keys "
        "and values cannot be quantized.\nHint: Leave kv_bits (--kv-bits) out.\n"
    )
