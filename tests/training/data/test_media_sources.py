"""Rows with videos, addresses and columns of the Hub: what they become, and where faults are."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phimlx.errors import MediaError
from phimlx.hub.client import Remote
from phimlx.hub.resolve import NANO_MULTIMODAL
from phimlx.media import fetch, video
from phimlx.media.limits import Limits
from phimlx.training.data import rows as rows_of_files
from phimlx.training.data.examples import Dataset, RowSettings, load_data
from phimlx.training.data.faults import DataError
from phimlx.training.data.loss_mask import RowEncoder
from phimlx.training.data.rows import DataFile, read_rows
from tests.hub.loopback_datasets import serve_datasets
from tests.hub.loopback_hub import Hub
from tests.media.sounds import av_video
from tests.training.data.test_media_rows import ASKED, MODEL, PICTURES, SOUNDS, asking, png, wav

ADDRESS = "https://pictures.example/"
MP4 = av_video(12)
MP464 = base64.b64encode(MP4).decode()
FRAMES = [f"{number}.png" for number in range(3)]


def encoder(**limits: Any) -> RowEncoder:
    """A new one, which has opened nothing yet."""
    return RowEncoder.load(NANO_MULTIMODAL, "nano-multimodal", MODEL, Limits(**limits))


def read(folder: Path, *rows: dict[str, Any], **limits: Any) -> Dataset:
    files = {"a.png": png(), "b.wav": wav(), "c.mp4": MP4}
    files |= {name: png(number) for number, name in enumerate(FRAMES)}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = RowSettings(max_length=None)
    return load_data(folder / "rows.jsonl", encoder(**limits), settings)["train"]


# Videos

VIDEOS: dict[str, dict[str, Any]] = {
    "path": asking({"type": "video", "path": "c.mp4"}),
    "video": asking({"type": "video", "video": "c.mp4"}),
    "bytes": asking({"type": "video", "bytes": MP464}),
    "data address": asking({"type": "video", "url": f"data:video/mp4;base64,{MP464}"}),
    "video_url": asking(
        {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{MP464}"}}
    ),
    "the Hub's object": asking({"type": "video", "video": {"bytes": MP464, "path": None}}),
    "column and place": {**asking({"type": "video"}), "videos": ["c.mp4"]},
    "column without place": {"prompt": ASKED["text"], "completion": "box", "video": "c.mp4"},
    "LLaVA's": {
        "video": "c.mp4",
        "conversations": [
            {"from": "human", "value": "<video>\nWhat shape is it?"},
            {"from": "gpt", "value": "box"},
        ],
    },
    "file_name": {"file_name": "c.mp4", "prompt": ASKED["text"], "completion": "box"},
}


@pytest.mark.parametrize("name", VIDEOS)
def test_every_form_of_a_video_is_its_frames(name: str, tmp_path: Path) -> None:
    (example,) = read(tmp_path, VIDEOS[name]).examples
    (expected,) = read(tmp_path, VIDEOS["path"]).examples
    assert example.tokens.tolist() == expected.tokens.tolist()
    assert example.media == expected.media
    assert [item.kind for item in example.media] == ["image"] * 8
    assert len({item.digest for item in example.media}) == 8


@pytest.mark.parametrize(
    "row",
    [
        asking({"type": "video", "video": FRAMES}),
        {"prompt": ASKED["text"], "completion": "box", "video": FRAMES},
        {"prompt": ASKED["text"], "completion": "box", "videos": [FRAMES]},
        asking(*({"type": "image", "path": name} for name in FRAMES)),
    ],
)
def test_frames_may_be_listed(row: dict[str, Any], tmp_path: Path) -> None:
    (example,) = read(tmp_path, row).examples
    expected = [read(tmp_path, asking({"type": "image", "path": each})) for each in FRAMES]
    found = [item.digest for item in example.media]
    assert found == [data.examples[0].media[0].digest for data in expected]


# Addresses


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked for, of a network with a picture, a sound and a video."""
    asked: list[str] = []
    files = {"a.png": png(), "b.wav": wav(), "c.mp4": MP4}

    def answer(url: str, limits: Limits) -> bytes:
        asked.append(url)
        name = url.removeprefix(ADDRESS)
        if name not in files:
            raise MediaError(f"{url} cannot be had: the server answers 404.")
        return files[name]

    monkeypatch.setattr(fetch, "fetch", answer)
    return asked


@pytest.mark.parametrize(
    ("part", "here"),
    [
        ({"type": "image", "url": ADDRESS + "a.png"}, PICTURES["path"]),
        ({"type": "image", "image": ADDRESS + "a.png"}, PICTURES["path"]),
        ({"type": "image_url", "image_url": {"url": ADDRESS + "a.png"}}, PICTURES["path"]),
        ({"type": "audio", "url": ADDRESS + "b.wav"}, SOUNDS["path"]),
        ({"type": "audio_url", "audio_url": {"url": ADDRESS + "b.wav"}}, SOUNDS["path"]),
        ({"type": "video", "url": ADDRESS + "c.mp4"}, VIDEOS["path"]),
    ],
)
def test_an_address_is_followed_once(
    part: dict[str, Any], here: dict[str, Any], tmp_path: Path, fetched: list[str]
) -> None:
    first, second = read(tmp_path, asking(part), asking(part)).examples
    (expected,) = read(tmp_path, here).examples
    assert first.tokens.tolist() == second.tokens.tolist() == expected.tokens.tolist()
    assert first.media == second.media == expected.media
    assert len(fetched) == 1


def test_what_an_address_led_to_is_kept_until_it_is_learned(
    tmp_path: Path, fetched: list[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(
        json.dumps(asking({"type": "image", "url": ADDRESS + "a.png"})) + "\n"
    )
    mine = encoder()
    (example,) = load_data(tmp_path / "rows.jsonl", mine)["train"].examples
    assert mine.media is not None
    assert mine.media.open(example.media[0])["input_image_embeds"].shape[2:] == (3, 448, 448)
    assert fetched == [ADDRESS + "a.png"]


def test_what_cannot_be_had_is_asked_for_once_and_told_of_each_row(
    tmp_path: Path, fetched: list[str]
) -> None:
    row = asking({"type": "image", "url": ADDRESS + "no.png"})
    with pytest.raises(DataError) as caught:
        read(tmp_path, PICTURES["path"], row, row)
    assert str(caught.value) == (
        "The data has 2 faults:\n  rows.jsonl, lines 2, 3: messages[0].content[0]: "
        "https://pictures.example/no.png cannot be had: the server answers 404."
    )
    assert fetched == [ADDRESS + "no.png"]


def test_a_video_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    def reading(source: Any, *more: Any) -> Any:
        opened.append(source)
        return take(source, *more)

    take = video.read_video
    monkeypatch.setattr(video, "read_video", reading)
    read(tmp_path, VIDEOS["path"], VIDEOS["path"])
    assert opened == [tmp_path / "c.mp4"]


# Data sets of the Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve_datasets(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def parquet(rows: list[dict[str, Any]]) -> bytes:
    arrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    files.write_table(arrow.Table.from_pylist(rows), file)
    return file.getvalue()


def of_hub(hub: Hub, files: dict[str, bytes], **settings: Any) -> Dataset:
    hub.repos["o/d"] = files
    remote = Remote(wait=lambda seconds: None)
    mine = RowSettings(max_length=None, **settings)
    return load_data("o/d", encoder(), mine, remote=remote)["train"]


ANSWER = {"prompt": ASKED["text"], "completion": "box"}
COLUMNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pictures": ({"image": {"bytes": png(), "path": "x/a.png"}, **ANSWER}, PICTURES["path"]),
    "several": ({"images": [{"bytes": png(), "path": None}], **ANSWER}, PICTURES["path"]),
    "bytes alone": ({"image": png(), **ANSWER}, PICTURES["path"]),
    "recordings": ({"audio": {"bytes": wav(), "path": "b.wav"}, **ANSWER}, SOUNDS["path"]),
    "videos": ({"video": {"bytes": MP4, "path": None}, **ANSWER}, VIDEOS["path"]),
    "places": (
        {
            "images": [{"bytes": png(), "path": None}],
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "text": None}, {"type": "text", **ASKED}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "box"}]},
            ],
        },
        PICTURES["path"],
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_the_hub(name: str, tmp_path: Path, hub: Hub) -> None:
    row, here = COLUMNS[name]
    (example,) = of_hub(hub, {"data/train-00000-of-00001.parquet": parquet([row])}).examples
    (expected,) = read(tmp_path, here).examples
    assert example.tokens.tolist() == expected.tokens.tolist()
    assert example.media == expected.media


def test_recordings_of_the_hub_with_their_transcripts(tmp_path: Path, hub: Hub) -> None:
    row = {"id": 7, "speech": {"bytes": wav(), "path": None}, "sentence": "box"}
    mapping = {"audio": "speech", "completion": "sentence"}
    files = {"data/train-00000-of-00001.parquet": parquet([row])}
    data = of_hub(hub, files, mapping=mapping, question=ASKED["text"])
    (expected,) = read(tmp_path, SOUNDS["path"]).examples
    assert data.examples[0].tokens.tolist() == expected.tokens.tolist()
    assert data.unused == {"data/train-00000-of-00001.parquet": {"the column 'id'": 1}}


def test_a_folder_of_pictures_of_the_hub(tmp_path: Path, hub: Hub) -> None:
    row = {"file_name": "sub/a.png", **ANSWER}
    about = (json.dumps(row) + "\n").encode()
    files = {"train/metadata.jsonl": about, "train/sub/a.png": png(), "train/sub/text.txt": b""}
    (example,) = of_hub(hub, files).examples
    (expected,) = read(tmp_path, PICTURES["path"]).examples
    assert example.media == expected.media
    assert sorted(hub.requested) == ["train/metadata.jsonl", "train/sub/a.png"]


def test_few_large_rows_of_parquet_are_in_memory_at_one_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet_file = pytest.importorskip("pyarrow.parquet").ParquetFile
    sizes: list[int] = []

    def batches(self: Any, batch_size: int) -> Any:
        sizes.append(batch_size)
        return take(self, batch_size=batch_size)

    take = parquet_file.iter_batches
    monkeypatch.setattr(parquet_file, "iter_batches", batches)
    monkeypatch.setattr(rows_of_files, "PARQUET_BYTES", 640_000)
    path = tmp_path / "rows.parquet"
    for rows in ([{"image": bytes([i]) * 10_000} for i in range(70)], [{"text": "a"}]):
        path.write_bytes(parquet(rows))
        assert len(list(read_rows([DataFile(path, path.name)]))) == len(rows)
    assert 32 < sizes[0] <= 64
    assert sizes[1] == 1024


# Faults, for each form


LINE = "rows.jsonl, line 2: messages[0].content[0]: "
FAULTS: dict[str, tuple[Any, dict[str, Any], str, str | None]] = {
    "video, pixels": (
        {"type": "video", "path": "c.mp4"}, {"max_pixels": 1000},
        "c.mp4 has frames of 64 × 48 pixels; at most 1000 are read.", "--max-pixels",
    ),
    "video, seconds": (
        {"type": "video", "path": "c.mp4"}, {"max_seconds": 0.1}, "longer than", "--max-seconds",
    ),
    "no video": ({"type": "video", "path": "a.png"}, {}, "a.png is not a video", None),
    "no video, of an address": (
        {"type": "video", "url": ADDRESS + "a.png"}, {}, "a.png is not a video", None,
    ),
    "frames": (
        {"type": "video", "video": ["0.png", "no.png"]}, {}, "There is no file", None,
    ),
    "sound, seconds": (
        {"type": "audio", "path": "b.wav"}, {"max_seconds": 0.1}, "longer than", "--max-seconds",
    ),
    "picture, pixels": (
        {"type": "image", "path": "a.png"}, {"max_pixels": 100}, "64 × 64", "--max-pixels",
    ),
    "picture, bytes": (
        {"type": "image", "bytes": base64.b64encode(png()).decode()}, {"max_bytes": 20},
        "larger than 20 bytes", "--max-bytes",
    ),
    "address of a picture, pixels": (
        {"type": "image", "url": ADDRESS + "a.png"}, {"max_pixels": 100}, "64 × 64", "--max-pixels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_its_line_and_the_limit(
    name: str, tmp_path: Path, fetched: list[str]
) -> None:
    part, limits, message, hint = FAULTS[name]
    fine = {"prompt": "Is it?", "completion": "Yes."}
    with pytest.raises(DataError) as caught:
        read(tmp_path, fine, asking(part), **limits)
    assert str(caught.value).startswith(LINE)
    assert message in str(caught.value)
    if hint is not None:
        assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("image", {"bytes": b"none", "path": None}, "the column image: The picture is no PNG"),
        ("audio", {"bytes": wav()[:30], "path": None}, "the column audio: "),
        ("video", {"bytes": png(), "path": None}, "the column video: "),
        ("images", [{"bytes": None, "path": None}], "the column image: "),
    ],
)
def test_a_fault_in_a_column_names_its_row(
    column: str, value: Any, message: str, tmp_path: Path, hub: Hub
) -> None:
    rows = [{column: None, **ANSWER}, {column: value, **ANSWER}]
    name = "data/train-00000-of-00001.parquet"
    with pytest.raises(DataError) as caught:
        of_hub(hub, {name: parquet(rows)})
    assert str(caught.value).startswith(f"{name}, row 2: {message}")
