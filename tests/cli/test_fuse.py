"""`phimlx fuse`, and --adapter-path where models are loaded and converted."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

import phimlx
from phimlx.adapters.adapter import Base
from phimlx.adapters.mlx_lm import write_adapter
from phimlx.adapters.read import read_adapter
from phimlx.cli.group import cli
from phimlx.training.settings import TrainSettings
from phimlx.training.trainable import adapter_of, attach


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)], prog_name="phimlx")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that makes nano say something else."""
    folder = tmp_path_factory.mktemp("adapter")
    phi = phimlx.load("nano")
    settings = TrainSettings(rank=4, seed=1)
    attach(phi.model, settings)
    for number, layer in enumerate(phi.model.layers):
        for linear in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
            key = mx.random.key(number)
            linear.lora_b = mx.random.normal(linear.lora_b.shape, key=key)
    write_adapter(folder, adapter_of(phi.model, settings, Base.of(phi.path, phi.config)))
    return folder


PROMPT = ("--prompt", "What is 3 + 4?", "--temp", "0", "--max-tokens", "12")


def test_generate_answers_as_the_fused_model_does(adapter: Path, tmp_path: Path) -> None:
    plain = run("generate", "--model", "nano", *PROMPT)
    adapted = run("generate", "--model", "nano", "--adapter-path", adapter, *PROMPT)
    assert (plain.exit_code, adapted.exit_code) == (0, 0)
    assert plain.stdout.strip() == "7"
    assert adapted.stdout not in ("", plain.stdout)
    phi = phimlx.load("nano", adapter=adapter, dtype="float32")
    expected = phi.generate("What is 3 + 4?", temperature=0, max_tokens=12).text
    out = tmp_path / "fused"
    fused = run(
        "fuse", "--model", "nano", "--adapter-path", adapter, "--save-path", out,
        "--dtype", "float32", "--json",
    )  # fmt: skip
    assert fused.exit_code == 0
    found = json.loads(fused.stdout)
    assert (found["path"], found["adapter"]) == (str(out), str(adapter))
    assert found["rounding_error"] < 1e-5
    assert run("generate", "--model", out, *PROMPT).stdout == f"{expected}\n"


def test_chat_takes_an_adapter(adapter: Path) -> None:
    def said(*arguments: str | Path) -> str:
        flags = ["--temp", "0", "--max-tokens", "12"]
        return (
            CliRunner()
            .invoke(
                cli,
                ["chat", "--model", "nano", *map(str, arguments), *flags],
                input="What is 3 + 4?\n",
            )
            .stdout
        )

    assert said() == "7\n"
    assert said("--adapter-path", adapter) not in ("", "7\n")


def test_what_rounding_costs_is_told(adapter: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "q"
    assert run("convert", "nano", "--mlx-path", quantized, "-q").exit_code == 0
    result = run(
        "fuse", "--model", quantized, "--adapter-path", adapter, "--save-path", tmp_path / "f"
    )
    assert result.exit_code == 0
    assert "Warning: Rounding to 4 bits put an error on the fused layers that is " in result.stderr
    assert "of what the adapter changed; --dequantize avoids most of it." in result.stderr
    result = run(
        "fuse", "--model", quantized, "--adapter-path", adapter, "--save-path", tmp_path / "d",
        "--dequantize", "--dtype", "float32",
    )  # fmt: skip
    assert result.exit_code == 0
    assert "Rounding" not in result.stderr


def test_convert_fuses_on_the_way(adapter: Path, tmp_path: Path) -> None:
    result = run(
        "convert", "nano", "--mlx-path", tmp_path / "q", "-q", "--adapter-path", adapter, "--json"
    )
    assert result.exit_code == 0
    assert json.loads(result.stdout)["bits_per_weight"] < 5
    assert "is fused into the weights." in (tmp_path / "q" / "README.md").read_text()


def test_an_adapter_to_peft_and_back(adapter: Path, tmp_path: Path) -> None:
    peft, back = tmp_path / "peft", tmp_path / "mlx"
    result = run(
        "fuse", "--model", "nano", "--adapter-path", adapter, "--save-path", peft,
        "--export", "peft", "--json",
    )  # fmt: skip
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "path": str(peft), "format": "peft", "kind": "lora", "tensors": 32, "parameters": 47_104,
    }  # fmt: skip
    assert sorted(file.name for file in peft.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    result = run("fuse", "--adapter-path", peft, "--save-path", back, "--export", "mlx-lm")
    assert result.stdout == f"{back}: lora, 32 tensors, 47,104 numbers\n"
    one, two = read_adapter(adapter).layers, read_adapter(back).layers
    assert all(mx.allclose(one[path].delta(), two[path].delta()) for path in one)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["fuse", "--model", "nano", "--save-path", "x"],
            2,
            "Error: --adapter-path is missing: name the adapter's folder.\n",
        ),
        (
            ["fuse", "--adapter-path", "ADAPTER", "--save-path", "x"],
            2,
            "Error: --model is missing: name the model that the adapter is for.\n",
        ),
        (
            ["fuse", "--adapter-path", "ADAPTER", "--save-path", "x", "--export", "peft", "-d"],
            2,
            "Error: --export writes the adapter alone: leave --dequantize and --dtype out.\n",
        ),
        (
            ["fuse", "--model", "nano", "--adapter-path", "ADAPTER", "--save-path", "x", "-d"],
            1,
            "is not quantized, so there is nothing to dequantize.\n"
            "Hint: Leave --dequantize out.\n",
        ),
        (
            ["fuse", "--adapter-path", "ADAPTER", "--save-path", "ADAPTER", "--export", "peft"],
            1,
            " exists already.\nHint: Choose another folder, or remove it first.\n",
        ),
        (
            ["generate", "--model", "nano", "--adapter-path", "none", "--prompt", "Hi"],
            1,
            "Error: There is no adapter folder none.\n"
            "Hint: Give a folder on this machine, or an adapter's Hub id: owner/name\n",
        ),
        (
            ["convert", "nano", "--adapter-path", "ADAPTER", "--mlx-path", "x", "--report"],
            2,
            "Error: --adapter-path does not go with --report: fuse first, with phimlx fuse, and "
            "convert the fused model.\n",
        ),
        (
            ["convert", "nano", "--adapter-path", "ADAPTER", "--mlx-path", "x", "--export", "gguf"],
            2,
            "Error: --adapter-path does not go with --export gguf: fuse first, with phimlx fuse, "
            "and convert the fused model.\n",
        ),
        (
            ["convert", "nano", "--adapter-path", "ADAPTER", "--mlx-path", "x", "-q",
             "--q-method", "gptq"],
            2,
            "Error: --adapter-path does not go with --q-method: fuse first, with phimlx fuse, and "
            "convert the fused model.\n",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go(
    arguments: list[str],
    code: int,
    message: str,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*(str(adapter) if word == "ADAPTER" else word for word in arguments))
    assert result.exit_code == code
    assert result.stderr.endswith(message)
    assert list(tmp_path.iterdir()) == []
