"""Adapters of the Hub by their id: fetched, resumed, checked, used, listed and removed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

import phimlx
from phimlx.adapters.mlx_lm import write_adapter
from phimlx.adapters.read import read_adapter
from phimlx.cli.group import cli
from phimlx.errors import ModelAbsentError, ModelNotFoundError
from phimlx.terminal.output import Output
from tests.hub.loopback_hub import COMMIT, Fault, Hub, serve_alone

FORMS = Path(__file__).parents[1] / "goldens" / "peft-forms"
MODEL, ADAPTER = str(FORMS / "plain"), "somebody/phi-lora"
LEFT_OUT = {
    "README.md": b"a card",
    "optimizer.pt": bytes(4000),
    "training_args.bin": bytes(2000),
    "checkpoint-10/adapter_model.safetensors": bytes(3000),
    "config.json.bak": b"{}",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with serve_alone(monkeypatch, tmp_path / "hub") as running:
        running.repos[ADAPTER] = contents(FORMS / "tokens-dict") | LEFT_OUT
        yield running


def run(*arguments: str | Path, input: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(map(str, arguments)), input=input, prog_name="phimlx")


def home(cache: Path) -> Path:
    return cache / "hub" / "models--somebody--phi-lora"


def test_only_what_an_adapter_needs_is_fetched(server: Hub, tmp_path: Path) -> None:
    result = run("download", ADAPTER)
    assert result.exit_code == 0, result.output
    assert sorted(server.requested) == ["adapter_config.json", "adapter_model.safetensors"]
    folder = home(tmp_path) / "snapshots" / COMMIT
    assert result.stdout == f"{folder}: 2 files, 2.70 kB\n"
    assert result.stderr.endswith(f"Try it: phimlx chat --model BASE --adapter-path {ADAPTER}\n")
    assert read_adapter(folder).rows["lm_head"].tokens == (6, 2, 5)
    server.requested.clear()
    assert run("download", ADAPTER).exit_code == 0
    assert server.requested == []
    checked = run("download", f"{folder}/")
    assert checked.exit_code == 0, checked.output
    assert "2 files have the contents that the Hub published." in checked.stdout


def test_a_download_that_stops_goes_on(server: Hub, tmp_path: Path) -> None:
    server.faults["adapter_model.safetensors"] = [Fault(cut=1000)] * 9
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("phimlx.hub.client.BACKOFF", ())
        assert run("download", ADAPTER).exit_code == 1
    state = json.loads(run("list", "--json").stdout)["models"][-1]
    assert (state["name"], state["kind"], state["state"]) == (ADAPTER, "adapter", "partial")
    server.faults.clear()
    server.served.clear()
    assert run("download", ADAPTER).exit_code == 0
    whole = len(server.repos[ADAPTER]["adapter_model.safetensors"])
    assert server.served["adapter_model.safetensors"] == whole - 1000


def test_where_it_is_not_here_it_is_as_with_models(server: Hub, tmp_path: Path) -> None:
    for arguments in (
        ["generate", "--model", MODEL, "--adapter-path", ADAPTER, "--prompt", "x"],
        ["chat", "--model", MODEL, "--adapter-path", ADAPTER],
        ["evaluate", "--model", MODEL, "--adapter-path", ADAPTER, "--data", __file__],
        ["fuse", "--model", MODEL, "--adapter-path", ADAPTER, "--save-path", "out"],
        ["fuse", "--adapter-path", ADAPTER, "--save-path", "out", "--export", "peft"],
        ["convert", MODEL, "--adapter-path", ADAPTER, "--mlx-path", "out"],
    ):
        result = run(*arguments)
        assert (result.exit_code, result.stderr) == (
            1,
            f"Error: {ADAPTER} is not on this machine.\n"
            f"Hint: Get it with: phimlx download {ADAPTER}\n",
        )
    assert server.requested == []
    with pytest.raises(ModelAbsentError, match=f"^{ADAPTER} is not on this machine"):
        phimlx.load(MODEL, adapter=ADAPTER)


def test_at_a_terminal_it_is_fetched_and_then_works_offline(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Output, "can_ask", True)
    command = ["generate", "--model", MODEL, "--adapter-path", ADAPTER, "--raw", "--prompt", "x"]
    first = run(*command)
    assert f"Downloading {ADAPTER} (0123456): 2 files" in first.stderr
    assert "tokenizer" in first.stderr.splitlines()[-2]  # the golden's model holds none
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    served = server.served.total()
    logits = phimlx.load(MODEL, adapter=ADAPTER).model(mx.array([[3, 5, 1]]))
    folder = home(tmp_path) / "snapshots" / COMMIT
    assert mx.array_equal(logits, phimlx.load(MODEL, adapter=folder).model(mx.array([[3, 5, 1]])))
    assert run("download", ADAPTER).exit_code == 0
    fused = run("fuse", "--model", MODEL, "--adapter-path", ADAPTER, "--save-path", "out", "--json")
    assert json.loads(fused.stdout)["adapter"] == ADAPTER
    exported = run(
        "fuse", "--adapter-path", ADAPTER, "--save-path", "peft", "--export", "peft", "--json"
    )
    assert json.loads(exported.stdout)["format"] == "peft"
    assert server.served.total() == served


def test_a_folder_of_that_name_comes_first(server: Hub, tmp_path: Path) -> None:
    shutil.copytree(FORMS / "olora", ADAPTER)
    phi = phimlx.load(MODEL, adapter=ADAPTER)
    expected = phimlx.load(MODEL, adapter=FORMS / "olora")
    ids = mx.array([[3, 5, 1]])
    assert mx.array_equal(phi.model(ids), expected.model(ids))


def test_list_and_remove(server: Hub, tmp_path: Path) -> None:
    run("download", ADAPTER)
    foreign = "somebody/llama-lora"
    config = json.loads(server.repos[ADAPTER]["adapter_config.json"])
    config["base_model_name_or_path"] = "meta-llama/Llama-3.1-8B"
    server.repos[foreign] = dict(server.repos[ADAPTER])
    server.repos[foreign]["adapter_config.json"] = json.dumps(config).encode()
    run("download", foreign)
    line = next(line for line in run("list").stdout.splitlines() if ADAPTER in line)
    assert line.split()[:4] == [ADAPTER, *line.split()[1:3], "adapter"]
    assert foreign not in run("list").stdout
    entry = json.loads(run("list", "--json").stdout)["models"][-1]
    assert (entry["name"], entry["kind"], entry["bits"]) == (ADAPTER, "adapter", None)
    assert run("remove", ADAPTER, "--yes").exit_code == 0
    assert not home(tmp_path).exists()
    assert ADAPTER not in run("list").stdout


def test_an_adapter_is_no_model_and_a_model_no_adapter(server: Hub, tmp_path: Path) -> None:
    assert run("show", ADAPTER).stderr == (
        f"Error: {ADAPTER} is an adapter, not a model.\n"
        f"Hint: Get it with: phimlx download {ADAPTER}\n"
    )
    run("download", ADAPTER)
    result = run("generate", "--model", ADAPTER, "--prompt", "x")
    assert result.stderr == (
        f"Error: {ADAPTER} is an adapter, not a model.\n"
        f"Hint: Give it with --adapter-path {ADAPTER}, and with --model what it was trained on.\n"
    )
    server.repos["somebody/phi"] = {
        "config.json": b'{"model_type": "phi3"}',
        "tokenizer.json": b"{}",
        "model.safetensors": bytes(100),
    }
    run("download", "somebody/phi")
    with pytest.raises(ModelNotFoundError) as caught:
        phimlx.load(MODEL, adapter="somebody/phi")
    assert str(caught.value) == "somebody/phi is a model, not an adapter."


def test_a_model_beside_it_is_left(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Output, "can_ask", True)
    server.repos[ADAPTER] |= {
        "config.json": b'{"model_type": "phi3"}',
        "tokenizer.json": b"{}",
        "model.safetensors": bytes(9000),
    }
    run("generate", "--model", MODEL, "--adapter-path", ADAPTER, "--prompt", "x")
    assert "adapter_model.safetensors" in server.requested
    assert "model.safetensors" not in server.requested


@pytest.mark.parametrize("file", ["adapter_model.bin", "adapters.npz"])
def test_pickled_weights_are_told(server: Hub, file: str) -> None:
    weights = server.repos[ADAPTER].pop("adapter_model.safetensors")
    server.repos[ADAPTER][file] = weights
    result = run("download", ADAPTER)
    assert result.stderr == (
        f"Error: {ADAPTER} holds no weights of an adapter but {file}; phimlx reads "
        "adapter_model.safetensors or adapters.safetensors.\n"
        "Hint: Load it with PEFT and save it again with save_pretrained, which writes "
        "safetensors.\n"
    )
    assert server.requested == []


def test_neither_a_model_nor_an_adapter(server: Hub) -> None:
    server.repos[ADAPTER] = {"README.md": b"nothing"}
    assert run("download", ADAPTER).stderr == (
        f"Error: {ADAPTER} holds no model*.safetensors, the only weights that phimlx reads.\n"
    )


def test_mlx_lms_form(server: Hub, tmp_path: Path) -> None:
    write_adapter(tmp_path / "mlx", read_adapter(FORMS / "layers"))
    server.repos[ADAPTER] = contents(tmp_path / "mlx") | LEFT_OUT
    assert run("download", ADAPTER).exit_code == 0
    assert sorted(server.requested) == ["adapter_config.json", "adapters.safetensors"]
    phimlx.load(MODEL, adapter=ADAPTER)
