"""Models that see and hear, without a layer, or narrower where they have widths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open

from convert import Quantization, convert
from convert.prune.layers import LayerChoice, block_influence, divergence_without
from convert.prune.plan import Pruning, PruningPlan
from convert.prune.widths import WidthChoice
from convert.prune.write import write_pruned
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.cli.group import cli
from phimlx.errors import ConversionError
from phimlx.evaluation import parity
from tests.convert.pruned import GOLDENS
from tests.multimodal import multimodal_folder
from tests.reasoning_vision import media

REFERENCE = GOLDENS / "mm-native"
WINDOWS = [tuple(np.random.default_rng(0).integers(2, 60, 24).tolist()) for _ in range(2)]


def without_the_first(folder: Path, out: Path) -> Checkpoint:
    checkpoint = Checkpoint(folder)
    count = checkpoint.config["num_hidden_layers"]
    PruningPlan.of(checkpoint, count - 1)
    kept = Pruning(LayerChoice("influence", (), tuple(range(1, count))))
    write_pruned(checkpoint, out, kept, lambda nbytes: None)
    return Checkpoint(out)


def test_pictures_and_sounds_without_a_layer_are_transformers(tmp_path: Path) -> None:
    after = without_the_first(REFERENCE, tmp_path / "out")
    assert not any("model.layers.1." in name for name in after.tensors)
    assert any(name.startswith("model.layers.0.") and ".lora_A." in name for name in after.tensors)
    with safe_open(str(REFERENCE / "reference.safetensors"), "numpy") as file:
        cases = json.loads(file.metadata()["cases"])
    arrays: dict[str, mx.array] = {}
    for path in (REFERENCE / "reference.safetensors", GOLDENS / "prune-multimodal.safetensors"):
        arrays |= mx.load(str(path))  # type: ignore[arg-type]
    results = list(parity.repeat(after.folder, cases, arrays))
    assert len(results) == 9
    assert [result for result in results if not result.passed] == []


@pytest.mark.parametrize("quantized", [False, True])
def test_the_published_layout_without_a_layer(quantized: bool, data: Path, tmp_path: Path) -> None:
    folder = data / "tiny" / "tiny-phi4mm-remote"
    with safe_open(str(folder / "oracle.safetensors"), "numpy") as file:
        inputs = {
            name.partition(".")[2]: mx.array(file.get_tensor(name))
            for name in file.keys()  # noqa: SIM118
            if name.startswith("audio.") and not name.endswith("logits")
        }
    if quantized:
        convert(folder, tmp_path / "quantized", Quantization(32, 4), parts=("adapters",))
        folder = tmp_path / "quantized"
    expected = load_model(Checkpoint(folder))
    del expected.model.layers[0]
    expected.layers[0].self_attn.layer = 0
    found = load_model(without_the_first(folder, tmp_path / "out"))
    tokens = inputs.pop("input_ids")
    assert mx.array_equal(found(tokens, **inputs), expected(tokens, **inputs))


def test_layers_are_measured_beside_their_adapters(data: Path) -> None:
    checkpoint = Checkpoint(REFERENCE)
    influence = block_influence(checkpoint, WINDOWS, lambda percent: None)
    divergence = divergence_without(checkpoint, WINDOWS, lambda percent: None)
    model = load_model(checkpoint, mx.float32)
    cosines: list[list[float]] = [[], []]
    for window in WINDOWS:
        ids = mx.array(window)[None]
        x, forward = model.embed(ids), model.forward_pass(ids)
        for number, layer in enumerate(model.layers):
            y = layer(x, forward)
            a, b = (np.array(each[0], np.float64) for each in (x, y))
            norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
            cosines[number] += ((a * b).sum(-1) / norms).tolist()
            x = y
    np.testing.assert_allclose(influence, [1 - np.mean(each) for each in cosines], rtol=1e-3)
    assert min(divergence) > 0


@pytest.mark.parametrize("name", ["mlp", "heads"])
def test_a_model_that_sees_is_cut_where_a_mask_would_be(
    name: str, data: Path, tmp_path: Path
) -> None:
    folder = data / "tiny" / "tiny-phi4-siglip"
    checkpoint = Checkpoint(folder)
    units, stay = {"mlp": (144, 64), "heads": (2, 1)}[name]
    random = np.random.default_rng(5)
    importance = random.random((checkpoint.config["num_hidden_layers"], units))
    choice = WidthChoice.of(importance, stay)
    assert PruningPlan.of(checkpoint, None, {name: stay}).counts == {name: stay}
    out = tmp_path / "out"
    write_pruned(checkpoint, out, Pruning(None, {name: choice}), lambda nbytes: None)
    expected = load_model(checkpoint)
    for layer, kept in zip(expected.layers, choice.kept, strict=True):
        read = layer.mlp.down_proj if name == "mlp" else layer.self_attn.o_proj
        mask = np.isin(np.arange(units), kept).repeat(read.weight.shape[1] // units)
        read.weight = read.weight * mx.array(mask.astype(np.float32))
    tokens = mx.array([[5, -200, 7, 9, 11]])
    inputs = media(data, ["small"])
    found = load_model(Checkpoint(out))(tokens, **inputs)
    assert mx.allclose(found, expected(tokens, **inputs), atol=1e-4)


@pytest.mark.parametrize("wanted", [{"mlp": 0.5}, {"heads": 1}])
def test_adapters_in_the_layers_keep_them_as_wide_as_they_are(wanted: dict[str, Any]) -> None:
    with pytest.raises(ConversionError) as caught:
        PruningPlan.of(Checkpoint(REFERENCE), None, wanted)
    (name,) = wanted
    assert str(caught.value) == f"phi4mm models cannot be pruned by --{name}."
    assert caught.value.hint == "Leave out layers, or prune a model such as phi-4 or phi-4-mini."


@pytest.mark.slow
def test_the_command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phimlx.cli.prune._speeds", lambda *given: (90.0, 120.0))
    folder = tmp_path / "model"
    folder.mkdir()
    multimodal_folder(data, folder)
    arguments = ["prune", "--model", str(folder), "--layers", "1"]
    arguments += ["--mlx-path", str(tmp_path / "out")]
    refused = CliRunner().invoke(cli, [*arguments, "--heal", "rows.jsonl"])
    assert refused.exit_code == 1
    assert "which --heal cannot make a part of its weights" in refused.stderr
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert "does not load in transformers: it runs phi4mm by code" in result.stderr
    assert "Measured on text alone" in result.stderr
    found = json.loads(result.stdout)
    assert found["does_not_load_in"] == ["transformers"]
    assert len(found["kept"]) == 1
