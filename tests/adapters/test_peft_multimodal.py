"""A user's adapter beside a multimodal model's own: each does what it does alone."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from convert import convert
from phimlx.adapters.adapter import Adapter
from phimlx.adapters.attach import load_adapter
from phimlx.adapters.peft import write_peft
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.models.base import CausalLM
from phimlx.models.lora import LoRA

MEDIA = (
    "input_image_embeds",
    "image_sizes",
    "image_attention_mask",
    "input_audio_embeds",
    "audio_embed_sizes",
    "audio_attention_mask",
)


@pytest.fixture(scope="module")
def folder(data: Path) -> Path:
    return data / "tiny" / "tiny-phi4mm-remote"


def load(folder: Path) -> CausalLM:
    return load_model(Checkpoint(folder), mx.float32)


def adapter_for(model: CausalLM, dora: bool) -> Adapter:
    """One that changes every projection of the language model."""
    modules = dict(model.named_modules())
    layers: dict[str, LoRA] = {}
    for number, _ in enumerate(model.layers):
        for name in model.architecture.projections:
            path = f"model.layers.{number}.{name}"
            height, width = modules[path].base_layer.weight.shape
            keys = mx.random.split(mx.random.key(len(layers)), 3)
            a, b = (
                mx.random.normal((width, 2), key=keys[0]),
                mx.random.normal((2, height), key=keys[1]),
            )
            m = mx.random.uniform(0.5, 1.5, (height,), key=keys[2]) if dora else None
            layers[path] = LoRA(0.1 * a, 0.1 * b, 1.5, m)
    return Adapter(layers)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "case", ["text", "audio", *(pytest.param(c, marks=pytest.mark.slow) for c in ("image", "both"))]
)
def test_it_is_as_if_the_base_had_been_trained(
    case: str, dora: bool, folder: Path, tmp_path: Path
) -> None:
    oracle = mx.load(str(folder / "oracle.safetensors"))
    assert isinstance(oracle, dict)
    ids = oracle[f"{case}.input_ids"]
    media = {name: oracle[f"{case}.{name}"] for name in MEDIA if f"{case}.{name}" in oracle}
    model = load(folder)
    before = model(ids, **media)
    adapter = adapter_for(model, dora)
    modules = dict(model.named_modules())
    for path, layer in adapter.layers.items():
        base = modules[path].base_layer
        base.weight = layer.merged(base.weight)
    expected = model(ids, **media)
    write_peft(tmp_path / "adapter", adapter)
    beside = load(folder)
    load_adapter(beside, tmp_path / "adapter")
    found = beside(ids, **media)
    size = mx.abs(expected).max()
    assert mx.abs(expected - before).max() / size > 0.05
    assert mx.abs(found - expected).max() / size < 2e-5


def test_it_is_fused_into_the_base_and_the_models_own_adapters_stay(
    folder: Path, tmp_path: Path
) -> None:
    model = load(folder)
    adapter = adapter_for(model, dora=False)
    write_peft(tmp_path / "adapter", adapter)
    convert(folder, tmp_path / "fused", adapter=tmp_path / "adapter")
    load_adapter(model, adapter)
    ids = mx.arange(3, 40)[None]
    expected = model(ids)
    assert mx.allclose(load(tmp_path / "fused")(ids), expected, rtol=1e-4, atol=1e-4)
    weights = Checkpoint(tmp_path / "fused").weights()
    own = {name: array for name, array in Checkpoint(folder).weights().items() if "lora_" in name}
    assert own
    assert all(mx.array_equal(weights[name], array) for name, array in own.items())
