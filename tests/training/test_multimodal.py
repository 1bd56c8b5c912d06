"""Training with pictures and sounds: torch's losses and gradients, and what they are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.models.multimodal import MultimodalLM
from phimlx.training.data.batches import Batches, Example
from phimlx.training.data.media import MediaItem
from phimlx.training.settings import TrainSettings
from phimlx.training.step import TrainingStep
from phimlx.training.trainable import attach
from tests.multimodal import PICTURE, SOUND

GOLDENS = Path(__file__).parents[1] / "goldens" / "mm-gradients.safetensors"
CASES = {"image": "vision", "audio": "speech", "both": "vision"}
EXACT = 1e-4


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    return load_file(GOLDENS)


@pytest.fixture(scope="module")
def oracle(data: Path) -> dict[str, np.ndarray]:
    return load_file(data / "tiny" / "tiny-phi4mm-remote" / "oracle.safetensors")


@pytest.fixture
def model(data: Path) -> MultimodalLM:
    found = load_model(Checkpoint(data / "tiny" / "tiny-phi4mm-remote"), mx.float32)
    assert isinstance(found, MultimodalLM)
    return found


class Recorder(optim.SGD):
    """Keeps the gradients that a step found, and updates nothing."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.0)
        self.seen: dict[str, mx.array] = {}

    def update(self, model: Any, gradients: dict[str, Any]) -> None:
        self.seen = dict(tree_flatten(gradients))


def case_example(name: str, goldens: Mapping[str, np.ndarray]) -> Example:
    """A golden's tokens; its items name the case that they are of."""
    ids = goldens[f"{name}.input_ids"].astype(np.int32)
    media = []
    for kind, token in (("image", PICTURE), ("audio", SOUND)):
        places = np.flatnonzero(ids == token)
        if len(places):
            item = MediaItem(kind, name.encode(), len(places), name, begin=int(places[0]))
            media.append(item)
    media.sort(key=lambda item: item.begin)
    return Example(ids, goldens[f"{name}.supervised"].astype(bool), name, media=tuple(media))


def encoder(
    model: MultimodalLM, oracle: Mapping[str, np.ndarray]
) -> Callable[[MediaItem], mx.array]:
    def features(item: MediaItem) -> mx.array:
        mine = {
            key: mx.array(array)
            for name, array in oracle.items()
            if name.startswith(f"{item.source}.") and item.kind in (key := name.partition(".")[2])
        }
        found = model.encode_frozen(**mine)
        rows = found.images if item.kind == "image" else found.audio
        assert rows is not None
        return rows

    return features


def learn(
    model: MultimodalLM,
    examples: list[Example],
    oracle: Mapping[str, np.ndarray],
    parts: tuple[str, ...],
    row_length: int | None = None,
    **options: Any,
) -> tuple[float, dict[str, mx.array]]:
    held = frozenset().union(*(example.held for example in examples))
    attach(model, TrainSettings(train=parts), held)
    recorder = Recorder()
    step = TrainingStep(model, recorder, features=encoder(model, oracle), **options)
    batches = list(Batches(examples, len(examples), row_length=row_length).epoch(0))
    return step(1, batches).loss, recorder.seen


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_torchs(
    name: str,
    checkpointing: bool,
    model: MultimodalLM,
    oracle: Mapping[str, np.ndarray],
    goldens: Mapping[str, np.ndarray],
) -> None:
    parts = (f"{CASES[name]}-adapter", "projector")
    loss, gradients = learn(
        model, [case_example(name, goldens)], oracle, parts, checkpointing=checkpointing
    )
    assert loss == pytest.approx(float(goldens[f"{name}.loss"][0]), rel=EXACT)
    expected = {k.partition(".norm.")[2]: k for k in goldens if k.startswith(f"{name}.norm.")}
    assert gradients.keys() == expected.keys()
    for path, key in expected.items():
        norm, rows = float(goldens[key][0]), goldens[key.replace(".norm.", ".rows.")]
        found = np.array(gradients[path])
        assert np.linalg.norm(found) == pytest.approx(norm, rel=EXACT), path
        assert np.abs(found[: len(rows)] - rows).max() <= EXACT * norm, path
