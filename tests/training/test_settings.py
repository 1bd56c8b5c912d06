"""Settings: one table for flags and files, and a sentence for each that does not hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phimlx.errors import TrainingError
from phimlx.models.lora import MAX_RANK
from phimlx.options import from_file, from_flags, override, read, schemas
from phimlx.training.memory_estimate import MOMENTS
from phimlx.training.run.trackers import TRACKERS
from phimlx.training.schedule import OPTIMIZERS, SCHEDULES
from phimlx.training.settings import TrainSettings


def test_defaults() -> None:
    settings = read(TrainSettings, {})
    assert settings == TrainSettings()
    assert (settings.rank, settings.scale, settings.peak_learning_rate) == (16, 2.0, 1e-4)
    assert read(TrainSettings, {"fine_tune_type": "full"}).peak_learning_rate == 1e-5


def test_each_word_has_something_behind_it() -> None:
    words = schemas(TrainSettings)
    assert set(words["optimizer"]["enum"]) == OPTIMIZERS.keys() == MOMENTS.keys()
    assert set(words["lr_schedule"]["enum"]) == SCHEDULES.keys()
    assert set(words["report_to"]["items"]["enum"]) == TRACKERS.keys()
    assert words["rank"]["maximum"] == MAX_RANK


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"batchsize": 4}, "there is no setting batchsize.", "Did you mean batch_size?"),
        ({"xyzzy": 4}, "there is no setting xyzzy.", "See phimlx train --help."),
        ({"batch_size": 0}, "batch_size is 0; it must be a whole number, 1 or more.", None),
        ({"batch_size": 2.5}, "batch_size is 2.5; it must be a whole number, 1 or more.", None),
        ({"batch_size": True}, "batch_size is True; it must be a whole number, 1 or more.", None),
        (
            {"learning_rate": "fast"},
            "learning_rate is 'fast'; it must be a number, above 0, 100000 at most.",
            None,
        ),
        (
            {"learning_rate": float("nan")},
            "learning_rate is nan; it must be a number, above 0, 100000 at most.",
            None,
        ),
        ({"dropout": 1}, "dropout is 1; it must be a number, 0 or more, below 1.", None),
        ({"pack": "yes"}, "pack is 'yes'; it must be true or false.", None),
        ({"loss_on": "user"}, "loss_on is 'user'; it must be one of assistant, last, all.", None),
        ({"layers": "9-3"}, "layers is '9-3'; it must be a range such as 8-23.", None),
        (
            {"mapping": "question"},
            "mapping is 'question'; it must be pairs such as prompt=question.",
            None,
        ),
        (
            {"report_to": "email"},
            "report_to is 'email'; it must be a list, each one of wandb, swanlab, tensorboard.",
            None,
        ),
        ({"rank": 0}, "rank is 0; it must be a whole number, 1 or more, 16384 at most.", None),
        (
            {"rank": 2**15},
            "rank is 32768; it must be a whole number, 1 or more, 16384 at most.",
            None,
        ),
        ({"num_layers": 0}, "num_layers is 0; it must be a whole number above 0, or -1.", None),
        ({"layers": 3}, "layers is 3; it must be a range such as 8-23.", None),
        ({"layers": [True, 3]}, "layers is [True, 3]; it must be a range such as 8-23.", None),
        ({"epochs": True}, "epochs is True; it must be a number, above 0, 100000 at most.", None),
        ({"targets": ["a", ""]}, "targets is ['a', '']; it must be a list, each a text.", None),
        ({"model": 3}, "model is 3; it must be a text.", None),
        ({"lorarank": 3}, "there is no setting lorarank.", "Did you mean lora_rank?"),
        ({"iters": 5, "epochs": 2}, "iters and epochs exclude each other.", "Give one."),
        (
            {"layers": "0-1", "num_layers": 2},
            "layers and num_layers exclude each other.",
            "Give one.",
        ),
    ],
)
def test_what_does_not_hold_is_named(
    values: dict[str, Any], message: str, hint: str | None
) -> None:
    with pytest.raises(TrainingError) as error:
        read(TrainSettings, values)
    assert (str(error.value), error.value.hint) == (message, hint)


def test_a_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'model = "nano"\nlearning-rate = 2e-4\ntargets = ["qkv_proj", "o_proj"]\n'
        'layers = [1, 3]\n[mapping]\nprompt = "question"\n'
    )
    settings = from_file(TrainSettings, path)
    assert settings.peak_learning_rate == 2e-4
    assert settings.targets == ("qkv_proj", "o_proj")
    assert settings.layers == (1, 3)
    assert settings.mapping == {"prompt": "question"}


def test_a_file_of_mlx_lm(tmp_path: Path) -> None:
    path = tmp_path / "lora.yaml"
    path.write_text(
        "model: nano\ntrain: true\nmask_prompt: false\niters: 10\nlearning_rate: 1e-5\n"
        "lora_parameters:\n  keys: [qkv_proj]\n  rank: 8\n  scale: 20.0\n  dropout: 0.1\n"
    )
    settings = from_file(TrainSettings, path)
    assert (settings.loss_on, settings.iters, settings.peak_learning_rate) == ("all", 10, 1e-5)
    assert (settings.rank, settings.scale, settings.dropout) == (8, 20.0, 0.1)
    assert settings.targets == ("qkv_proj",)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "a: [", "{path} is not YAML (line 1)."),
        ("a.yaml", "!!python/object/apply:os.getcwd []", "{path} is not YAML (line 1)."),
        ("a.toml", "a = ", "{path} is not TOML (Invalid value (at end of document))."),
        ("a.yaml", "- 1", "{path} is not a table of settings."),
        ("a.json", "{}", "{path} is neither YAML nor TOML."),
        ("a.yaml", "batch: 3", "{path}: there is no setting batch."),
        ("a.yaml", "rank: 4\nlora_parameters: {rank: 4}", "{path}: rank is given twice."),
        ("a.yaml", "lora_parameters: 4", "{path}: lora_parameters is 4, not a table of values."),
        ("a.yaml", "mask_prompt: 1", "{path}: mask_prompt is 1; it must be true or false."),
        ("a.yaml", "iters: 0", "{path}: iters is 0; it must be a whole number, 1 or more."),
        ("a.toml", "iters = \xff", "{path} is not UTF-8 text."),
    ],
)
def test_a_file_that_does_not_hold(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(TrainingError) as error:
        from_file(TrainSettings, path)
    assert str(error.value) == message.format(path=path)


def test_a_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as error:
        from_file(TrainSettings, tmp_path / "a.toml")
    assert str(error.value) == f"There is no file {tmp_path / 'a.toml'}."


def test_differences_are_those_that_decide() -> None:
    before = TrainSettings(targets=("o_proj",), keep=3)
    now = TrainSettings(targets=("qkv_proj",), keep=5, seed=2)
    assert now.differences(before) == [
        "targets was ['o_proj'], is ['qkv_proj']",
        "seed was 0, is 2",
    ]


def test_a_flag_takes_the_place_of_what_it_excludes_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("epochs: 2\nlayers: 0-1\nrank: 4\n")
    file = from_file(TrainSettings, path)
    settings = from_flags(TrainSettings, {"iters": 7, "epochs": None, "num_layers": 1}, file)
    assert settings.model_fields_set == {"iters", "num_layers", "rank"}
    assert (settings.iters, settings.epochs, settings.layers, settings.rank) == (7, 3, None, 4)
    with pytest.raises(TrainingError, match="iters and epochs exclude each other"):
        from_flags(TrainSettings, {"iters": 7, "epochs": 2.0})
    assert override(settings, TrainSettings(epochs=1)).iters is None


def test_settings_survive_their_file() -> None:
    settings = read(
        TrainSettings,
        {"layers": "1-3", "mapping": "prompt=q,completion=a", "report_to": "wandb,swanlab"},
    )
    assert settings.as_object()["layers"] == [1, 3]
    again = settings.as_object() | {"num_layers": None, "epochs": None}
    assert read(TrainSettings, again) == settings
