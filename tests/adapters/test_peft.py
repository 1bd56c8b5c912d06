"""PEFT's adapters: the same logits as `peft` with transformers makes, out again, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phimlx.adapters.adapter import Adapter
from phimlx.adapters.attach import load_adapter
from phimlx.adapters.mlx_lm import write_adapter
from phimlx.adapters.peft import write_peft
from phimlx.adapters.read import read_adapter
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import CheckpointError, ConfigError, PhimlxError

GOLDENS = Path(__file__).parents[1] / "goldens" / "peft"
ADAPTERS = ("lora", "rslora", "dora", "patterns")
O_PROJ = "base_model.model.model.layers.0.self_attn.o_proj"


def golden(name: str) -> mx.array:
    arrays = mx.load(str(GOLDENS / "logits.safetensors"))
    assert isinstance(arrays, dict)
    return arrays[name]


def logits(adapter: Adapter | Path) -> mx.array:
    model = load_model(Checkpoint(GOLDENS / "model"))
    load_adapter(model, adapter)
    return model(golden("input_ids"))


def adapter_in(folder: Path, **config: Any) -> Path:
    usual = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"]}
    arrays = {
        f"{O_PROJ}.lora_A.weight": mx.ones((2, 32)),
        f"{O_PROJ}.lora_B.weight": mx.ones((32, 2)),
    }
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
    (folder / "adapter_config.json").write_text(json.dumps(usual | config))
    return folder


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_are_those_of_peft(name: str) -> None:
    expected = golden(name)
    assert mx.abs(expected - golden("base")).max() > 1
    assert mx.allclose(logits(GOLDENS / name), expected, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_goes_out_is_what_peft_wrote(name: str, tmp_path: Path) -> None:
    """PEFT reads names, shapes, rank, alpha and kind; all of them are as in its own files."""
    write_peft(tmp_path, read_adapter(GOLDENS / name))
    ours, theirs = (
        mx.load(str(folder / "adapter_model.safetensors")) for folder in (tmp_path, GOLDENS / name)
    )
    assert isinstance(ours, dict)
    assert isinstance(theirs, dict)
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[key], theirs[key]) for key in theirs)
    assert mx.array_equal(logits(tmp_path), logits(GOLDENS / name))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    source = json.loads((GOLDENS / name / "adapter_config.json").read_text())
    same = ["peft_type", "task_type", "bias", "use_dora", "modules_to_save", "lora_dropout"]
    if name != "patterns":
        assert config["r"] == source["r"]
        assert sorted(config["target_modules"]) == source["target_modules"]
        same += ["layers_to_transform"] if name == "dora" else []
    assert {key: config[key] for key in same} == {
        key: 0.0 if key == "lora_dropout" else source[key] for key in same
    }
    if name == "rslora":
        assert config["lora_alpha"] == pytest.approx(5 * 6**0.5)  # 5 / √6, said as alpha / 6


@pytest.mark.parametrize("name", ADAPTERS)
def test_from_peft_to_mlx_lm_and_back(name: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / "mlx", read_adapter(GOLDENS / name))
    write_peft(tmp_path / "peft", read_adapter(tmp_path / "mlx"))
    for folder in ("mlx", "peft"):
        assert mx.allclose(logits(tmp_path / folder), golden(name), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"peft_type": "IA3"},
            "adapter_config.json: peft_type is 'IA3'; phimlx reads LoRA and DoRA.",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            "adapter_config.json: modules_to_save is set, but no weights of 'lm_head' are there.",
        ),
        (
            {"bias": "some"},
            "adapter_config.json: bias is 'some', not 'none', 'all' or 'lora_only'.",
        ),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "adapter_config.json: init_lora_weights is 'pissa_niter_4', which changes the model's "
            "own weights too.",
        ),
        ({"r": True}, "adapter_config.json: r is True, not a whole number from 1 to 16384."),
        ({"r": 10**8}, "adapter_config.json: r is 100000000, not a whole number from 1 to 16384."),
        ({"lora_alpha": None}, "adapter_config.json: lora_alpha is None, not a number above 0."),
        (
            {"rank_pattern": {"(a+": 3}},
            "adapter_config.json: rank_pattern has the patterns '(a+', which are no regular "
            "expressions.",
        ),
        (
            {"alpha_pattern": [1]},
            "adapter_config.json: alpha_pattern is [1], not a table of values.",
        ),
        (
            {"alpha_pattern": {"o_proj": -1}},
            "adapter_config.json: alpha_pattern.'o_proj' is -1, not a number above 0.",
        ),
        (
            {"use_dora": True},
            "use_dora is True, but adapter_model.safetensors has no magnitudes.",
        ),
        (
            {"rank_pattern": {"o_proj": 3}},
            "The adapter of model.layers.0.self_attn.o_proj has shapes [32, 2] and [2, 32], which "
            "rank 3 does not make.",
        ),
    ],
)
def test_settings_that_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PhimlxError) as caught:
        read_adapter(adapter_in(tmp_path, **config))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "base_model.model.lm_head.ia3_l",
            "adapter_model.safetensors holds base_model.model.lm_head.ia3_l, which is no part of "
            "a LoRA or DoRA adapter.",
        ),
        (
            f"{O_PROJ}.lora_magnitude_vector.weight",
            "use_dora is False, but adapter_model.safetensors has magnitudes.",
        ),
    ],
)
def test_tensors_that_are_refused(name: str, message: str, tmp_path: Path) -> None:
    file = adapter_in(tmp_path) / "adapter_model.safetensors"
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    mx.save_safetensors(str(file), {**arrays, name: mx.ones((32,))})
    with pytest.raises(CheckpointError) as caught:
        read_adapter(tmp_path)
    assert str(caught.value) == message


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    adapter_in(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError) as caught:
        read_adapter(tmp_path)
    assert str(caught.value) == f"{tmp_path} holds no adapter_model.safetensors."
    assert caught.value.hint == (
        "Only safetensors weights are read, never .bin, .pt or .npz files."
    )


def test_a_full_fine_tuning_does_not_go_to_peft(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        write_peft(tmp_path, Adapter(weights={"model.norm.weight": mx.ones(4)}))
    assert str(caught.value) == "A full fine-tuning is no adapter that PEFT knows."


def test_the_base_is_told(tmp_path: Path) -> None:
    adapter_in(tmp_path, base_model_name_or_path="microsoft/phi-4", revision="abc")
    base = read_adapter(tmp_path).base
    assert base is not None
    assert (base.name, base.revision) == ("microsoft/phi-4", "abc")
    write_peft(tmp_path / "out", read_adapter(tmp_path))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("microsoft/phi-4", "abc")
    with pytest.raises(ConfigError, match=r"holds no adapter_config\.json"):
        read_adapter(tmp_path.parent)
