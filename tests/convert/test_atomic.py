"""Whole or not at all: what a kill leaves, what the next run makes of it, and two runs at once."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from convert import ConversionResult
from convert import convert as convert_model
from convert.folder import discard, new_file
from phimlx.errors import ConversionError
from tests.convert.tiny import PHI_4, failing, parameters, plan, same_bits, weights_of, write_model

KILLED = """
import os, signal, sys
from convert import ConversionRequest, plan, plan_conversion
plan.JOURNAL_BYTES = int(sys.argv[4])
planned = plan_conversion(ConversionRequest(sys.argv[1], sys.argv[2]))
done = []
def advance(nbytes):
    done.append(nbytes)
    if len(done) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
planned.run(advance)
"""


def killed(source: Path, out: Path, tensors: int, journal_bytes: int) -> Path:
    """What a run leaves that is killed when it has dealt with so many tensors."""
    arguments = [str(source), str(out), str(tensors), str(journal_bytes)]
    ended = subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    leftover = out.parent / f".{out.name}.partial"
    assert leftover.is_dir()
    return leftover


def test_a_killed_run_leaves_no_output_and_the_next_one_none_of_it(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    leftover = killed(source, out, 8, 1 << 30)
    (leftover / "deep" / "er").mkdir(parents=True)
    (leftover / "stray.bin").touch()
    assert convert_model(source, out).continued == 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert same_bits(weights_of(out), parameters(PHI_4))


def test_a_killed_run_is_continued(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    leftover = killed(source, out, 8, 1)
    (leftover / "stray.bin").touch()
    seen: list[int] = []
    planned = plan(source, out)
    result = planned.run(seen.append)
    done = [step.nbytes for step in planned.tensors.conversions]
    assert result.continued == seen[0] == sum(done[: len(done) - len(seen) + 1]) > 0
    assert sum(seen) == planned.bytes_before
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert same_bits(weights_of(out), parameters(PHI_4))


@pytest.mark.slow
@pytest.mark.parametrize("change", ["plan", "source", "journal", "version"])
def test_a_killed_run_of_another_plan_is_not_continued(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    leftover = killed(source, out, 8, 1)
    weights, dtype = parameters(PHI_4), None
    if change == "plan":
        dtype = "float16"
        weights = parameters(PHI_4, mx.float16)
    elif change == "source":
        weights = {name: array * 2 for name, array in weights.items()}
        write_model(source, PHI_4, weights)
    elif change == "journal":
        (leftover / ".journal.json").write_text("[]")
    else:
        monkeypatch.setattr("phimlx.__version__", "0.0.0")
    assert convert_model(source, out, dtype=dtype).continued == 0
    assert same_bits(weights_of(out), weights)


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    first, second = plan(source, out), plan(source, out)
    results: list[ConversionResult] = []
    errors: list[ConversionError] = []

    def in_between(nbytes: int) -> None:
        if not errors:
            with pytest.raises(ConversionError) as caught:
                second.run()
            errors.append(caught.value)

    results.append(first.run(in_between))
    assert str(errors[0]) == f"{out} is being written by another process."
    assert errors[0].hint == "Wait for it, or stop it."
    assert same_bits(weights_of(out), parameters(PHI_4))
    with pytest.raises(ConversionError, match="exists already"):
        second.run()


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"

    def appear(nbytes: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "precious").touch()

    with pytest.raises(ConversionError) as caught:
        plan(source, out).run(appear)
    assert str(caught.value) == f"{out} cannot be written: directory not empty."
    assert [path.name for path in out.iterdir()] == ["precious"]
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_a_leftover_that_another_process_holds_is_left_alone(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").touch()
    descriptor = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    error = failing(source, out)
    os.close(descriptor)
    assert str(error) == f"{out} is being written by another process."
    assert (tmp_path / ".out.partial" / "half").exists()


def test_a_folder_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    theirs = tmp_path / ".out.partial"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("precious")
    with pytest.raises(ConversionError) as caught:
        convert_model(source, out)
    assert str(caught.value) == f"{theirs} was not made by phimlx, so it is left alone."
    assert caught.value.hint == "Move it elsewhere, or choose another output."
    with pytest.raises(ConversionError), new_file(out, "plan"):
        pass
    assert {path.name: path.read_text() for path in theirs.iterdir()} == {"thesis.txt": "precious"}
    (theirs / "thesis.txt").unlink()
    convert_model(source, out)  # an empty one is nobody's loss
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    assert not (out / ".phimlx").exists()


def test_a_removal_that_was_cut_short_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    leftover = killed(source, out, 8, 1)
    with monkeypatch.context() as cut:
        cut.setattr(Path, "unlink", fail)
        discard(leftover)
    assert {".phimlx", ".journal.json"} <= {path.name for path in leftover.iterdir()}
    discard(leftover)
    assert not leftover.exists()
