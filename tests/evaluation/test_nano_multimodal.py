"""The bundled model that sees and hears: its files, its answers, and the adapters behind them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

import phimlx
from convert import Quantization, convert
from phimlx import catalog
from phimlx.api import Phi
from phimlx.checkpoint.folder import Checkpoint
from phimlx.cli.group import cli
from phimlx.evaluation import bundled as demo
from phimlx.evaluation.bundled import Scene
from phimlx.generation.options import GenerationOptions
from phimlx.hub.resolve import NANO, NANO_MULTIMODAL
from phimlx.models import features
from phimlx.models.phi4mm.audio import AudioEmbedding
from phimlx.transcription import TRANSCRIBE
from tests.everything import EVERYTHING, everything

HELD_OUT = Path(__file__).parents[1] / "assets" / "nano_mm"
REFERENCE = json.loads((HELD_OUT / "reference.json").read_text(encoding="utf-8"))
SCENES = demo.scenes(HELD_OUT)
LESS = 1 if EVERYTHING else 4  # of how many answers one is compared


@cache
def nano() -> Phi:
    return phimlx.load("nano-multimodal", dtype="float32")


def of(modality: str, every: int = 1) -> list[tuple[int, Scene]]:
    chosen = [(number, scene) for number, scene in enumerate(SCENES) if scene.modality == modality]
    return chosen[::every]


def share_right(phi: Phi, scenes: Sequence[tuple[int, Scene]]) -> float:
    replies = [(demo.look_and_listen(phi, scene).text.strip(), scene.answer) for _, scene in scenes]
    return sum(text == answer for text, answer in replies) / len(replies)


def word_errors(said: str, heard: str) -> int:
    """Words to change, leave out or put in."""
    before = list(range(len(heard.split()) + 1))
    for row, word in enumerate(said.split(), 1):
        now = [row]
        for column, other in enumerate(heard.split(), 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (word != other)))
        before = now
    return before[-1]


def word_error_rate(pairs: Sequence[tuple[str, str]]) -> float:
    return sum(word_errors(*pair) for pair in pairs) / sum(len(said.split()) for said, _ in pairs)


def test_it_is_small_and_its_text_weights_are_nanos() -> None:
    files = [path for path in NANO_MULTIMODAL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    whole = Checkpoint(NANO_MULTIMODAL)
    count = sum(int(np.prod(info.shape)) for info in whole.tensors.values())
    listed = catalog.find("nano-multimodal")
    assert listed is not None
    assert count == listed.parameters == 4_416_448
    ours = whole.weights()
    for name, array in Checkpoint(NANO).weights().items():
        base = name.replace("_proj.weight", "_proj.base_layer.weight")
        assert mx.array_equal(ours[base], array), name


@pytest.mark.parametrize("modality", ["vision", "speech", "both"])
def test_logits_are_the_references(modality: str) -> None:
    goldens = mx.load(str(HELD_OUT / "reference.safetensors"))
    assert isinstance(goldens, dict)
    scene = SCENES[int(goldens[f"{modality}.row"])]
    asked = TRANSCRIBE if modality == "speech" else scene.question
    request = nano().request(asked, GenerationOptions(images=scene.image, audio=scene.audio))
    assert request.prompt == np.array(goldens[f"{modality}.input_ids"]).tolist()
    assert request.media is not None
    logits = nano().model(mx.array([request.prompt]), **request.media.arrays)[0, -8:]
    golden = goldens[f"{modality}.logits"]
    assert float(mx.abs(logits - golden).max()) <= 1e-4 * float(mx.abs(golden).max())


@pytest.mark.slow
@pytest.mark.parametrize(("modality", "least"), [("vision", 0.9), ("both", 0.9), ("speech", 0.75)])
def test_answers_are_the_references_and_most_are_right(modality: str, least: float) -> None:
    """Some answers are compared; the reference's own say how many are right."""
    answers = {number: REFERENCE["right"][str(number)]["text"] for number, _ in of(modality)}
    for number, scene in of(modality, 3 * LESS):
        assert demo.look_and_listen(nano(), scene).text == answers[number], scene
    right = [answers[number].strip() == scene.answer for number, scene in of(modality)]
    assert sum(right) / len(right) >= least


@pytest.mark.slow
def test_transcribe_makes_few_word_errors(tmp_path: Path) -> None:
    scenes = [scene for _, scene in of("speech")]
    files = [str(scene.audio) for scene in scenes]
    run = CliRunner().invoke(
        cli,
        ["transcribe", "--model", "nano-multimodal", "--output-dir", str(tmp_path), *files],
        catch_exceptions=False,
    )
    assert run.exit_code == 0
    heard = [(tmp_path / f"{Path(file).stem}.txt").read_text().strip() for file in files]
    pairs = list(zip((scene.answer for scene in scenes), heard, strict=True))
    assert word_error_rate(pairs) <= 0.10


@everything
@pytest.mark.slow
def test_four_bits_are_no_worse_than_three_points(tmp_path: Path) -> None:
    convert(NANO_MULTIMODAL, tmp_path / "small", Quantization(bits=4, group_size=64), "float32")
    small = phimlx.load(tmp_path / "small")
    pictures, clips = of("vision", 2 * LESS), of("speech", 2)
    assert share_right(small, pictures) >= share_right(nano(), pictures) - 0.03
    rates = []
    for phi in (small, nano()):
        heard = [demo.look_and_listen(phi, scene).text.strip() for _, scene in clips]
        said = [scene.answer for _, scene in clips]
        rates.append(word_error_rate(list(zip(said, heard, strict=True))))
    assert rates[0] <= rates[1] + 0.03


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Force an adapter upon every row, whatever it holds."""

    def force(adapter: str | None) -> None:
        monkeypatch.setattr(features.Placeholders, "adapter_for", lambda self, held: adapter)

    project = AudioEmbedding.project
    monkeypatch.setattr(
        AudioEmbedding, "project", lambda self, rows, mode: project(self, rows, mode or "speech")
    )
    return force


@pytest.mark.parametrize(
    ("modality", "adapter"),
    [("vision", "speech"), ("vision", None), ("speech", "vision"), ("speech", None)],
)
def test_with_the_wrong_adapter_it_fails_badly(
    modality: str, adapter: str | None, choose: Callable[[str | None], Any]
) -> None:
    less = LESS if modality == "vision" else 1  # pictures take long
    choose(adapter)
    assert share_right(nano(), of(modality, 3 * less)) <= 0.1
    choose({"vision": "vision", "speech": "speech"}[modality])
    assert share_right(nano(), of(modality, 5 * less)) >= 0.75
