"""Data out of files: one row a file, valid, in order, and nothing asked twice."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import phimlx
from phimlx.cli.group import cli
from phimlx.errors import GenerationError, PromptError
from phimlx.extraction import TASK, extract
from phimlx.hub.resolve import NANO_MULTIMODAL
from phimlx.prompt_file import Journal
from tests.test_prompt_file import asked

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue, or so"]},
        "sides": {"enum": [3, 4]},
        "seen": {"const": [True]},
    },
    "required": ["colour", "sides", "seen"],
    "additionalProperties": False,
}
SETTINGS = {"temperature": 0.0, "seed": 1, "max_tokens": 60}
PICTURE = str(NANO_MULTIMODAL / "pictures" / "vision-00.png")
SOUND = str(next((NANO_MULTIMODAL / "clips").glob("speech-*.flac")))


@pytest.fixture(scope="module")
def phi() -> phimlx.Phi:
    return phimlx.load("nano-multimodal", dtype="float32")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A text, a picture, a sound, and three that are none."""
    (tmp_path / "a.txt").write_text("A red square.")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "c.png").write_bytes(b"no picture")
    named = [str(tmp_path / name) for name in ("a.txt", "b.bin", "c.png", "gone.txt")]
    return [named[0], PICTURE, SOUND, *named[1:]]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_file_is_a_row_with_data_or_the_reason(
    phi: phimlx.Phi, files: list[str], tmp_path: Path
) -> None:
    result = extract(phi, files, tmp_path / "out", SCHEMA, SETTINGS)
    found = rows(tmp_path / "out")
    assert [row["file"] for row in found] == files
    for row in found[:3]:
        assert row["data"].keys() == SCHEMA["properties"].keys()  # type: ignore[attr-defined]
        assert row["data"]["seen"] == [True]
    assert [list(row) for row in found[3:]] == [["file", "error"]] * 3
    assert (result.answered, sorted(result.failed)) == (3, [4, 5, 6])
    assert found[3]["error"] == f"{files[3]} is not UTF-8 text."
    assert found[5]["error"] == f"There is no file {files[5]}."
    assert not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("place", range(3))
def test_a_row_is_what_the_model_says_of_that_file_alone(
    place: int, phi: phimlx.Phi, files: list[str], tmp_path: Path
) -> None:
    extract(phi, files[:3], tmp_path / "out", SCHEMA, SETTINGS)
    told = f"{TASK}\n{json.dumps(SCHEMA)}"
    more: dict[str, Any] = {}
    if place == 0:
        told = f"A red square.\n\n{told}"
    else:
        more["images" if place == 1 else "audio"] = [files[place]]
    prompt = [{"role": "user", "content": told}]
    reply = phi.generate(prompt, schema=SCHEMA, **SETTINGS, **more)
    assert rows(tmp_path / "out")[place]["data"] == reply.parsed


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(
    phi: phimlx.Phi, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, target = tmp_path / "whole", tmp_path / "out"
    extract(phi, files, whole, SCHEMA, SETTINGS)
    add = Journal.add

    def add_two(journal: Journal, *given: Any) -> None:
        if len(journal._places) == 2:
            raise KeyboardInterrupt
        add(journal, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add_two)
        with pytest.raises(KeyboardInterrupt):
            extract(phi, files, target, SCHEMA, SETTINGS)
    seen = asked(phi, monkeypatch)
    result = extract(phi, files, target, SCHEMA, SETTINGS)
    assert (result.kept, len(seen)) == (2, 1)
    assert target.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("change", ["file", "schema", "task", "settings"])
def test_what_has_changed_is_asked_again(
    change: str, phi: phimlx.Phi, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(schema: Any, task: str, **more: Any) -> int:
        seen = asked(phi, monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "finish", lambda *given: None)  # killed before the end
            extract(phi, files[:1], tmp_path / "out", schema, SETTINGS | more, task=task)
        return len(seen)

    assert [run(SCHEMA, TASK), run(SCHEMA, TASK)] == [1, 0]
    if change == "file":
        Path(files[0]).write_text("A blue one.")
    schema = {**SCHEMA, "title": "x"} if change == "schema" else SCHEMA
    more = {"seed": 2} if change == "settings" else {}
    assert run(schema, "Say:" if change == "task" else TASK, **more) == 1


def test_a_cut_answer_is_no_data(phi: phimlx.Phi, files: list[str], tmp_path: Path) -> None:
    result = extract(phi, files[:1], tmp_path / "out", SCHEMA, SETTINGS | {"max_tokens": 3})
    why = "The answer was cut after 3 tokens."
    assert rows(tmp_path / "out") == [{"file": files[0], "error": why}]
    assert (result.answered, result.failed) == (0, {1: why})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schema", "columns"), [(SCHEMA, ["colour", "sides", "seen"]), ({"const": [True]}, ["data"])]
)
def test_a_table_has_a_column_for_each_property(
    schema: Any, columns: list[str], phi: phimlx.Phi, files: list[str], tmp_path: Path
) -> None:
    extract(phi, files[:4], tmp_path / "a", schema, SETTINGS)
    extract(phi, files[:4], tmp_path / "b", schema, SETTINGS, form="csv")
    head, *table = csv.reader(io.StringIO((tmp_path / "b").read_text(), newline=""))
    assert head == ["file", *columns, "error"]
    for cells, row in zip(table, rows(tmp_path / "a"), strict=True):
        assert (cells[0], cells[-1]) == (row["file"], row.get("error", ""))
        data = row.get("data")
        values = [data[name] for name in columns] if isinstance(data, dict) else [data]
        if data is not None:
            assert cells[1:-1] == [v if isinstance(v, str) else json.dumps(v) for v in values]


def test_an_output_that_is_there_stays(phi: phimlx.Phi, files: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(PromptError, match="exists already"):
        extract(phi, files, tmp_path / "out", SCHEMA, SETTINGS)
    with pytest.raises(GenerationError, match="nowhere"):
        extract(phi, files, tmp_path / "nowhere" / "out", SCHEMA, SETTINGS)


# The command


def run(*arguments: str) -> Result:
    given = ["--model", "nano-multimodal", "--temp", "0", "--seed", "1", *arguments]
    return CliRunner().invoke(cli, ["extract", *given], prog_name="phimlx")


@pytest.mark.slow
def test_the_command(files: list[str], tmp_path: Path) -> None:
    target = tmp_path / "o.csv"
    done = run(*files[:3], "--schema", json.dumps(SCHEMA), "-o", str(target))
    assert (done.exit_code, done.stdout) == (0, f"3 replies are in {target}.\n")
    assert target.read_text().startswith("file,colour,sides,seen,error\n")
    target.unlink()
    done = run(files[0], "--schema", json.dumps(SCHEMA), "-o", str(target))
    assert (done.exit_code, done.stdout) == (0, f"1 reply is in {target}.\n")


def test_the_same_fault_of_many_files_is_said_once(files: list[str], tmp_path: Path) -> None:
    target = tmp_path / "o.jsonl"
    alike = [tmp_path / f"{number}.txt" for number in range(5)]
    for file in alike:
        file.write_text("A red square.")
    arguments = ["--schema", json.dumps(SCHEMA), "-o", str(target), "--max-tokens", "3"]
    done = run(*map(str, alike), *files[3:4], *arguments)
    assert done.exit_code == 1
    first = ", ".join(map(str, alike[:3]))
    assert done.stderr == (
        f"The answer was cut after 3 tokens. So it is with 5 files: {first} and 2 more.\n"
        f"{files[3]} is not UTF-8 text.\n"
        f"Error: 6 of 6 files could not be answered: {first} and 3 more.\n"
        f"Hint: {target} has the reason in the place of each.\n"
    )


def test_a_file_that_failed_is_told_by_its_path(files: list[str], tmp_path: Path) -> None:
    target = tmp_path / "o.jsonl"
    arguments = ["--schema", json.dumps(SCHEMA), "-o", str(target), "--json"]
    done = run(files[3], *arguments)
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert told["error"]["message"] == f"1 of 1 file could not be answered: {files[3]}."
    assert told["failed"] == {files[3]: f"{files[3]} is not UTF-8 text."}


@pytest.mark.parametrize("missing", ["--schema", "-o"])
def test_what_must_be_given(missing: str, files: list[str], tmp_path: Path) -> None:
    given = {"--schema": "a", "-o": str(tmp_path / "out")}
    del given[missing]
    done = run(*files, *(word for pair in given.items() for word in pair))
    assert done.exit_code == 2
    assert f"Missing option '{'--output' if missing == '-o' else missing}'" in done.stderr
