"""Settings that a method's loss has or has not, and what learning from own answers takes."""

from __future__ import annotations

from collections.abc import Mapping

from phimlx.errors import TrainingError
from phimlx.models.base import CausalLM
from phimlx.models.tensor_parallel import check_shardable
from phimlx.options import flags_of
from phimlx.training.data.examples import Dataset
from phimlx.training.methods import NUMBERS, takers
from phimlx.training.settings import TrainSettings

NOT_SHARED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("fine_tune_type", ("full",), "Train adapters, beside a model that may be quantized: lora."),
    (
        "optimizer",
        ("adafactor", "muon"),
        "Take adamw, adam, lion or sgd, to which parts are alike.",
    ),
    ("method", ("grpo",), "Leave --shard out: each machine then answers a part of the prompts."),
)
"""Settings whose values see more of the model than a part, and what to do instead."""


def check_numbers(settings: TrainSettings) -> None:
    """Raise TrainingError for a number that the method's loss does not have, or cannot have."""
    for name in NUMBERS:
        flag = flags_of(TrainSettings, name)[0]
        if getattr(settings, name) is not None and name not in settings.learns_by.numbers:
            raise TrainingError(
                f"{flag} does not go with --method {settings.method}.",
                hint=f"It goes with {', '.join(takers(name))}.",
            )
    if settings.numbers.get("beta") == 0 and settings.method != "grpo":
        raise TrainingError(f"--beta is 0, which leaves --method {settings.method} nothing to do.")


def check_prompts(settings: TrainSettings) -> None:
    """Raise TrainingError where rewards and what answers them do not go together."""
    answers = settings.learns_by.rows == "prompts"
    for name in ("reward", "group_size", "max_tokens", "updates"):
        if name in settings.model_fields_set and getattr(settings, name) and not answers:
            flag = flags_of(TrainSettings, name)[0]
            raise TrainingError(
                f"{flag} does not go with --method {settings.method}.",
                hint="It goes with grpo, which learns from the model's own answers.",
            )
    if not answers:
        return
    if not settings.reward:
        raise TrainingError(
            "Nothing says what an answer is worth.",
            hint="Name it: --reward exact, or a function of your own: --reward FILE.py:NAME",
        )
    if settings.pack:
        raise TrainingError("--pack does not go with --method grpo.")
    if settings.max_tokens + 2 > (settings.max_seq_length or 0):
        raise TrainingError(
            f"--max-tokens is {settings.max_tokens:,}, which leaves no room for a prompt in "
            f"{settings.max_seq_length:,} tokens.",
            hint="Lower it, or raise --max-seq-length.",
        )


def can_share(settings: TrainSettings, model: CausalLM) -> bool:
    """Whether some number of machines could share a model's layers in such a run."""
    goes = all(getattr(settings, name) not in refused for name, refused, _ in NOT_SHARED)
    architecture = model.architecture
    shared = architecture.sharding is not None and not architecture.takes_media
    return goes and shared and settings.command == "train"


def check_shared(settings: TrainSettings, model: CausalLM, machines: int, resumed: bool) -> None:
    """Check that so many machines can share the layers of a model in training.

    Args:
        model: which needs no weights.
        resumed: whether the run was begun before; one machine may then go on with it alone.

    Raises:
        TrainingError, ConfigError: where they cannot.
    """
    if settings.command != "train":
        raise TrainingError(f"phimlx {settings.command} does not share a model's layers.")
    if model.architecture.takes_media:
        raise TrainingError(
            "--shard trains text models, and this one takes more.",
            hint="Leave --shard out: each machine then learns from a part of the rows.",
        )
    for name, refused, hint in NOT_SHARED:
        if getattr(settings, name) in refused:
            flag = flags_of(TrainSettings, name)[0]
            value = getattr(settings, name)
            raise TrainingError(f"--shard does not go with {flag} {value}.", hint=hint)
    if settings.sample_prompts:
        raise TrainingError(
            "--shard does not go with --sample-prompts.",
            hint="Ask the adapter afterwards: phimlx generate --adapter-path ADAPTER",
        )
    if machines > 1:
        if model.architecture.takes_media:
            raise TrainingError(
                "--shard trains models of text alone, and this one takes more.",
                hint="Leave --shard out: each machine then has the whole model.",
            )
        check_shardable(model, machines)
    elif not resumed:
        raise TrainingError(
            "--shard shares a model among several machines, and this is one alone.",
            hint="Start it on several: mlx.launch -n 2 -- phimlx train --shard …",
        )


def check_answers(data: Mapping[str, Dataset]) -> None:
    """Raise TrainingError for the first row without the answer that is compared with."""
    for each in data.values():
        for example in each.examples:
            if example.task is not None and example.task.expected is None:
                raise TrainingError(
                    f"{example.source} has no answer, which --reward exact compares with.",
                    hint="Name its column: --mapping completion=answer",
                )
