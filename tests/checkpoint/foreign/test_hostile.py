"""Layers that are not what their framework writes: each ends with one sentence, none with a crash.

Every part of every format is left out, cut, stretched, turned and given another type, and what
values can be impossible is made so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phimlx.checkpoint.foreign.methods import ForeignQuantization
from phimlx.checkpoint.header import list_tensors
from phimlx.checkpoint.tensors import ELEMENT_DTYPES
from phimlx.errors import CheckpointError, ConfigError, PhimlxError
from tests.checkpoint.foreign.test_layers import CASES, STORED, load, on_the_cpu
from tests.convert.tiny import write_safetensors

__all__ = ["on_the_cpu"]  # a fixture

Part = tuple[str, tuple[int, ...], bytes]
Layer = dict[str, Part]
Change = Callable[[Layer], object]

ATTACKED = {
    "awq": (48, 64),
    "awq-gemv": (24, 128),
    "gptq-4-gptq-act": (32, 96),
    "gptq-3-gptq_v2": (32, 96),
    "bnb-nf4-64-bfloat16-nested": (24, 128),
    "bnb-fp4-128-float16": (72, 80),
    "bnb-int8": (24, 64),
    "ct-int4-zeros-bfloat16": (40, 96),
    "ct-int4-g-idx": (24, 64),
    "ct-int8-naive-group-float32": (40, 96),
    "ct-fp8-block-bfloat16": (40, 80),
    "fp8-float32": (256, 128),
    "fbgemm": (24, 64),
}
# Parts whose absence is right too, or whose values are not looked at.
OPTIONAL = {"g_idx", "weight_g_idx", "weight_shape", "weight_format", "weight_zero_point"}
UNUSED = {"weight.quant_map"}
PADDED = {("awq-gemv", "qzeros", "wider"), ("awq-gemv", "scales", "wider")}
NF4 = "weight.quant_state.bitsandbytes__nf4"


def layer_of(name: str) -> Layer:
    found = {}
    for key, info in STORED.items():
        if key.startswith(f"{name}."):
            rows = info.reads(0, info.count)[0]
            found[key.removeprefix(f"{name}.")] = (info.dtype, info.shape, rows.read())
    return found


def decode(
    folder: Path, settings: dict[str, Any], layer: Layer, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Decode a layer as a conversion does, and check its shape as one does."""
    header, data = {}, b""
    for part, (dtype, size, content) in layer.items():
        begin = len(data)
        data += content
        header[f"x.{part}"] = {"dtype": dtype, "shape": size, "data_offsets": [begin, len(data)]}
    write_safetensors(folder / "model.safetensors", header, data)
    stored = dict(list_tensors(folder / "model.safetensors"))
    foreign = ForeignQuantization.of({"quantization_config": settings})
    assert foreign is not None
    weight = foreign.decoded(stored, lambda path: shape[1])["x.weight"]
    if weight.shape != shape:  # as `check_parameters` says it
        raise CheckpointError("x.weight has another shape.")
    made = weight.whole(load)
    made.tolist()
    return made.shape


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ELEMENT_DTYPES[dtype].size


def with_shape(part: Part, shape: tuple[int, ...]) -> Part:
    dtype, _, data = part
    size = size_of(dtype, shape)
    return dtype, shape, (data * (1 + size // max(1, len(data))))[:size]


def changes_of(part: str, layer: Layer) -> dict[str, Change]:
    dtype, shape, _ = layer[part]
    other = {"F16": "BF16", "BF16": "F16"}.get(dtype, "F64" if dtype != "F64" else "F32")
    shapes = {
        "longer": (shape[0] + 1, *shape[1:]) if shape else (2,),
        "shorter": (max(0, shape[0] - 1), *shape[1:]) if shape else (0,),
        "wider": (*shape[:-1], shape[-1] + 3) if shape else (3,),
        "turned": shape[::-1] if len(shape) == 2 and shape[0] != shape[1] else (*shape, 2),
        "deeper": (2, *shape, 2),
        "empty": (0,) * max(1, len(shape)),
    }
    found: dict[str, Change] = {
        what: lambda layer, size=size: layer.update({part: with_shape(layer[part], size)})  # type: ignore[misc]
        for what, size in shapes.items()
    }
    found["gone"] = lambda layer: layer.pop(part)
    if other == "F64":
        found["of 64 bits"] = lambda layer: layer.update(
            {part: ("F64", shape, bytes(8 * math.prod(shape)))}
        )
    return found


EVERY = [
    pytest.param(name, part, what, id=f"{name}: {part} {what}")
    for name in ATTACKED
    for part in layer_of(name)
    for what in changes_of(part, layer_of(name))
]


@pytest.mark.parametrize(("name", "part", "what"), EVERY)
def test_parts(name: str, part: str, what: str, tmp_path: Path) -> None:
    layer = layer_of(name)
    changes_of(part, layer)[what](layer)
    is_right = (what == "gone" and part in OPTIONAL) or (name, part, what) in PADDED
    if part in UNUSED or is_right:
        assert decode(tmp_path, CASES[name], layer, ATTACKED[name]) == ATTACKED[name]
        return
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        decode(tmp_path, CASES[name], layer, ATTACKED[name])
    check(caught.value)


def check(error: PhimlxError) -> None:
    assert str(error).endswith(".")
    assert len(str(error)) < 400
    assert "\x1b" not in str(error)


def ints(dtype: str, *values: int) -> bytes:
    size = ELEMENT_DTYPES[dtype].size
    return b"".join(value.to_bytes(size, "little", signed=True) for value in values)


VALUES: dict[str, tuple[str, str, bytes, str]] = {
    "a group beyond the last": (
        "gptq-4-gptq-act", "g_idx", ints("I32", *[3] * 96), "a column is in group 3 of 3",
    ),
    "a group before the first": (
        "gptq-4-gptq-act", "g_idx", ints("I32", *[-1] * 96), "a column is in group -1 of 3",
    ),
    "compressed-tensors' group": (
        "ct-int4-g-idx", "weight_g_idx", ints("I32", *[2**31 - 1] * 64),
        "a column is in group 2147483647 of 4",
    ),
    "compressed-tensors' shape": (
        "ct-int4-zeros-bfloat16", "weight_shape", ints("I64", 40, 95),
        "weight_shape says [40, 95], not [40, 96]",
    ),
    "bitsandbytes' layout": (
        "bnb-int8", "weight_format", b"\1", "its weight is in the layout of one kind of GPU",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", VALUES)
def test_values(what: str, tmp_path: Path) -> None:
    name, part, data, why = VALUES[what]
    layer = layer_of(name)
    dtype, shape, _ = layer[part]
    layer[part] = (dtype, shape, data)
    with pytest.raises(CheckpointError) as caught:
        decode(tmp_path, CASES[name], layer, ATTACKED[name])
    framework = {"gptq": "GPTQ", "ct": "compressed-tensors", "bnb": "bitsandbytes"}
    assert str(caught.value) == (
        "x does not fit config.json, whose quantization_config is another framework's "
        f"({framework[name.split('-')[0]]}): {why}."
    )


STATES: dict[str, Any] = {
    "no JSON": b"not json",
    "no text": b"\xff\xfe",
    "nothing": b"",
    "a list": [],
    "deep": b"[" * 60_000,
    "long": b" " * 70_000,
    "a long number": b'{"blocksize": ' + b"9" * 5000 + b"}",
    "empty": {},
    "another shape": {"shape": [12, 256]},
    "a shape of text": {"shape": "24"},
    "a shape of truths": {"shape": [True, 128]},
    "another type": {"quant_type": "fp4"},
    "a type that there is not": {"quant_type": "int4"},
    "a type that is a list": {"quant_type": ["nf4"]},
    "a block of none": {"blocksize": 0},
    "a block below none": {"blocksize": -64},
    "another block": {"blocksize": 32},
    "a block that is true": {"blocksize": True},
    "a block of text": {"blocksize": "64"},
    "a fractional block": {"blocksize": 64.0},
    "a block of 2^70": {"blocksize": 1 << 70},
    "no dtype": {"dtype": None},
    "a dtype that there is not": {"dtype": "load"},
    "a dtype that a terminal obeys": {"dtype": "\x1b[2J"},
    "a dtype of a megabyte": {"dtype": "a" * 60_000},
    "nested blocks of none": {"nested_blocksize": 0},
    "nested blocks of another size": {"nested_blocksize": 32},
    "an offset of text": {"nested_offset": "0"},
    "an offset that is true": {"nested_offset": True},
    "an infinite offset": {"nested_offset": float("inf")},
    "an offset that is no number": {"nested_offset": float("nan")},
    "an offset too long for a float": {"nested_offset": 10**400},
}


@pytest.mark.parametrize("what", STATES)
def test_quant_states(what: str, tmp_path: Path) -> None:
    name = "bnb-nf4-64-bfloat16-nested"
    layer = layer_of(name)
    state = STATES[what]
    if isinstance(state, dict) and state:
        state = {**json.loads(layer[NF4][2]), **state}
    data = state if isinstance(state, bytes) else json.dumps(state).encode()
    layer[NF4] = ("U8", (len(data),), data)
    with pytest.raises(CheckpointError) as caught:
        decode(tmp_path, CASES[name], layer, ATTACKED[name])
    check(caught.value)


SETTINGS: dict[str, tuple[str, Any]] = {
    "a format of AWQ's": ("awq", {"version": "marlin"}),
    "a version that is a list": ("awq", {"version": ["gemm"]}),
    "a format of GPTQ's": ("gptq-4-gptq-act", {"checkpoint_format": "marlin"}),
    "marlin as it was": ("gptq-4-gptq-act", {"is_marlin_format": True}),
    "a format that is a number": ("gptq-4-gptq-act", {"checkpoint_format": 7}),
    "sparse": ("ct-int4-zeros-bfloat16", {"sparsity_config": {"format": "sparse-24-bitmask"}}),
    "a format of compressed-tensors'": ("ct-int4-zeros-bfloat16", {"format": "marlin-24"}),
    "a format of a group": (
        "ct-int4-zeros-bfloat16",
        {"config_groups": {"group_0": {"format": "nvfp4-pack-quantized"}}},
    ),
    "rotated": ("ct-int4-zeros-bfloat16", {"transform_config": {"config_groups": {"a": {}}}}),
    "blocks of text": ("fp8-float32", {"weight_block_size": "128"}),
    "blocks of none": ("fp8-float32", {"weight_block_size": [0, 128]}),
    "blocks that are true": ("fp8-float32", {"weight_block_size": [True, 128]}),
    "blocks too large for a word": ("fp8-float32", {"weight_block_size": [1 << 80, 1 << 80]}),
    **{
        f"the method {method}": ("awq", {"quant_method": method})
        for method in ("hqq", "aqlm", "quanto", "torchao", "exl2", "eetq", "higgs", "\x1b[2J", 7)
    },
    "a method that is a list": ("awq", {"quant_method": ["awq"]}),
    "no method": ("awq", {"quant_method": None}),
    "a method of a megabyte": ("awq", {"quant_method": "a" * (1 << 20)}),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_settings(what: str, tmp_path: Path) -> None:
    name, settings = SETTINGS[what]
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        decode(tmp_path, {**CASES[name], **settings}, layer_of(name), ATTACKED[name])
    check(caught.value)


HARMLESS: dict[str, tuple[str, Any]] = {
    "groups of text": ("gptq-4-gptq-act", {"group_size": "32"}),
    "groups of none": ("gptq-4-gptq-act", {"group_size": 0}),
    "bits that are not its own": ("gptq-4-gptq-act", {"bits": 8}),
    "bits of text": ("awq", {"bits": "4"}),
    "groups that are a list": ("ct-int4-zeros-bfloat16", {"config_groups": []}),
    "a group that is a number": ("ct-int4-zeros-bfloat16", {"config_groups": {"group_0": 7}}),
    "weights that are a list": (
        "ct-int4-zeros-bfloat16",
        {"config_groups": {"group_0": {"weights": [{"num_bits": []}]}}},
    ),
    "bits that are a list": (
        "ct-int4-zeros-bfloat16",
        {"config_groups": {"group_0": {"weights": {"num_bits": [4]}}}},
    ),
    "a method in capitals": ("awq", {"quant_method": "AWQ"}),
    "a version in capitals": ("awq", {"version": "GEMM"}),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_settings_that_the_tensors_overrule(what: str, tmp_path: Path) -> None:
    name, settings = HARMLESS[what]
    shape = decode(tmp_path, {**CASES[name], **settings}, layer_of(name), ATTACKED[name])
    assert shape == ATTACKED[name]


def test_a_weight_that_is_packed_and_not(tmp_path: Path) -> None:
    layer = {**layer_of("awq"), "weight": ("F16", (48, 64), bytes(2 * 48 * 64))}
    with pytest.raises(CheckpointError) as caught:
        decode(tmp_path, CASES["awq"], layer, ATTACKED["awq"])
    assert "it has a weight that is not packed as well" in str(caught.value)


def test_a_weight_without_its_scale(tmp_path: Path) -> None:
    layer = {"weight": ("F8_E4M3", (16, 16), bytes(256))}
    with pytest.raises(CheckpointError) as caught:
        decode(tmp_path, CASES["fp8-float32"], layer, (16, 16))
    assert "it is stored as F8_E4M3, and nothing tells its scale" in str(caught.value)


def test_what_serves_activations_is_left_out(tmp_path: Path) -> None:
    beside: Layer = {
        part: ("F32", (1,), bytes(4)) for part in ("input_scale", "k_scale", "output_scale")
    }
    name = "fp8-float32"
    shape = decode(tmp_path, CASES[name], {**layer_of(name), **beside}, ATTACKED[name])
    assert shape == ATTACKED[name]


def test_there_are_many_in_all() -> None:
    assert len(EVERY) + len(STATES) + len(SETTINGS) > 400
