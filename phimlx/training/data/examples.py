"""Rows -> examples to learn from, with what is wrong, left out, cut and split told row by row."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from phimlx.errors import TrainingError
from phimlx.hub.client import Remote
from phimlx.hub.download import ProgressContext, without_progress
from phimlx.training.data.batches import Example, Task
from phimlx.training.data.faults import DataError, Faults
from phimlx.training.data.lengths import exchanges, windows
from phimlx.training.data.loss_mask import Encoded, LossOn, RowEncoder, learned_length
from phimlx.training.data.row_messages import RowError
from phimlx.training.data.row_types import (
    ROW_FAULTS,
    Conversation,
    JudgedAnswer,
    OpenPrompt,
    PlainText,
    PreferencePair,
    ReadRow,
    RowContent,
    check_mapping,
    read_content,
)
from phimlx.training.data.rows import DataFile, Problem, Progress, Row, read_rows
from phimlx.training.data.sources import find_splits
from phimlx.training.methods import RowForm

Overlong = Literal["refuse", "cut", "split"]

SHOWN = 20  # problems that are kept and told; the others are counted
LONGEST = 1200  # characters of all that are told

MOST_UNUSED = 100  # names of unused columns that are told apart

WHOLE = {"pairs": "a preference", "answers": "a judged answer"}
"""What is never split, by the form of rows."""

NO_REPLY = "no reply to learn"
CUT_AWAY = "nothing to learn is left after cutting"


@dataclass(frozen=True)
class RowSettings:
    """Settings of how rows become examples.

    Attributes:
        loss_on: what is learned of a conversation: every reply of the assistant, the last one, or
            all of it. Of a text all is learned in any case, of a preference the two answers.
        max_length: tokens that an example may have; None for as many as there are.
        overlong: what happens to a row with more: it is refused; its first `max_length` tokens are
            taken; or it is split. A text is split into windows of `max_length` tokens, each
            beginning with the token that ends the one before it, so that every token is learned
            once. A conversation is split before messages of the user that follow a reply, each part
            as long as fits and beginning with the system message; one question with its answer is
            never split, and refused where it is too long.
        mapping: what rows call the things in `phimlx.training.data.row_types.FIELDS`.
        form: what rows are; see `phimlx.training.methods.RowForm`.
        question: what the user asks in rows with an answer and no prompt.
        media_root: the folder of pictures and sounds that rows name; that of the data where None.

    Raises:
        TrainingError: where two do not go together, or the mapping names what no row has.
    """

    loss_on: LossOn = "assistant"
    max_length: int | None = 2048
    overlong: Overlong = "refuse"
    mapping: Mapping[str, str] = field(default_factory=dict)
    form: RowForm = "examples"
    question: str | None = None
    media_root: Path | None = None

    def __post_init__(self) -> None:
        if self.overlong != "refuse" and self.form == "prompts":
            raise TrainingError(
                "A prompt that is too long is always refused.", hint="Leave --overlong out."
            )
        judged = self.form != "examples"
        if self.overlong == "split" and (judged or self.loss_on == "last"):
            what = WHOLE.get(self.form, "a row of which the last reply counts")
            raise TrainingError(
                f"Splitting would leave {what} without what it is about.",
                hint="Have rows that are too long cut or refused.",
            )
        check_mapping(self.mapping)


@dataclass
class Dataset:
    """Examples that some rows have become.

    Attributes:
        examples: in the order of their rows; of preferences chosen and rejected in turn.
        rows: for each example the number of the row that it came from, int `[examples]`.
        kinds: for each example what its row was: a conversation, a text or a preference.
        skipped: how many had nothing to learn in them, by reason.
        cut, split: how many were too long, and what became of them.
        unused: what rows hold that nothing is made of, and how many do, by the file's name.
        faults: of rows that cannot be learned from.
    """

    examples: list[Example] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    split: int = 0
    unused: dict[str, Counter[str]] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over tokens and masks in their order, in hexadecimal."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(len(example.tokens).to_bytes(8, "little"))
            digest.update(example.tokens.astype("<i4").tobytes())
            digest.update(np.packbits(example.supervised).tobytes())
            digest.update(b"" if example.desirable else b"undesirable")
            if example.task is not None:
                row = json.dumps(dict(example.task.values), sort_keys=True, default=str)
                digest.update(row.encode())
            for item in example.media:
                digest.update(item.key)
        return digest.hexdigest()

    def hold_out(self, amount: float, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Part the rows to learn from and those to validate on, drawn by the seed alone.

        What is counted of rows that were skipped, cut, split or not all used stays with the
        former.

        Args:
            amount: of rows, below 1 a part of them (one at least), else their number.

        Raises:
            TrainingError: where either would be empty.
        """
        rows = sorted(set(self.rows))
        count = max(1, round(amount * len(rows))) if 0 < amount < 1 else int(amount)
        if not 0 < count < len(rows) or (amount >= 1 and count != amount):
            raise TrainingError(
                f"Of {len(rows):,} rows, {amount:g} cannot be held out for validation.",
                hint="Give a part between 0 and 1, or a number of rows smaller than all.",
            )
        order = np.random.Generator(np.random.PCG64([seed])).permutation(len(rows))
        drawn = {rows[i] for i in order[:count]}
        held = replace(self._part(drawn), skipped=Counter(), cut=0, split=0, unused={})
        return self._part(set(rows) - drawn), held

    def _part(self, rows: set[int]) -> Dataset:
        kept = [i for i, row in enumerate(self.rows) if row in rows]
        return replace(
            self,
            examples=[self.examples[i] for i in kept],
            rows=[self.rows[i] for i in kept],
            kinds=[self.kinds[i] for i in kept],
        )

    def note_unused(self, file: str, names: Iterable[str]) -> None:
        """Count what a row holds and nothing is made of; of names that never end only the first."""
        counts = self.unused.setdefault(file, Counter())
        for name in names:
            counts[name if name in counts or len(counts) < MOST_UNUSED else "others"] += 1


def load_data(
    source: str | Path,
    encoder: RowEncoder,
    settings: RowSettings = RowSettings(),
    *,
    held_out: float | None = None,
    seed: int = 0,
    on_progress: Progress = lambda done, total: None,
    remote: Remote | None = None,
    show_progress: ProgressContext = without_progress,
) -> dict[str, Dataset]:
    """The data sets that `source` means: "train", and "valid" and "test" where there are some.

    Every row of every file is checked before anything is raised.

    Args:
        source: as for `find_splits`.
        held_out: rows to take out of the training data for that, as for `Dataset.hold_out`, where
            it comes without validation data.
        seed: draws them.
        on_progress: takes the bytes that have been read, and how many there are.
        remote, show_progress: for what comes from the Hub, as for `find_splits`.

    Raises:
        DataError: naming file, line and reason of what cannot be learned from.
        TrainingError: where there is no data, or nothing in it to learn.
        DownloadError: where it cannot come from the Hub.
    """
    splits = find_splits(source, remote, show_progress, with_media=encoder.media is not None)
    total = sum(file.path.stat().st_size for files in splits.values() for file in files)
    found, before = {}, 0
    for split, files in splits.items():

        def report(done: int, size: int, before: int = before) -> None:
            on_progress(before + done, total)

        found[split] = tokenize(read_rows(files, report), encoder, settings)
        before += sum(file.path.stat().st_size for file in files)
    faults = Faults()
    for data in found.values():
        faults.include(data.faults)
    if faults.count:
        raise DataError(faults)
    for split, data in found.items():
        if not data.examples:
            raise _nothing(splits[split][0].name, data)
    if held_out is not None and "valid" not in found:
        found["train"], held = found["train"].hold_out(held_out, seed)
        found = {"train": found["train"], "valid": held, **found}
    return found


def tokenize(
    rows: Iterable[Row | Problem],
    encoder: RowEncoder,
    settings: RowSettings = RowSettings(),
) -> Dataset:
    """The examples that rows make, and what is wrong with those that make none.

    Raises:
        PromptError, TokenizerError: where the model has no template, or no token that ends a text.
    """
    data = Dataset()
    for number, row in enumerate(rows):
        if isinstance(row, Problem):
            data.faults.note(row)
            continue
        try:
            content, unused = read_row(row, encoder, settings)
        except ROW_FAULTS as error:
            data.faults.note(Problem(row.place, str(error), error.hint))
            continue
        if not isinstance(content, PlainText):
            _ = encoder.template  # its absence is no row's fault
        try:
            made = list(_examples(content, row, encoder, settings))
        except ROW_FAULTS as error:
            data.faults.note(Problem(row.place, str(error), error.hint))
            continue
        data.note_unused(row.file, unused)
        _add(data, number, made, content)
    return data


def read_row(row: Row, encoder: RowEncoder, settings: RowSettings) -> ReadRow:
    """Read what a row says, shows and plays.

    Raises:
        RowError, PromptError, MediaError: with the reason.
    """
    media = None
    if encoder.media is not None and settings.form != "prompts":  # which the engine answers
        from phimlx.training.data.row_media import RowMedia, root_of

        file = row.data_file or DataFile(Path("data"), "")
        root = root_of(file.path, file.bounds, settings.media_root)
        media = RowMedia(encoder.media, root, row.values, settings.mapping)
    return read_content(
        row.values,
        settings.mapping,
        settings.form,
        thinks=encoder.thinks,
        media=media,
        question=settings.question,
    )


KINDS: dict[type[RowContent], str] = {
    Conversation: "conversations",
    PlainText: "texts",
    PreferencePair: "preferences",
    JudgedAnswer: "judged answers",
    OpenPrompt: "prompts",
}


class _Fitted(NamedTuple):
    """An example, and whether tokens were cut off it."""

    example: Example
    is_cut: bool = False

    @property
    def is_empty(self) -> bool:
        return not self.example.supervised.any() and self.example.task is None


def _add(data: Dataset, number: int, made: list[_Fitted], content: RowContent) -> None:
    """Put in what a row has made; of a preference both or none."""
    is_cut = any(each.is_cut for each in made)
    empty = [each for each in made if each.is_empty]
    if len(empty) == len(made) or (empty and isinstance(content, PreferencePair)):
        data.skipped[CUT_AWAY if any(each.is_cut for each in empty) else NO_REPLY] += 1
        return
    data.cut += is_cut
    data.split += len(made) > 1 and not isinstance(content, PreferencePair)
    for each in made:
        if not each.is_empty:
            data.examples.append(each.example)
            data.rows.append(number)
            data.kinds.append(KINDS[type(content)])


def _examples(
    content: RowContent, row: Row, encoder: RowEncoder, settings: RowSettings
) -> Iterator[_Fitted]:
    place = row.place
    if isinstance(content, OpenPrompt):
        ids = encoder.template.encode(content.said.messages, content.said.tools)
        task = Task(content.prompt, content.expected, row.values)
        nothing = np.zeros(len(ids), bool)
        yield _fit(Example(np.array(ids, np.int32), nothing, place, task=task), settings)
        return
    if isinstance(content, PreferencePair):
        for which, said in (("chosen", content.chosen), ("rejected", content.rejected)):
            name, desirable = f"{place}, {which}", which == "chosen"
            yield _fit(_example(encoder.encode(said), name, desirable), settings)
        return
    if isinstance(content, JudgedAnswer):
        encoded = encoder.encode(content.said)
        yield _fit(_example(encoded, place, content.desirable), settings)
        return
    parts = _parts(content, encoder, settings)
    for part, encoded in enumerate(parts, 1):
        name = place if len(parts) == 1 else f"{place}, part {part}"
        yield _fit(_example(encoded, name), settings)


def _example(encoded: Encoded, name: str, desirable: bool = True) -> Example:
    return Example(encoded.tokens, encoded.supervised, name, desirable, media=encoded.media)


def _parts(
    content: Conversation | PlainText, encoder: RowEncoder, settings: RowSettings
) -> list[Encoded]:
    """A row's tokens and masks, in pieces where it is too long and is to be split."""
    whole = (
        Encoded(*encoder.text(content.text))
        if isinstance(content, PlainText)
        else encoder.encode(content, settings.loss_on)
    )
    longest = settings.max_length
    if longest is None or len(whole[0]) <= longest or settings.overlong != "split":
        return [whole]
    if isinstance(content, PlainText):
        return list(windows(whole.tokens, whole.supervised, longest))
    return exchanges(content, lambda part: encoder.encode(part, settings.loss_on), longest)


def _fit(example: Example, settings: RowSettings) -> _Fitted:
    length, longest = len(example.tokens), settings.max_length
    learned = example.supervised.any() or example.task is not None
    if longest is None or length <= longest or not learned:
        return _Fitted(example)
    if settings.overlong == "cut":
        length = learned_length(example.supervised[:longest])
        return _Fitted(example.beginning(length), is_cut=True)
    what = "A question with its answer" if settings.overlong == "split" else "It"
    raise RowError(
        f"{what} has {length:,} tokens, but {longest:,} are allowed.",
        hint="Raise --max-seq-length, or have such rows cut or split with --overlong.",
    )


def _nothing(name: str, data: Dataset) -> TrainingError:
    reasons = "; ".join(f"{count:,}: {reason}" for reason, count in data.skipped.items())
    return TrainingError(
        f"{name} holds nothing to learn from: every row is skipped ({reasons}).",
        hint="Learning needs replies of the assistant, within the length that is allowed.",
    )
