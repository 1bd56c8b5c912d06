"""A model measured on data: loss and perplexity, and whether its answers are those expected."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from phimlx.api import Phi
from phimlx.errors import TrainingError
from phimlx.generation.nonfinite import nonfinite_error
from phimlx.generation.placed_media import Media
from phimlx.generation.reply import Reply
from phimlx.models.base import CausalLM
from phimlx.models.multimodal import MultimodalLM
from phimlx.training.data.batches import Batches, Example
from phimlx.training.data.examples import Dataset, RowSettings, read_row, tokenize
from phimlx.training.data.faults import DataError, Faults
from phimlx.training.data.loss_mask import RowEncoder
from phimlx.training.data.media import MediaReader
from phimlx.training.data.row_types import Conversation
from phimlx.training.data.rows import Problem, Row, read_rows
from phimlx.training.data.sources import SPLITS, find_splits
from phimlx.training.features import EncodedMedia
from phimlx.training.forward import adapters_of, inputs_of, media_inputs, supervised_states
from phimlx.training.loss import measured_losses

Advance = Callable[[int], object]


@dataclass(frozen=True)
class Loss:
    """Cross-entropy of the tokens to learn, over all of some data.

    Attributes:
        loss: mean cross-entropy of a token, in nats.
        tokens: how many were predicted.
        examples: that they stand in.
    """

    loss: float
    tokens: int
    examples: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@dataclass(frozen=True)
class Question:
    """A prompt and the answer expected.

    Attributes:
        place: file and line that it comes from.
        media: pictures and sounds that stand among the tokens.
    """

    place: str
    tokens: list[int]
    expected: str
    media: Media | None = None


@dataclass(frozen=True)
class Answer:
    """A model's answer to a question.

    Attributes:
        exact: the same words as expected; see `normalized`.
        f1: of the words that the two share.
        identical: the same text but for white space around it.
        is_whole: the model ended it, not the limit of tokens.
    """

    place: str
    expected: str
    given: str
    exact: bool
    f1: float
    identical: bool
    is_whole: bool


@dataclass(frozen=True)
class Answers:
    """All answers, and their means."""

    answers: tuple[Answer, ...]

    @property
    def exact_match(self) -> float:
        return self._mean([answer.exact for answer in self.answers])

    @property
    def f1(self) -> float:
        return self._mean([answer.f1 for answer in self.answers])

    @property
    def identical(self) -> float:
        return self._mean([answer.identical for answer in self.answers])

    @property
    def cut(self) -> int:
        """Number of answers that the limit of tokens cut off."""
        return sum(not answer.is_whole for answer in self.answers)

    def _mean(self, values: Sequence[float]) -> float:
        return sum(values) / len(values)


def read_data(
    source: str | Path, split: str | None = None, limit: int | None = None
) -> list[Row | Problem]:
    """The rows to evaluate on.

    Args:
        source: a file, a folder or a data set of the Hub, as for training.
        split: "train", "valid" or "test"; the last of these that there is where None.
        limit: so many of the first rows.

    Raises:
        TrainingError: where there is no such data.
    """
    splits = find_splits(source)
    chosen = split or next(name for name in reversed(SPLITS) if name in splits)
    if chosen not in splits:
        raise TrainingError(f"{source} has no split {chosen}; it has {', '.join(splits)}.")
    rows = read_rows(splits[chosen])
    return [row for _, row in zip(range(limit), rows, strict=False)] if limit else list(rows)


def examples_of(
    phi: Phi,
    rows: Iterable[Row | Problem],
    settings: RowSettings,
    encoder: RowEncoder | None = None,
) -> Dataset:
    """The examples that rows make, all of them sound.

    Args:
        encoder: of the model; made where None.

    Raises:
        DataError: naming what is wrong, row by row.
        TrainingError: where nothing is left to predict.
    """
    data = tokenize(rows, encoder or RowEncoder.of(phi), settings)
    if data.faults.count:
        raise DataError(data.faults)
    if not data.examples:
        raise TrainingError("The data holds no token to predict.")
    return data


def measure_loss(
    model: CausalLM,
    examples: Sequence[Example],
    batch_size: int = 4,
    advance: Advance = lambda count: None,
    media: MediaReader | None = None,
) -> Loss:
    """The mean loss over supervised tokens, never holding the logits of more than a few.

    Args:
        advance: called with the number of examples that have been dealt with.
        media: opens what they show and play.

    Raises:
        GenerationError: where the model computes no numbers.
    """
    losses = example_losses(model, examples, batch_size, advance, media)
    tokens = sum(int(example.supervised[1:].sum()) for example in examples)
    return Loss(math.fsum(losses) / tokens, tokens, len(examples))


def example_losses(
    model: CausalLM,
    examples: Sequence[Example],
    batch_size: int = 4,
    advance: Advance = lambda count: None,
    media: MediaReader | None = None,
) -> list[float]:
    """The loss of each example, summed over its supervised tokens; see `measure_loss`."""
    found = np.zeros(len(examples))
    key = mx.random.key(0)  # nothing is drawn: adapters drop only what training gives a key
    for batch in Batches(examples, batch_size).epoch(0):
        inputs = inputs_of(batch, model.config.rope)
        if batch.media:
            assert media is not None
            assert isinstance(model, MultimodalLM)
            inputs |= media_inputs(batch, model, EncodedMedia(model, media))
        states = supervised_states(model, inputs, key, adapters=adapters_of(model, batch))
        losses = measured_losses(model.output_layer, states, inputs["targets"])
        weighted = np.array(losses * inputs["weights"], np.float64)
        summed = np.bincount(batch.example_ids, weighted, len(batch.examples))
        if not np.isfinite(summed).all():
            raise nonfinite_error(model, batch.tokens[0].tolist())
        found[batch.numbers] = summed
        mx.clear_cache()
        advance(len(batch.examples))
    return list(map(float, found))


def questions_of(
    phi: Phi,
    rows: Iterable[Row | Problem],
    settings: RowSettings,
    encoder: RowEncoder | None = None,
) -> tuple[list[Question], int]:
    """Read questions and their answers from rows: the last reply, of rows that end with one.

    Returns:
        The questions, and how many rows have none: texts, calls of functions.
    """
    encoder = encoder or RowEncoder.of(phi)
    questions, without = [], 0
    for row in rows:
        if isinstance(row, Problem):
            faults = Faults()
            faults.note(row)
            raise DataError(faults)
        said, _ = read_row(row, encoder, settings)
        if not isinstance(said, Conversation) or not _ends_in_text(said):
            without += 1
            continue
        last = said.messages[-1]
        tokens, items = encoder.prompt(said.messages[:-1], said.tools)
        media = encoder.media.placed(items) if items and encoder.media is not None else None
        questions.append(Question(row.place, tokens, last.content, media))
    return questions, without


def ask(
    phi: Phi,
    questions: Sequence[Question],
    max_tokens: int = 256,
    batch_size: int = 8,
    advance: Advance = lambda count: None,
    kv_bits: int | None = None,
) -> Answers:
    """Let a model answer greedily.

    Args:
        max_tokens: of an answer, reasoning included.
        advance: called with the number of questions that have been answered.
        kv_bits: 8 or 4, to hold keys and values quantized; as they come where None.

    Raises:
        TrainingError: where there is no question.
        GenerationError: where one does not fit the model's context.
    """
    if not questions:
        raise TrainingError(
            "The data holds no question with its answer.",
            hint="Rows of prompt and completion, or messages that end with a reply, have one.",
        )
    replies = phi.generate_all(
        [question.tokens for question in questions],
        media=[question.media for question in questions],
        max_tokens=max_tokens,
        batch_size=batch_size,
        kv_bits=kv_bits,
        advance=advance,
    )
    return Answers(tuple(map(_judged, questions, replies)))


def normalized(text: str) -> list[str]:
    """The words of an answer in lower case, without punctuation and articles.

    Source: SQuAD (arXiv 1606.05250), section 6.1, and its evaluation script.
    """
    bare = "".join(character for character in text.lower() if character not in PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


PUNCTUATION = frozenset(string.punctuation)


def token_f1(given: str, expected: str) -> float:
    """Harmonic mean of precision and recall of words; two empty answers are the same."""
    ours, theirs = normalized(given), normalized(expected)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * shared / (len(ours) + len(theirs))


def _ends_in_text(said: Conversation) -> bool:
    *before, last = said.messages
    return bool(before) and last.role == "assistant" and not last.tool_calls


def _judged(question: Question, reply: Reply) -> Answer:
    given, expected = reply.text.strip(), question.expected.strip()
    return Answer(
        question.place,
        expected,
        given,
        exact=normalized(given) == normalized(expected),
        f1=token_f1(given, expected),
        identical=given == expected,
        is_whole=reply.finish_reason != "length",
    )
