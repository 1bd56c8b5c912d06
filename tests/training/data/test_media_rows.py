"""Rows with pictures, sounds and videos: their forms, what they may reach, what faults say."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]
from PIL import Image

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model
from phimlx.hub.resolve import NANO, NANO_MULTIMODAL
from phimlx.training.data.examples import Dataset, RowSettings, load_data
from phimlx.training.data.faults import DataError
from phimlx.training.data.loss_mask import RowEncoder
from phimlx.training.data.media import beside_each_other

MODEL = build_model(Checkpoint(NANO_MULTIMODAL).config)
ENCODER = RowEncoder.load(NANO_MULTIMODAL, "nano-multimodal", MODEL)
IMAGE, AUDIO = MODEL.placeholders.tokens if MODEL.placeholders else (0, 0)
REPLY = {"role": "assistant", "content": "box"}
ASKED = {"type": "text", "text": "What shape is it?"}


def png(shade: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, 90, 160)).save(buffer, "PNG")
    return buffer.getvalue()


def wav(seconds: float = 0.4) -> bytes:
    buffer = io.BytesIO()
    tone = np.sin(np.arange(round(16000 * seconds)) / 9).astype(np.float32) / 2
    soundfile.write(buffer, tone, 16000, format="WAV")
    return buffer.getvalue()


PNG64, WAV64 = base64.b64encode(png()).decode(), base64.b64encode(wav()).decode()


def asking(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*parts, ASKED]}, REPLY]}


def read(folder: Path, *rows: dict[str, Any], **options: Any) -> Dataset:
    (folder / "a.png").write_bytes(png())
    (folder / "b.wav").write_bytes(wav())
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines)
    return load_data(folder / "rows.jsonl", ENCODER, RowSettings(**options))["train"]


PICTURES: dict[str, dict[str, Any]] = {
    "path": asking({"type": "image", "path": "a.png"}),
    "image": asking({"type": "image", "image": "a.png"}),
    "bytes": asking({"type": "image", "bytes": PNG64}),
    "data address": asking({"type": "image", "url": f"data:image/png;base64,{PNG64}"}),
    "OpenAI's": asking(
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG64}"}}
    ),
    "the Hub's object": asking({"type": "image", "image": {"bytes": PNG64, "path": None}}),
    "empty keys": asking({"type": "image", "image": "a.png", "text": None, "audio": None}),
    "column and place": {**asking({"type": "image"}), "images": ["a.png"]},
    "column without place": {"prompt": ASKED["text"], "completion": "box", "image": "a.png"},
    "LLaVA's": {
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat shape is it?"},
            {"from": "gpt", "value": "box"},
        ],
    },
    "parts as prompt": {
        "prompt": [{"type": "image", "path": "a.png"}, ASKED],
        "completion": [REPLY],
    },
    "file_name": {"file_name": "a.png", "prompt": ASKED["text"], "completion": "box"},
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_form_of_a_picture_is_the_same_example(name: str, tmp_path: Path) -> None:
    (example,) = read(tmp_path, PICTURES[name]).examples
    (expected,) = read(tmp_path, PICTURES["path"]).examples
    assert example.tokens.tolist() == expected.tokens.tolist()
    assert example.media == expected.media
    (item,) = example.media
    filled = np.flatnonzero(example.tokens == IMAGE)
    assert filled.tolist() == list(range(item.begin, item.begin + item.tokens))
    assert not example.supervised[filled].any()
    text = ENCODER.tokenizer.decode(example.tokens[example.supervised].tolist())
    assert text == "box<|end|>"
    assert example.held == {"image"}


SOUNDS: dict[str, dict[str, Any]] = {
    "path": asking({"type": "audio", "path": "b.wav"}),
    "OpenAI's": asking({"type": "input_audio", "input_audio": {"data": WAV64, "format": "wav"}}),
    "column": {"prompt": ASKED["text"], "completion": "box", "audio": {"path": "b.wav"}},
}


@pytest.mark.parametrize("name", SOUNDS)
def test_every_form_of_a_sound_is_the_same_example(name: str, tmp_path: Path) -> None:
    (example,) = read(tmp_path, SOUNDS[name]).examples
    (expected,) = read(tmp_path, SOUNDS["path"]).examples
    assert example.tokens.tolist() == expected.tokens.tolist()
    assert (example.media, set(example.held)) == (expected.media, {"audio"})
    assert (example.tokens == AUDIO).sum() == example.media[0].tokens > 0


def test_samples_and_transcripts_need_no_prompt_of_their_own(tmp_path: Path) -> None:
    samples = soundfile.read(io.BytesIO(wav()), dtype="float32")[0].tolist()
    row = {"audio": {"array": samples, "sampling_rate": 16000}, "sentence": "box"}
    (example,) = read(
        tmp_path, row, mapping={"completion": "sentence"}, question="What shape is it?"
    ).examples
    (expected,) = read(tmp_path, SOUNDS["path"]).examples
    assert example.tokens.tolist() == expected.tokens.tolist()


def test_a_picture_and_a_sound_are_both_and_two_sounds_are_padded(tmp_path: Path) -> None:
    (tmp_path / "long.wav").write_bytes(wav(1.1))
    parts = [{"type": "image", "path": "a.png"}, {"type": "audio", "path": "b.wav"}]
    two = [{"type": "audio", "path": "b.wav"}, {"type": "audio", "path": "long.wav"}]
    both, sounds = read(tmp_path, asking(*parts), asking(*two)).examples
    assert both.held == {"image", "image+audio"}
    short, long = sounds.media
    assert (long.padded, short.padded) == (long.frames, 8 * short.tokens)
    assert short.key != both.media[1].key
    assert short.digest == both.media[1].digest


def test_an_example_that_is_cut_keeps_the_media_before(tmp_path: Path) -> None:
    first = asking({"type": "audio", "path": "b.wav"})["messages"]
    second = asking({"type": "image", "path": "a.png"})["messages"]
    (example,) = read(
        tmp_path, {"messages": [*first, *second]}, max_length=120, overlong="cut"
    ).examples
    assert [item.kind for item in example.media] == ["audio"]
    assert example.held == {"audio"}
    assert IMAGE not in example.tokens


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda folder: "no.png", "There is no file "),
    "above": (lambda folder: "../out.png", "'../out.png' lies outside "),
    "absolute": (lambda folder: str(folder.parent / "out.png"), "out.png' lies outside "),
    "by a link": (lambda folder: "link.png", "'link.png' lies outside "),
    "by a linked folder": (lambda folder: "up/out.png", "'up/out.png' lies outside "),
    "null byte": (lambda folder: "a\0.png", "is no path."),
    "no picture": (lambda folder: "rows.jsonl", "is no PNG, JPEG, WEBP"),
    "folder": (lambda folder: ".", "is a folder."),
    "http": (lambda folder: "http://127.0.0.1/a.png", "http"),
    "number": (lambda folder: 7, "7 is no source of pictures."),
    "nothing": (lambda folder: None, "is a place for pictures, and the row has none left."),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_rows_reach_what_came_with_them_alone(name: str, tmp_path: Path) -> None:
    source, message = HOSTILE[name]
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "out.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    (folder / "up").symlink_to(tmp_path)
    row = asking({"type": "image", "image": source(folder)})
    with pytest.raises(DataError) as caught:
        read(folder, PICTURES["path"], row)
    assert str(caught.value).startswith("rows.jsonl, line 2: messages[0].content[0]")
    assert message in str(caught.value)


def test_another_root_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "out.png").write_bytes(png())
    row = asking({"type": "image", "path": "out.png"})
    (example,) = read(folder, row, media_root=tmp_path).examples
    assert example.media[0].kind == "image"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**asking(), "images": ["a.png"], "text": "?"}, None),
        (
            {
                "instruction": "<image>\nWhat shape is it?",
                "input": "A box, or a moon?",
                "output": "box",
                "image": "a.png",
            },
            None,
        ),
        ({"text": "words", "image": "a.png"}, "It has pictures that no message has a place for."),
        (
            {**asking({"type": "image"}, {"type": "image"}), "images": ["a.png"]},
            "messages[0].content[1] is a place for pictures, and the row has none left.",
        ),
        (
            {"prompt": "<image> and <image>?", "completion": "box", "image": "a.png"},
            "prompt[0] is a place for pictures, and the row has none left.",
        ),
        ({"text": "words <|endoftext10|> words"}, "The tokens that stand for pictures and sounds"),
    ],
)
def test_places_and_media_go_together(
    row: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    if message is None:
        (example,) = read(tmp_path, row).examples
        assert len(example.media) == 1
        return
    with pytest.raises(DataError) as caught:
        read(tmp_path, row)
    assert str(caught.value).startswith(f"rows.jsonl, line 1: {message}")


@pytest.mark.parametrize("content", [[{"type": "image"}, ASKED], "<image>\nWhat?", "What?"])
def test_both_answers_of_a_pair_are_about_the_same_picture(content: Any, tmp_path: Path) -> None:
    asked = {"role": "user", "content": content}
    worse = {"role": "assistant", "content": "moon"}
    row = {"images": ["a.png"], "chosen": [asked, REPLY], "rejected": [asked, worse]}
    chosen, rejected = read(tmp_path, row, form="pairs").examples
    assert chosen.media == rejected.media
    assert len(chosen.media) == 1


def test_a_model_of_text_says_what_sees(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(PICTURES["path"]) + "\n")
    with pytest.raises(DataError, match="the model reads text alone"):
        load_data(tmp_path / "rows.jsonl", RowEncoder.load(NANO))


def test_parquet_holds_bytes(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    row = {
        "image": {"bytes": png(), "path": "elsewhere/a.png"},
        "prompt": ASKED["text"],
        "completion": "box",
    }
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    (example,) = load_data(tmp_path / "rows.parquet", ENCODER)["train"].examples
    (expected,) = read(tmp_path, PICTURES["path"]).examples
    assert (example.tokens.tolist(), example.media) == (expected.tokens.tolist(), expected.media)
    assert ENCODER.media is not None
    opened, again = ENCODER.media.open(example.media[0]), ENCODER.media.open(expected.media[0])
    assert all(np.array_equal(opened[name], again[name]) for name in again)


def test_what_changed_since_is_told(tmp_path: Path) -> None:
    (example,) = read(tmp_path, PICTURES["path"]).examples
    (tmp_path / "a.png").write_bytes(png(200))
    assert ENCODER.media is not None
    with pytest.raises(Exception, match="is not what it was when the data was read"):
        ENCODER.media.open(example.media[0])
    assert beside_each_other(example.media) == example.media
