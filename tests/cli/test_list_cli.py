"""`phimlx list`: what is told of the models on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from phimlx.cli.group import cli
from phimlx.hub import resolve
from phimlx.sizes import size_text
from tests.locked_out import locked_out, open_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["list", *arguments], prog_name="phimlx")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def keep(cache: Path, repo: str, whole: bool = True, **config: object) -> Path:
    """A model of 12 kB, last used on the day before the year 2024, or 4 kB of it."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (snapshot / "config.json").write_text(json.dumps({"model_type": "phi3", **config}))
    (snapshot / "tokenizer.json").write_text("{}")
    blob = home / "blobs" / ("a" * 64 + ("" if whole else ".phimlx.incomplete"))
    blob.write_bytes(bytes(12_000 if whole else 4_000))
    os.utime(blob, (1_704_000_000, 1_704_000_000))
    if whole:
        (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def size_of(folder: Path) -> list[str]:
    return size_text(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())).split()


def test_an_empty_store(cache: Path) -> None:
    result = run()
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["model", "size", "bits", "state", "last", "used"]
    assert [line.split() for line in lines[2:4]] == [
        ["nano", *size_of(resolve.NANO), "16", "complete"],
        ["nano-multimodal", *size_of(resolve.NANO_MULTIMODAL), "16", "complete"],
    ]
    assert lines[4:] == ["", f"0 bytes in {cache}"]
    assert result.stderr == ""


def test_of_layouts_that_many_families_share_ours_alone(cache: Path) -> None:
    sizes = {"num_hidden_layers": 40, "hidden_size": 5120}
    keep(cache, "unsloth/phi-4", model_type="llama", **sizes, intermediate_size=17920)
    keep(cache, "meta-llama/Llama-2-13b-hf", model_type="llama", **sizes, intermediate_size=13824)
    result = run("--json")
    names = [entry["name"] for entry in json.loads(result.stdout)["models"]]
    assert names[2:] == ["unsloth/phi-4"]


def test_what_a_person_reads(cache: Path) -> None:
    keep(cache, "mlx-community/phi-4-4bit", quantization={"bits": 4})
    keep(cache, "microsoft/Phi-4-mini-instruct", whole=False, torch_dtype="bfloat16")
    keep(cache, "someone/bert", model_type="bert")
    result = run()
    assert result.exit_code == 0
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()[4:]]
    assert rows == [
        "microsoft/Phi-4-mini-instruct 4.05 kB 16 partial 2023-12-31",
        "phi-4 12.1 kB 4 complete 2023-12-31",
        "",
        f"16.1 kB in {cache}",
    ]
    assert result.stderr == "Go on with: phimlx download microsoft/Phi-4-mini-instruct\n"


def test_json(cache: Path) -> None:
    snapshot = keep(cache, "mlx-community/phi-4-4bit", quantization={"bits": 4})
    result = run("--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    about = json.loads(result.stdout)
    nbytes = sum(file.stat().st_size for file in snapshot.iterdir())
    assert (about["store"], about["bytes"]) == (str(cache), nbytes)
    nano, multimodal, model = about["models"]
    assert (nano["name"], nano["path"], nano["state"]) == ("nano", str(resolve.NANO), "complete")
    assert (multimodal["name"], multimodal["path"]) == (
        "nano-multimodal",
        str(resolve.NANO_MULTIMODAL),
    )
    assert model == {
        "name": "phi-4",
        "kind": "model",
        "repository": "mlx-community/phi-4-4bit",
        "path": str(snapshot),
        "bytes": nbytes,
        "bits": 4,
        "state": "complete",
        "problem": None,
        "last_used": "2023-12-31T05:20:00+00:00",
    }


@pytest.mark.parametrize("dangling", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_link_that_leads_nowhere_ends_no_list(cache: Path, dangling: str) -> None:
    keep(cache, "mlx-community/phi-4-4bit", quantization={"bits": 4})
    snapshot = keep(cache, "microsoft/Phi-4-mini-instruct")
    (snapshot / dangling).unlink()
    (snapshot / dangling).symlink_to("../../blobs/gone")
    (snapshot.parent / "gone").symlink_to("nowhere")
    (snapshot.parents[1] / "blobs" / "gone").symlink_to("nowhere")
    (cache / "models--microsoft--phi-4").symlink_to("nowhere")
    result = run("--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = [(each["name"], each["state"]) for each in json.loads(result.stdout)["models"][2:]]
    assert found == [("microsoft/Phi-4-mini-instruct", "partial"), ("phi-4", "complete")]


@pytest.mark.parametrize("locked", [".", "snapshots", f"snapshots/{COMMIT}", "blobs"])
def test_an_unreadable_model_ends_no_list(monkeypatch: pytest.MonkeyPatch, locked: str) -> None:
    with open_folder() as cache:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("PHIMLX_CONFIG_DIR", str(cache / "config"))
        keep(cache, "mlx-community/phi-4-4bit", quantization={"bits": 4})
        home = keep(cache, "someone/tune").parents[1]
        assert json.loads(run("--json").stdout)["models"][3]["state"] == "complete"
        run()  # imports what draws the table, which may be unreadable too to whom is locked out
        with locked_out(home / locked):
            result = run()
            about = json.loads(run("--json").stdout)["models"]
    assert result.exit_code == 0
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()[4:6]]
    assert rows == ["phi-4 12.1 kB 4 complete 2023-12-31", "someone/tune 0 bytes unreadable"]
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Warning: {home}")
    assert line.endswith(" cannot be read: permission denied.")
    assert [each["problem"] is None for each in about] == [True, True, True, False]


def test_an_unreadable_store_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_folder() as folder:
        cache = folder / "hub"
        cache.mkdir()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("PHIMLX_CONFIG_DIR", str(folder / "config"))
        assert run().exit_code == 0
        with locked_out(cache):
            result = run()
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {cache} cannot be read: permission denied.\n"
        "Hint: Make it yours to read, or set HF_HOME to another folder.\n"
    )


def test_a_damaged_config_is_said(cache: Path) -> None:
    snapshot = keep(cache, "mlx-community/phi-4-4bit")
    (snapshot / "config.json").write_text("{")
    result = run()
    assert result.exit_code == 0
    assert " ".join(result.stdout.splitlines()[4].split()) == (
        "phi-4 12.0 kB unreadable 2023-12-31"
    )
    assert result.stderr.startswith(f"Warning: {snapshot / 'config.json'} is not JSON (line 1")
