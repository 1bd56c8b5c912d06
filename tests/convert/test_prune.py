"""Layers left out: their measures beside mlx-lm's hidden states in numpy, and what is written."""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open

from convert.prune.layers import LayerChoice, block_influence, divergence_without
from convert.prune.plan import Pruning, PruningPlan
from convert.prune.write import pruned_config, write_pruned
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.cli.group import cli
from phimlx.errors import ConversionError
from phimlx.hub.resolve import NANO
from tests.training.folder import write_rows, write_tiny

WINDOWS = [tuple(np.random.default_rng(0).integers(0, 1500, 40).tolist()) for _ in range(3)]
TOKENS = mx.array(WINDOWS[0])[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "model")


def by_mlx_lm(folder: Path) -> Any:
    from mlx_lm.utils import load_model as load

    return load(folder)[0]


def states(folder: Path, window: tuple[int, ...]) -> list[np.ndarray]:
    """What goes into each layer and out of the last, `[length, hidden]`, computed by mlx-lm."""
    model = by_mlx_lm(folder)
    x = model.model.embed_tokens(mx.array(window)[None])
    found = [x]
    for layer in model.model.layers:
        found.append(layer(found[-1], "causal", None))
    return [np.array(each[0], np.float64) for each in found]


def log_probabilities(model: Any, window: tuple[int, ...]) -> np.ndarray:
    logits = np.array(model(mx.array(window)[None])[0], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_influence_is_one_less_the_cosine(folder: Path) -> None:
    found = block_influence(Checkpoint(folder), WINDOWS, lambda percent: None)
    cosines: list[list[float]] = [[], []]
    for window in WINDOWS:
        each = states(folder, window)
        for layer, (x, y) in enumerate(pairwise(each)):
            norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
            cosines[layer] += ((x * y).sum(-1) / norms).tolist()
    np.testing.assert_allclose(found, [1 - np.mean(each) for each in cosines], rtol=1e-4)


def test_divergence_is_that_of_a_model_without_the_layer(folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(folder)
    found = divergence_without(checkpoint, WINDOWS, lambda percent: None)
    whole = by_mlx_lm(folder)
    for gone, kept in ((0, 1), (1, 0)):
        out = tmp_path / f"without-{gone}"
        write_pruned(
            checkpoint, out, Pruning(LayerChoice("divergence", (), (kept,))), lambda nbytes: None
        )
        without = by_mlx_lm(out)
        ours = load_model(Checkpoint(out))(TOKENS)
        assert mx.allclose(without(TOKENS), ours, atol=1e-4)
        expected = []
        for window in WINDOWS:
            p, q = (log_probabilities(model, window) for model in (whole, without))
            expected += (np.exp(p) * (p - q)).sum(-1).tolist()
        assert found[gone] == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize("quantized", [False, True])
def test_what_is_written_is_the_model_without_the_layers(tmp_path: Path, quantized: bool) -> None:
    source = NANO
    if quantized:
        from convert import convert

        source = tmp_path / "quantized"
        convert(NANO, source, _quantization())
    checkpoint = Checkpoint(source)
    out = tmp_path / "out"
    choice = LayerChoice("influence", (0.4, 0.1, 0.2, 0.3), (0, 2, 3))
    nbytes = write_pruned(checkpoint, out, Pruning(choice), lambda nbytes: None)
    assert nbytes < sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    expected = load_model(checkpoint)
    del expected.model.layers[1]
    for number, layer in enumerate(expected.layers):
        layer.self_attn.layer = number
    found = load_model(Checkpoint(out))
    assert mx.array_equal(found(TOKENS), expected(TOKENS))
    with safe_open(str(out / "model.safetensors"), framework="numpy") as file:
        assert file.metadata() == {"format": "mlx" if quantized else "pt"}
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 3
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def _quantization() -> Any:
    from convert import Quantization

    return Quantization(64, 4)


def test_forms_of_single_layers_go_with_them() -> None:
    table = {"bits": 4, "model.layers.1.mlp.down_proj": {"bits": 8}, "lm_head": {"bits": 8},
             "model.layers.2.mlp.down_proj": {"bits": 6}}  # fmt: skip
    config = json.loads((NANO / "config.json").read_text())
    choice = Pruning(LayerChoice("influence", (), (0, 2)))
    found = pruned_config({**config, "quantization": table, "auto_map": {}}, choice)
    assert found["quantization"] == {
        "bits": 4, "lm_head": {"bits": 8}, "model.layers.1.mlp.down_proj": {"bits": 6}
    }  # fmt: skip
    assert "auto_map" not in found


def test_the_most_important_stay_in_their_order() -> None:
    assert LayerChoice.of("influence", [0.1, 0.5, 0.1, 0.9], 3).kept == (0, 1, 3)


@pytest.mark.parametrize("layers", [2, 3, 9])
def test_more_layers_than_there_are_cannot_stay(folder: Path, layers: int) -> None:
    with pytest.raises(ConversionError, match=f"{layers} layers are to stay, but this model has 2"):
        PruningPlan.of(Checkpoint(folder), layers)


@pytest.mark.slow
def test_the_command_says_what_is_lost(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["prune", "--model", str(folder), "--layers", "1", "--mlp", "0.7"]
    arguments += ["--heads", "1", "--mlx-path", str(out)]
    rows = write_rows(tmp_path / "rows.jsonl", 4)
    result = CliRunner().invoke(cli, [*arguments, "--heal", str(rows), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    healed = Checkpoint(tmp_path / "out-healed")
    assert found["healed"]["path"] == str(healed.folder)
    assert not mx.allclose(load_model(healed)(TOKENS), load_model(Checkpoint(out))(TOKENS))
    assert len(found["kept"]) == 1
    assert {name: each["after"] for name, each in found["widths"].items()} == {
        "mlp": 64,
        "heads": 1,
    }
    assert found["bytes_after"] < found["bytes_before"]
    assert found["agreements"][0]["divergence"] > 0
    assert min(found["tokens_per_second"]) > 0
    if find_spec("matplotlib"):
        assert (out / "prune.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(cli, arguments)
    assert again.exit_code == 1
    assert f"{out} exists already." in again.stderr
