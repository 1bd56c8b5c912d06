"""Adapter folders: mlx-lm's here and ours in mlx-lm with the same logits, and broken ones."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import phimlx
from phimlx.adapters.adapter import Adapter, Base
from phimlx.adapters.attach import load_adapter
from phimlx.adapters.mlx_lm import write_adapter
from phimlx.adapters.read import read_adapter
from phimlx.errors import CheckpointError, ConfigError, PhimlxError
from phimlx.models.lora import LoRA
from phimlx.models.phi3 import Phi3Config, Phi3ForCausalLM
from phimlx.training.settings import TrainSettings
from phimlx.training.trainable import adapter_of, attach
from tests.convert.tiny import MINI, PHI_4, parameters, write_model

IDS = mx.array([[5, 6, 7, 8, 9, 10, 11, 40, 3]])
# Without long factors, so that mlx-lm's model is right too.
QUANTIZED = {"group_size": 32, "bits": 4}


def ours(quantized: bool = False) -> Phi3ForCausalLM:
    model = Phi3ForCausalLM(Phi3Config.from_dict(PHI_4))
    model.load_weights(list(parameters(PHI_4).items()))
    if quantized:
        nn.quantize(model, **QUANTIZED)
    return model


def theirs(quantized: bool = False) -> Any:
    """mlx-lm's model with the same weights."""
    from mlx_lm.models.phi3 import Model, ModelArgs

    model = Model(ModelArgs.from_dict(PHI_4))
    model.load_weights(list(parameters(PHI_4).items()))
    if quantized:
        nn.quantize(model, **QUANTIZED)
    return model


def shaken(model: nn.Module) -> None:
    """Give what is trained some numbers, as a training would."""
    keys = iter(mx.random.split(mx.random.key(7), 200))
    for name, array in dict(tree_flatten(model.trainable_parameters())).items():
        noise = mx.random.normal(array.shape, key=next(keys))
        moved = array * (1 + 0.2 * noise) if name.endswith(".m") else array + 0.1 * noise
        model.load_weights([(name, moved)], strict=False)


def adapter_in(folder: Path, **config: Any) -> Path:
    """A folder in mlx-lm's format, whole, with an adapter for one layer."""
    arrays = {
        "model.layers.0.self_attn.o_proj.lora_a": mx.ones((64, 2)),
        "model.layers.0.self_attn.o_proj.lora_b": mx.ones((2, 64)),
    }
    usual = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": None},
    }
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    (folder / "adapter_config.json").write_text(json.dumps(usual | config))
    return folder


SETTINGS = {
    "lora": TrainSettings(rank=4, alpha=3),
    "dora": TrainSettings(fine_tune_type="dora", rank=3, alpha=4.5),
    "last layer": TrainSettings(rank=2, num_layers=1, targets=("qkv_proj", "down_proj")),
    "first layer": TrainSettings(fine_tune_type="dora", rank=2, layers=(0, 0), targets=("mlp.*",)),
    "full": TrainSettings(fine_tune_type="full"),
    "last layer, full": TrainSettings(fine_tune_type="full", num_layers=1),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantized"),
    [*((name, False) for name in SETTINGS), ("lora", True), ("dora", True)],
)
def test_what_is_trained_here_is_the_same_here_and_in_mlx_lm(
    name: str, quantized: bool, tmp_path: Path
) -> None:
    from mlx_lm.tuner.utils import load_adapters

    settings = SETTINGS[name]
    model = ours(quantized)
    before = model(IDS)
    attach(model, settings)
    shaken(model)
    expected = model(IDS)
    assert mx.abs(expected - before).max() > 0.05
    write_adapter(tmp_path / "a", adapter_of(model, settings, Base("nano")))
    loaded = ours(quantized)
    load_adapter(loaded, tmp_path / "a")
    assert mx.allclose(loaded(IDS), expected, rtol=1e-5, atol=1e-5)
    reference = load_adapters(theirs(quantized), str(tmp_path / "a"))
    assert mx.allclose(reference(IDS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("quantized", "kind", "keys"),
    [
        (False, "lora", None),
        (True, "lora", ["self_attn.o_proj"]),
        (False, "lora", ["model.layers.0.mlp.down_proj"]),
        (False, "dora", ["self_attn.o_proj", "mlp.down_proj"]),
        (True, "dora", None),
        (False, "full", None),
    ],
)
def test_what_mlx_lm_trains_is_the_same_here(
    quantized: bool, kind: str, keys: list[str] | None, tmp_path: Path
) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = theirs(quantized)
    model.freeze()
    config: dict[str, Any] = {"rank": 4, "scale": 2.5, "dropout": 0.0}
    if keys is not None:
        config["keys"] = keys
    if kind == "full":
        model.layers[1].unfreeze()
    else:
        linear_to_lora_layers(model, 1, config, use_dora=kind == "dora")
    shaken(model)
    arrays = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), arrays)
    saved = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": config, "model": "x"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    loaded = ours(quantized)
    load_adapter(loaded, tmp_path)
    assert mx.allclose(loaded(IDS), model(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("keys", [["model.embed_tokens"], ["lm_head", "self_attn.o_proj"]])
def test_embeddings_and_heads_that_mlx_lm_trains_are_the_same_here(
    keys: list[str], tied: bool, tmp_path: Path
) -> None:
    """A tied output head follows the embedding there, and has no adapter of its own."""
    from mlx_lm.models.phi3 import Model, ModelArgs
    from mlx_lm.tuner.utils import linear_to_lora_layers

    config = {**PHI_4, "tie_word_embeddings": tied}
    weights = list(parameters(config).items())
    model = Model(ModelArgs.from_dict(config))
    model.load_weights(weights)
    model.freeze()
    settings = {"rank": 4, "scale": 2.5, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, 1, settings)
    shaken(model)
    arrays = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), arrays)
    saved = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    loaded = Phi3ForCausalLM(Phi3Config.from_dict(config))
    loaded.load_weights(weights)
    before = loaded(IDS)
    load_adapter(loaded, tmp_path)
    assert mx.abs(loaded(IDS) - before).max() > 0.01
    assert mx.allclose(loaded(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    write_adapter(tmp_path / "again", replace(read_adapter(tmp_path), blocks=2))
    again = Phi3ForCausalLM(Phi3Config.from_dict(config))
    again.load_weights(weights)
    load_adapter(again, tmp_path / "again")
    assert mx.array_equal(again(IDS), loaded(IDS))


def test_the_folder_says_what_was_trained_on_what(tmp_path: Path) -> None:
    model = ours()
    settings = TrainSettings(rank=4, alpha=3, num_layers=1, dropout=0.1)
    attach(model, settings)
    base = Base("microsoft/phi-4", "0" * 40)
    write_adapter(tmp_path, adapter_of(model, settings, base))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    names = ["mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"]
    assert sorted(config["lora_parameters"].pop("keys")) == names
    assert config == {
        "fine_tune_type": "lora",
        "num_layers": 1,
        "lora_parameters": {"rank": 4, "scale": 0.75, "dropout": 0.1},
        "base_model": {"name": "microsoft/phi-4", "revision": "0" * 40},
        "num_hidden_layers": 2,
        "phimlx": phimlx.__version__,
    }
    read = read_adapter(tmp_path)
    assert (read.base, read.blocks, read.dropout, read.kind) == (base, 2, 0.1, "lora")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
    ]


def test_layers_of_several_ranks_become_one_rank_with_the_same_product(tmp_path: Path) -> None:
    def layer(rank: int, scale: float, key: int) -> LoRA:
        a, b = (mx.random.normal((64, rank), key=mx.random.key(key + i)) for i in (0, 1))
        return LoRA(a, b.T, scale)

    paths = [f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)]
    mixed = Adapter(dict(zip(paths, (layer(3, 0.5, 0), layer(5, 2.0, 9)), strict=True)))
    write_adapter(tmp_path, mixed)
    read = read_adapter(tmp_path)
    for path in paths:
        assert (read.layers[path].rank, read.layers[path].scale) == (5, 0.5)
        assert mx.allclose(read.layers[path].delta(), mixed.layers[path].delta(), atol=1e-5)


def test_a_failed_write_leaves_the_adapter_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter_in(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(file: Any, *_: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", fails)
    with pytest.raises(CheckpointError) as caught:
        write_adapter(tmp_path, Adapter(weights={"model.norm.weight": mx.ones(64)}))
    assert str(caught.value) == f"The disk is full: {tmp_path} could not be written."
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_loads_with_its_adapter_and_without_mlx_lm(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    adapter_in(tmp_path / "a")
    plain = phimlx.load(model).model(IDS)
    adapted = phimlx.load(model, adapter=tmp_path / "a").model(IDS)
    assert mx.abs(adapted - plain).max() > 0.1
    code = (
        "import sys, phimlx; phi = phimlx.load(sys.argv[1], adapter=sys.argv[2]); "
        "print(phi.generate([5, 6], max_tokens=3).tokens, 'mlx_lm' in sys.modules, "
        "'transformers' in sys.modules)"
    )
    run = [sys.executable, "-c", code, str(model), str(tmp_path / "a")]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("] False False\n")


def test_the_long_rope_step_is_crossed_with_an_adapter(tmp_path: Path) -> None:
    model = phimlx.load(write_model(tmp_path / "model", MINI), adapter=adapter_in(tmp_path / "a"))
    ids = mx.arange(40)[None]
    cache = model.model.make_cache()
    pieces = [model.model(ids[:, begin : begin + 8], cache) for begin in range(0, 40, 8)]
    assert mx.allclose(pieces[-1], model.model(ids)[:, -8:], rtol=1e-4, atol=1e-4)


O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("arrays", "config", "message"),
    [
        (
            {f"{O_PROJ}.lora_a": mx.ones((64, 2))},
            {},
            f"The adapter of {O_PROJ} lacks lora_b.",
        ),
        (
            {f"{O_PROJ}.lora_a": mx.ones((64, 2)), f"{O_PROJ}.lora_b": mx.ones((3, 64))},
            {},
            f"The adapter of {O_PROJ} has shapes [64, 2] and [3, 64], which rank 2 does not make.",
        ),
        (
            {f"{O_PROJ}.lora_a": mx.ones((32, 2)), f"{O_PROJ}.lora_b": mx.ones((2, 64))},
            {},
            f"The adapter was made for another model: {O_PROJ}.lora_a has shape [32, 2], and this "
            "one needs [64, 2].",
        ),
        (
            {
                "model.layers.7.mlp.x.lora_a": mx.ones((4, 2)),
                "model.layers.7.mlp.x.lora_b": mx.ones((2, 4)),
            },
            {},
            "The adapter changes model.layers.7.mlp.x, which is none of this model's layers that "
            "an adapter can change.",
        ),
        (
            {"model.norm.lora_a": mx.ones((64, 2)), "model.norm.lora_b": mx.ones((2, 48))},
            {},
            "The adapter changes model.norm, which is none of this model's layers that an adapter "
            "can change.",
        ),
        (
            {f"{O_PROJ}.weight": mx.ones((64, 64))},
            {},
            f"adapters.safetensors holds {O_PROJ}.weight, which is no part of a lora adapter.",
        ),
        (
            {f"{O_PROJ}.lora_a": mx.full((64, 2), math.nan), f"{O_PROJ}.lora_b": mx.ones((2, 64))},
            {},
            f"{O_PROJ}.lora_a holds NaN or infinity: this adapter is damaged.",
        ),
        (
            {f"{O_PROJ}.lora_a": mx.ones((64, 2), mx.uint32), f"{O_PROJ}.lora_b": mx.ones((2, 64))},
            {},
            f"{O_PROJ}.lora_a in adapters.safetensors is stored as U32, not as floating-point "
            "numbers.",
        ),
        ({}, {}, "adapters.safetensors holds no tensors."),
        (
            None,
            {"fine_tune_type": "prefix"},
            "adapter_config.json: fine_tune_type is 'prefix', not one of lora, dora, full.",
        ),
        (
            None,
            {"fine_tune_type": "dora"},
            f"The adapter of {O_PROJ} lacks m.",
        ),
        (
            None,
            {"lora_parameters": [1]},
            "adapter_config.json: lora_parameters is [1], not a table of values.",
        ),
        (
            None,
            {"lora_parameters": {"rank": 10**9, "scale": 1}},
            "adapter_config.json: lora_parameters.rank is 1000000000, not a whole number from 1 to "
            "16384.",
        ),
        (
            None,
            {"lora_parameters": {"rank": 2, "alpha": 4}},
            "adapter_config.json: lora_parameters.scale is None, not a number above 0.",
        ),
        (
            None,
            {"lora_parameters": {"rank": 2, "scale": 1, "dropout": "x"}},
            "adapter_config.json: lora_parameters.dropout is 'x', not a number from 0 up to 1.",
        ),
        (
            {"model.norm.weight": mx.ones((65,))},
            {"fine_tune_type": "full"},
            "The adapter was made for another model: model.norm.weight has shape [65], and this "
            "one needs [64].",
        ),
        (
            {"model.layers.0.extra": mx.ones((4,))},
            {"fine_tune_type": "full"},
            "The adapter changes model.layers.0.extra, which is none of this model's weights that "
            "an adapter can change.",
        ),
    ],
)
def test_a_broken_or_foreign_adapter_is_refused(
    arrays: dict[str, mx.array] | None, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    adapter_in(tmp_path, **config)
    if arrays is not None:
        mx.save_safetensors(str(tmp_path / "adapters.safetensors"), arrays)
    model = ours()
    before = dict(tree_flatten(model.parameters()))
    with pytest.raises(PhimlxError) as caught:
        load_adapter(model, tmp_path)
    assert str(caught.value) == message
    assert dict(tree_flatten(model.parameters())).keys() == before.keys()


def test_a_full_fine_tuning_does_not_go_into_quantized_weights(tmp_path: Path) -> None:
    adapter_in(tmp_path, fine_tune_type="full")
    file = str(tmp_path / "adapters.safetensors")
    mx.save_safetensors(file, {f"{O_PROJ}.weight": mx.ones((64, 64))})
    with pytest.raises(CheckpointError) as caught:
        load_adapter(ours(quantized=True), tmp_path)
    assert str(caught.value) == f"The adapter replaces {O_PROJ}.weight, which is quantized here."
    mx.save_safetensors(file, {"model.norm.weight": mx.ones((64,))})
    load_adapter(ours(quantized=True), tmp_path)


def test_folders_that_hold_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_adapter(tmp_path / "none")
    assert str(caught.value) == f"There is no adapter folder {tmp_path / 'none'}."
    with pytest.raises(ConfigError) as no_config:
        read_adapter(tmp_path)
    assert str(no_config.value) == (
        f"{tmp_path} holds no adapter_config.json, so it is not an adapter folder."
    )
    adapter_in(tmp_path)
    (tmp_path / "adapters.safetensors").rename(tmp_path / "adapters.npz")
    with pytest.raises(CheckpointError) as caught:
        read_adapter(tmp_path)
    assert str(caught.value) == f"{tmp_path} holds no adapters.safetensors."
    assert caught.value.hint == (
        "Only safetensors weights are read, never .bin, .pt or .npz files."
    )
    (tmp_path / "adapters.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointError, match=r"^adapters\.safetensors is not a whole safetensors"):
        read_adapter(tmp_path)


def test_an_adapter_of_another_model_of_the_family_is_refused(tmp_path: Path) -> None:
    named = {"hidden_size": 3072, "num_hidden_layers": 32, "vocab_size": 200_064}
    config = {"model_type": "phi3", **named, "_name_or_path": "microsoft/Phi-4-mini-instruct"}
    for said in (
        {"base_model": {"name": "microsoft/Phi-4-mini-reasoning"}},
        {"model": "mlx-community/Phi-4-mini-reasoning-4bit"},
    ):
        adapter_in(tmp_path, **said)
        with pytest.raises(CheckpointError) as caught:
            load_adapter(ours(), tmp_path, Path("x"), config)
        assert str(caught.value) == (
            "This adapter was trained on phi-4-mini-reasoning, not on phi-4-mini."
        )
        assert caught.value.hint == (
            "Use it with --model phi-4-mini-reasoning; to use it here all the same, take the "
            "model's name out of its adapter_config.json."
        )
    for name in ("microsoft/Phi-4-mini-instruct", "/my/own", 5):
        load_adapter(ours(), adapter_in(tmp_path, model=name), Path("x"), config)


def test_the_base_is_named_with_its_own_commit_only(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--microsoft--phi-4" / "snapshots" / commit
    shape = {"hidden_size": 5120, "num_hidden_layers": 40, "vocab_size": 100_352}
    config = {"model_type": "phi3", **shape}
    assert Base.of(snapshot, config) == Base("microsoft/phi-4", commit)
    snapshot = tmp_path / "models--mlx-community--phi-4-4bit" / "snapshots" / commit
    assert Base.of(snapshot, config) == Base("microsoft/phi-4", None)
    assert Base.of(tmp_path / "mine", config) == Base("mine", None)
