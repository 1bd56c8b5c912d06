"""Rows from files of every kind, splits from files, folders and the Hub."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from phimlx.errors import DownloadError, PhimlxError, TrainingError
from phimlx.hub.client import Remote
from phimlx.hub.transfer import DownloadPlan, ProgressCallback
from phimlx.training.data.rows import DataFile, Problem, Row, read_rows
from phimlx.training.data.sources import find_splits
from tests.hub.loopback_datasets import serve_datasets
from tests.hub.loopback_hub import Fault, Hub

ROWS: list[dict[str, Any]] = [
    {"prompt": "One, “two”?", "completion": "Zwei\nLinien"},
    {"prompt": "ünï", "completion": 'a, "b"'},
    {"prompt": "x\u2028y", "completion": "z"},
]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[dict[str, str]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet  # type: ignore[import-untyped]

    sink = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def rows_of(folder: Path, name: str, content: bytes) -> list[Row | Problem]:
    path = folder / name
    path.write_bytes(content)
    return list(read_rows([DataFile(path, name)]))


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("d.jsonl", jsonl(ROWS), ["line 1", "line 2", "line 3"]),
        ("d.ndjson", b"\xef\xbb\xbf\n" + jsonl(ROWS), ["line 2", "line 3", "line 4"]),
        ("d.json", json.dumps(ROWS, indent=2).encode(), ["row 1", "row 2", "row 3"]),
        ("d.json", json.dumps({"data": ROWS}).encode(), ["row 1", "row 2", "row 3"]),
        ("d.json", jsonl(ROWS), ["line 1", "line 2", "line 3"]),
        ("d.csv", table(ROWS), ["line 2", "line 4", "line 5"]),
        ("d.CSV", b"\xef\xbb\xbf" + table(ROWS), ["line 2", "line 4", "line 5"]),
        ("d.tsv", table(ROWS, "\t"), ["line 2", "line 4", "line 5"]),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(
    tmp_path: Path, name: str, content: bytes, places: list[str]
) -> None:
    expected = [Row(f"{name}, {place}", row) for place, row in zip(places, ROWS, strict=True)]
    assert rows_of(tmp_path, name, content) == expected


CELLS = st.text(st.sampled_from("ab ,;|\t\"'é\n"), min_size=1, max_size=8)


@pytest.mark.parametrize("name", ["d.csv", "d.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@settings(max_examples=15)
@given(
    rows=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=4),
    is_quoted=st.booleans(),
    sep=st.booleans(),
)
def test_columns_are_parted_by_what_parts_the_header(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    delimiter: str,
    end: str,
    rows: list[tuple[str, ...]],
    is_quoted: bool,
    sep: bool,
) -> None:
    if end == "\r" and not is_quoted:  # the writer would leave line feeds bare
        rows = [tuple(cell.replace("\n", " ") for cell in row) for row in rows]
    text = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if is_quoted else csv.QUOTE_MINIMAL
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)
    header = ("prompt", "completion", "id")
    writer.writerows([header, *rows])
    content = (f"sep={delimiter}{end}" if sep else "") + text.getvalue()
    found = rows_of(tmp_path_factory.mktemp("d"), name, content.encode())
    assert [row.values for row in found if isinstance(row, Row)] == [
        dict(zip(header, row, strict=True)) for row in rows
    ]


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ("text\na; b | c\n", {"text": "a; b | c"}),
        ("text;\nHello\n", {"text;": "Hello"}),
        ("prompt,completion;x\na,b;c\n", {"prompt": "a", "completion;x": "b;c"}),
        ("prompt;completion, x\na;b\nc;d\n", {"prompt": "a", "completion, x": "b"}),
        ('prompt;completion\na;b\n"c"d;e\n', {"prompt": "a", "completion": "b"}),
        ("prompt|completion\na, b|c; d\n", {"prompt": "a, b", "completion": "c; d"}),
        (",prompt,completion\n0,a,b\n", {"Unnamed: 0": "0", "prompt": "a", "completion": "b"}),
        (";prompt;\n0;a;\n", {"Unnamed: 0": "0", "prompt": "a", "Unnamed: 2": ""}),
    ],
)
def test_what_else_might_part_columns(tmp_path: Path, content: str, values: dict[str, str]) -> None:
    first = rows_of(tmp_path, "d.csv", content.encode())[0]
    assert first == Row("d.csv, line 2", values)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
@pytest.mark.parametrize("end", [b"\r", b"\r\n", b"\n", b"\r\r\n"])
@pytest.mark.parametrize("last", [b"", b"\r", b"\n"])
def test_lines_end_as_any_system_ends_them(
    tmp_path: Path, name: str, end: bytes, last: bytes
) -> None:
    lines = [json.dumps(row).encode() for row in ROWS]
    found = rows_of(tmp_path, name, end.join(lines) + last)
    assert [row.values for row in found if isinstance(row, Row)] == ROWS
    assert len(found) == len(ROWS)
    if end == b"\r":
        assert rows_of(tmp_path, name, end.join([*lines, b'{"a": '])) == [
            *found,
            Problem(f"{name}, line 4", "The file ends in the middle of this row."),
        ]


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "p", "completion": None}]
    expected = [Row(f"d.parquet, row {i}", row) for i, row in enumerate(rows, 1)]
    assert rows_of(tmp_path, "d.parquet", parquet(rows)) == expected


def test_a_json_file_of_one_object_is_one_row(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "d.json", b'{"text": "a"}\n') == [Row("d.json, row 1", {"text": "a"})]


def test_the_last_line_needs_no_line_break(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "d.jsonl", b'{"text": "a"}') == [Row("d.jsonl, line 1", {"text": "a"})]


@pytest.mark.slow
@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.text()), min_size=1))
def test_jsonl_gives_back_whatever_json_writes(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]
) -> None:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    found = rows_of(tmp_path_factory.mktemp("rows"), "d.jsonl", content)
    assert [row.values for row in found] == rows


@given(
    st.lists(
        st.tuples(*[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))] * 2)
    )
)
def test_csv_gives_back_whatever_csv_writes(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]]
) -> None:
    rows = [{"prompt": one, "completion": other} for one, other in cells]
    content = table([{"prompt": "p", "completion": "c"}, *rows])
    found = rows_of(tmp_path_factory.mktemp("rows"), "d.csv", content)
    assert [row.values for row in found[1:]] == rows


def test_progress_counts_bytes_over_all_files(tmp_path: Path) -> None:
    files = []
    for name, content in (("a.jsonl", jsonl(ROWS)), ("b.json", jsonl(ROWS)), ("c.csv", b"")):
        (tmp_path / name).write_bytes(content)
        files.append(DataFile(tmp_path / name, name))
    seen: list[tuple[int, int]] = []
    assert len(list(read_rows(files, lambda done, total: seen.append((done, total))))) == 7
    size = len(jsonl(ROWS))
    first = len(jsonl(ROWS[:1]))
    assert seen[0] == (first, 2 * size)
    assert seen[-1] == (2 * size, 2 * size)
    assert seen == sorted(seen)


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    found = rows_of(tmp_path, "d.csv", b"text\n" + b"a" * 200_000 + b"\n")
    assert [len(row.values["text"]) for row in found] == [200_000]
    assert csv.field_size_limit() == 131_072  # whose module is everybody's


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none.jsonl", f"There is no file {tmp_path / 'none.jsonl'}."),
        (tmp_path / "d.json", f"{tmp_path / 'd.json'} is not a regular file."),
    ):
        (tmp_path / "d.json").mkdir(exist_ok=True)
        with pytest.raises(TrainingError) as caught:
            list(read_rows([DataFile(path, path.name)]))
        assert str(caught.value) == message


# Folders


def write(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(jsonl(ROWS))


def names_of(source: str | Path, remote: Remote | None = None) -> dict[str, list[str]]:
    splits = find_splits(source, remote)
    return {split: [file.name for file in files] for split, files in splits.items()}


@pytest.mark.parametrize("valid", ["valid.jsonl", "validation.csv", "val.json"])
def test_a_folder_holds_splits(tmp_path: Path, valid: str) -> None:
    write(tmp_path, "test.jsonl", "train.jsonl", valid, "train_old.jsonl", "notes.txt")
    expected = {"train": ["train.jsonl"], "valid": [valid], "test": ["test.jsonl"]}
    assert names_of(tmp_path) == expected
    assert list(names_of(tmp_path)) == ["train", "valid", "test"]


def test_a_folder_may_hold_parts_of_a_split(tmp_path: Path) -> None:
    parts = [f"train-0000{i}-of-00002.jsonl" for i in range(2)]
    write(tmp_path, *parts)
    assert names_of(tmp_path) == {"train": parts}


BESIDE = [
    *("train.py", "train.jsonl.bak", "train.jsonl~", "train.sh", "train.log", "train.txt"),
    *("test.py", "valid.yaml", "val.ipynb", "._train.jsonl", ".train.jsonl.swp", "train.jsonl.gz"),
]


@pytest.mark.parametrize("beside", [*([name] for name in BESIDE), BESIDE])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".JSON"])
def test_what_lies_beside_data_is_none(tmp_path: Path, beside: list[str], suffix: str) -> None:
    write(tmp_path, f"train{suffix}", f"valid{suffix}", *beside)
    assert names_of(tmp_path) == {"train": [f"train{suffix}"], "valid": [f"valid{suffix}"]}


def test_a_split_that_is_compressed_is_not_left_out(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", "valid.jsonl.gz", "valid.py")
    assert names_of(tmp_path) == {"train": ["train.jsonl"], "valid": ["valid.jsonl.gz"]}


def test_a_file_is_all_training_data(tmp_path: Path) -> None:
    write(tmp_path, "mine.jsonl")
    assert names_of(str(tmp_path / "mine.jsonl")) == {"train": ["mine.jsonl"]}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["valid.jsonl"], "{} has no training data: no file train.*."),
        (["train.csv", "train.jsonl"], "{} has both train.csv and train.jsonl."),
        (["train.jsonl", "val.jsonl", "valid.jsonl"], "{} has both val.jsonl and valid.jsonl."),
        (
            ["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"],
            "{} has only 2 of the 3 parts of train.jsonl.",
        ),
    ],
)
def test_a_folder_that_does_not_say_what_to_learn(
    tmp_path: Path, names: list[str], message: str
) -> None:
    write(tmp_path, *names)
    with pytest.raises(TrainingError) as caught:
        find_splits(tmp_path)
    assert str(caught.value) == message.format(tmp_path)


@pytest.mark.parametrize("source", ["nowhere", "here/train.jsonl", "/nowhere/at/all", "a b/c"])
def test_a_source_that_is_nothing(tmp_path: Path, source: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainingError) as caught:
        find_splits(source)
    assert str(caught.value) == f"There is no data {source}."


# The Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve_datasets(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def quick() -> Remote:
    return Remote(wait=lambda seconds: None)


def card(*configs: dict[str, Any]) -> bytes:
    """A data set's card; JSON is YAML."""
    return b"---\n" + json.dumps({"configs": list(configs)}).encode() + b"\n---\n# Words\n"


SHARDS = [f"data/train-0000{i}-of-00002.jsonl" for i in range(2)]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train.jsonl"], {"train": ["train.jsonl"]}),
        (["everything.jsonl", "LICENSE"], {"train": ["everything.jsonl"]}),
        ([*SHARDS, "data/dev.jsonl"], {"train": SHARDS, "valid": ["data/dev.jsonl"]}),
        (
            ["training/a.csv", "training/b.csv", "my_evaluation_2.csv", "other.csv"],
            {"train": ["training/a.csv", "training/b.csv"], "test": ["my_evaluation_2.csv"]},
        ),
        (["test_results/train.csv"], {"train": ["test_results/train.csv"]}),
        (["train.csv", "train.jsonl"], {"train": ["train.jsonl"]}),
    ],
)
def test_names_on_the_hub_tell_splits(
    hub: Hub, files: list[str], expected: dict[str, list[str]]
) -> None:
    hub.repos["o/d"] = {name: jsonl([{"text": name}]) for name in files}
    assert names_of("o/d", quick()) == expected
    assert sorted(set(hub.requested)) == sorted(
        name for names in expected.values() for name in names
    )
    assert hub.authorizations["hub/api/datasets/o/d"] == "Bearer hf_secret"


PLAIN = {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}
PAIRS = {
    "config_name": "pairs",
    "data_files": [
        {"split": "train_prefs", "path": ["p/a.jsonl", "p/b.jsonl"]},
        {"split": "validation", "path": "p/v*"},
    ],
}
FOLDER = {"config_name": "folder", "data_dir": "p"}
TEXT = {"config_name": "text", "data_files": "data/*.jsonl"}


@pytest.mark.parametrize(
    ("configs", "source", "expected"),
    [
        ([PLAIN, PAIRS], "o/d", {"train": SHARDS}),
        ([PAIRS], "o/d:train_prefs", {"train": ["p/a.jsonl", "p/b.jsonl"]}),
        ([TEXT, PAIRS], "o/d:text", {"train": SHARDS}),
        ([PAIRS, TEXT | {"default": True}], "o/d", {"train": SHARDS}),
        ([FOLDER], "o/d", {"train": ["p/a.jsonl", "p/b.jsonl", "p/v.jsonl"]}),
        ([], "o/d:p", {"train": ["p/a.jsonl", "p/b.jsonl", "p/v.jsonl"]}),
    ],
)
def test_a_card_tells_splits(
    hub: Hub, configs: list[dict[str, Any]], source: str, expected: dict[str, list[str]]
) -> None:
    names = [*SHARDS, "p/a.jsonl", "p/b.jsonl", "p/v.jsonl"]
    hub.repos["o/d"] = {name: jsonl(ROWS) for name in names} | {"README.md": card(*configs)}
    assert names_of(source, quick()) == expected


@pytest.mark.parametrize(
    ("configs", "source", "message", "hint"),
    [
        (
            [PLAIN, PAIRS],
            "o/d:pears",
            "The data set o/d has no configuration pears; it has default, pairs.",
            "Name one of them: o/d:default",
        ),
        (
            [PAIRS, TEXT],
            "o/d",
            "The data set o/d has several configurations; it has pairs, text.",
            "Name one of them: o/d:pairs",
        ),
        (
            [PAIRS],
            "o/d",
            "The data set o/d has no split train; it has train_prefs, validation.",
            "Name the one to learn from: o/d:train_prefs",
        ),
        (
            [],
            "o/d:x",
            "The data set o/d has no configuration x.",
            "Leave it out, or look at the data set's page for what it has.",
        ),
    ],
)
def test_what_a_card_does_not_tell(
    hub: Hub, configs: list[dict[str, Any]], source: str, message: str, hint: str
) -> None:
    names = [*SHARDS, "p/a.jsonl", "p/v.jsonl"]
    hub.repos["o/d"] = {name: jsonl(ROWS) for name in names} | {"README.md": card(*configs)}
    with pytest.raises(TrainingError) as caught:
        find_splits(source, quick())
    assert (str(caught.value), caught.value.hint) == (message, hint)


def test_a_download_is_shown_before_it_begins(hub: Hub) -> None:
    hub.repos["o/d"] = {"train.jsonl": jsonl(ROWS), "README.md": card(TEXT), SHARDS[0]: b"x"}
    hub.repos["o/d"] |= {SHARDS[1]: b"xy"}
    seen: list[Any] = []

    @contextmanager
    def watch(plan: DownloadPlan) -> Iterator[ProgressCallback]:
        assert not plan.repository.is_renamed
        seen.append((plan.repository.name, plan.nbytes, plan.remaining))
        yield lambda file, nbytes: seen.append((file.name, nbytes))

    find_splits("o/d", quick(), watch)
    assert seen == [("o/d", 3, 3), (SHARDS[0], 1), (SHARDS[1], 2)]


def test_rows_come_from_the_hub_once(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    hub.repos["o/d"] = {"train.jsonl": jsonl(ROWS)}
    for _ in range(2):
        rows = list(read_rows(find_splits("o/d", quick())["train"]))
        assert rows[0] == Row("train.jsonl, line 1", ROWS[0])
    assert hub.requested == ["train.jsonl"]
    assert capfd.readouterr() == ("", "")


def test_offline_what_is_here_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["o/d"] = {"train.jsonl": jsonl(ROWS), "val.jsonl": jsonl(ROWS)}
    online = names_of("o/d", quick())
    hub.requested.clear()
    hub.authorizations.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert names_of("o/d") == online == {"train": ["train.jsonl"], "valid": ["val.jsonl"]}
    assert not hub.authorizations
    with pytest.raises(DownloadError) as caught:
        find_splits("o/other")
    assert str(caught.value) == (
        "The data set o/other is not on this machine, and HF_HUB_OFFLINE is set."
    )


def test_wrong_bytes_are_fetched_again(hub: Hub) -> None:
    hub.repos["o/d"] = {"train.jsonl": jsonl(ROWS)}
    hub.faults["train.jsonl"] = [Fault(wrong=True)]
    rows = list(read_rows(find_splits("o/d", quick())["train"]))
    assert [row.values for row in rows] == ROWS
    assert hub.requested == ["train.jsonl"] * 2


def test_wrong_bytes_twice_are_an_error(hub: Hub) -> None:
    hub.repos["o/d"] = {"train.jsonl": jsonl(ROWS)}
    hub.faults["train.jsonl"] = [Fault(wrong=True)] * 2
    with pytest.raises(DownloadError) as caught:
        find_splits("o/d", quick())
    assert str(caught.value) == (
        "train.jsonl of o/d came twice with contents that are not what the Hub says they are; "
        "they are deleted."
    )


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda hub: None, "The Hub has no data set o/d, or it is private."),
        (
            lambda hub: hub.refusals.update({"o/d": (403, {"X-Error-Code": "GatedRepo"})}),
            "o/d is only for those who have accepted its terms.",
        ),
        (
            lambda hub: hub.repos.update({"o/d": {"model.bin": b"x"}}),
            "In the data set o/d no file is for training; it has no data file of a known kind.",
        ),
        (
            lambda hub: hub.repos.update({"o/d": {"test.csv": b"x"}}),
            "In the data set o/d no file is for training; it has test.csv.",
        ),
        (
            lambda hub: hub.repos.update({"o/d": {"../train.csv": b"x"}}),
            "o/d lists a file '../train.csv', which would leave its folder; nothing of it is "
            "downloaded.",
        ),
        (
            lambda hub: hub.repos.update({"o/d": {"README.md": b"---\na: [\n---\n"}}),
            "The card of the data set o/d cannot be read: its head is no YAML.",
        ),
        (
            lambda hub: hub.repos.update({"o/d": {SHARDS[1]: b"x"}}),
            "o/d has only 1 of the 2 parts of data/train.jsonl.",
        ),
    ],
)
def test_what_the_hub_cannot_give(hub: Hub, prepare: Any, message: str) -> None:
    prepare(hub)
    with pytest.raises(PhimlxError) as caught:
        find_splits("o/d", quick())
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"size": None}, "What answers at {hub.url} does not speak as the Hub does."),
        (
            {"blobId": "../../../x"},
            "o/d lists 'train.jsonl' without a hash, so what comes could not be checked.",
        ),
    ],
)
def test_a_hub_that_is_none(hub: Hub, said: dict[str, Any], message: str) -> None:
    hub.repos["o/d"] = {"train.jsonl": jsonl(ROWS)}
    hub.listed["o/d", "train.jsonl"] = said
    with pytest.raises(DownloadError) as caught:
        find_splits("o/d", quick())
    assert str(caught.value) == message.format(hub=hub)


def test_a_hub_that_stops_answering(hub: Hub) -> None:
    hub.repos["o/d"] = {"train.jsonl": jsonl(ROWS)}
    hub.faults["train.jsonl"] = [Fault(status=503) for _ in range(99)]
    with pytest.raises(DownloadError) as caught:
        find_splits("o/d", quick())
    assert str(caught.value) == "The Hub answers with an error (503) for o/d."


def test_a_download_goes_on_where_it_stopped(hub: Hub) -> None:
    content = jsonl([{"text": "a" * 100}])
    hub.repos["o/d"] = {"train.jsonl": content}
    hub.faults["train.jsonl"] = [Fault(cut=50)]
    rows = list(read_rows(find_splits("o/d", quick())["train"]))
    assert rows == [Row("train.jsonl, line 1", {"text": "a" * 100})]
    assert hub.ranges["train.jsonl"] == [0, 50]
    assert hub.served["train.jsonl"] == len(content)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with serve_datasets(monkeypatch, tmp_path) as hub:
        pass
    with pytest.raises(DownloadError) as caught:
        find_splits("o/d", quick())
    assert str(caught.value) == f"The Hub cannot be reached at {hub.url}."


def test_what_is_here_comes_before_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o").mkdir()
    write(tmp_path / "o" / "d", "train.jsonl")
    assert names_of("o/d") == {"train": ["train.jsonl"]}
