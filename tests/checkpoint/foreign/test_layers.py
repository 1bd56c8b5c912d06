"""Layers of other frameworks, decoded to what their own libraries decode them to, bit for bit.

The goldens come from `scripts/goldens/foreign_goldens.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phimlx.checkpoint.foreign.methods import ForeignQuantization
from phimlx.checkpoint.header import list_tensors
from phimlx.checkpoint.tensors import JoinedTensor, PartialTensor, StoredRows, Tensor

GOLDENS = Path(__file__).parents[2] / "goldens" / "foreign"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDENS / "cases.json").read_text())
STORED = dict(list_tensors(GOLDENS / "packed.safetensors"))
SCALES = {
    name: next(
        part
        for part in ("scales", "weight.absmax", "SCB", "weight_scale", "weight_scale_inv")
        if f"{name}.{part}" in STORED
    )
    for name in CASES
}
NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}


@pytest.fixture(autouse=True)
def on_the_cpu() -> Any:
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


def expected(name: str) -> mx.array:
    weights = mx.load(str(GOLDENS / "weights.safetensors"))
    assert isinstance(weights, dict)
    return weights[name]


def decoded(name: str, dtype: str | None) -> Tensor:
    """The weight of a case, where config.json names this dtype for the model."""
    stored = {key: info for key, info in STORED.items() if key.startswith(f"{name}.")}
    config = {"quantization_config": CASES[name], "torch_dtype": dtype}
    foreign = ForeignQuantization.of(config)
    assert foreign is not None
    width = expected(name).shape[1]
    found = foreign.decoded(stored, lambda path: width)
    assert list(found) == [f"{name}.weight"]
    return found[f"{name}.weight"]


def rows_of(tensor: Tensor, first: int, last: int) -> mx.array:
    return tensor.rows(first, last, [load(rows) for rows in tensor.reads(first, last)])


def load(rows: StoredRows) -> mx.array:
    return rows.array(rows.read())


def same(one: mx.array, other: mx.array) -> bool:
    """Whether every bit is the same, but for those that make up a NaN."""
    words = mx.uint32 if one.dtype == mx.float32 else mx.uint16
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    alike = (mx.contiguous(one).view(words) == mx.contiguous(other).view(words)) | (
        mx.isnan(one) & mx.isnan(other)
    )
    return bool(mx.all(alike).item())


@pytest.mark.parametrize("name", CASES)
def test_whole(name: str) -> None:
    weight = expected(name)
    dtype = str(weight.dtype).removeprefix("mlx.core.")
    tensor = decoded(name, dtype)
    assert (tensor.shape, tensor.dtype) == (weight.shape, NAMES[weight.dtype])
    assert same(tensor.whole(load), weight)


@pytest.mark.parametrize("name", CASES)
def test_in_the_type_of_the_model_or_else_of_the_scales(name: str) -> None:
    weight = expected(name)
    tensor = decoded(name, "float16")
    assert same(tensor.whole(load), weight.astype(mx.float16))
    tensor = decoded(name, None)
    scales = next((info for key, info in STORED.items() if key == f"{name}.{SCALES[name]}"))
    assert tensor.dtype == scales.dtype.replace("U8", "F32" if "bnb" in name else "BF16")
    own = tensor.whole(load)
    narrow = min(own.dtype, weight.dtype, key=lambda dtype: dtype.size)
    assert same(own.astype(narrow), weight.astype(narrow))


@pytest.mark.parametrize("name", CASES)
def test_rows(name: str) -> None:
    weight = expected(name)
    tensor = decoded(name, str(weight.dtype).removeprefix("mlx.core."))
    count = weight.shape[0]
    for first, last in ((0, 1), (1, 2), (3, 11), (count - 5, count), (7, count - 1)):
        assert same(rows_of(tensor, first, last), weight[first:last])
    part = PartialTensor(tensor, 5, 9)
    joined = JoinedTensor.of("joined", {"one": part, "other": tensor})
    assert same(rows_of(joined, 4, 14), mx.concatenate([weight[9:14], weight[:5]]))


def test_cases() -> None:
    kinds = {name.split("-")[0] for name in CASES}
    assert kinds == {"awq", "gptq", "bnb", "ct", "fp8", "fbgemm"}
    assert len(CASES) >= 70
