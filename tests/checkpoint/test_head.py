"""Heads that are stored beside an embedding to which the config ties them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from convert import Quantization, convert
from convert.folder import Journal
from convert.quantize.layerwise import quantize_layer_by_layer
from phimlx.checkpoint import head as head_module
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.checkpoint.tensors import StoredRows
from phimlx.models.base import CausalLM
from tests.convert.export.test_gguf import TOKENIZER
from tests.convert.tiny import MINI, parameters, same_bits, weights_of, write_model

TOKENS = mx.array([[1, 5, 9, 33, 2, 7]])
UNTIED = {**MINI, "tie_word_embeddings": False}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FOUR = Quantization(32, 4)


def load(folder: Path) -> CausalLM:
    return load_model(Checkpoint(folder))


def quantized(bits: int, mode: str, same: bool) -> dict[str, mx.array]:
    """Weights of an untied model as MLX packs them, whose head is the embedding or not."""
    weights = parameters(UNTIED)
    if same:
        weights[HEAD] = weights[EMBEDDING]
    model = load_weights(weights)
    nn.quantize(model, 32, bits, mode=mode)
    return dict(tree_flatten(model.parameters()))


def load_weights(weights: dict[str, mx.array]) -> CausalLM:
    from phimlx.checkpoint.load import build_model

    model = build_model(UNTIED)
    model.load_weights(list(weights.items()))
    return model


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    row=st.integers(0, 47),
    column=st.integers(0, 63),
    dtype=st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    shards=st.sampled_from([1, 3]),
    block=st.sampled_from([1, 1000, 16 << 20]),
)
def test_one_number_that_differs_unties(
    tmp_path: Path, row: int, column: int, dtype: mx.Dtype, shards: int, block: int
) -> None:
    weights = parameters(MINI, dtype)
    other = mx.array(weights[EMBEDDING])
    other[row, column] = 3
    weights[HEAD] = other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "BLOCK_BYTES", block)
        checkpoint = Checkpoint(write_model(tmp_path / f"m{shards}", MINI, weights, shards))
        assert checkpoint.config["tie_word_embeddings"] is False
    model = load_model(checkpoint)
    reference = load_weights(weights)
    assert model.config.tie_word_embeddings is False
    assert mx.array_equal(model(TOKENS), reference(TOKENS))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("block", [1, 1000, 16 << 20])
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_an_equal_head_stays_tied(
    tmp_path: Path,
    shards: int,
    block: int,
    dtypes: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_module, "BLOCK_BYTES", block)
    weights = parameters(MINI, mx.bfloat16)
    weights[EMBEDDING], weights[HEAD] = (
        weights[EMBEDDING].astype(getattr(mx, dtype)) for dtype in dtypes
    )
    checkpoint = Checkpoint(write_model(tmp_path, MINI, weights, shards))
    assert checkpoint.config["tie_word_embeddings"] is True
    assert HEAD not in dict(tree_flatten(load_model(checkpoint).parameters()))


def test_reading_ends_at_the_first_block_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = StoredRows.read

    def counted(*arguments: Any) -> bytes:
        data = original(*arguments)
        read.append(len(data))
        return data

    monkeypatch.setattr(StoredRows, "read", counted)
    monkeypatch.setattr(head_module, "BLOCK_BYTES", 64 * 4 * 8)
    weights = parameters(MINI)
    weights[HEAD] = mx.array(weights[EMBEDDING])
    weights[HEAD][8, 0] = 3
    assert Checkpoint(write_model(tmp_path, MINI, weights)).config["tie_word_embeddings"] is False
    assert read == [64 * 4 * 8] * 4  # two blocks of each, of six


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(("bits", "mode"), [(4, "affine"), (8, "affine"), (4, "mxfp4")])
def test_quantized_heads(tmp_path: Path, bits: int, mode: str, same: bool) -> None:
    table = {"group_size": 32, "bits": bits, "mode": mode}
    config = {**MINI, "quantization": table}
    weights = quantized(bits, mode, same)
    checkpoint = Checkpoint(write_model(tmp_path / "m", config, weights))
    assert checkpoint.config["tie_word_embeddings"] is same
    model = load_model(checkpoint)
    untied = load(write_model(tmp_path / "u", {**config, "tie_word_embeddings": False}, weights))
    assert mx.array_equal(model(TOKENS), untied(TOKENS))


def test_a_head_in_full_beside_a_quantized_embedding_is_kept(tmp_path: Path) -> None:
    weights = quantized(4, "affine", same=True)
    for part in ("scales", "biases"):
        del weights[f"lm_head.{part}"]
    weights[HEAD] = parameters(MINI)[EMBEDDING]
    config = {**MINI, "quantization": {"group_size": 32, "bits": 4}}
    model = load(write_model(tmp_path, config, weights))
    assert isinstance(model.lm_head, nn.Linear)
    assert mx.array_equal(model.lm_head.weight, weights[HEAD])


@pytest.mark.parametrize("shards", [1, 3])
def test_a_shared_tensor_that_is_stored_as_the_head(tmp_path: Path, shards: int) -> None:
    weights = parameters(MINI)
    plain = load(write_model(tmp_path / "plain", MINI, weights))
    weights[HEAD] = weights.pop(EMBEDDING)
    folder = write_model(tmp_path / "named", MINI, weights, shards)
    assert mx.array_equal(load(folder)(TOKENS), plain(TOKENS))
    convert(folder, tmp_path / "out")
    assert same_bits(weights_of(tmp_path / "out"), weights_of(tmp_path / "plain"))


@pytest.mark.parametrize("layout", ["mlx", "hf", "packed"])
def test_a_conversion_is_untied(tmp_path: Path, layout: str) -> None:
    weights = parameters(UNTIED)
    source = write_model(tmp_path / "source", MINI, weights)
    expected = write_model(tmp_path / "expected", UNTIED, weights)
    layouts: dict[str, dict[str, Any]] = {
        "mlx": {},
        "hf": {"layout": "hf"},
        "packed": {"quantization": FOUR},
    }
    arguments = layouts[layout]
    convert(source, tmp_path / "a", **arguments)
    convert(expected, tmp_path / "b", **arguments)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["tie_word_embeddings"] is False
    assert same_bits(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    assert mx.array_equal(load(tmp_path / "a")(TOKENS), load(tmp_path / "b")(TOKENS))


def test_a_gguf_file_has_the_head(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'phimlx[gguf]'")
    weights = parameters(UNTIED)
    source = write_model(tmp_path / "source", MINI, weights)
    (source / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    convert(source, tmp_path / "out.gguf", layout="gguf")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    head = weights[HEAD].astype(mx.float16)
    assert mx.array_equal(mx.array(found["output.weight"]), head)


def test_gptq_sees_the_head(tmp_path: Path) -> None:
    """What walks the layers, with the head after them."""
    weights = parameters(UNTIED)
    windows = [tuple(range(1, 17)), tuple(range(20, 36))]
    found = []
    for name, config in (("tied", MINI), ("untied", UNTIED)):
        checkpoint = Checkpoint(write_model(tmp_path / name, config, weights))
        folder = tmp_path / f"journal-{name}"
        folder.mkdir()
        forms = {path: FOUR for path, _ in load_model(checkpoint).named_modules()}
        found.append(
            quantize_layer_by_layer(
                checkpoint,
                forms,
                windows,
                mx.float32,
                Journal(folder, "", 0),
                lambda share: None,
            )
        )
    assert HEAD in found[0]
    assert same_bits(*found)
