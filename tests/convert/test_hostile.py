"""Folders made to mislead or to break a conversion: each ends with one sentence and no output.

What the sentence says is tested with the checkpoint's own tests; here it is that none gets through.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from convert import Quantization
from convert import convert as convert_model
from phimlx.errors import CheckpointError, ConfigError, ConversionError
from tests.convert.tiny import (
    MINI,
    PHI_4,
    parameters,
    write_config,
    write_index,
    write_model,
    write_safetensors,
)

Spoil = Callable[[Path], object]
FOUR = Quantization(32, 4)
NAME = "model.norm.weight"


def tensor(begin: int, end: int, **other: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end], **other}


# What stands where model.safetensors should begin: header, data, and its length where that lies.
HEADERS: dict[str, tuple[Any, bytes, int | None]] = {
    "empty": (b"", b"", None),
    "longer than every disk": ({}, b"", 1 << 63),
    "length of minus one": ({}, b"", (1 << 64) - 1),
    "longer than the file": ({}, b"", 1000),
    "of 200 MB": ({}, b"", 200 << 20),
    "no JSON": (b"not json", b"", None),
    "no text": (b"\xff\xfe\xfd", b"", None),
    "a list": ([], b"", None),
    "a number": (b"7", b"", None),
    "nested deeply": (b"[" * 50_000, b"", None),
    "with null bytes": (b"{}\0\0\0\0\0\0", b"", None),
    "overlapping": ({"a": tensor(0, 64), "b": tensor(32, 96)}, bytes(96), None),
    "the same bytes": ({"a": tensor(0, 64), "b": tensor(0, 64)}, bytes(64), None),
    "a gap": ({"a": tensor(0, 64), "b": tensor(80, 144)}, bytes(144), None),
    "trailing bytes": ({"a": tensor(0, 64)}, bytes(65), None),
    "beyond the end": ({"a": tensor(0, 64)}, bytes(63), None),
    "backwards": ({"a": tensor(0, 64, data_offsets=[64, 0])}, bytes(64), None),
    "negative offsets": ({"a": tensor(0, 64, data_offsets=[-64, 0])}, bytes(64), None),
    "fractional offsets": ({"a": tensor(0, 64, data_offsets=[0, 64.5])}, bytes(64), None),
    "three offsets": ({"a": tensor(0, 64, data_offsets=[0, 32, 64])}, bytes(64), None),
    "negative shape": ({"a": tensor(0, 64, shape=[-16])}, bytes(64), None),
    "shape that overflows": ({"a": tensor(0, 64, shape=[1 << 33, 1 << 33])}, bytes(64), None),
    "shape of another size": ({"a": tensor(0, 64, shape=[15])}, bytes(64), None),
    "shape of text": ({"a": tensor(0, 64, shape="16")}, bytes(64), None),
    "unknown type": ({"a": tensor(0, 64, dtype="X9")}, bytes(64), None),
    "no type": ({"a": {"shape": [16], "data_offsets": [0, 64]}}, bytes(64), None),
    "no description": ({"a": None}, b"", None),
    "metadata of lists": ({"__metadata__": {"a": [1]}}, b"", None),
    "a name twice": (
        f'{{"a": {json.dumps(tensor(0, 64))}, "a": {json.dumps(tensor(64, 128))}}}'.encode(),
        bytes(128),
        None,
    ),
    "no tensors": ({}, b"", None),
    "other tensors": ({"a": tensor(0, 64)}, bytes(64), None),
    "numbers of 64 bits": ({"a": tensor(0, 64, dtype="F64", shape=[8])}, bytes(64), None),
    "whole numbers": ({NAME: tensor(0, 256, dtype="I32")}, bytes(256), None),
    "a name with a path": ({"../../a": tensor(0, 64)}, bytes(64), None),
    "a name of 100 kB": ({"a" * 100_000: tensor(0, 64)}, bytes(64), None),
    "a name that a terminal obeys": ({"\x1b[2J": tensor(0, 64)}, bytes(64), None),
}

FILE_NAMES: dict[str, Any] = {
    "parent": "../model.safetensors",
    "absolute": "/etc/passwd.safetensors",
    "folder": "sub/model.safetensors",
    "backslash": "..\\model.safetensors",
    "no safetensors": "model.bin",
    "hidden": ".safetensors",
    "option": "-rf.safetensors",
    "null byte": "model\0.safetensors",
    "newline": "model\n.safetensors",
    "empty": "",
    "number": 7,
    "list": ["model.safetensors"],
    "missing": "model-00009-of-00009.safetensors",
}

CONFIGS: dict[str, dict[str, Any]] = {
    "no model type": {"model_type": None},
    "another architecture": {"model_type": "gpt2"},
    "type that is a list": {"model_type": ["phi3"]},
    "a billion layers": {"num_hidden_layers": 10**9},
    "layers below zero": {"num_hidden_layers": -1},
    "layers that are true": {"num_hidden_layers": True},
    "more layers than stored": {"num_hidden_layers": 3},
    "fewer layers than stored": {"num_hidden_layers": 1},
    "width of text": {"hidden_size": "64"},
    "width that heads do not divide": {"hidden_size": 65},
    "a larger vocabulary": {"vocab_size": 1 << 23},
    "no vocabulary": {"vocab_size": 0},
    "theta that is infinite": {"rope_theta": float("inf")},
    "theta that is no number": {"rope_theta": float("nan")},
    "unknown rope": {"rope_scaling": {"type": "ntk", "factor": 4}},
    "another activation": {"hidden_act": "relu"},
    "bits that MLX lacks": {"quantization": {"bits": 7, "group_size": 64}},
    "groups that MLX lacks": {"quantization": {"bits": 4, "group_size": 1}},
    "quantization of text": {"quantization": "4bit"},
    "layers of unknown mode": {"quantization": {"bits": 4, "group_size": 32, "x": {"mode": "q"}}},
}

COMPANIONS: dict[str, Spoil] = {
    "tokenizer that is a folder": lambda folder: (folder / "tokenizer.json").mkdir(),
    "tokenizer that is a pipe": lambda folder: os.mkfifo(folder / "tokenizer.json"),
    "template that is a device": lambda folder: (folder / "chat_template.jinja").symlink_to(
        "/dev/zero"
    ),
    "licence that is a secret": lambda folder: (folder / "LICENSE").symlink_to("/etc/passwd"),
    "licence that links to itself": lambda folder: (folder / "LICENSE").symlink_to("LICENSE"),
    "licence that is not there": lambda folder: (folder / "LICENSE").symlink_to("nowhere"),
    "weights that are a folder": lambda folder: _replaced(folder).mkdir(),
    "weights that link to themselves": lambda folder: _replaced(folder).symlink_to(
        "model.safetensors"
    ),
    "config that is a folder": lambda folder: _replaced(folder, "config.json").mkdir(),
    "config of 65 MB": lambda folder: os.truncate(folder / "config.json", 65 << 20),
    "index of 65 MB": lambda folder: write_sparse(
        _as_shard(folder).with_name("model.safetensors.index.json"), 65 << 20
    ),
    "another's quantization": lambda folder: write_model(
        folder,
        {**PHI_4, "quantization_config": {"quant_method": "gptq", "bits": 4}},
        {**parameters(PHI_4), "lm_head.qweight": mx.zeros((8, 48), mx.int32)},
    ),
    "weights cut short": lambda folder: os.truncate(folder / "model.safetensors", 10_000),
}


def _replaced(folder: Path, name: str = "model.safetensors") -> Path:
    (folder / name).unlink()
    return folder / name


def _as_shard(folder: Path) -> Path:
    """The weights under another name: beside model.safetensors no index would be read."""
    return (folder / "model.safetensors").rename(folder / "model-1.safetensors")


def write_sparse(file: Path, size: int) -> None:
    file.touch()
    os.truncate(file, size)


def in_header(header: Any, data: bytes, length: int | None) -> Spoil:
    return lambda folder: write_safetensors(folder / "model.safetensors", header, data, length)


def in_index(file_name: Any) -> Spoil:
    names = [*parameters(PHI_4)]

    def spoil(folder: Path) -> None:
        shard = _as_shard(folder).name
        write_index(folder, dict.fromkeys(names, shard) | {names[-1]: file_name})

    return spoil


def in_config(changes: dict[str, Any]) -> Spoil:
    return lambda folder: write_config(folder, {**PHI_4, **changes})


HOSTILE: dict[str, Spoil] = {
    **{f"header: {what}": in_header(*header) for what, header in HEADERS.items()},
    **{f"index: {what}": in_index(file_name) for what, file_name in FILE_NAMES.items()},
    **{f"config: {what}": in_config(changes) for what, changes in CONFIGS.items()},
    **{f"file: {what}": spoil for what, spoil in COMPANIONS.items()},
}


def test_there_are_many() -> None:
    assert len(HOSTILE) == 36 + 13 + 20 + 13 == 82


@pytest.mark.parametrize("what", HOSTILE)
def test_nothing_gets_through(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "source")
    HOSTILE[what](source)
    monkeypatch.setattr(mx, "load", lambda file: pytest.fail("MLX was given a hostile file"))
    with pytest.raises((CheckpointError, ConfigError, ConversionError)) as caught:
        convert_model(source, tmp_path / "out", FOUR)
    message = str(caught.value)
    assert message.endswith(".")
    assert len(message) < 400
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_rope_table_without_end(tmp_path: Path) -> None:
    factors = {**MINI["rope_scaling"], "long_factor": [1.0] * 1_000_000}
    source = write_model(tmp_path / "source", MINI)
    write_config(source, {**MINI, "rope_scaling": factors})
    with pytest.raises(ConfigError) as caught:
        convert_model(source, tmp_path / "out", FOUR)
    assert str(caught.value) == (
        "config.json: long_factor needs 6 numbers, one a frequency; it has 1000000."
    )
