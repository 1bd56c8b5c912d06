"""Settings of a training run: names, bounds and help, for flags and files alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictInt,
    StringConstraints,
    model_validator,
)

from phimlx.errors import PhimlxError, TrainingError, shortened
from phimlx.options import (
    Count,
    Fraction,
    NonNegative,
    OptionError,
    Options,
    Positive,
    PositiveCount,
    Text,
    option,
    read,
    schemas,
)
from phimlx.training.methods import METHODS, Method
from phimlx.training.mlx_lm_config import CheckedSchedule, OptimizerTables, translate

Part = Literal["vision-adapter", "speech-adapter", "new", "projector"]
PARTS: tuple[str, ...] = get_args(Part)
MAX_RANK = 1 << 14  # as of adapters in configurations, which are read where MLX is loaded


def _split_range(value: Any) -> Any:
    """Read `8-23`; what is no text is the two numbers already."""
    return [int(each) for each in value.split("-")] if isinstance(value, str) else value


def _check_range(layers: tuple[int, int]) -> tuple[int, int]:
    if not 0 <= layers[0] <= layers[1]:
        raise ValueError(layers)
    return layers


def _split_pairs(value: Any) -> Any:
    """Read `a=b,c=d`, or a list of such texts; what is neither is a table already."""
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, list):
        return dict(str(pair).split("=", 1) for pair in value)
    return value


def _check_layer_count(value: int) -> int:
    if value == 0 or value < -1:
        raise ValueError(value)
    return value


LayerRange = Annotated[
    tuple[StrictInt, StrictInt], BeforeValidator(_split_range), AfterValidator(_check_range)
]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Pairs = Annotated[dict[Name, Name], BeforeValidator(_split_pairs)]
LayerCount = Annotated[int, AfterValidator(_check_layer_count)]


def matches(target: str, path: str) -> bool:
    """Whether a target, a name or a pattern, means a projection of that path in a layer."""
    return fnmatchcase(path, target) or fnmatchcase(path.rpartition(".")[2], target)


class TrainSettings(Options):
    """All of a run's options. None stands for a default that follows from others.

    `decides=False` marks those of which another value gives the same losses, so that a run can go
    on with it.
    """

    command: ClassVar[str] = "train"  # that a run is begun and gone on with by
    error: ClassVar[type[PhimlxError]] = TrainingError
    hint: ClassVar[str | None] = "See phimlx train --help."
    exclusive: ClassVar[tuple[tuple[str, str], ...]] = (
        ("iters", "epochs"),
        ("layers", "num_layers"),
        ("schedule", "lr_schedule"),
        ("schedule", "learning_rate"),
        ("schedule", "warmup"),
    )
    # What mlx-lm's files call otherwise.
    other_names: ClassVar[dict[str, str]] = {
        "lora_rank": "rank",
        "keys": "targets",
        "grad_accumulation": "grad_accumulation_steps",
        "mask_prompt": "loss_on",
        "lambda": "lambda_",
        "num_generations": "group_size",
        "max_completion_length": "max_tokens",
    }

    model: Text | None = option(
        None, "An alias, a Hub id or a folder", metavar="MODEL", decides=False
    )
    data: Text | None = option(
        None,
        "A file (JSONL, JSON, CSV, parquet), a folder with train, valid and test files, or a data "
        "set of the Hub.",
        metavar="DATA",
        decides=False,
    )
    adapter_path: Text = option(
        "adapters", "Where the run and what it learns go.", metavar="FOLDER", decides=False
    )

    loss_on: Literal["assistant", "last", "all"] = option(
        "assistant", "Learn every answer, the last one, or all text."
    )
    max_seq_length: Annotated[int, Field(ge=2)] | None = option(
        None, "Longest row, in tokens  [default: 2048, or what the model holds]"
    )
    overlong: Literal["refuse", "cut", "split"] = option("refuse", "What becomes of longer rows.")
    mapping: Pairs = option(
        {},
        "Columns of other names, such as prompt=question,completion=answer.",
        metavar="NAME=COLUMN,…",
        what="pairs such as prompt=question",
    )
    valid_fraction: Fraction | None = option(
        None,
        "Part of the rows kept for validation where the data has no valid file  [default: 0.05]",
    )
    pack: bool = option(False, "Put several examples into each row of --max-seq-length tokens.")

    train: tuple[Part, ...] = option(
        (),
        "What of a model that sees and hears is trained: a copy of its own adapter for either, a "
        "new one beside, what turns features into tokens  [default: the adapters of what the rows "
        "hold, of text a new one]",
        metavar="|".join(PARTS) + ",…",
        commas=True,
        bare=True,
    )
    prompt: Text | None = option(
        None, "What rows with an answer and no prompt ask, such as 'What does the sign say?'"
    )
    media_root: Text | None = option(
        None,
        "The folder that paths of pictures and sounds are relative to, and may not leave  "
        "[default: that of the data file]",
        metavar="FOLDER",
        decides=False,
    )
    feature_store: NonNegative = option(
        20.0,
        "GB of the disk for features of pictures and sounds, which are then computed once; 0 for "
        "none.",
        metavar="GB",
        decides=False,
    )

    fine_tune_type: Literal["lora", "dora", "full"] = option("lora", "Adapters, or all weights.")
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = option(
        16, "Rank of the adapters.", "--rank", "--lora-rank"
    )
    alpha: Positive | None = option(
        None, "Adapters are scaled by alpha / rank  [default: twice the rank]"
    )
    dropout: Fraction = option(0.0, "Part of an adapter's input that is dropped.")
    rslora: bool = option(False, "Scale by alpha / √rank instead.")
    targets: tuple[Text, ...] = option(
        (),
        "Projections that get an adapter  [default: all of a layer]",
        metavar="NAME,…",
        commas=True,
    )
    num_layers: LayerCount = option(
        -1, "Last layers to train; -1 for all.", what="a whole number above 0, or -1"
    )
    layers: LayerRange | None = option(
        None,
        "Layers to train instead, counted from 0, such as 8-23.",
        metavar="A-B",
        what="a range such as 8-23",
    )

    epochs: Positive = option(3.0, "Times through the data  [default: 3]")
    iters: PositiveCount | None = option(None, "Steps of the run, instead of --epochs.")
    batch_size: PositiveCount = option(4, "Rows in a batch, over all machines together.")
    grad_accumulation_steps: PositiveCount = option(1, "Batches whose gradients make one step.")
    learning_rate: Positive | None = option(
        None, "At its highest  [default: 1e-4, with all weights 1e-5]"
    )
    lr_schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", "How it falls after the warmup."
    )
    warmup: Count | None = option(
        None, "Steps in which it rises  [default: 3 % of all, at most 100]"
    )
    optimizer: Literal["adamw", "adam", "adafactor", "lion", "muon", "sgd"] = option(
        "adamw", "What updates the weights."
    )
    schedule: CheckedSchedule | None = option(
        None,
        "MLX's own schedule instead, as in the files of mlx-lm.",
        what="a table of name, arguments, warmup and warmup_init, as MLX's schedule takes them",
        in_files_only=True,
    )
    optimizer_config: OptimizerTables = option(
        {},
        "What optimizers take beside these, by their name, as in the files of mlx-lm.",
        what="a table of values for each optimizer, as MLX's optimizer takes them",
        in_files_only=True,
    )
    weight_decay: NonNegative = option(0.01, "Where the optimizer has it.")
    clip: NonNegative = option(1.0, "Largest norm of all gradients together; 0 for none.")
    grad_checkpoint: bool = option(
        False, "Compute activations twice rather than keep them.", decides=False
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = option(0, "For everything drawn.")
    shard: bool = option(
        False,
        "Share the model's layers among the machines of mlx.launch, so that each holds a part; "
        "without it each holds all, and has a part of the rows.",
        decides=False,
    )

    method: Literal["sft", "dpo", "orpo", "simpo", "cpo", "kto", "grpo"] = option(
        "sft",
        "Imitate answers (sft); prefer chosen answers to rejected ones (dpo, orpo, simpo, cpo); "
        "tell good answers from bad ones by their label (kto); or answer prompts, and learn from "
        "what --reward says of the answers (grpo).",
    )
    dpo: bool = option(False, "The same as --method dpo.")
    beta: NonNegative | None = option(
        None,
        "How far dpo, kto and grpo hold on to the model before training, and the scale of what "
        "simpo and cpo prefer by  [default: 0.1, of simpo 2, of grpo 0.04]",
    )
    gamma: NonNegative | None = option(
        None, "By how much simpo wants a chosen answer to be ahead  [default: 1]"
    )
    lambda_: NonNegative | None = option(
        None,
        "Weight of orpo's odds ratio, or of cpo's likelihood of the chosen answer  "
        "[default: 0.1, of cpo 1]",
        "--lambda",
    )
    desirable_weight: NonNegative | None = option(
        None, "Weight of good answers in kto, λ_D of its paper  [default: 1]"
    )
    undesirable_weight: NonNegative | None = option(
        None, "Weight of bad answers in kto, λ_U  [default: 1]"
    )
    reward: tuple[Text, ...] = option(
        (),
        "What grpo gives an answer: exact (it is the row's), regex:PATTERN, schema:FILE, length:N "
        "(1 up to N tokens, 0 from 2 N on), or FILE.py:NAME, a function of your own. Given again, "
        "they add up.",
        metavar="REWARD",
    )
    group_size: Annotated[int, Field(ge=2)] = option(8, "Answers of grpo to each prompt.")
    max_tokens: PositiveCount = option(256, "Of an answer, in grpo.")
    epsilon: Annotated[float, Field(gt=0, lt=1)] | None = option(
        None, "How far grpo lets an answer's probability move in a step  [default: 0.2]"
    )
    updates: PositiveCount = option(1, "Updates of grpo from the answers of a step.")

    steps_per_report: PositiveCount = option(10, "Steps from report to report.", decides=False)
    steps_per_eval: PositiveCount | None = option(
        None, "Steps between validations  [default: a tenth of the run]", decides=False
    )
    val_batches: Annotated[int, Field(ge=-1)] = option(
        -1, "Batches of a validation, always the same; -1 for all."
    )
    save_every: PositiveCount | None = option(
        None, "Steps between checkpoints  [default: as --steps-per-eval]", decides=False
    )
    keep: PositiveCount = option(
        3, "Newest checkpoints kept; the best one is kept beside them.", decides=False
    )
    early_stop: Count = option(
        0, "End after this many validations without a better one; 0 for never.", decides=False
    )
    sample_prompts: Count = option(
        0, "Validation rows that the model answers after each validation.", decides=False
    )
    log: Text | None = option(
        None,
        "Every report as a line of JSON  [default: log.jsonl in --adapter-path]",
        metavar="FILE",
        decides=False,
    )
    report_to: tuple[Literal["wandb", "swanlab", "tensorboard"], ...] = option(
        (), "Send reports there too.", commas=True, decides=False
    )

    @model_validator(mode="before")
    @classmethod
    def _name_method(cls, values: Any) -> Any:
        """Take `dpo` for the method of that name."""
        if not isinstance(values, Mapping) or values.get("dpo") is not True:
            return values
        if values.get("method", "dpo") != "dpo":
            raise OptionError("dpo and method exclude each other.", hint="Give one.")
        return {name: value for name, value in values.items() if name != "dpo"} | {"method": "dpo"}

    @classmethod
    def rename(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """Return a file's table under the names of the fields, mlx-lm's files included.

        Raises:
            OptionError: for a setting that is given twice, what is no table or no number, and what
                a run here cannot follow.
        """
        known = {*cls.model_fields, *cls.other_names, "lora_parameters"}
        outer = translate(super().rename(table), known)
        section = outer.pop("lora_parameters", None) or {}
        if not isinstance(section, Mapping):
            raise OptionError(f"lora_parameters is {shortened(section)}, not a table of values.")
        inner = super().rename(section)
        scale = inner.pop("scale", None)
        found: dict[str, Any] = {}
        for name, value in [*outer.items(), *inner.items()]:
            if value is None:
                continue
            if name == "mask_prompt":
                value = _mask_prompt(value)
            name = cls.other_names.get(name, name)
            if name in found:
                raise OptionError(f"{name} is given twice.")
            found[name] = value
        if scale is not None:
            found.setdefault("alpha", _alpha(scale, found))
        return found

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at its highest."""
        if self.schedule is not None:
            return float(self.schedule.arguments[0])
        usual = 1e-5 if self.fine_tune_type == "full" else 1e-4
        return usual if self.learning_rate is None else self.learning_rate

    @property
    def scale(self) -> float:
        """Factor of B A: alpha / rank, or alpha / √rank (arXiv 2312.03732)."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def learns_by(self) -> Method:
        """What is known of the method."""
        return METHODS[self.method]

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers of the method's loss, as they are set or else its own."""
        given = {name: getattr(self, name) for name in self.learns_by.numbers}
        usual = self.learns_by.numbers
        return {name: usual[name] if value is None else value for name, value in given.items()}

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with the model as it was before training."""
        return self.learns_by.has_reference and self.numbers.get("beta") != 0

    @property
    def trains_whole_layers(self) -> bool:
        """Whether the model's own weights are trained rather than adapters."""
        return self.fine_tune_type == "full"

    def adapts(self, path: str) -> bool:
        """Whether a projection gets an adapter, by its path in a layer."""
        return not self.targets or any(matches(each, path) for each in self.targets)

    @property
    def trains_every_layer(self) -> bool:
        """Whether no layers were chosen: with whole layers embeddings are then trained too."""
        return self.num_layers < 0 and self.layers is None

    def as_object(self) -> dict[str, Any]:
        """Everything, as JSON keeps it."""
        return self.model_dump(mode="json")

    def differences(self, before: TrainSettings) -> list[str]:
        """Say how these settings, where they decide about losses, differ from those of a run."""
        old, new = before.as_object(), self.as_object()
        return [
            f"{name} was {shortened(old[name])}, is {shortened(new[name])}"
            for name, schema in schemas(type(self)).items()
            if schema.get("decides", True) and old[name] != new[name]
        ]


def _mask_prompt(value: object) -> str:
    """Return what mlx-lm's `mask_prompt` says about `loss_on`."""
    if not isinstance(value, bool):
        raise OptionError(f"mask_prompt is {shortened(value)}; it must be true or false.")
    return "assistant" if value else "all"


def _alpha(scale: Any, found: Mapping[str, Any]) -> float:
    """Return the alpha that makes mlx-lm's `scale`, at the rank that the file gives."""
    try:
        factor = read(TrainSettings, {"alpha": scale}).alpha
    except TrainingError:
        raise OptionError(f"scale is {shortened(scale)}; it must be a number, above 0.") from None
    assert factor is not None
    return factor * read(TrainSettings, {"rank": found.get("rank")}).rank
