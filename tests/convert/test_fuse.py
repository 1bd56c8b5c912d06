"""Adapters fused into weights: the logits of the adapter beside them, and what rounding costs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from convert import Quantization, convert
from convert import plan as plan_module
from phimlx.adapters.adapter import Base
from phimlx.adapters.attach import load_adapter
from phimlx.adapters.mlx_lm import write_adapter
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import CheckpointError, ConversionError
from phimlx.training.settings import TrainSettings
from phimlx.training.trainable import adapter_of, attach
from tests.convert.tiny import MINI, PHI_4, plan, same_bits, weights_of, write_model

IDS = mx.arange(40)[None]
SETTINGS = {
    "lora": TrainSettings(rank=4, alpha=8.0),
    "dora": TrainSettings(fine_tune_type="dora", rank=3, num_layers=1),
    "full": TrainSettings(fine_tune_type="full", num_layers=1),
}


def adapter_for(source: Path, folder: Path, settings: TrainSettings) -> Path:
    """An adapter folder with numbers in it."""
    model = load_model(Checkpoint(source))
    attach(model, settings)
    keys = iter(mx.random.split(mx.random.key(3), 100))
    for name, array in dict(tree_flatten(model.trainable_parameters())).items():
        noise = mx.random.normal(array.shape, key=next(keys))
        moved = array * (1 + 0.1 * noise) if name.endswith(".m") else array + 0.05 * noise
        model.load_weights([(name, moved)], strict=False)
    write_adapter(folder, adapter_of(model, settings, Base("somebody/phi")))
    return folder


def logits(source: Path, adapter: Path | None = None) -> mx.array:
    model = load_model(Checkpoint(source))
    if adapter is not None:
        load_adapter(model, adapter)
    return model(IDS)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("config", [PHI_4, MINI], ids=["phi-4", "mini"])
def test_fused_logits_are_the_adapters(
    kind: str, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "BATCH_BYTES", 4096)  # many blocks to a layer
    source = write_model(tmp_path / "m", config)
    adapter = adapter_for(source, tmp_path / "a", SETTINGS[kind])
    convert(source, tmp_path / "out", adapter=adapter)
    expected = logits(source, adapter)
    assert mx.abs(expected - logits(source)).max() > 0.01
    assert mx.allclose(logits(tmp_path / "out"), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_onto_quantized_weights(kind: str, tmp_path: Path) -> None:
    plain = write_model(tmp_path / "m")
    source = convert(plain, tmp_path / "q", Quantization(32, 4)).path
    adapter = adapter_for(source, tmp_path / "a", SETTINGS[kind])
    expected = logits(source, adapter)
    convert(source, tmp_path / "plain", adapter=adapter, dequantize=True)
    assert mx.allclose(logits(tmp_path / "plain"), expected, rtol=1e-5, atol=1e-4)
    planned = plan(source, tmp_path / "again", adapter=adapter)
    planned.run()
    assert planned.fusion is not None
    out = Checkpoint(tmp_path / "again")
    assert out.quantization == Checkpoint(source).quantization
    # What has no adapter keeps its bits; what has one is off by what the message says.
    before, after = weights_of(source), weights_of(tmp_path / "again")
    fused = {
        f"{path}.{kind}"
        for path in planned.fusion.adapter.layers
        for kind in ("weight", "scales", "biases")
    }
    rest = {name for name in before if name not in fused}
    assert same_bits({n: before[n] for n in rest}, {n: after[n] for n in rest})
    error = change = 0.0
    wanted = weights_of(tmp_path / "plain")
    for path in planned.fusion.adapter.layers:
        parts = [
            [arrays.get(f"{path}.{part}") for part in ("weight", "scales", "biases")]
            for arrays in (before, after)
        ]
        if parts[0][1] is None:
            continue  # groups do not divide its width, so it was never quantized
        was, now = (mx.dequantize(*each, **asdict(Quantization(32, 4))) for each in parts)
        error += float((now - wanted[f"{path}.weight"]).square().sum())
        change += float((wanted[f"{path}.weight"] - was).square().sum())
    for path in planned.fusion.adapter.layers:
        if f"{path}.scales" not in before:
            change += float((wanted[f"{path}.weight"] - before[f"{path}.weight"]).square().sum())
    assert planned.fusion.rounding.share == pytest.approx((error / change) ** 0.5, rel=1e-3)
    assert 0.05 < planned.fusion.rounding.share < 2


def test_layers_of_several_bits_keep_theirs(tmp_path: Path) -> None:
    plain = write_model(tmp_path / "m")
    source = convert(plain, tmp_path / "q", "mixed-4-6", group_size=32).path
    adapter = adapter_for(source, tmp_path / "a", SETTINGS["lora"])
    convert(source, tmp_path / "out", adapter=adapter)
    assert Checkpoint(tmp_path / "out").quantization == Checkpoint(source).quantization
    distance = mx.abs(logits(tmp_path / "out") - logits(source, adapter)).mean()
    assert distance < 0.5 * mx.abs(logits(source) - logits(source, adapter)).mean()


def test_fusing_and_quantizing_in_one_go_is_the_same_as_one_after_the_other(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m")
    adapter = adapter_for(source, tmp_path / "a", SETTINGS["dora"])
    convert(source, tmp_path / "one", Quantization(32, 4), adapter=adapter)
    convert(source, tmp_path / "fused", adapter=adapter)
    convert(tmp_path / "fused", tmp_path / "two", Quantization(32, 4))
    assert same_bits(weights_of(tmp_path / "one"), weights_of(tmp_path / "two"))


def test_the_type_of_the_weights_costs_what_is_said(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m")
    adapter = adapter_for(source, tmp_path / "a", SETTINGS["lora"])
    shares = {}
    for dtype in ("float32", "float16", "bfloat16"):
        planned = plan(source, tmp_path / dtype, dtype=dtype, adapter=adapter)
        planned.run()
        assert planned.fusion is not None
        shares[dtype] = planned.fusion.rounding.share
    assert shares["float32"] < 1e-6
    assert 1e-5 < shares["float16"] < 1e-3
    assert 1e-4 < shares["bfloat16"] < 1e-2


def test_the_card_tells(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m")
    for kind, text in (
        ("lora", "A LoRA of rank 4 on 8 layers, trained on somebody/phi, is fused"),
        ("dora", "A DoRA of rank 3 on 4 layers, trained on somebody/phi, is fused"),
        ("full", "A full fine-tuning, trained on somebody/phi, is fused"),
    ):
        adapter = adapter_for(source, tmp_path / f"a {kind}", SETTINGS[kind])
        convert(source, tmp_path / kind, adapter=adapter)
        card = (tmp_path / kind / "README.md").read_text()
        assert f"## Fine-tuning\n\n{text} into the weights.\n" in card


def test_another_adapter_does_not_go_on_where_one_was_stopped(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m")
    digests = {
        plan(
            source, tmp_path / "out", adapter=adapter_for(source, tmp_path / str(rank), settings)
        ).digest
        for rank, settings in enumerate((TrainSettings(rank=2), TrainSettings(rank=2)))
    }
    assert len({*digests, plan(source, tmp_path / "out").digest}) == 3


def test_what_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m")
    adapter = adapter_for(source, tmp_path / "a", SETTINGS["lora"])
    with pytest.raises(ConversionError) as caught:
        plan(source, tmp_path / "out", Quantization(32, 4), calibration="gptq", adapter=adapter)
    assert str(caught.value) == "Calibration needs a model's own weights: fuse the adapter first."
    with pytest.raises(ConversionError) as caught:
        plan(source, tmp_path / "out", dequantize=True, adapter=adapter)
    assert str(caught.value) == f"{source} is not quantized, so there is nothing to dequantize."
    wide = write_model(tmp_path / "wide", {**PHI_4, "hidden_size": 128})
    with pytest.raises(CheckpointError, match=r"^The adapter was made for 'som") as other:
        plan(wide, tmp_path / "out", adapter=adapter)
    assert str(other.value) == (
        "The adapter was made for 'somebody/phi', not for 'wide': model.layers.0.mlp."
        "down_proj.lora_b has shape [4, 64], and this one needs [4, 128]."
    )
    assert not (tmp_path / "out").exists()
