"""Settings of a distillation: those of a training run, and what is taken from the teacher."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, FiniteFloat

from phimlx.options import NonNegative, Positive, PositiveCount, Text, option
from phimlx.training.distill.divergence import Divergence
from phimlx.training.settings import TrainSettings

TEACHER_DATA = "teacher"  # in the run's folder
PROBABILITIES = "probabilities.safetensors"

Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
Between = Annotated[FiniteFloat, Field(gt=0, lt=1)]
Temperature = Annotated[FiniteFloat, Field(ge=0, le=10)]


class DistillSettings(TrainSettings):
    """All of a distillation's options; None stands for a default that follows from others."""

    command: ClassVar[str] = "distill"
    hint: ClassVar[str | None] = "See phimlx distill --help."

    teacher: Text | None = option(
        None, "The model to learn from: an alias, a Hub id or a folder.", metavar="MODEL",
        decides=False,
    )  # fmt: skip
    model: Text | None = option(
        None,
        "The model that learns: an alias, a Hub id or a folder, plain or quantized.",
        "--student",
        "--model",
        metavar="MODEL",
        decides=False,
    )
    via: Literal["logits", "text", "both"] | None = option(
        None,
        "What is learned: the teacher's probabilities along the data's own answers (logits), the "
        "teacher's own answers (text), or its probabilities along these (both)  [default: logits "
        "where the two share a vocabulary, else text]",
    )
    teacher_data: Text | None = option(
        None,
        "Where what the teacher makes is kept, and taken from again  [default: teacher in "
        "--adapter-path]",
        metavar="FOLDER",
        decides=False,
    )

    loss: Literal["forward-kl", "reverse-kl", "jsd"] = option(
        "forward-kl",
        "Learn all that the teacher may say (forward-kl), what it is sure of (reverse-kl), or "
        "between these.",
    )
    jsd_beta: Between = option(0.5, "Weight of the teacher in jsd's mixture.")
    sft_weight: Share = option(0.0, "Part of the loss that is the text's own tokens.")
    temperature: Annotated[Positive, Field(le=100)] = option(
        1.0, "Flattens both sides' probabilities before they are compared."
    )
    top_k: PositiveCount = option(64, "The teacher's likeliest tokens that are kept of each place.")
    logits_limit: Positive = option(
        20.0, "GB that the teacher's probabilities may take on disk.", decides=False
    )

    samples: PositiveCount = option(1, "Answers of the teacher to each question.")
    answer_tokens: PositiveCount = option(1024, "Longest answer of the teacher, in tokens.")
    answer_temperature: Temperature | None = option(
        None, "Randomness of its answers  [default: 0, with several --samples 0.8]"
    )
    answer_top_p: Annotated[NonNegative, Field(le=1)] = option(1.0, "Nucleus of its answers.")
    answer_batch: PositiveCount = option(8, "Questions that are answered together.", decides=False)
    exact: bool = option(False, "Learn only answers that are the row's own, in the same words.")
    json_schema: Text | None = option(
        None,
        "Learn only answers that are JSON valid under this: a file, JSON, or fields such as "
        '"name, age int".',
        "--schema",
        metavar="SCHEMA",
    )
    regex: Text | None = option(
        None, "Learn only answers that match this as a whole.", metavar="REGEX"
    )
    judge: Text | None = option(
        None,
        "Learn only answers that the teacher, asked again, approves of: a file with a prompt that "
        "asks for yes or no about {question} and {answer}, or 'default'.",
        metavar="FILE",
    )
    keep_same: bool = option(False, "Keep answers that the same question has had already.")

    @property
    def teacher_temperature(self) -> float:
        """Randomness of the teacher's answers."""
        usual = 0.8 if self.samples > 1 else 0.0
        return usual if self.answer_temperature is None else self.answer_temperature

    @property
    def divergence(self) -> Divergence:
        """The loss."""
        return Divergence(self.loss, self.jsd_beta, self.temperature, self.sft_weight)
