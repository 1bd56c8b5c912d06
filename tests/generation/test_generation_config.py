"""generation_config.json as it comes: what is meant, and what is said of the rest."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import phimlx
from phimlx.cli.group import cli
from phimlx.generation.generation_config import GenerationConfig
from phimlx.generation.sampler import RANGES, Sampling
from phimlx.hub.resolve import NANO


def read(folder: Path, content: bytes) -> GenerationConfig:
    (folder / "generation_config.json").write_bytes(content)
    return GenerationConfig.read(folder)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("top_k", -1, 0),
        ("top_k", 0, 0),
        ("top_k", 50.0, 50),
        ("top_k", "50", 50),
        ("top_k", 10**30, 10**30),
        ("temperature", 1, 1),
        ("temperature", "0.7", 0.7),
        ("top_p", 1, 1),
        ("min_p", 0, 0),
        ("do_sample", "true", True),
        ("do_sample", "False", False),
        ("do_sample", 1, True),
        ("eos_token_id", 7, [7]),
        ("eos_token_id", [7, 8.0], [7, 8]),
        ("eos_token_id", "7", [7]),
        ("eos_token_id", -1, []),
        ("eos_token_id", [None, 7], [7]),
    ],
)
def test_what_is_meant(key: str, value: Any, expected: Any) -> None:
    found = GenerationConfig.of({key: value})
    assert (found.values, found.remarks) == ({key: expected}, ())


def test_no_share_of_the_probability_means_the_likeliest_token() -> None:
    assert GenerationConfig.of({"top_p": 0.0, "top_k": 50}).values == {"top_p": 1.0, "top_k": 1}


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("top_k", -2, "a whole number, 0 or -1 for no limit"),
        ("top_k", 0.5, "a whole number"),
        ("top_k", [50], "a number"),
        ("top_p", 1.5, "from 0 to 1"),
        ("temperature", -1, "0 or more"),
        ("temperature", float("nan"), "a number"),
        ("temperature", float("inf"), "a number"),
        ("temperature", 10**400, "a number"),
        ("temperature", "warm", "a number"),
        ("temperature", True, "a number"),
        ("repetition_penalty", 0, "above 0"),
        ("do_sample", "perhaps", "true or false"),
        ("do_sample", {}, "true or false"),
        ("eos_token_id", [[2]], "a number"),
        ("eos_token_id", list(range(1001)), "a token or a list of some"),
    ],
)
def test_what_is_left_out(key: str, value: Any, what: str) -> None:
    found = GenerationConfig.of({key: value, "min_p": 0.25})
    assert found.values == {"min_p": 0.25}
    (remark,) = found.remarks
    assert remark.startswith(f"generation_config.json: {key} is ")
    assert remark.endswith(f", not {what}; it is left out.")
    assert len(remark) < 200


@pytest.mark.parametrize("content", [b"", b" \n", b"\xef\xbb\xbf", b"{}", b"{,}"])
def test_an_empty_file(tmp_path: Path, content: bytes) -> None:
    assert read(tmp_path, content) == GenerationConfig()


def test_no_file(tmp_path: Path) -> None:
    assert GenerationConfig.read(tmp_path) == GenerationConfig()


@pytest.mark.parametrize(
    "content",
    [
        b'{"eos_token_id": [7, 8,], "temperature": 0.7,}',
        b'{"eos_token_id": [7, 8 , \n ],\n"temperature": 0.7 ,\n}\n',
        b'\xef\xbb\xbf{"a": ",}", "b\\",]": "\\\\", "eos_token_id": [7, 8], "temperature": 0.7,\t}',
    ],
)
def test_trailing_commas(tmp_path: Path, content: bytes) -> None:
    expected = GenerationConfig({"eos_token_id": [7, 8], "temperature": 0.7})
    assert read(tmp_path, content) == expected


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'"x', b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000, b"null"]
)
def test_a_file_that_is_no_table(tmp_path: Path, content: bytes) -> None:
    found = read(tmp_path, content)
    assert found.values == {}
    (remark,) = found.remarks
    assert remark.startswith(str(tmp_path / "generation_config.json"))
    assert remark.endswith(": its settings are left out.")


@pytest.mark.parametrize("kind", ["pipe", "folder", "large"])
def test_no_regular_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "generation_config.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    assert len(GenerationConfig.read(tmp_path).remarks) == 1


@pytest.mark.parametrize("unit", [b'\\"', b"\\", b",", b", ", b'",', b'"'])
def test_reading_takes_time_in_proportion(tmp_path: Path, unit: bytes) -> None:
    start = time.process_time()
    read(tmp_path, (b'{"' + unit * 1_000_000)[:1_000_000])
    assert time.process_time() - start < 2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["do_sample", "eos_token_id", *RANGES]), json_values))
def test_anything_loads(tmp_path: Path, written: dict[str, Any]) -> None:
    found = read(tmp_path, json.dumps(written).encode())
    Sampling.defaults(found.values, {})
    assert all(type(token) is int for token in found.values.get("eos_token_id", ()))


def test_commands_name_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(NANO, folder)
    (folder / "generation_config.json").write_text('{"temperature": "warm", "top_k": -1,}')
    assert phimlx.load(folder).sampling.top_k == 0
    for command in (("show",), ("generate", "--prompt", "Hello", "--max-tokens", "1", "--model")):
        result = CliRunner().invoke(cli, [*command, str(folder)])
        assert result.exit_code == 0
        assert (
            "generation_config.json: temperature is 'warm', not a number; it is left out."
            in result.stderr
        )
