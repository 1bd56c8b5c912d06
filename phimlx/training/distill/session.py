"""Settings -> a distillation that is ready to go: what the teacher is to do, and the student's run.

The teacher works first and is gone before the student is loaded: all that passes between them lies
on the disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from mlx.optimizers import Optimizer

from phimlx import catalog
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, needed_tensors
from phimlx.errors import PhimlxError, TrainingError
from phimlx.files import is_file, read_text
from phimlx.hub.layout import model_name
from phimlx.models.base import CausalLM
from phimlx.models.config import ModelConfig
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from phimlx.sizes import size_text
from phimlx.training.data.examples import Dataset, RowSettings
from phimlx.training.data.faults import DataError
from phimlx.training.data.loss_mask import RowEncoder
from phimlx.training.data.rows import Progress, read_rows
from phimlx.training.data.sources import find_splits
from phimlx.training.distill.answers import Asking
from phimlx.training.distill.checkers import (
    JUDGE,
    Checker,
    check_judge,
    is_expected,
    is_whole,
    matching,
    under_schema,
)
from phimlx.training.distill.logits_file import LogitsPlan, TeacherLogits
from phimlx.training.distill.questions import Question, read_questions
from phimlx.training.distill.settings import PROBABILITIES, TEACHER_DATA, DistillSettings
from phimlx.training.distill.step import DistillationStep
from phimlx.training.distill.teacher import working_memory
from phimlx.training.loss import CHUNK_ROWS
from phimlx.training.memory_estimate import FLOAT32, MemoryEstimate
from phimlx.training.run.session import Session, fingerprint
from phimlx.training.step import TrainingStep

GIGABYTE = 10**9
MORE_LOGITS = 6  # arrays of a chunk's logits, beside those of cross-entropy
SPLITS = ("train", "valid")


@dataclass
class DistillSession(Session):
    """One distillation, from its settings on.

    Attributes:
        teacher_folder: the teacher's; `folder` is the student's.
        schema: that answers have to be valid under.
        teacher: its probabilities, when they are there.
    """

    settings: DistillSettings
    teacher_folder: Path = field(kw_only=True)
    schema: Mapping[str, Any] | None = field(default=None, kw_only=True)
    teacher: TeacherLogits | None = field(default=None, kw_only=True)

    takes_media: ClassVar[bool] = False  # the teacher's walk through the data is over text

    @cached_property
    def teacher_checkpoint(self) -> Checkpoint:
        checkpoint = Checkpoint(self.teacher_folder)
        checkpoint.check_runs()
        return checkpoint

    @cached_property
    def teacher_config(self) -> ModelConfig:
        return build_model(self.teacher_checkpoint.config).config

    @cached_property
    def teacher_encoder(self) -> RowEncoder:
        known = catalog.by_config(self.teacher_checkpoint.config, model_name(self.teacher_folder))
        name = known.alias if known else self.teacher_folder.resolve().name
        return RowEncoder.load(self.teacher_folder, name)

    @cached_property
    def teacher_fingerprint(self) -> str:
        return fingerprint(self.teacher_folder)

    @cached_property
    def via(self) -> str:
        """What is learned: "logits", "text" or "both".

        Raises:
            TrainingError: where probabilities are asked for and cannot be compared.
        """
        chosen, difference = self.settings.via, self.vocabulary_difference
        if chosen in ("logits", "both") and difference is not None:
            raise TrainingError(
                f"The teacher's probabilities cannot be learned: {difference}.",
                hint="Learn from the teacher's answers instead: --via text",
            )
        return chosen or ("logits" if difference is None else "text")

    @cached_property
    def vocabulary_difference(self) -> str | None:
        """What keeps the two models' tokens from being the same; None where they are.

        Control tokens may have other names, as those have that one model uses and the other does
        not: what the data holds of them is the student's, which the teacher reads as it is.
        """
        sizes = [config.vocab_size for config in (self.teacher_config, self.config)]
        if sizes[0] != sizes[1]:
            return (
                f"its vocabulary has {sizes[0]:,} tokens, and the student's {sizes[1]:,}, so that "
                "the two have no tokens in common"
            )
        ours, theirs = (folder / "tokenizer.json" for folder in (self.folder, self.teacher_folder))
        if is_file(ours) and is_file(theirs) and ours.read_bytes() == theirs.read_bytes():
            return None
        student, teacher = self.encoder.tokenizer, self.teacher_encoder.tokenizer
        if not _same_tokens(student, teacher, sizes[0]):
            return "the same tokens stand for other texts in the student"
        return None

    @property
    def uses_logits(self) -> bool:
        return self.via in ("logits", "both")

    @property
    def uses_answers(self) -> bool:
        return self.via in ("text", "both")

    @property
    def teacher_data(self) -> Path:
        """The folder of what the teacher makes."""
        given = self.settings.teacher_data
        return Path(given) if given else Path(self.settings.adapter_path) / TEACHER_DATA

    @property
    def probabilities(self) -> Path:
        return self.teacher_data / PROBABILITIES

    def check(self) -> None:
        """Raise TrainingError where settings do not fit each other, the models or the folder."""
        super().check()
        settings = self.settings
        if self.processes.size > 1:
            raise TrainingError(
                "A distillation runs on one machine.",
                hint="Keep the teacher's answers (--via text), and train on them with several: "
                "phimlx train --data FOLDER",
            )
        if self.uses_logits and self.teacher_folder.samefile(self.folder):
            raise TrainingError(
                "Teacher and student are the same model, whose probabilities have nothing to teach "
                "it.",
                hint="Name another --teacher, or learn from answers that were checked: --via text",
            )
        for name in ("exact", "json_schema", "regex", "judge"):
            if getattr(settings, name) and not self.uses_answers:
                raise TrainingError(
                    f"{name.removeprefix('json_')} checks the teacher's answers, and the data's "
                    "own are learned.",
                    hint="Let the teacher answer: --via text or --via both",
                )
        if settings.samples > 1 and settings.teacher_temperature == 0:
            raise TrainingError(
                f"{settings.samples} answers of temperature 0 would all be the same.",
                hint="Raise --answer-temperature, or leave it out.",
            )
        if self.uses_answers:
            _ = self.checkers  # a fault in one is told before the teacher works

    # What the teacher does.

    @cached_property
    def asking(self) -> Asking:
        """What the teacher is asked.

        Raises:
            DataError, TrainingError: where the data asks nothing.
        """
        settings = self.settings
        splits = find_splits(settings.data or "")
        questions: dict[str, Sequence[Question]] = {
            split: read_questions(
                read_rows(splits[split]), settings.mapping, self.teacher_encoder.thinks
            )
            for split in SPLITS
            if split in splits
        }
        options = {
            "max_tokens": settings.answer_tokens,
            "temperature": settings.teacher_temperature,
            "top_p": settings.answer_top_p,
        }
        return Asking(
            self.teacher_data,
            self.teacher_fingerprint,
            questions,
            settings.samples,
            options,
            settings.seed,
            self._judge,
            settings.answer_batch,
        )

    @property
    def _judge(self) -> str | None:
        given = self.settings.judge
        if given is None:
            return None
        return check_judge(JUDGE if given == "default" else read_text(Path(given), TrainingError))

    @cached_property
    def checkers(self) -> list[Checker]:
        """The checks of answers, in the order in which they are made."""
        settings, checks = self.settings, list[Checker]([is_whole])
        if settings.exact:
            checks.append(is_expected)
        if self.schema is not None:
            checks.append(under_schema(self.schema))
        if settings.regex is not None:
            encoder = self.teacher_encoder
            checks.append(
                matching(
                    settings.regex,
                    encoder.tokenizer,
                    self.teacher_config.vocab_size,
                    set(encoder.stop_tokens),
                )
            )
        return checks

    def logits_plan(self, data: Mapping[str, Dataset]) -> LogitsPlan:
        """Plan the file of the teacher's probabilities."""
        examples = [each for split in SPLITS if split in data for each in data[split].examples]
        settings = self.settings
        return LogitsPlan.of(
            self.teacher_fingerprint,
            self.teacher_config.vocab_size,
            settings.top_k,
            settings.temperature,
            examples,
        )

    def open_logits(self, plan: LogitsPlan) -> bool:
        """Take up probabilities that are there; whether they are, and of all that is planned.

        Raises:
            TrainingError: where the file is damaged, or of another teacher.
        """
        path = self.probabilities
        if not path.exists():
            return False
        found = TeacherLogits(path)
        for name, value in plan.about.items():
            if found.about.get(name) != value:
                raise TrainingError(
                    f"{path} holds probabilities of another {name.replace('_', ' ')}: "
                    f"{found.about.get(name, 'none')[:12]}, not {value[:12]}.",
                    hint="Choose another --teacher-data, or remove the file: it is made again.",
                )
        if not all(example in found for example in plan.examples):
            return False
        self.teacher = found
        return True

    def teacher_memory(self, plan: LogitsPlan | None) -> int:
        """Estimate the bytes that the teacher takes.

        Args:
            plan: of its probabilities; None where it writes answers, whose cache takes what is
                left.
        """
        model = build_model(self.teacher_checkpoint.config)
        tensors = needed_tensors(self.teacher_checkpoint, model).values()
        weights = sum(info.nbytes for info in tensors)
        if plan is None:
            return weights
        itemsize = 4 if any(info.dtype == "F32" for info in tensors) else 2
        return weights + working_memory(model.config, plan.examples[0].inputs, itemsize)

    def check_teacher_memory(self, plan: LogitsPlan | None, memory: int) -> None:
        """Raise TrainingError where the teacher will not fit into so many bytes."""
        needed = self.teacher_memory(plan)
        if needed > memory:
            raise TrainingError(
                f"The teacher is expected to need {size_text(needed)} of memory; this machine has "
                f"{size_text(memory)} for it.",
                hint="Take it at 4 bits (phimlx convert -q). To try all the same: --ignore-memory.",
            )

    # The student's run, where it is another than that of `phimlx train`.

    def load_data(self, on_progress: Progress = lambda done, total: None) -> dict[str, Dataset]:
        """Read and check all data, as `Session.load_data`; the hint of an error says more."""
        try:
            return super().load_data(on_progress)
        except DataError as error:
            if not self.uses_answers and self._asks:
                error.hint = "Let the teacher answer rows that only ask: --via both, or --via text"
            raise

    @property
    def _asks(self) -> bool:
        """Whether every row asks something."""
        try:
            return self.asking.total > 0
        except PhimlxError:
            return False

    @property
    def source(self) -> str:
        return str(self.teacher_data) if self.uses_answers else super().source

    @property
    def row_settings(self) -> RowSettings:
        usual = super().row_settings
        return replace(usual, mapping={}) if self.uses_answers else usual

    def make_step(self, model: CausalLM, optimizer: Optimizer) -> TrainingStep:
        if self.teacher is None:
            return super().make_step(model, optimizer)
        settings = self.settings
        return DistillationStep(
            model,
            optimizer,
            divergence=settings.divergence,
            teacher=self.teacher,
            clip=settings.clip or None,
            checkpointing=settings.grad_checkpoint,
            seed=settings.seed,
        )

    def estimate_memory(self, data: Mapping[str, Dataset]) -> MemoryEstimate:
        found = super().estimate_memory(data)
        if not self.uses_logits:
            return found
        logits = MORE_LOGITS * CHUNK_ROWS * self.config.vocab_size * FLOAT32
        return replace(found, working=found.working + logits)

    def description(self, data: Mapping[str, Dataset]) -> dict[str, Any]:
        teacher = {} if self.teacher is None else {"teacher": self.teacher.content}
        return {**super().description(data), **teacher}

    @property
    def logits_limit(self) -> int:
        """Bytes that the teacher's probabilities may take."""
        return round(self.settings.logits_limit * GIGABYTE)


def _same_tokens(one: Tokenizer, other: Tokenizer, vocab_size: int) -> bool:
    """Whether the tokens of two models stand for the same, but for names of control tokens."""
    ours, theirs = one.control_tokens, other.control_tokens
    if any(ours[name] != theirs[name] for name in ours.keys() & theirs.keys()):
        return False
    control = {*ours.values(), *theirs.values()}
    return all(
        one.token_bytes(token) == other.token_bytes(token)
        for token in range(vocab_size)
        if token not in control
    )
