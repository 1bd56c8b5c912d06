"""Statistics of a data set, before a night is spent on it: counts, lengths, shares, examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from phimlx.sizes import counted
from phimlx.training.data.batches import Batches, Example
from phimlx.training.data.examples import Dataset

MOST_NAMED = 8  # unused columns of a file that are named
PERCENTILES = (5, 50, 95, 100)

MaskedText = tuple[str, bool]
"""A stretch of text, and whether it is learned."""


@dataclass(frozen=True)
class DatasetSummary:
    """A data set in numbers.

    Attributes:
        examples: of preferences, two a row.
        rows: those that became examples.
        kinds: rows by what they are.
        skipped: rows left out, by reason.
        unused: what rows hold that nothing is made of, and how many do, by the file's name.
        lengths: tokens of an example, by percentile; 100 is the longest.
        tokens: of all examples, which is what an epoch feeds.
        supervised_share: part of them that is learned.
        padding_share: part of what an epoch computes that is padding.
        batches: in an epoch.
        fingerprint: see `Dataset.fingerprint`.
        media: pictures and sounds, by kind.
    """

    examples: int
    rows: int
    kinds: dict[str, int]
    skipped: dict[str, int]
    cut: int
    split: int
    unused: dict[str, dict[str, int]]
    lengths: dict[int, int]
    tokens: int
    supervised_share: float
    padding_share: float
    batches: int
    fingerprint: str
    media: dict[str, int] = field(default_factory=dict)


def summarize(data: Dataset, batch_size: int, row_length: int | None = None) -> DatasetSummary:
    """Count a data set that is not empty; `row_length` as for `Batches`."""
    lengths = np.array([len(example.tokens) for example in data.examples])
    learned = sum(int(example.supervised.sum()) for example in data.examples)
    batches = Batches(data.examples, batch_size, row_length=row_length)
    found = np.percentile(lengths, PERCENTILES, method="higher")
    return DatasetSummary(
        examples=len(data.examples),
        rows=len(set(data.rows)),
        kinds=dict(Counter(dict(zip(data.rows, data.kinds, strict=True)).values())),
        skipped=dict(data.skipped),
        cut=data.cut,
        split=data.split,
        unused={file: dict(counts) for file, counts in data.unused.items() if counts},
        lengths=dict(zip(PERCENTILES, found.tolist(), strict=True)),
        tokens=int(lengths.sum()),
        supervised_share=learned / int(lengths.sum()),
        padding_share=1 - batches.real_share,
        batches=len(batches),
        fingerprint=data.fingerprint,
        media=dict(Counter(item.kind for example in data.examples for item in example.media)),
    )


def summary_table(summaries: Mapping[str, DatasetSummary]) -> list[list[str]]:
    """Make a table of some data sets by name: a row of headings, then one for each number."""
    each = list(summaries.values())
    rows = [
        ["", *summaries],
        ["rows", *(f"{s.rows:,}" for s in each)],
        ["examples", *(f"{s.examples:,}" for s in each)],
    ]
    for kind, name in (("image", "pictures"), ("audio", "sounds")):
        if any(s.media.get(kind) for s in each):
            rows.append([name, *(f"{s.media.get(kind, 0):,}" for s in each)])
    for name in sorted({reason for s in each for reason in s.skipped}):
        rows.append([f"skipped: {name}", *(f"{s.skipped.get(name, 0):,}" for s in each)])
    for name in ("cut", "split"):
        if any(getattr(s, name) for s in each):
            rows.append([name, *(f"{getattr(s, name):,}" for s in each)])
    for percentile in PERCENTILES:
        name = "longest" if percentile == 100 else f"length, {percentile} %"
        rows.append([name, *(f"{s.lengths[percentile]:,}" for s in each)])
    return [
        *rows,
        ["tokens an epoch", *(f"{s.tokens:,}" for s in each)],
        ["batches an epoch", *(f"{s.batches:,}" for s in each)],
        ["learned", *(f"{s.supervised_share:.1%}" for s in each)],
        ["padding", *(f"{s.padding_share:.1%}" for s in each)],
    ]


def unused_notes(data: Iterable[Dataset]) -> list[str]:
    """Say of each file in a sentence what its rows hold that nothing is made of."""
    notes = []
    for file, counts in ((file, c) for each in data for file, c in each.unused.items() if c):
        named = [
            f"{name} ({counted(count, 'row')})"
            for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        ]
        more = [f"{len(named) - MOST_NAMED} more"] if len(named) > MOST_NAMED else []
        text = f"{file}: not used: {', '.join(named[:MOST_NAMED] + more)}."
        if "the column 'input'" in counts:
            text += " With --mapping input=input it follows the prompt."
        notes.append(text)
    return notes


def samples(data: Dataset, count: int = 3) -> list[Example]:
    """Pick some examples from all over a data set, its first and last among them."""
    last = len(data.examples) - 1
    places = sorted({round(last * i / max(count - 1, 1)) for i in range(count)})
    return [data.examples[place] for place in places]


def rendered_samples(
    data: Dataset, tokenizer: Tokenizer, count: int = 3
) -> list[tuple[str, list[MaskedText]]]:
    """Return where each of some examples comes from, and its text."""
    return [(each.source, rendered(each, tokenizer)) for each in samples(data, count)]


def rendered(example: Example, tokenizer: Tokenizer) -> list[MaskedText]:
    """Return the text of an example, control tokens by name, cut where learning begins or ends.

    A picture or a sound is said in a word.
    """
    shown = {item.begin: item for item in example.media}
    borders = {int(place) for place in np.flatnonzero(np.diff(example.supervised)) + 1}
    for begin, item in shown.items():
        borders |= {begin, begin + item.tokens}
    places = sorted(borders - {0, len(example.tokens)})
    starts = [0, *places]
    return [
        (
            f"[{shown[start].kind}, {shown[start].tokens} tokens]"
            if start in shown
            else tokenizer.decode(tokens.tolist()),
            bool(example.supervised[start]),
        )
        for start, tokens in zip(starts, np.split(example.tokens, places), strict=True)
    ]


def abridged(pieces: Sequence[MaskedText], longest: int = 600) -> list[MaskedText]:
    """Return the same with the middle left out of every stretch that has more characters."""
    return [
        (
            text
            if len(text) <= longest
            else f"{text[: longest // 2]} […{len(text) - longest:,} characters…] "
            f"{text[-(longest // 2) :]}",
            learned,
        )
        for text, learned in pieces
    ]
