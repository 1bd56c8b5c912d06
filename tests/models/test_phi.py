"""phi-1, phi-1.5 and phi-2 against the reference, in today's and in both older layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, load_model
from phimlx.errors import CheckpointError, ConfigError
from phimlx.models.base import CausalLM
from phimlx.models.phi import PhiForCausalLM

EXACT = 2e-5  # a wrong form of GELU shows 7e-5
FOLDERS = ("tiny-phi2", "tiny-phi15", "tiny-phi-qknorm", "tiny-phi2-msft", "tiny-phi15-mixformer")
LENGTHS = ("len1", "len17", "len300")

Oracle = dict[str, mx.array]


@pytest.fixture(scope="module", params=FOLDERS)
def folder(data: Path, request: pytest.FixtureRequest) -> Path:
    return data / "tiny" / request.param


@pytest.fixture(scope="module")
def model(folder: Path) -> CausalLM:
    return load_model(Checkpoint(folder))


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    arrays = mx.load(str(folder / "oracle.safetensors"))
    assert isinstance(arrays, dict)
    return arrays


def difference(found: mx.array, expected: mx.array) -> float:
    assert found.shape == expected.shape
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())


@pytest.mark.parametrize("case", LENGTHS)
def test_logits_are_the_references(model: CausalLM, oracle: Oracle, case: str) -> None:
    assert isinstance(model, PhiForCausalLM)
    logits = model(oracle[f"{case}.input_ids"].astype(mx.int32))[0]
    assert difference(logits[oracle[f"{case}.rows"]], oracle[f"{case}.logits"]) <= EXACT


def test_padded_rows_are_the_references(model: CausalLM, oracle: Oracle) -> None:
    ids, mask = (
        oracle[f"padded.{key}"].astype(mx.int32) for key in ("input_ids", "attention_mask")
    )
    logits = model(ids, attention_mask=mask)[:, oracle["padded.rows"]]
    assert difference(logits, oracle["padded.logits"]) <= EXACT


@pytest.mark.parametrize("piece", [1, 7, 299])
def test_pieces_equal_the_whole(model: CausalLM, oracle: Oracle, piece: int) -> None:
    ids = oracle["len300.input_ids"].astype(mx.int32)
    cache = model.make_cache()
    found = [model(ids[:, begin : begin + piece], cache) for begin in range(0, 300, piece)]
    logits = mx.concatenate(found, axis=1)[0]
    assert difference(logits[oracle["len300.rows"]], oracle["len300.logits"]) <= EXACT


def test_greedy_tokens_are_the_references(model: CausalLM, oracle: Oracle) -> None:
    cache, ids, tokens = model.make_cache(), oracle["greedy.input_ids"].astype(mx.int32), []
    for _ in range(oracle["greedy.generated"].size):
        ids = mx.argmax(model(ids, cache)[:, -1:], axis=-1)
        tokens.append(ids.item())
    assert tokens == oracle["greedy.generated"].tolist()


@pytest.mark.parametrize("name", ["tiny-phi2", "tiny-phi15", "tiny-phi-qknorm"])
def test_transformers_5s_config_gives_the_same_model(data: Path, name: str, tmp_path: Path) -> None:
    source = data / "tiny" / name
    shutil.copy(source / "config.transformers5.json", tmp_path / "config.json")
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    ids = mx.arange(50)[None]
    both = [load_model(Checkpoint(each))(ids) for each in (source, tmp_path)]
    assert mx.array_equal(*both).item()


def test_half_precision_keeps_scores_in_range(data: Path, tmp_path: Path) -> None:
    """Queries and keys whose products leave float16's range, as phi-2's do."""
    source = data / "tiny" / "tiny-phi2"
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    loud = {
        name: 300 * array if "q_proj" in name or "k_proj" in name else array
        for name, array in weights.items()
    }
    shutil.copy(source / "config.json", tmp_path / "config.json")
    mx.save_safetensors(str(tmp_path / "model.safetensors"), loud)
    logits = load_model(Checkpoint(tmp_path), mx.float16)(mx.arange(50)[None])
    assert mx.isfinite(logits).all().item()


def test_rotary_buffers_are_left_aside(data: Path, tmp_path: Path) -> None:
    for name, stored in {
        "tiny-phi2": "model.layers.0.self_attn.rotary_emb.inv_freq",
        "tiny-phi2-msft": "transformer.h.0.mixer.rotary_emb.inv_freq",
        "tiny-phi15-mixformer": "layers.1.mixer.rotary_emb.inv_freq",
    }.items():
        source, copy = data / "tiny" / name, tmp_path / name
        copy.mkdir()
        shutil.copy(source / "config.json", copy / "config.json")
        weights = mx.load(str(source / "model.safetensors"))
        assert isinstance(weights, dict)
        mx.save_safetensors(str(copy / "model.safetensors"), {**weights, stored: mx.ones(4)})
        ids = mx.arange(9)[None]
        both = [load_model(Checkpoint(each))(ids) for each in (source, copy)]
        assert mx.array_equal(*both).item()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tiny-phi2", {"hidden_act": "gelu"}, "hidden_act is 'gelu', but Phi models have"),
        ("tiny-phi2", {"qk_layernorm": 1}, "qk_layernorm is 1, not true or false."),
        ("tiny-phi2", {"tie_word_embeddings": True}, "tie_word_embeddings is True, but Phi models"),
        ("tiny-phi2", {"partial_rotary_factor": 0.01}, "partial_rotary_factor (0.01) turns 0 of"),
        ("tiny-phi2-msft", {"n_embd": "80"}, "hidden_size is '80', not a whole number."),
        ("tiny-phi2-msft", {"n_head": 0}, "num_attention_heads is 0, not a whole number."),
        ("tiny-phi15-mixformer", {"n_layer": None}, "num_hidden_layers is missing."),
    ],
)
def test_config_values(data: Path, name: str, changes: dict[str, object], message: str) -> None:
    config = json.loads((data / "tiny" / name / "config.json").read_text())
    with pytest.raises(ConfigError) as caught:
        build_model({**config, **changes})
    assert message in str(caught.value)


def test_a_joint_projection_of_another_shape(data: Path, tmp_path: Path) -> None:
    source = data / "tiny" / "tiny-phi2-msft"
    shutil.copy(source / "config.json", tmp_path / "config.json")
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    name = "transformer.h.0.mixer.Wqkv.weight"
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {**weights, name: weights[name][:-1]})
    with pytest.raises(CheckpointError) as caught:
        load_model(Checkpoint(tmp_path))
    assert f"{name} has shape [239, 80], of which 3 equal parts" in str(caught.value)
