"""A teacher's answers to the questions of some data: asked, judged, checked and kept as data.

In the teacher's folder:

    answers.json                 what was asked of which teacher, and how
    answers-train.jsonl          every answer, in order; answers-valid.jsonl likewise
    judged-train.jsonl           what a judge said of each
    train.jsonl, valid.jsonl     rows to learn from, of those that passed
    rejected.jsonl               the others, each with the reason

Answers and verdicts come through `phimlx.prompt_file`, so that a run that was stopped goes on where
it was; the checks cost nothing and are made again whenever rows are.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from phimlx.errors import TrainingError
from phimlx.files import read_bytes, read_json, translate_write_errors, write_file, write_json
from phimlx.prompt_file import Answers, Line, Result, answer_lines, parse_line
from phimlx.training.distill.checkers import (
    VERDICT,
    Checker,
    Novelty,
    is_approved,
    judge_prompt,
)
from phimlx.training.distill.questions import Question

ABOUT, REJECTED = "answers.json", "rejected.jsonl"
JUDGE_TOKENS = 1024  # of a verdict, for a judge that reasons first
MOST_BYTES = 16 << 30  # of a file of answers

Advance = Callable[[int], object]
Row = dict[str, Any]


@dataclass(frozen=True)
class Asking:
    """What is asked of a teacher, and how.

    Attributes:
        teacher: fingerprint of its files.
        questions: of each split.
        samples: answers to each question.
        settings: of every answer, as `GenerationOptions` has them, but for its seed.
        judge: a prompt by which the teacher judges each answer; None for no judge.
    """

    folder: Path
    teacher: str
    questions: Mapping[str, Sequence[Question]]
    samples: int
    settings: Mapping[str, Any]
    seed: int = 0
    judge: str | None = None
    batch_size: int = 8

    @property
    def total(self) -> int:
        """How many answers there will be."""
        return self.samples * sum(map(len, self.questions.values()))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that answers depend on."""
        about = [self.teacher, self.samples, dict(self.settings), self.seed]
        found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for split, questions in self.questions.items():
            found.update(split.encode())
            for question in questions:
                found.update(hashlib.sha256(question.as_json).digest())
        return found.hexdigest()

    def answers(self, split: str) -> Path:
        """The file of every answer of a split."""
        return self.folder / f"answers-{split}.jsonl"

    def verdicts(self, split: str) -> Path:
        """The file of a judge's verdicts, told by the judge's prompt."""
        name = hashlib.sha256((self.judge or "").encode()).hexdigest()[:12]
        return self.folder / f"judged-{split}-{name}.jsonl"

    @property
    def missing(self) -> list[Path]:
        """Files that the teacher has yet to write."""
        made = [self.answers(split) for split in self.questions]
        if self.judge is not None:
            made += [self.verdicts(split) for split in self.questions]
        return [path for path in made if not path.exists()]

    def begin(self) -> None:
        """Claim the folder for this asking.

        Raises:
            TrainingError: where it holds the answers of another, or cannot be written.
        """
        path = self.folder / ABOUT
        found = read_json(path, TrainingError, missing_ok=True)
        if found and found.get("asking") != self.digest:
            raise TrainingError(
                f"{self.folder} holds answers of another teacher, to other questions or with other "
                "settings.",
                hint="Choose another --teacher-data, or remove that folder first.",
            )
        with translate_write_errors(self.folder, TrainingError, hint="Choose another folder."):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not found:
                write_json(path, {"asking": self.digest, "settings": dict(self.settings)})

    def ask(self, phi: Answers, advance: Advance) -> Result:
        """Let the teacher answer what it has not answered yet.

        Args:
            advance: called with the number of answers that have come, earlier ones first.

        Raises:
            GenerationError: where answers cannot be written.
        """
        whole = Result()
        for split, questions in self.questions.items():
            target = self.answers(split)
            if target.exists():
                count = self.samples * len(questions)
                whole.kept += count
                whole.answered += count
                advance(count)
                continue
            lines = list(self._lines(questions))
            found = answer_lines(
                phi, lines, target, self.settings, parse_line, self.batch_size, advance
            )
            _add(whole, found)
        return whole

    def let_judge(self, phi: Answers, advance: Advance) -> None:
        """Let the judge say of each answer whether it is right; as `ask`."""
        assert self.judge is not None
        settings = {"max_tokens": JUDGE_TOKENS, "temperature": 0.0, "regex": VERDICT, "seed": 0}
        for split in self.questions:
            target = self.verdicts(split)
            if target.exists():
                advance(self.samples * len(self.questions[split]))
                continue
            lines = list(self._judged_lines(split))
            answer_lines(phi, lines, target, settings, parse_line, self.batch_size, advance)

    def _lines(self, questions: Sequence[Question]) -> Iterator[Line]:
        """A line for each answer; those to the same question differ by their seed."""
        number = 0
        for question in questions:
            for sample in range(self.samples):
                number += 1
                entropy = f"{self.seed} {sample} {number}".encode()
                seed = int.from_bytes(hashlib.sha256(entropy).digest()[:4], "little")
                asked = {**json.loads(question.as_json), "seed": seed}
                text = json.dumps(asked, ensure_ascii=True).encode()
                yield Line(number, text, self._key(number, text))

    def _judged_lines(self, split: str) -> Iterator[Line]:
        assert self.judge is not None
        for number, (question, reply) in enumerate(self._read(split), 1):
            asked = {"prompt": judge_prompt(self.judge, question, reply)}
            text = json.dumps(asked, ensure_ascii=True).encode()
            yield Line(number, text, self._key(number, text))

    def _key(self, number: int, text: bytes) -> str:
        found = hashlib.sha256(f"{self.digest} {number} ".encode() + text)
        return found.hexdigest()

    def _read(self, split: str) -> Iterator[tuple[Question, Row]]:
        """Each question with each of its answers."""
        rows = _read_rows(self.answers(split), self.samples * len(self.questions[split]))
        for question in self.questions[split]:
            for _ in range(self.samples):
                yield question, next(rows)

    def filter(self, checkers: Sequence[Checker], dedup: bool) -> Kept:
        """Write rows of the answers that pass all checks, and say why the others did not.

        Raises:
            TrainingError: where a split has none, or they cannot be written.
        """
        kept, rejected = Kept(), list[bytes]()
        checks: list[Checker] = [*checkers]
        if dedup:
            checks.append(Novelty())
        for split in self.questions:
            verdicts: Iterator[Row | None] = iter(())
            if self.judge is not None:
                count = self.samples * len(self.questions[split])
                verdicts = _read_rows(self.verdicts(split), count)
            rows: list[bytes] = []
            for question, reply in self._read(split):
                verdict = next(verdicts, None)
                why = _why(question, reply, verdict, checks)
                if why is None:
                    rows.append(_line(question.answered(reply)))
                else:
                    kept.rejected[why] += 1
                    told = {"place": question.place, "reason": why, **question.answered(
                        {"text": reply.get("text", ""), **reply})}  # fmt: skip
                    rejected.append(_line(told))
            if not rows:
                raise TrainingError(
                    f"None of the teacher's {sum(kept.rejected.values()):,} answers passed: "
                    f"{kept.reasons}.",
                    hint=f"Look at them in {self.answers(split)}, and loosen the checks.",
                )
            kept.rows[split] = len(rows)
            with translate_write_errors(self.folder, TrainingError):
                write_file(self.folder / f"{split}.jsonl", b"".join(rows))
        with translate_write_errors(self.folder, TrainingError):
            write_file(self.folder / REJECTED, b"".join(rejected))
        return kept


@dataclass
class Kept:
    """Answers that passed, by split, and why others did not."""

    rows: dict[str, int] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)

    @property
    def reasons(self) -> str:
        return "; ".join(f"{count:,} {why}" for why, count in self.rejected.most_common())


def _why(
    question: Question, reply: Row, verdict: Row | None, checks: Sequence[Checker]
) -> str | None:
    """Why an answer is not learned; None where it is."""
    if "error" in reply:
        return "could not be asked"
    if verdict is not None and not is_approved(verdict):
        return "rejected by the judge"
    return next((why for check in checks if (why := check(question, reply)) is not None), None)


def _read_rows(path: Path, count: int) -> Iterator[Row]:
    """The rows of a file that `answer_lines` wrote; raises TrainingError where it is not whole."""
    lines = read_bytes(path, TrainingError, limit=MOST_BYTES).splitlines()
    fault = TrainingError(
        f"{path} is damaged.", hint="Remove it: the teacher then answers again what is missing."
    )
    if len(lines) != count:
        raise fault
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise fault from None
        if not isinstance(row, dict) or not ({"text", "error"} & row.keys()):
            raise fault
        yield row


def _add(whole: Result, part: Result) -> None:
    whole.answered += part.answered
    whole.kept += part.kept
    whole.failed.update({len(whole.failed) + 1: why for why in part.failed.values()})


def _line(value: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(value, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # halves of surrogates
        return (json.dumps(value, ensure_ascii=True) + "\n").encode()
