"""What a person may set about a training run: names, bounds and help, for flags and files alike.

Knows one table of options and how a file spells them; what each does is its user's affair.
"""

from __future__ import annotations

import difflib
import importlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from phimlx.errors import TrainingError, shortened
from phimlx.files import read_text
from phimlx.training.option_types import Kind, Number, Pairs, Several, Span, Switch, Text, Word

OPTIMIZERS = ("adamw", "adam", "adafactor", "lion", "muon", "sgd")
SCHEDULES = ("cosine", "linear", "constant")
SINKS = ("wandb", "swanlab", "tensorboard")
MAX_FILE_BYTES = 1 << 20


def _option(
    default: Any, kind: Kind, text: str, *flags: str, decides: bool = True, section: str = ""
) -> Any:
    """A field of `TrainSettings`.

    Args:
        flags: on the command line; the field's name with dashes where none is given.
        decides: whether another value gives other losses, so that a run cannot go on with it.
    """
    about = {"kind": kind, "help": text, "flags": flags, "decides": decides}
    return field(default=default, metadata=about)


COUNT = Number(1, whole=True)
COUNT_OR_NONE = Number(0, whole=True)
POSITIVE = Number(0, above=True, metavar="X")
SHARE = Number(0, 1, below=True, metavar="X")


@dataclass(frozen=True)
class TrainSettings:
    """All of a run's options. None stands for a default that follows from others."""

    model: str | None = _option(
        None, Text("MODEL"), "An alias, a Hub id or a folder", decides=False
    )
    data: str | None = _option(
        None,
        Text("DATA"),
        "A file (JSONL, JSON, CSV, parquet), a folder with train, valid and test files, or a data "
        "set of the Hub.",
        decides=False,
    )
    adapter_path: str = _option(
        "adapters", Text("FOLDER"), "Where the run and what it learns go.", decides=False
    )

    loss_on: str = _option(
        "assistant",
        Word(("assistant", "last", "all")),
        "Learn every answer, the last one, or all text.",
    )
    max_seq_length: int | None = _option(
        None,
        Number(2, whole=True),
        "Longest row, in tokens  [default: 2048, or what the model holds]",
    )
    overlong: str = _option(
        "refuse", Word(("refuse", "cut", "split")), "What becomes of longer rows."
    )
    mapping: tuple[tuple[str, str], ...] = _option(
        (), Pairs(), "Columns of other names, such as prompt=question,completion=answer."
    )
    valid_fraction: float | None = _option(
        None,
        SHARE,
        "Part of the rows kept for validation where the data has no valid file  [default: 0.05]",
    )
    pack: bool = _option(
        False, Switch(), "Put several examples into each row of --max-seq-length tokens."
    )

    fine_tune_type: str = _option(
        "lora", Word(("lora", "dora", "full")), "Adapters, or all weights."
    )
    rank: int = _option(16, COUNT, "Rank of the adapters.", "--rank", "--lora-rank")
    alpha: float | None = _option(
        None, POSITIVE, "Adapters are scaled by alpha / rank  [default: twice the rank]"
    )
    dropout: float = _option(0.0, SHARE, "Part of an adapter's input that is dropped.")
    rslora: bool = _option(False, Switch(), "Scale by alpha / √rank instead.")
    targets: tuple[str, ...] = _option(
        (), Several(Text("NAME")), "Projections that get an adapter  [default: all of a layer]"
    )
    num_layers: int = _option(
        -1, Number(-1, whole=True), "Last layers to train; -1 for all.", "--num-layers"
    )
    layers: tuple[int, int] | None = _option(
        None, Span(), "Layers to train instead, counted from 0, such as 8-23."
    )

    epochs: float = _option(3, Number(0, above=True, metavar="X"), "Times through the data.")
    iters: int | None = _option(None, COUNT, "Steps of the run, instead of --epochs.")
    batch_size: int = _option(4, COUNT, "Rows in a batch, over all machines together.")
    grad_accumulation_steps: int = _option(1, COUNT, "Batches whose gradients make one step.")
    learning_rate: float | None = _option(
        None, POSITIVE, "At its highest  [default: 1e-4, with all weights 1e-5]"
    )
    lr_schedule: str = _option("cosine", Word(SCHEDULES), "How it falls after the warmup.")
    warmup: int | None = _option(
        None, COUNT_OR_NONE, "Steps in which it rises  [default: 3 % of all, at most 100]"
    )
    optimizer: str = _option("adamw", Word(OPTIMIZERS), "What updates the weights.")
    weight_decay: float = _option(0.01, Number(0, metavar="X"), "Where the optimizer has it.")
    clip: float = _option(
        1.0, Number(0, metavar="X"), "Largest norm of all gradients together; 0 for none."
    )
    grad_checkpoint: bool = _option(
        False, Switch(), "Compute activations twice rather than keep them.", decides=False
    )
    seed: int = _option(0, Number(0, 2**63, below=True, whole=True), "For everything drawn.")

    dpo: bool = _option(
        False, Switch(), "Learn from rows of prompt, chosen and rejected which answer is preferred."
    )
    beta: float = _option(0.1, POSITIVE, "How far --dpo holds on to the model without adapter.")

    steps_per_report: int = _option(10, COUNT, "Steps from report to report.", decides=False)
    steps_per_eval: int | None = _option(
        None, COUNT, "Steps between validations  [default: a tenth of the run]", decides=False
    )
    val_batches: int = _option(
        -1, Number(-1, whole=True), "Batches of a validation, always the same; -1 for all."
    )
    save_every: int | None = _option(
        None, COUNT, "Steps between checkpoints  [default: as --steps-per-eval]", decides=False
    )
    keep: int = _option(
        3, COUNT, "Newest checkpoints kept; the best one is kept beside them.", decides=False
    )
    early_stop: int = _option(
        0,
        COUNT_OR_NONE,
        "End after this many validations without a better one; 0 for never.",
        decides=False,
    )
    sample_prompts: int = _option(
        0,
        COUNT_OR_NONE,
        "Validation rows that the model answers after each validation.",
        decides=False,
    )
    log: str | None = _option(
        None,
        Text("FILE"),
        "Every report as a line of JSON  [default: log.jsonl in --adapter-path]",
        decides=False,
    )
    report_to: tuple[str, ...] = _option(
        (), Several(Word(SINKS)), "Send reports there too.", decides=False
    )

    @property
    def rate(self) -> float:
        """The learning rate at its highest."""
        usual = 1e-5 if self.fine_tune_type == "full" else 1e-4
        return usual if self.learning_rate is None else self.learning_rate

    @property
    def scaled_by(self) -> float:
        """Alpha of the adapters."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def as_object(self) -> dict[str, Any]:
        """Everything, as JSON keeps it."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """How these settings, where they decide about losses, differ from those of a run."""
        return [
            f"{name} was {other[name]!r}, is {value!r}"
            for name, value in self.as_object().items()
            if TABLE[name].metadata["decides"] and name in other and other[name] != value
        ]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


TABLE: dict[str, Field[Any]] = {each.name: each for each in fields(TrainSettings)}
"""The options by name; `metadata` holds kind, help, flags and decides."""

# What mlx-lm's files call otherwise.
ALIASES = {
    "lora_rank": "rank",
    "keys": "targets",
    "grad_accumulation": "grad_accumulation_steps",
}
SECTIONS = ("lora_parameters",)  # tables whose entries count as if they stood outside
IGNORED = ("train",)  # where training is another word of the same command


def read_settings(values: Mapping[str, Any], place: str = "") -> TrainSettings:
    """Settings by name, each held to its bounds.

    Args:
        place: what the values come from, for messages.

    Raises:
        TrainingError: naming the first that is unknown, out of bounds or in conflict.
    """
    before = f"{place}: " if place else ""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in TABLE:
            close = difflib.get_close_matches(name, [*TABLE, *ALIASES, "mask_prompt"], 1)
            raise TrainingError(
                f"{before}there is no setting {name}.",
                hint=f"Did you mean {close[0]}?" if close else "See phimlx train --help.",
            )
        if value is not None:
            found[name] = read_value(name, value, place)
    if found.get("iters") is not None and "epochs" in found:
        raise TrainingError(f"{before}iters and epochs exclude each other.", hint="Give one.")
    if found.get("layers") is not None and found.get("num_layers", -1) != -1:
        raise TrainingError(f"{before}layers and num_layers exclude each other.", hint="Give one.")
    return TrainSettings(**found)


def read_value(name: str, value: Any, place: str = "") -> Any:
    """One value as it is kept; raises TrainingError that says what it must be."""
    kind: Kind = TABLE[name].metadata["kind"]
    try:
        return kind.read(value)
    except (ValueError, TypeError):
        before = f"{place}: " if place else ""
        raise TrainingError(
            f"{before}{name} is {shortened(value)}; it must be {kind.what}."
        ) from None


def read_file(path: Path) -> dict[str, Any]:
    """The settings that a YAML or TOML file gives, under the names of `TrainSettings`.

    Dashes count as underscores, and what mlx-lm's files call otherwise is understood.

    Raises:
        TrainingError: for a file that cannot be read, and for a setting given twice.
    """
    table = _parse(path)
    sections = [(name, table.pop(name)) for name in SECTIONS if name in table]
    found: dict[str, Any] = {}
    scale = None
    for name, part in [("", table), *sections]:
        if not isinstance(part, Mapping):
            raise TrainingError(f"{path}: {name} is {shortened(part)}, not a table of values.")
        for key, value in part.items():
            key = str(key).replace("-", "_")
            if key in IGNORED or value is None:
                continue
            if key == "mask_prompt":
                key, value = "loss_on", mask_prompt(value, path)
            elif name and key == "scale":
                scale = value
                continue
            key = ALIASES.get(key, key)
            if key in found:
                raise TrainingError(f"{path}: {key} is given twice.")
            found[key] = value
    if scale is not None:
        rank = read_value("rank", found.get("rank", TrainSettings.rank), str(path))
        found.setdefault("alpha", POSITIVE.read(scale) * rank)
    read_settings(found, str(path))
    return found


def mask_prompt(value: object, path: Path) -> str:
    """What mlx-lm's `mask_prompt` says about `loss_on`."""
    if not isinstance(value, bool):
        raise TrainingError(f"{path}: mask_prompt is {shortened(value)}; it must be true or false.")
    return "assistant" if value else "all"


def _parse(path: Path) -> dict[str, Any]:
    readers = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml}
    if path.suffix not in readers:
        raise TrainingError(
            f"{path} is neither YAML nor TOML.", hint="Name it .yaml, .yml or .toml."
        )
    text = read_text(path, TrainingError, limit=MAX_FILE_BYTES)
    table = readers[path.suffix](text, path)
    if not isinstance(table, dict):
        raise TrainingError(f"{path} is not a table of settings.")
    return table


def _toml(text: str, path: Path) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TrainingError(f"{path} is not TOML ({error}).") from None


def _yaml(text: str, path: Path) -> Any:
    yaml = importlib.import_module("yaml")  # huggingface_hub and mlx-lm bring it
    try:
        return yaml.safe_load(text) or {}
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}" if mark else "nested too deeply"
        raise TrainingError(f"{path} is not YAML ({place}).") from None


def spelled(name: str) -> Sequence[str]:
    """How an option is spelled on the command line."""
    return TABLE[name].metadata["flags"] or (f"--{name.replace('_', '-')}",)
