"""Headers of GGUF files, whole ones and hostile ones."""

from __future__ import annotations

import contextlib
import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phimlx.checkpoint.gguf import header as module
from phimlx.checkpoint.gguf.header import read_header
from phimlx.errors import CheckpointError
from tests.checkpoint.gguf.writer import Described, Written, text, value

DAMAGED = "x.gguf is not a whole GGUF file: "
HUGE = 2**60


def tensor(name: str = "a.weight", **changes: Any) -> Described:
    return Described(**{"name": name, "shape": (2, 8), "data": bytes(64), **changes})


def read(path: Path, written: Written | bytes) -> Any:
    file = path / "x.gguf"
    file.write_bytes(written if isinstance(written, bytes) else written.bytes())
    return read_header(file)


def test_a_whole_header(tmp_path: Path) -> None:
    given_settings = {
        "general.architecture": "phi3",
        "phi3.block_count": 4,
        "phi3.rope.freq_base": 0.5,
        "flag": True,
        "long": struct.pack("<IQ", 10, 2**63),
        "tokens": ["a", "ä", ""],
        "types": [1, -3],
        "latin": struct.pack("<I", 8) + text(b"\xe9"),
    }
    tensors = [
        tensor("a.weight"),
        tensor("b.weight", shape=(2, 64), type=8, data=bytes(2 * 68)),
        tensor("c.weight", shape=(3, 256), type=16, data=bytes(198)),
        tensor("d.bias", shape=(5,), data=bytes(20)),
    ]
    found = read(tmp_path, Written(given_settings, tensors))
    expected = {**given_settings, "long": 2**63, "latin": "\udce9"}
    assert {**found.settings, "types": found.settings["types"].tolist()} == expected
    a, b, c, d = found.tensors.values()
    assert (a.shape, a.type_name, a.nbytes) == ((2, 8), "F32", 64)
    assert (b.shape, b.type_name, b.nbytes) == ((2, 64), "Q8_0", 136)
    assert (c.shape, c.type_name, c.type) == ((3, 256), "IQ2_XXS", None)
    assert (d.shape, d.nbytes) == ((5,), 20)
    assert b.offset - a.offset == 64
    assert c.offset - b.offset == 160
    assert a.offset % 32 == 0


def test_another_alignment(tmp_path: Path) -> None:
    written = Written({"general.alignment": 128}, [tensor("a"), tensor("b")], alignment=128)
    a, b = read(tmp_path, written).tensors.values()
    assert (a.offset % 128, b.offset - a.offset) == (0, 128)


def test_version_2(tmp_path: Path) -> None:
    assert read(tmp_path, Written({"a": 1}, version=2)).settings == {"a": 1}


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IIQ", 9, kind, count) + data


def string(length: int) -> bytes:
    return struct.pack("<IQ", 8, length)


BAD_SETTINGS = {
    "a string of 2^60 bytes": (string(HUGE), "it ends within its header"),
    "a string of 2^64 - 1 bytes": (string(2**64 - 1), "it ends within its header"),
    "2^60 strings": (array(8, HUGE), "its lists count over 2097152 strings"),
    "2^60 numbers": (array(4, HUGE), "it ends within its header"),
    "2^64 - 1 numbers of 8 bytes": (array(10, 2**64 - 1), "it ends within its header"),
    "a list of lists": (array(9, 1, array(4, 1)[4:]), "'bad' is a list of lists"),
    "2^60 lists": (array(9, HUGE), "'bad' is a list of lists"),
    "a list of what": (array(77, 1), "'bad' is of the unknown type 77"),
    "an unknown type": (struct.pack("<I", 13), "'bad' has the unknown type 13"),
    "a number cut short": (struct.pack("<IH", 10, 1), "it ends within its header"),
}
BAD_ALIGNMENTS = {
    "0": 0,
    "3": 3,
    "True": True,
    "0.5": 0.5,
    "'32'": "32",
    "-32": struct.pack("<Ii", 5, -32),
    "array([32, 32], dtype=int32)": [32, 32],
}
BAD_TENSORS = {
    "an offset outside": (
        [tensor(offset=HUGE)],
        f"'a.weight' ends at byte {HUGE + 160}, and the file at 160",
    ),
    "an offset at the end": (
        [tensor(data=b"", offset=32)],
        "'a.weight' ends at byte 192, and the file at 96",
    ),
    "an odd offset": ([tensor(offset=1)], "'a.weight' begins at 1, not a multiple of 32"),
    "an overflowing offset": (
        [tensor(offset=2**64 - 32)],
        f"'a.weight' ends at byte {2**64 + 128}, and the file at 160",
    ),
    "one place twice": (
        [tensor("a"), tensor("b", offset=0)],
        "'a' and 'b' overlap",
    ),
    "half a place twice": (
        [tensor("a"), tensor("b", offset=32)],
        "'a' and 'b' overlap",
    ),
    "one name twice": ([tensor("a"), tensor("a")], "it has the tensor 'a' twice"),
    "no name": ([tensor("")], "the name of a tensor has 0 bytes, of 1 to 256"),
    "a long name": ([tensor("a" * 257)], "the name of a tensor has 257 bytes, of 1 to 256"),
    "no dimension": ([tensor(shape=())], "'a.weight' has 0 dimensions, of 1 to 4"),
    "5 dimensions": ([tensor(shape=(1,) * 5)], "'a.weight' has 5 dimensions, of 1 to 4"),
    "no rows": ([tensor(shape=(0, 8))], "'a.weight' has the impossible shape [0, 8]"),
    "2^62 rows": (
        [tensor(shape=(2**62, 2**62))],
        f"'a.weight' has the impossible shape [{2**62}, {2**62}]",
    ),
    "a product that overflows to 0": (
        [tensor(shape=(2**32, 2**32))],
        f"'a.weight' has the impossible shape [{2**32}, {2**32}]",
    ),
    "more rows than bytes": (
        [tensor(shape=(2**30, 8))],
        f"'a.weight' ends at byte {2**35 + 96}, and the file at 160",
    ),
    "a width that blocks do not divide": (
        [tensor(type=8)],
        "'a.weight' is 8 wide, which blocks of 32 do not divide",
    ),
}


def failing(path: Path, written: Written | bytes) -> CheckpointError:
    """Read what cannot be read, in time and memory that the file does not choose."""
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        read(path, written)
    assert time.process_time() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert len(str(caught.value)) < 300
    return caught.value


@pytest.mark.parametrize("kind", BAD_SETTINGS)
def test_bad_settings(tmp_path: Path, kind: str) -> None:
    bad, why = BAD_SETTINGS[kind]
    error = failing(tmp_path, Written({"good": 1, "bad": bad}))
    assert str(error) == f"{DAMAGED}{why}."
    assert error.hint == "Download the file again, or get the original model's folder."


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_bad_tensors(tmp_path: Path, kind: str) -> None:
    tensors, why = BAD_TENSORS[kind]
    assert str(failing(tmp_path, Written({}, tensors))) == f"{DAMAGED}{why}."


@pytest.mark.parametrize("shown", BAD_ALIGNMENTS)
def test_bad_alignments(tmp_path: Path, shown: str) -> None:
    error = failing(tmp_path, Written({"general.alignment": BAD_ALIGNMENTS[shown]}, [tensor()]))
    assert str(error) == f"{DAMAGED}its alignment is {shown}, not a power of two."


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tensor_count": 10**9}, "it counts 1000000000 tensors, of at most 65536"),
        ({"tensor_count": 2**64 - 1}, f"it counts {2**64 - 1} tensors, of at most 65536"),
        ({"setting_count": 10**9}, "it counts 1000000000 settings, of at most 65536"),
        ({"tensor_count": 60000}, "the name of a tensor has 0 bytes, of 1 to 256"),
        ({"setting_count": 60000}, "the name of a setting has 0 bytes, of 1 to 256"),
        ({"settings": {"a": 1}, "twice": ["a"]}, "it has the setting 'a' twice"),
        ({"settings": {"": 1}}, "the name of a setting has 0 bytes, of 1 to 256"),
    ],
)
def test_bad_counts_and_keys(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    assert str(failing(tmp_path, Written(**changes))) == f"{DAMAGED}{why}."


def test_names_that_are_no_text(tmp_path: Path) -> None:
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"\xff") + value(1)
    assert str(failing(tmp_path, data)) == f"{DAMAGED}the name of a setting is not UTF-8 text."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "x.gguf is not a GGUF file."),
        (b"GG", "x.gguf is not a GGUF file."),
        (b"PK\3\4" + bytes(60), "x.gguf is not a GGUF file."),
        (b"GGUF", f"{DAMAGED}it ends within its header."),
        (b"GGUF" + bytes(2), f"{DAMAGED}it ends within its header."),
        (Written(version=1).bytes(), "x.gguf is GGUF version 1, and versions 2 and 3 are read."),
        (Written(version=4).bytes(), "x.gguf is GGUF version 4, and versions 2 and 3 are read."),
        (
            b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
            "x.gguf is a GGUF file of big-endian machines, and only little-endian ones are read.",
        ),
    ],
)
def test_other_files(tmp_path: Path, data: bytes, message: str) -> None:
    error = failing(tmp_path, data)
    assert str(error) == message
    assert error.hint


def test_a_header_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HEADER", 1_000_000)
    file = tmp_path / "x.gguf"
    file.write_bytes(Written({"a": string(1 << 40)}).bytes())
    os.truncate(file, 1 << 42)  # a sparse file
    with pytest.raises(CheckpointError, match=r"its header is larger than 1\.00 MB"):
        read_header(file)


def test_pipes_and_folders(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path, what in (
        (tmp_path / "pipe.gguf", "is not a regular file"),
        (tmp_path / "none.gguf", "There is no file"),
    ):
        with pytest.raises(CheckpointError, match=what):
            read_header(path)


WHOLE = Written(
    {"general.architecture": "phi3", "tokens": ["a", "b"], "types": [1, 2], "eps": 1e-5},
    [tensor("a"), tensor("b", shape=(2, 64), type=8, data=bytes(136))],
).bytes()


@settings(max_examples=300, deadline=None)
@given(
    place=st.integers(0, len(WHOLE) - 1),
    size=st.sampled_from((1, 4, 8)),
    found=st.integers(0, 2**64 - 1) | st.sampled_from((0, 1, 2**31, 2**32, HUGE, 2**64 - 1)),
    end=st.none() | st.integers(0, len(WHOLE)),
)
def test_any_change_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: int, size: int, found: int, end: int | None
) -> None:
    data = bytearray(WHOLE)
    data[place : place + size] = struct.pack("<Q", found)[:size]
    file = tmp_path_factory.getbasetemp() / "x.gguf"
    file.write_bytes(data[:end])
    with contextlib.suppress(CheckpointError):
        for each in read_header(file).tensors.values():
            assert each.type is None or each.offset + each.nbytes <= len(data[:end])
