"""mlx-lm's configuration files, read as mlx-lm reads them, or refused in one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from phimlx.errors import TrainingError
from phimlx.options import from_file, from_flags, read
from phimlx.training.mlx_lm_config import ADVICE
from phimlx.training.schedule import learning_rate, make_optimizer
from phimlx.training.settings import TrainSettings

# The example of mlx-lm 0.32, mlx_lm/examples/lora_config.yaml, and what its defaults add.
WHOLE = """
model: nano
train: true
fine_tune_type: lora
optimizer: AdamW
optimizer_config:
  adamw: {betas: [0.9, 0.98], eps: 1e-6, bias_correction: true, weight_decay: 0.05}
  sgd: {momentum: 0.5}
data: data
seed: 0
num_layers: 2
batch_size: 2
iters: 4
val_batches: 1
learning_rate: 1e-5
steps_per_report: 1
steps_per_eval: 2
grad_accumulation_steps: 2
clear_cache_threshold: 0
resume_adapter_file: null
adapter_path: out
save_every: 2
test: false
test_batches: 10
max_seq_length: 256
grad_checkpoint: false
config: null
mask_prompt: true
report_to: null
project_name: null
trust_remote_code: false
lora_parameters: {keys: [self_attn.qkv_proj], rank: 8, scale: 20.0, dropout: 0.0}
lr_schedule: {name: cosine_decay, warmup: 1, warmup_init: 1e-7, arguments: [2e-5, 10, 1e-7]}
"""


def settings_of(folder: Path, text: str | dict[str, Any]) -> TrainSettings:
    path = folder / "lora.yaml"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return from_file(TrainSettings, path)


def refusal(folder: Path, table: dict[str, Any]) -> str:
    with pytest.raises(TrainingError) as caught:
        settings_of(folder, table)
    return str(caught.value).removeprefix(f"{folder / 'lora.yaml'}: ")


def test_a_whole_file(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, WHOLE)
    assert (settings.optimizer, settings.weight_decay) == ("adamw", 0.05)
    assert settings.peak_learning_rate == 2e-5
    assert (settings.scale, settings.targets) == (20.0, ("self_attn.qkv_proj",))
    optimizer = make_optimizer(settings, 4)
    assert isinstance(optimizer, optim.AdamW)
    assert (list(optimizer.betas), optimizer.eps) == ([0.9, 0.98], 1e-6)
    assert (optimizer.bias_correction, optimizer.weight_decay) == (True, 0.05)


def test_it_survives_the_file_of_a_run(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, WHOLE)
    defaults = TrainSettings().as_object()
    changed = {k: v for k, v in settings.as_object().items() if v != defaults[k]}
    assert read(TrainSettings, changed).differences(settings) == []


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cosine_decay", [1e-5, 10, 1e-7]),
        ("cosine_decay", ["1e-4", 1000]),
        ("linear_schedule", [1e-3, 1e-5, 12]),
        ("exponential_decay", [0.1, 0.9]),
        ("step_decay", [0.1, 0.5, 3]),
    ],
)
@pytest.mark.parametrize("warmup", [{}, {"warmup": 0}, {"warmup": 4}, {"warmup_init": 1e-7}])
def test_rates_are_those_of_mlx_lm(
    tmp_path: Path, name: str, arguments: list[Any], warmup: dict[str, Any]
) -> None:
    build = pytest.importorskip("mlx_lm.tuner.utils").build_schedule
    table = {"name": name, "arguments": arguments, **warmup}
    plain = table | {"arguments": [float(x) if isinstance(x, str) else x for x in arguments]}
    settings = settings_of(tmp_path, {"learning_rate": 7, "lr_schedule": table})
    ours, theirs = learning_rate(settings, 20), build(plain)
    steps = [mx.array(step, mx.uint64) for step in range(20)]
    assert [float(ours(step)) for step in steps] == [float(theirs(step)) for step in steps]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("adam", {"betas": (0.8, 0.9), "eps": 1e-7}),
        ("lion", {"betas": (0.8, 0.9)}),
        ("muon", {"momentum": 0.8, "nesterov": False, "ns_steps": 3, "weight_decay": 0.0}),
        ("sgd", {"momentum": 0.0, "dampening": 0.1, "weight_decay": 0.2}),
        ("adafactor", {"clip_threshold": 2.0, "scale_parameter": True}),
    ],
)
def test_values_of_every_optimizer(tmp_path: Path, name: str, values: dict[str, Any]) -> None:
    table = {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
    }
    found = {"optimizer": name, "optimizer_config": {name: table, "adamw": {"eps": 1.0}}}
    optimizer = make_optimizer(settings_of(tmp_path, found), 5)
    assert {key: getattr(optimizer, key) for key in values} == values


def test_flags_come_before_the_file(tmp_path: Path) -> None:
    file = settings_of(tmp_path, WHOLE)
    settings = from_flags(TrainSettings, {"learning_rate": 1e-3, "optimizer": "sgd"}, file)
    assert (settings.schedule, settings.peak_learning_rate) == (None, 1e-3)
    optimizer = make_optimizer(settings, 4)
    assert isinstance(optimizer, optim.SGD)
    assert optimizer.momentum == 0.5


@pytest.mark.parametrize("key", ADVICE)
def test_what_is_not_asked_for_is_no_fault(tmp_path: Path, key: str) -> None:
    for value in (None, False, ""):
        assert settings_of(tmp_path, {key: value, "rank": 4}) == TrainSettings(rank=4)
    assert refusal(tmp_path, {key: True}) == f"phimlx does not follow {key} ({ADVICE[key]})."


def test_all_that_cannot_be_followed_is_one_message(tmp_path: Path) -> None:
    table = {
        "test": True,
        "resume_adapter_file": "a.safetensors",
        "optimizer": "sgd",
        "optimizer_config": {"sgd": {"nesterov": True, "momentum": 0.9}, "rmsprop": {"x": 1}},
        "lr_schedule": {"name": "join_schedules", "arguments": [1], "warm": 3},
        "hf_dataset": {"path": "o/d", "train_split": "train[:10%]"},
        "xyzzy": 3,
    }
    assert refusal(tmp_path, table) == (
        "phimlx does not follow test (evaluate afterwards: phimlx evaluate), resume_adapter_file "
        "(a run of phimlx goes on with --resume), optimizer_config.sgd.nesterov, lr_schedule.name "
        "'join_schedules' (one of cosine_decay, linear_schedule, exponential_decay, step_decay), "
        "lr_schedule.warm, hf_dataset.train_split, xyzzy (no setting)."
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": 1, "b": 2}, "there are no settings 'a', 'b'."),
        *(
            (
                {"lr_schedule": {"name": name, "arguments": arguments}},
                "it must be a table of name, arguments, warmup and warmup_init, as MLX's schedule "
                "takes them.",
            )
            for name, arguments in [
                ("cosine_decay", [1e-5]),
                ("cosine_decay", [1e-5, 1.5]),
                ("cosine_decay", [0, 5]),
                ("cosine_decay", [1e-5, 0]),
                ("cosine_decay", [1, 2, 3, 4]),
                ("cosine_decay", None),
                ("cosine_decay", 3),
                ("step_decay", [1e-5, 2]),
                ("linear_schedule", [1e-5, float("nan"), 2]),
            ]
        ),
        *(
            (
                {"optimizer_config": config},
                "it must be a table of values for each optimizer, as MLX's optimizer takes them.",
            )
            for config in [{"adamw": {"betas": 3}}, {"adamw": {"eps": 0}}, [1], 4]
        ),
    ],
)
def test_values_that_do_not_hold(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    assert refusal(tmp_path, table).endswith(message)


@pytest.mark.parametrize(
    ("table", "data", "mapping"),
    [
        (
            {"prompt_feature": "q", "text_feature": "t", "data": "d"},
            "d",
            {"prompt": "q", "text": "t"},
        ),
        ({"hf_dataset": {"path": "o/d", "text_feature": "t"}, "data": "d"}, "o/d", {"text": "t"}),
        ({"hf_dataset": [{"name": "o/d", "chat_feature": "c"}]}, "o/d", {"messages": "c"}),
        ({"hf_dataset": {"path": "o/d", "config": {"name": "main"}}}, "o/d:main", {}),
        ({"hf_dataset": {"path": "o/d", "train_split": "train"}}, "o/d", {}),
    ],
)
def test_data_and_columns(
    tmp_path: Path, table: dict[str, Any], data: str, mapping: dict[str, str]
) -> None:
    settings = settings_of(tmp_path, table)
    assert (settings.data, settings.mapping) == (data, mapping)


def test_older_names(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, {"lora_layers": 4, "use_dora": True})
    assert (settings.num_layers, settings.fine_tune_type) == (4, "dora")
    assert settings_of(tmp_path, {"use_dora": False}) == TrainSettings()
