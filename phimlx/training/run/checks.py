"""Settings that a method's loss has or has not, and what learning from own answers takes."""

from __future__ import annotations

from collections.abc import Mapping

from phimlx.errors import TrainingError
from phimlx.options import flags_of
from phimlx.training.data.examples import Dataset
from phimlx.training.methods import NUMBERS, takers
from phimlx.training.settings import TrainSettings


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


def check_answers(data: Mapping[str, Dataset]) -> None:
    """Raise TrainingError for the first row without the answer that is compared with."""
    for each in data.values():
        for example in each.examples:
            if example.task is not None and example.task.expected is None:
                raise TrainingError(
                    f"{example.source} has no answer, which --reward exact compares with.",
                    hint="Name its column: --mapping completion=answer",
                )
