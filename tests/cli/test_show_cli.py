"""`phimlx show`: what it says of models that are here, and of models that are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from convert import Quantization, convert
from phimlx import catalog
from phimlx.cli.group import cli
from phimlx.memory import cache_bytes_per_token, footprint, longest_context
from tests.convert.tiny import MINI, PHI_4, write_model


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["show", *map(str, arguments)], prog_name="phimlx")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GB, and no model."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("phimlx.memory.machine_memory", lambda: 16_000_000_000)
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
    assert lines[-1] == "It does not fit this machine's 16.0 GB."
    assert result.stderr == "Get it with: phimlx download microsoft/Phi-4-reasoning\n"


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
    parameters = 67_904 - 48 * 64
    nbytes = (parameters - 320) * 3 // 4 + 4 * 320  # a scale and a bias of 4 bytes for 32 weights
    cache, working = 100 * 2 * 2 * 2 * 16 * 4, 100 * (6 * 96 + 12 * 64) * 4
    assert json.loads(result.stdout) == {
        "name": "mini",
        "path": "mini",
        "download": None,
        "repository": None,
        "architecture": "phi3",
        "parameters": parameters,
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / parameters,
        "dtype": "F32",
        "bits": 4,
        "group_size": 32,
        "file_bytes": (tmp_path / "mini" / "model.safetensors").stat().st_size,
        "context_length": 256,
        "longrope_step": 32,
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
    }


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
            "phi-5",
            "Error: phi-5 is neither a folder, an alias nor a Hub id.\nHint: Did you mean phi-4?\n",
        ),
        (
            "someone/tune",
            "Error: someone/tune is not on this machine.\n"
            "Hint: Get it with: phimlx download someone/tune\n",
        ),
        (
            "./none",
            "Error: ./none is no folder on this machine.\n"
            "Hint: Give a model's folder, or an alias such as phi-4-mini.\n",
        ),
    ],
)
def test_unknown_models(model: str, stderr: str) -> None:
    result = run(model)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == stderr


@pytest.mark.parametrize(("alias", "per_token"), [("phi-4-mini", 131_072), ("phi-4", 204_800)])
def test_the_cache_of_the_published_models(alias: str, per_token: int) -> None:
    model = catalog.find(alias)
    assert model is not None
    assert cache_bytes_per_token(model) == per_token
    assert footprint(model, 0, 131_072).cache == 131_072 * per_token


def test_the_longest_context_is_the_last_that_fits() -> None:
    model = catalog.DEFAULT
    weights, memory = model.quantized_nbytes, 16_000_000_000
    longest = longest_context(model, weights, memory)
    assert footprint(model, weights, longest).total <= memory
    assert footprint(model, weights, longest + 1).total > memory
    assert longest_context(model, weights, weights) == 0
