"""Runs on pictures and sounds: the store, going on, and what loads, fuses and exports after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]
from click.testing import CliRunner, Result
from PIL import Image

from phimlx import api
from phimlx.adapters.read import read_adapter
from phimlx.cli.group import cli
from phimlx.models.lora import LoRALinear
from phimlx.training import features
from phimlx.training.data.batches import Batch
from phimlx.training.data.examples import load_data
from phimlx.training.data.loss_mask import RowEncoder
from phimlx.training.run.checkpoints import RunFolder
from phimlx.training.step import StepResult, TrainingStep
from tests.multimodal import multimodal_folder

OPTIONS = (
    *("--iters", "4", "--batch-size", "3", "--learning-rate", "0.01", "--steps-per-report", "1"),
    *("--steps-per-eval", "2", "--save-every", "2", "--max-seq-length", "1024"),
)
TIMES = ("seconds", "left", "tokens_per_second", "peak_memory")
LOG, WEIGHTS = "log.jsonl", "adapters.safetensors"


@pytest.fixture(scope="module")
def place(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that sees and hears, and rows with sounds, texts and a picture."""
    folder = tmp_path_factory.mktemp("media-runs")
    (folder / "model").mkdir()
    multimodal_folder(data, folder / "model")
    noise = np.random.default_rng(5)
    rows: list[dict[str, Any]] = []
    for number in range(8):
        name = f"{number}.wav"
        length = 3000 + 900 * number
        soundfile.write(folder / name, noise.normal(0, 0.2, length).astype(np.float32), 16000)
        rows.append({"audio": name, "prompt": "Say it.", "completion": f"it is {number}"})
    write(folder / "sounds.jsonl", rows)
    write(folder / "texts.jsonl", [{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(6)])
    Image.fromarray(noise.integers(0, 255, (40, 60, 3), np.uint8)).save(folder / "a.png")
    picture = {"image": "a.png", "prompt": "What?", "completion": "That."}
    write(folder / "mixed.jsonl", [picture, *rows[:2], {"prompt": "Is it?", "completion": "Yes."}])
    return folder


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(features, "features_folder", lambda: tmp_path / "features")
    return tmp_path / "features"


def train(place: Path, data: str, out: Path, *more: str) -> Result:
    begin = ["train", "--model", str(place / "model"), "--data", str(place / data)]
    command = [*begin, "--adapter-path", str(out), *OPTIONS, *more]
    return CliRunner().invoke(cli, command, prog_name="phimlx", catch_exceptions=False)


def log(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / LOG).read_text().splitlines())
    return [{name: v for name, v in line.items() if name not in TIMES} for line in lines]


def arrays(folder: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(folder / WEIGHTS))
    assert isinstance(loaded, dict)
    return loaded


def same(one: Path, other: Path) -> bool:
    first, second = arrays(one), arrays(other)
    alike = [mx.array_equal(first[name], second[name]).item() for name in first]
    return log(one) == log(other) and first.keys() == second.keys() and all(alike)


def test_the_store_changes_no_bit_and_a_stopped_run_goes_on(
    place: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_store, without = tmp_path / "with", tmp_path / "without"
    assert train(place, "sounds.jsonl", with_store).exit_code == 0
    kept = sorted(store.iterdir())
    assert len(kept) == 8
    assert train(place, "sounds.jsonl", without, "--feature-store", "0").exit_code == 0
    assert same(with_store, without)

    # Damaged files are not used, and made again.
    kept[0].write_bytes(kept[0].read_bytes()[:-3])
    kept[1].write_bytes(kept[1].read_bytes()[:-40] + bytes(40))
    take = TrainingStep.__call__

    def interrupted(self: TrainingStep, number: int, batches: Sequence[Batch]) -> StepResult:
        if number == 4:
            raise KeyboardInterrupt
        return take(self, number, batches)

    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", interrupted)
        assert train(place, "sounds.jsonl", stopped).exit_code == 130
    assert [each.step for each in RunFolder(stopped, 3).checkpoints()] == [2]
    command = ["train", "--resume", "--adapter-path", str(stopped)]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert same(with_store, stopped)


def test_a_full_store_says_so_once_and_changes_nothing(place: Path, tmp_path: Path) -> None:
    tiny, whole = tmp_path / "tiny", tmp_path / "whole"
    result = train(place, "sounds.jsonl", tiny, "--feature-store", "0.000003")
    assert result.output.count("the store of features is full") == 1
    assert train(place, "sounds.jsonl", whole).exit_code == 0
    assert same(tiny, whole)


def load(place: Path, adapter: Path | None) -> api.Phi:
    return api.load(place / "model", adapter=adapter, dtype="float32")


def prompt(place: Path, name: str) -> dict[str, Any]:
    media = {"images": str(place / "a.png")} if name == "image" else {}
    return media | ({"audio": str(place / "1.wav")} if name == "audio" else {})


def logprobs(phi: api.Phi, **options: Any) -> list[float]:
    reply = phi.generate("What?", max_tokens=3, temperature=0.0, logprobs=True, **options)
    return [each.logprob for each in reply.logprobs]


def test_an_adapter_of_its_own_is_used_where_the_original_was(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "speech"
    result = train(place, "sounds.jsonl", out, "--train", "speech-adapter,projector")
    assert result.exit_code == 0, result.output
    adapter = read_adapter(out)
    assert adapter.own == {"speech": (10, 2.0)}
    assert sorted(adapter.shared_weights) == sorted(
        f"model.embed_tokens_extend.audio_embed.audio_projection.speech.{layer}.{part}"
        for layer in (0, 2)
        for part in ("weight", "bias")
    )
    plain, tuned = load(place, None), load(place, out)
    for name in ("text", "image", "audio"):
        before, after = (logprobs(phi, **prompt(place, name)) for phi in (plain, tuned))
        assert (before == after) == (name != "audio"), name

    # Fused, it says the same.
    fused = tmp_path / "fused"
    command = ["fuse", "--model", str(place / "model"), "--adapter-path", str(out)]
    result = CliRunner().invoke(cli, [*command, "--save-path", str(fused)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    fused_phi = api.load(fused, dtype="float32")
    heard = prompt(place, "audio")
    assert logprobs(fused_phi, **heard) == pytest.approx(logprobs(tuned, **heard), abs=1e-5)


def test_by_request_and_through_peft(place: Path, tmp_path: Path) -> None:
    out, peft = tmp_path / "speech", tmp_path / "peft"
    assert train(place, "sounds.jsonl", out).exit_code == 0
    command = ["fuse", "--adapter-path", str(out), "--save-path", str(peft), "--export", "peft"]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    config = json.loads((peft / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (10, 20.0, "LORA")
    phi, tuned = load(place, None), load(place, out)
    for name, folder in (("mine", out), ("theirs", peft)):
        phi.load_adapter(folder, name)
        for kind in ("text", "audio"):
            given = prompt(place, kind)
            assert logprobs(phi, adapter=name, **given) == logprobs(tuned, **given)
    plain = load(place, None)
    heard = prompt(place, "audio")
    assert logprobs(phi, **heard) == logprobs(plain, **heard) != logprobs(tuned, **heard)
    phi.delete_adapter("mine")
    phi.delete_adapter("theirs")
    layers = [m for m in phi.model.modules() if isinstance(m, LoRALinear)]
    assert {name for layer in layers for name in layer.lora_A} == {"vision", "speech"}


def test_a_new_adapter_is_for_rows_like_those_it_learned_from(place: Path, tmp_path: Path) -> None:
    text, heard = tmp_path / "text", tmp_path / "heard"
    assert train(place, "texts.jsonl", text).exit_code == 0
    assert train(place, "sounds.jsonl", heard, "--train", "new").exit_code == 0
    assert read_adapter(text).modalities == ("text",)
    assert read_adapter(heard).modalities == ("audio",)
    plain = load(place, None)
    for folder, changed in ((text, "text"), (heard, "audio")):
        tuned = load(place, folder)
        for name in ("text", "audio"):
            given = prompt(place, name)
            assert (logprobs(tuned, **given) != logprobs(plain, **given)) == (name == changed)
    command = ["fuse", "--model", str(place / "model"), "--adapter-path", str(heard)]
    result = CliRunner().invoke(cli, [*command, "--save-path", str(tmp_path / "no")])
    assert (result.exit_code, "is for rows of audio alone" in result.output) == (1, True)


def test_what_a_run_measures_is_what_generation_computes(place: Path, tmp_path: Path) -> None:
    """Training on pictures, sounds and text, packed, gives the losses of the loaded model."""
    out = tmp_path / "mixed"
    parts = ("--train", "vision-adapter,speech-adapter,new")
    more = ("--pack", "--valid-fraction", "0", "--batch-size", "8", "--rank", "4")
    result = train(place, "mixed.jsonl", out, *parts, *more)
    assert result.exit_code == 0, result.output
    assert read_adapter(out).own.keys() == {"vision", "speech"}
    assert read_adapter(out).modalities == ("text", "audio", "image")
    command = ["evaluate", "--model", str(place / "model"), "--data", str(place / "mixed.jsonl")]
    options = ["--adapter-path", str(out), "--dtype", "float32", "--json"]
    found = CliRunner().invoke(cli, [*command, *options], catch_exceptions=False)
    after = json.loads(found.stdout)["loss"]

    tuned = load(place, out)
    encoder = RowEncoder.of(tuned)
    assert encoder.media is not None
    total, count = 0.0, 0
    for example in load_data(place / "mixed.jsonl", encoder)["train"].examples:
        shown = encoder.media.placed(example.media).arrays
        logits = tuned.model(mx.array(example.tokens[None, :-1]), **shown)[0]
        losses = nn.losses.cross_entropy(logits, mx.array(example.tokens[1:]))
        total += float((losses * mx.array(example.supervised[1:])).sum())
        count += int(example.supervised.sum())
    assert after == pytest.approx(total / count, rel=1e-5)
    assert after < log(out)[0]["loss"]
