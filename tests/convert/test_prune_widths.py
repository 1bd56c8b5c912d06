"""Channels and heads left out: transformers' importance and logits, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from convert import Quantization, convert
from convert.prune.layers import LayerChoice
from convert.prune.memory import check_memory, forecast
from convert.prune.plan import Pruning, PruningPlan
from convert.prune.widths import WidthChoice, width_importance
from convert.prune.write import write_pruned
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.cli.group import cli
from phimlx.errors import ConversionError
from phimlx.hub.resolve import NANO
from tests.convert.tiny import PHI_4, write_model

GOLDEN = load_file(Path(__file__).parents[1] / "goldens" / "prune.safetensors")
MODELS = ("tiny-phi4", "tiny-phi4-mini", "tiny-phi2")


def pruned(checkpoint: Checkpoint, out: Path, split: bool = False, **kept: Any) -> Checkpoint:
    """Keep so many of the units whose importance a golden tells."""
    write_pruned(checkpoint, out, Pruning(None, kept), lambda nbytes: None, split)
    return Checkpoint(out)


def choices(name: str, **counts: int) -> dict[str, WidthChoice]:
    return {key: WidthChoice.of(GOLDEN[f"{name}.{key}"], count) for key, count in counts.items()}


def by_mlx_lm(folder: Path) -> Any:
    from mlx_lm.utils import load_model as load

    return load(folder)[0]


@pytest.mark.parametrize("name", MODELS)
def test_importance_is_transformers(name: str, data: Path) -> None:
    checkpoint = Checkpoint(data / "tiny" / name)
    windows = [tuple(row) for row in GOLDEN[f"{name}.tokens"].tolist()]
    layers = range(checkpoint.config["num_hidden_layers"])
    found = width_importance(checkpoint, ("heads", "mlp"), layers, windows, lambda percent: None)
    for key in ("heads", "mlp"):
        np.testing.assert_allclose(np.array(found[key]), GOLDEN[f"{name}.{key}"], rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_cut_is_what_transformers_masks(name: str, data: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(data / "tiny" / name)
    heads = checkpoint.config["num_key_value_heads"]
    kept = choices(name, mlp=64, heads=max(1, heads // 2))
    after = pruned(checkpoint, tmp_path / "out", **kept)
    config = json.loads((after.folder / "config.json").read_text())
    assert config["intermediate_size"] == 64
    assert config["num_key_value_heads"] == max(1, heads // 2)
    whole = checkpoint.config["hidden_size"] // checkpoint.config["num_attention_heads"]
    assert config["head_dim"] == whole
    logits = np.array(load_model(after)(mx.array(GOLDEN[f"{name}.tokens"])))[:, ::8]
    np.testing.assert_allclose(logits, GOLDEN[f"{name}.logits"], atol=1e-4)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_mlx_lm_says_the_same(bits: int | None, data: Path, tmp_path: Path) -> None:
    source = data / "tiny" / "tiny-phi4"
    if bits is not None:
        convert(source, tmp_path / "quantized", Quantization(32, bits))
        source = tmp_path / "quantized"
    kept = choices("tiny-phi4", heads=1, **({} if bits else {"mlp": 64}))
    after = pruned(Checkpoint(source), tmp_path / "out", split=True, **kept)
    tokens = mx.array(GOLDEN["tiny-phi4.tokens"])
    logits = load_model(after)(tokens)
    assert mx.allclose(by_mlx_lm(after.folder)(tokens), logits, atol=1e-4)
    if bits is not None:
        # Unpacked and then cut: the codes of what stays are the same.
        convert(source, tmp_path / "plain", dequantize=True, dtype="float32")
        plain = pruned(Checkpoint(tmp_path / "plain"), tmp_path / "out-plain", **kept)
        assert mx.allclose(load_model(plain)(tokens), logits, atol=1e-4)


def test_channels_alone_keep_the_layout_that_mlx_lm_reads(data: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(data / "tiny" / "tiny-phi4")
    plan = PruningPlan.of(checkpoint, None, {"mlp": 0.5})
    assert (plan.split, plan.lost.programs) == (False, ())
    after = pruned(checkpoint, tmp_path / "out", **choices("tiny-phi4", mlp=64))
    tokens = mx.array(GOLDEN["tiny-phi4.tokens"])
    assert mx.allclose(by_mlx_lm(after.folder)(tokens), load_model(after)(tokens), atol=1e-4)


def test_forms_of_single_layers_go_to_the_pieces(data: Path, tmp_path: Path) -> None:
    source = tmp_path / "quantized"
    convert(data / "tiny" / "tiny-phi4", source, Quantization(32, 4))
    file = source / "config.json"
    config = json.loads(file.read_text())
    own = {"group_size": 32, "bits": 4, "mode": "affine"}
    config["quantization"] |= {"model.layers.1.self_attn.qkv_proj": own, "model.layers.x": own}
    file.write_text(json.dumps(config))
    kept = choices("tiny-phi4", heads=1)
    after = pruned(Checkpoint(source), tmp_path / "out", split=True, **kept)
    table = json.loads((after.folder / "config.json").read_text())["quantization"]
    paths = {f"model.layers.1.self_attn.{each}_proj" for each in "qkv"}
    assert {name for name, value in table.items() if isinstance(value, dict)} == paths


@pytest.mark.slow
def test_all_at_once_is_one_after_the_other(tmp_path: Path) -> None:
    checkpoint = Checkpoint(NANO)
    once = PruningPlan.of(checkpoint, 3, {"mlp": 0.75}).choose(None)
    assert once.layers is not None
    first = tmp_path / "first"
    write_pruned(checkpoint, first, Pruning(once.layers), lambda nbytes: None)
    second = PruningPlan.of(Checkpoint(first), None, {"mlp": 0.75}).choose(None)
    assert second.widths["mlp"].kept == once.widths["mlp"].kept
    assert len(once.widths["mlp"].kept) == 3
    assert {len(each) for each in once.widths["mlp"].kept} == {256}  # of 384: 288 is no multiple


@pytest.mark.parametrize(
    ("part", "stay"),
    [(0.001, 64), (0.3, 64), (0.5, 128), (0.6, 128), (0.75, 192), (0.87, 192)],
)
def test_channels_are_rounded_to_64(part: float, stay: int, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", {**PHI_4, "intermediate_size": 256})
    assert PruningPlan.of(Checkpoint(folder), None, {"mlp": part}).counts == {"mlp": stay}


@pytest.mark.parametrize(
    ("change", "wanted", "message", "hint"),
    [
        ({}, {"heads": 2}, "2 key/value heads are to stay, but this model has 2.",
         "Give a number from 1 to 1."),
        ({"num_key_value_heads": 1}, {"heads": 1},
         "This model has 1 key/value heads, and one at least must stay.",
         "Leave out something else."),
        ({"intermediate_size": 64}, {"mlp": 0.5},
         "This model has 64 mlp channels, and 64 at least must stay.", "Leave out something else."),
        ({"intermediate_size": 128}, {"mlp": 0.9},
         "0.9 of 128 mlp channels is all of them: their number stays a multiple of 64.",
         "Give 0.5 or less."),
    ],
)  # fmt: skip
def test_what_cannot_stay(
    change: dict[str, Any], wanted: dict[str, Any], message: str, hint: str, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model", {**PHI_4, **change})
    with pytest.raises(ConversionError) as caught:
        PruningPlan.of(Checkpoint(folder), None, wanted)
    assert (str(caught.value), caught.value.hint) == (message, hint)


@pytest.mark.parametrize(
    ("wanted", "unit"), [({"mlp": 0.5}, "mlp channels"), ({"heads": 1}, "key/value heads")]
)
def test_parts_of_a_group_cannot_be_cut(
    wanted: dict[str, Any], unit: str, data: Path, tmp_path: Path
) -> None:
    convert(data / "tiny" / "tiny-phi4", tmp_path / "quantized", Quantization(64, 4))
    with pytest.raises(ConversionError, match=f"parts of several {unit}: none of them") as caught:
        PruningPlan.of(Checkpoint(tmp_path / "quantized"), None, wanted)
    assert "Prune the original model" in str(caught.value.hint)


def test_a_kind_of_layers_that_has_no_widths_is_refused(data: Path) -> None:
    folder = data / "tiny" / "tiny-phi4flash"
    for wanted in ({"layers": 2}, {"widths": {"mlp": 0.5}}):
        with pytest.raises(ConversionError) as caught:
            PruningPlan.of(Checkpoint(folder), **wanted)
        assert str(caught.value) == (
            f"{folder}: the layers of phi4flash are of several kinds and need each other, so "
            "nothing of them can be left out."
        )
        assert caught.value.hint == (
            "Prune a model whose layers are alike, such as phi-4 or phi-4-mini."
        )


def test_equal_importance_keeps_the_first() -> None:
    choice = WidthChoice.of([[0.1, 0.5, 0.1, 0.5], [0.0, 0.0, 0.0, 0.0]], 3)
    assert choice.kept == ((0, 1, 3), (0, 1, 2))
    assert choice.shares == pytest.approx((1.1 / 1.2, 0))


def test_memory_is_told_before() -> None:
    checkpoint = Checkpoint(NANO)
    plans = [PruningPlan.of(checkpoint, 2, {}, method) for method in ("influence", "divergence")]
    light, heavy = (forecast(plan)["measuring"] for plan in plans)
    assert light < heavy
    check_memory(plans[0], max(forecast(plans[0]).values()))
    with pytest.raises(ConversionError) as caught:
        check_memory(plans[1], heavy - 1)
    assert caught.value.hint is not None
    assert "--by influence" in caught.value.hint


def test_something_must_be_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(cli, ["prune", "--model", str(NANO), "--mlx-path", str(out)])
    assert result.exit_code == 2
    assert "Say what is to stay: --layers, --mlp or --heads, or several." in result.stderr
    assert not out.exists()


def test_layers_of_widths_go_with_the_layers(data: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(data / "tiny" / "tiny-phi2")
    layers = LayerChoice("influence", (0.3, 0.1, 0.2), (0, 2))
    widths = {"mlp": WidthChoice.of(GOLDEN["tiny-phi2.mlp"][[0, 2]], 128)}
    out = tmp_path / "out"
    write_pruned(checkpoint, out, Pruning(layers, widths), lambda nbytes: None)
    before, after = checkpoint.weights(), Checkpoint(out).weights()
    rows = mx.array(widths["mlp"].kept[1])
    assert mx.array_equal(
        after["model.layers.1.mlp.fc1.bias"], before["model.layers.2.mlp.fc1.bias"][rows]
    )
    assert mx.array_equal(
        after["model.layers.1.mlp.fc2.bias"], before["model.layers.2.mlp.fc2.bias"]
    )
    load_model(Checkpoint(out))
