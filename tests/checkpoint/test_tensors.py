"""Tensors that are stored in pieces, read in blocks of rows and as a whole."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from convert.read import RowBlock, in_file_order, read_blocks, stored_bytes
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, load_model
from phimlx.errors import CheckpointError
from phimlx.models.names import Place, Renames, split_projections
from tests.convert.tiny import PHI_4, parameters, same_bits, write_model

ROWS = {
    "self_attn.qkv_proj": {"q_proj": 64, "k_proj": 32, "v_proj": 32},
    "mlp.gate_up_proj": {"gate_proj": 96, "up_proj": 96},
}


def split(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The same weights with q, k and v, gate and up each a tensor of its own."""
    found = {}
    for name, array in weights.items():
        path, _, kind = name.rpartition(".")
        parts = next((ROWS[end] for end in ROWS if path.endswith(end)), None)
        if parts is None:
            found[name] = array
            continue
        top = 0
        for part, count in parts.items():
            found[f"{path.rpartition('.')[0]}.{part}.{kind}"] = array[top : top + count]
            top += count
    return found


def quantized(bits: int = 4) -> dict[str, mx.array]:
    model = build_model(PHI_4)
    model.load_weights(list(parameters(PHI_4).items()))
    nn.quantize(model, 32, bits)
    return dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize("shards", [1, 3, 7])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_split_projections_are_the_fused_ones(tmp_path: Path, dtype: mx.Dtype, shards: int) -> None:
    weights = parameters(PHI_4, dtype)
    folder = write_model(tmp_path / "split", PHI_4, split(weights), shards)
    assert same_bits(Checkpoint(folder).weights(), weights)
    tokens = mx.array([[1, 5, 9, 33, 2, 7]])
    fused = write_model(tmp_path / "fused", PHI_4, weights)
    models = [load_model(Checkpoint(each)) for each in (folder, fused)]
    assert mx.array_equal(models[0](tokens), models[1](tokens))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_packed_layers_join_too(tmp_path: Path, bits: int) -> None:
    weights = quantized(bits)
    config = {**PHI_4, "quantization": {"group_size": 32, "bits": bits}}
    folder = write_model(tmp_path, config, split(weights), 2)
    assert same_bits(Checkpoint(folder).weights(), weights)
    loaded = dict(tree_flatten(load_model(Checkpoint(folder)).parameters()))
    assert same_bits(loaded, weights)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), shards=st.sampled_from([1, 2, 3, 5]))
def test_any_rows_can_be_read(tmp_path: Path, data: st.DataObject, shards: int) -> None:
    weights = parameters(PHI_4)
    folder = tmp_path / str(shards)
    if not folder.is_dir():
        write_model(folder, PHI_4, split(weights), shards)
    tensors = Checkpoint(folder).tensors
    blocks, expected = [], []
    for name, tensor in in_file_order(tensors).items():
        cuts = data.draw(st.sets(st.integers(1, tensor.shape[0]), max_size=4))
        edges = sorted({0, *cuts, tensor.shape[0]})
        for first, last in pairwise(edges):
            blocks.append(RowBlock((tensor,), first, last))
            expected.append(weights[name][first:last])
    for (found,), wanted in zip(read_blocks(blocks, 2), expected, strict=True):
        assert mx.array_equal(found, wanted)
    assert sum(block.nbytes for block in blocks) == stored_bytes(list(tensors.values()))
    for name, tensor in tensors.items():
        made = tensor.whole(lambda rows: rows.array(rows.read()))
        assert mx.array_equal(made, weights[name])


def test_pieces_of_other_forms_are_refused(tmp_path: Path) -> None:
    weights = split(parameters(PHI_4))
    name = "model.layers.1.self_attn.v_proj.weight"
    weights[name] = weights[name].astype(mx.float16)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(write_model(tmp_path, PHI_4, weights)).tensors  # noqa: B018
    assert str(caught.value) == (
        "model.layers.1.self_attn.qkv_proj.weight cannot be joined from parts of other widths or "
        "types: model.layers.1.self_attn.q_proj.weight F32 [64, 64], "
        "model.layers.1.self_attn.k_proj.weight F32 [32, 64], "
        "model.layers.1.self_attn.v_proj.weight F16 [32, 64]."
    )


@pytest.mark.parametrize("kind", ["weight", "scales"])
def test_pieces_packed_otherwise_are_refused(tmp_path: Path, kind: str) -> None:
    weights, others = split(quantized(4)), split(quantized(6 if kind == "weight" else 8))
    prefix = "model.layers.0.mlp.up_proj"
    weights |= {name: array for name, array in others.items() if name.startswith(prefix)}
    config = {**PHI_4, "quantization": {"group_size": 32, "bits": 4}}
    with pytest.raises(CheckpointError, match=r"gate_up_proj\.weight cannot be joined"):
        Checkpoint(write_model(tmp_path, config, weights)).tensors  # noqa: B018


@pytest.mark.parametrize("piece", ["q_proj", "k_proj", "v_proj"])
def test_a_missing_piece_is_named(tmp_path: Path, piece: str) -> None:
    weights = split(parameters(PHI_4))
    missing = f"model.layers.1.self_attn.{piece}.weight"
    del weights[missing]
    with pytest.raises(CheckpointError, match="but lacks") as caught:
        Checkpoint(write_model(tmp_path, PHI_4, weights)).tensors  # noqa: B018
    assert str(caught.value).endswith(f"but lacks {missing}.")


def test_both_forms_of_one_tensor_are_refused(tmp_path: Path) -> None:
    weights = parameters(PHI_4)
    weights |= {name: array for name, array in split(weights).items() if "layers.0" in name}
    with pytest.raises(CheckpointError, match="are the same tensor"):
        Checkpoint(write_model(tmp_path, PHI_4, weights)).tensors  # noqa: B018


def test_other_sizes_than_the_config_s_are_refused(tmp_path: Path) -> None:
    weights = split(parameters(PHI_4))
    name = "model.layers.0.self_attn.k_proj.weight"
    weights[name] = weights[name][:16]
    with pytest.raises(CheckpointError, match=r"has shape \[112, 64\]; config.json makes it"):
        load_model(Checkpoint(write_model(tmp_path, PHI_4, weights)))


def test_names_of_pieces() -> None:
    renames = Renames(
        split_projections(
            ["self_attn.qkv_proj", "self_attn.o_proj"], {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
        )
    )
    layer = "model.layers.12.self_attn"
    pieces = tuple(f"{layer}.{part}.scales" for part in ("q_proj", "k_proj", "v_proj"))
    for piece in pieces:
        assert renames.place(piece) == Place((f"{layer}.qkv_proj.scales",), pieces)
    other = f"{layer}.o_proj.weight"
    assert renames.place(other) == Place((other,), (other,))
