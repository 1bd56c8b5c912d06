"""mlx-lm's `lora_config.yaml` -> the settings of a run, under our own names.

Source: https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/lora.py (0.32), tuner/utils.py,
tuner/datasets.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FiniteFloat, StrictBool
from pydantic import TypeAdapter as Adapter

from phimlx.options import Count, Fraction, NonNegative, OptionError, Positive, PositiveCount

HINT = "Leave these out, or set them to null, where the run may do without."

Betas = tuple[Fraction, Fraction]
_ADAM: dict[str, Any] = {"betas": Betas, "eps": Positive, "bias_correction": StrictBool}
# What each optimizer of MLX takes beside its learning rate, as far as a run here keeps its state.
OPTIMIZER_VALUES: dict[str, dict[str, Any]] = {
    "adam": _ADAM,
    "adamw": _ADAM | {"weight_decay": NonNegative},
    "lion": {"betas": Betas, "weight_decay": NonNegative},
    "muon": {
        "momentum": Fraction,
        "nesterov": StrictBool,
        "ns_steps": PositiveCount,
        "weight_decay": NonNegative,
    },
    "sgd": {"momentum": NonNegative, "dampening": NonNegative, "weight_decay": NonNegative},
    "adafactor": {
        "clip_threshold": Positive,
        "scale_parameter": StrictBool,
        "weight_decay": NonNegative,
    },
}
# The arguments of MLX's schedules, of which a last one may have a default.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cosine_decay": (Positive, PositiveCount, NonNegative),
    "linear_schedule": (NonNegative, NonNegative, PositiveCount),
    "exponential_decay": (Positive, Fraction),
    "step_decay": (Positive, Fraction, PositiveCount),
}


class Schedule(BaseModel):
    """A learning rate by MLX's own function, after a warmup from `warmup_init` on.

    `arguments` are that function's, the first of them the rate that it begins with.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["cosine_decay", "linear_schedule", "exponential_decay", "step_decay"]
    arguments: tuple[int | FiniteFloat, ...]
    warmup: Count = 0
    warmup_init: NonNegative = 0.0


def _check_schedule(schedule: Schedule) -> Schedule:
    """Return the schedule with each argument as the number that it has to be."""
    kinds, given = ARGUMENTS[schedule.name], schedule.arguments
    fewest = len(kinds) - (schedule.name == "cosine_decay")
    if not fewest <= len(given) <= len(kinds):
        raise ValueError(given)
    checked = [
        Adapter(kind).validate_python(each) for kind, each in zip(kinds, given, strict=False)
    ]
    return schedule.model_copy(update={"arguments": tuple(checked)})


def _check_optimizers(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            key: Adapter(OPTIMIZER_VALUES[name][key]).validate_python(value)
            for key, value in table.items()
        }
        for name, table in tables.items()
        if name in OPTIMIZER_VALUES
    }


CheckedSchedule = Annotated[Schedule, AfterValidator(_check_schedule)]
OptimizerTables = Annotated[dict[str, dict[str, Any]], AfterValidator(_check_optimizers)]

# Keys that change nothing here: evaluation that is not asked for, memory, trust in code that is
# never run.
IDLE = ("test_batches", "clear_cache_threshold", "trust_remote_code")
# Keys that are followed only where they ask for nothing, and what does what they ask for.
ADVICE = {
    "test": "evaluate afterwards: phimlx evaluate",
    "resume_adapter_file": "a run of phimlx goes on with --resume",
    "config": "give one file",
    "project_name": "trackers name the run after its folder",
    "wandb": "report_to: wandb",
}
# Splits of a data set of the Hub that are taken without being asked for.
SPLITS = {
    "train_split": ("train",),
    "valid_split": ("valid", "validation"),
    "test_split": ("test",),
}
LONGEST = 600  # characters of settings that one message names
# What mlx-lm calls the columns.
COLUMNS = {
    "prompt_feature": "prompt",
    "completion_feature": "completion",
    "text_feature": "text",
    "chat_feature": "messages",
}


def translate(table: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return mlx-lm's settings under our own names, beside those that are our own already.

    Args:
        table: keys with underscores; null counts as absent.
        known: every name that is understood after this.

    Raises:
        OptionError: naming everything at once that cannot be followed.
    """
    found = {key: value for key, value in table.items() if value is not None and key not in IDLE}
    if isinstance(found.get("train"), bool):  # mlx-lm's word for training, which this is
        del found["train"]
    unfollowed: list[str] = []
    for key, advice in ADVICE.items():
        value = found.pop(key, None)
        if value not in (None, False, ""):
            unfollowed.append(f"{key} ({advice})")
    for take in (_take_optimizer, _take_schedule, _take_data, _take_older):
        take(found, unfollowed.append)
    if unfollowed:
        unfollowed += [f"{key} (no setting)" for key in found if key not in known]
        raise OptionError(f"phimlx does not follow {_listed(unfollowed)}.", HINT)
    return found


def _listed(names: list[str]) -> str:
    """Name settings, as many as a message has room for."""
    shown: list[str] = []
    for name in names:
        if sum(map(len, shown)) > LONGEST:
            return f"{', '.join(shown)} and {len(names) - len(shown)} more"
        shown.append(name if len(name) <= 150 else f"{name[:147]}...")
    return ", ".join(shown)


Refuse = Callable[[str], None]


def _take_optimizer(found: dict[str, Any], refuse: Refuse) -> None:
    if isinstance(found.get("optimizer"), str):
        found["optimizer"] = found["optimizer"].lower()
    tables = found.get("optimizer_config")
    if not isinstance(tables, Mapping):
        return
    chosen = found.get("optimizer", "adamw")
    kept: dict[str, Any] = {}
    for name, values in tables.items():
        if not isinstance(values, Mapping) or name not in OPTIMIZER_VALUES:
            if name == chosen and values:
                refuse(f"optimizer_config.{name}")
            continue
        kept[name] = {key: value for key, value in values.items() if key in OPTIMIZER_VALUES[name]}
        if name == chosen:
            for key in sorted(map(str, values.keys() - kept[name].keys())):
                refuse(f"optimizer_config.{name}.{key}")
            if "weight_decay" in kept[name]:
                found.setdefault("weight_decay", kept[name].pop("weight_decay"))
    found["optimizer_config"] = {name: values for name, values in kept.items() if values}


def _take_schedule(found: dict[str, Any], refuse: Refuse) -> None:
    table = found.get("lr_schedule")
    if not isinstance(table, Mapping):
        return
    del found["lr_schedule"]
    if not table:
        return
    if str(table.get("name")) not in ARGUMENTS:
        refuse(f"lr_schedule.name {table.get('name')!r:.40} (one of {', '.join(ARGUMENTS)})")
    for key in sorted(map(str, table.keys() - Schedule.model_fields.keys())):
        refuse(f"lr_schedule.{key}")
    found.pop("learning_rate", None)  # which a schedule takes the place of
    found["schedule"] = {key: value for key, value in table.items() if value is not None}


def _take_data(found: dict[str, Any], refuse: Refuse) -> None:
    """Take a data set of the Hub, and the names of columns."""
    hub = found.pop("hf_dataset", None)
    columns = {COLUMNS[key]: found.pop(key) for key in COLUMNS if key in found}
    if isinstance(hub, list) and len(hub) == 1:
        hub = hub[0]
    if isinstance(hub, Mapping):
        hub = {key: value for key, value in hub.items() if value is not None}
        path = hub.pop("path", None) or hub.pop("name", None)
        given = hub.pop("config", None)
        config = dict(given) if isinstance(given, Mapping) else {"name": given}
        part = config.pop("name", None)
        for key in config:
            refuse(f"hf_dataset.config.{key}")
        columns |= {COLUMNS[key]: hub.pop(key) for key in COLUMNS if key in hub}
        for key, words in SPLITS.items():
            if hub.get(key) in words:
                del hub[key]
        hub.pop("mask_prompt", None)
        for key in hub:
            refuse(f"hf_dataset.{key}")
        found["data"] = f"{path}:{part}" if part else path
    elif hub:
        refuse("hf_dataset (one data set, with its path)")
    if columns:
        found["mapping"] = columns | dict(found.get("mapping") or {})


def _take_older(found: dict[str, Any], refuse: Refuse) -> None:
    """Take names of earlier versions."""
    if "lora_layers" in found:
        found.setdefault("num_layers", found.pop("lora_layers"))
    if found.pop("use_dora", False):
        found.setdefault("fine_tune_type", "dora")
