"""Two processes that share a model's layers train it as one does, each in part of its memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import phimlx
from phimlx.checkpoint.load import build_model
from phimlx.errors import PhimlxError, TrainingError
from phimlx.hub.resolve import ASSETS
from phimlx.machine.processes import ProcessGroup
from phimlx.training.run.checks import check_shared
from phimlx.training.run.session import Session
from phimlx.training.settings import TrainSettings
from tests.everything import everything
from tests.generation.small import CONFIG
from tests.sharing.test_shared_model import make_phi, make_quantized
from tests.training.folder import COPIED, write_tiny
from tests.training.test_distributed import alone, arguments, log, losses, together, write_place

DRAWN = ("--dropout", "0.2", "--grad-checkpoint", "--learning-rate", "0.001")
DORA = ("--fine-tune-type", "dora", "--optimizer", "lion", "--pack", "--max-seq-length", "64")
quantized, phi = (partial(make, vocab_size=1536) for make in (make_quantized, make_phi))
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
"""Of a model whose layers are most of it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("sharded"))


def check_losses(found: Path, wanted: Path, count: int | None = None) -> None:
    """Compare losses, up to the last report or the `count`-th of one."""
    expected = losses(wanted)[:count]
    assert len(expected) >= 7  # five steps, two validations or more
    assert [step for step, _ in losses(found)] == [step for step, _ in expected]
    for (_, loss), (_, of_one) in zip(losses(found), expected, strict=True):
        assert loss == pytest.approx(of_one, rel=1e-5)


def check_adapters(place: Path, found: str, wanted: str) -> None:
    """Compare what the model says with one adapter and with another, and that it is changed."""
    logits = [
        np.array(phimlx.load(place / "model", adapter=adapter).model(mx.array([[5, 6, 7, 8]])))
        for adapter in (place / found, place / wanted, None)
    ]
    bound = 1e-4 * np.abs(logits[1]).max()
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=bound)
    assert np.abs(logits[0] - logits[2]).max() > 1e-2


@pytest.mark.slow
def test_losses_are_those_of_one_process_which_goes_on_where_a_machine_is_lost(place: Path) -> None:
    one = alone(arguments(place, "one", "rows.jsonl", *DRAWN))
    assert one.returncode == 0, one.stderr
    lost = together(arguments(place, "lost", "rows.jsonl", "--shard", *DRAWN), "SIGKILL@1", "6")
    said = lost.stdout + lost.stderr
    assert said.count("Error:") == 1
    assert "Another of the 2 machines is lost, so the run ends here" in said
    check_losses(place / "lost", place / "one", 7)
    kept = sorted(path.name for path in (place / "lost" / "checkpoints").iterdir())
    assert kept == ["step-0000003"]
    resumed = alone(["train", "--resume", "--adapter-path", str(place / "lost")])
    assert resumed.returncode == 0, resumed.stderr
    check_losses(place / "lost", place / "one")
    check_adapters(place, "lost", "one")


@everything
def test_an_interrupted_run_goes_on_to_the_same_bits(place: Path) -> None:
    whole = together(arguments(place, "whole", "rows.jsonl", "--shard", *DRAWN))
    assert whole.returncode == 0, whole.stderr
    begun = together(arguments(place, "begun", "rows.jsonl", "--shard", *DRAWN), "SIGINT@1", "4")
    assert "Stopped after step 4." in begun.stdout + begun.stderr
    together(["train", "--resume", "--adapter-path", str(place / "begun")])
    assert losses(place / "begun") == losses(place / "whole")
    arrays = [mx.load(str(place / name / "adapters.safetensors")) for name in ("begun", "whole")]
    assert all(mx.array_equal(arrays[0][name], array) for name, array in arrays[1].items())
    one = alone(arguments(place, "of one", "rows.jsonl", *DRAWN))
    assert one.returncode == 0, one.stderr
    check_losses(place / "whole", place / "of one")
    check_adapters(place, "whole", "of one")


@everything
@pytest.mark.parametrize(
    ("make", "data", "more"),
    [
        (quantized, "rows.jsonl", DRAWN),
        (quantized, "rows.jsonl", DORA),
        (phi, "rows.jsonl", DORA),
        (phi, "pairs.jsonl", ("--dpo",)),
        (write_tiny, "pairs.jsonl", ("--method", "kto")),
    ],
    ids=["quantized", "quantized, dora", "phi, dora", "phi, dpo", "kto"],
)
def test_every_kind_of_model_and_method(
    tmp_path: Path, place: Path, make: Callable[[Path], Path], data: str, more: tuple[str, ...]
) -> None:
    folder = make(tmp_path / "model")
    for name in COPIED:
        (folder / name).write_bytes((place / "model" / name).read_bytes())
    for name in ("rows.jsonl", "pairs.jsonl"):
        (tmp_path / name).write_bytes((place / name).read_bytes())
    one = alone(arguments(tmp_path, "one", data, *more))
    assert one.returncode == 0, one.stderr
    two = together(arguments(tmp_path, "two", data, "--shard", *more))
    assert two.returncode == 0, two.stderr
    check_losses(tmp_path / "two", tmp_path / "one")


@dataclass(frozen=True)
class Machines(ProcessGroup):
    """So many machines, as the first of them sees them."""

    count: int = 2

    @property
    def size(self) -> int:
        return self.count


@pytest.mark.slow
def test_memory_is_what_was_forecast_and_little_more_than_half(place: Path) -> None:
    folder = write_tiny(place / "wide", **WIDE)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    more = ("--iters", "2", "--batch-size", "1", "--grad-accumulation-steps", "1")
    peaks, forecasts = {}, {}
    for name, count, run in (("wide-1", 1, alone), ("wide-2", 2, together)):
        shard = ("--shard",) if count == 2 else ()
        given = arguments(place, name, "rows.jsonl", *shard, *more)
        given[given.index("--model") + 1] = str(folder)
        done = run(given)
        assert done.returncode == 0, done.stderr
        peaks[count] = max(row["peak_memory"] for row in log(place / name) if "peak_memory" in row)
        settings = TrainSettings(
            model=str(folder),
            data=str(place / "rows.jsonl"),
            batch_size=1,
            rank=4,
            shard=count == 2,
        )
        session = Session(settings, folder, Machines(count=count))
        forecasts[count] = session.estimate_memory(session.load_data())
    print(peaks, forecasts, weights)
    assert forecasts[1].weights == pytest.approx(weights, rel=0.01)
    assert forecasts[2].weights < 0.6 * forecasts[1].weights
    assert peaks[2] < 0.6 * peaks[1]
    for count, forecast in forecasts.items():
        assert forecast.total == pytest.approx(peaks[count], rel=0.15)


@pytest.mark.parametrize(
    ("given", "machines", "sentence", "hint"),
    [
        ({}, 1, "--shard shares a model among several machines, and this is one alone.", "-n 2"),
        ({"fine_tune_type": "full"}, 2, "--shard does not go with --fine-tune-type full.", "lora"),
        ({"optimizer": "muon"}, 2, "--shard does not go with --optimizer muon.", "adamw"),
        ({"sample_prompts": 1}, 2, "--shard does not go with --sample-prompts.", "generate"),
        ({"method": "grpo"}, 2, "--shard does not go with --method grpo.", "Leave --shard out"),
        ({}, 3, "3 machines cannot share this model evenly: it has 4 attention heads.", ": 2."),
    ],
)
def test_what_does_not_go_is_refused(
    given: dict[str, Any], machines: int, sentence: str, hint: str
) -> None:
    heads = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    with pytest.raises(PhimlxError) as refused:
        check_shared(
            TrainSettings(shard=True, **given), build_model({**CONFIG, **heads}), machines, False
        )
    assert str(refused.value) == sentence
    assert hint in str(refused.value.hint)


def test_a_model_that_takes_media_is_not_shared_in_training() -> None:
    model = build_model(json.loads((ASSETS / "nano-multimodal" / "config.json").read_text()))
    with pytest.raises(TrainingError, match=r"--shard trains text models, and this one takes more"):
        check_shared(TrainSettings(shard=True), model, 2, False)


@everything
def test_one_message_tells_what_is_wrong(place: Path) -> None:
    wrong = together(arguments(place, "wrong", "rows.jsonl", "--shard", "--optimizer", "muon"))
    said = wrong.stdout + wrong.stderr
    assert said.count("Error:") == 1
    assert "--shard does not go with --optimizer muon." in said
