"""`phimlx evaluate --compare`: two models, or two adapters of one, on the same rows."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimlx.errors import ModelNotFoundError, TrainingError, shortened
from phimlx.sizes import counted
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.api import Phi
    from phimlx.evaluation.compare import Difference, RowResult

SHOWN = 20  # rows in which the two differ
WIDEST = 60  # characters of an answer

Results = dict[str, "RowResult"]


@dataclass(frozen=True)
class Measuring:
    """What each model is measured on, and how.

    Attributes:
        data: source, split and limit.
        rows: settings of how rows become examples.
        max_length: of a row; the model's context where None.
        asked: tokens of an answer and bits of the cache, where answers are compared.
    """

    data: tuple[str, str | None, int | None]
    rows: Mapping[str, Any]
    max_length: int | None
    batch_size: int
    asked: tuple[int, int | None] | None


def compare_on_data(
    sides: tuple[str, str],
    model: str | None,
    load: Callable[..., Phi],
    measuring: Measuring,
    output: Output,
) -> None:
    """Measure both, one after the other, so that one is in memory at a time.

    Args:
        sides: A and B, each a model or an adapter of `model`.
        load: takes a model and an adapter.
    """
    from phimlx.evaluation.compare import CONFIDENCE, compare

    adapters = [is_adapter(side) for side in sides]
    found: list[Results] = []
    for side, adapted in zip(sides, adapters, strict=True):
        phi = load(model, adapter=side) if adapted else load(side)
        found.append(_measure(phi, side, measuring, output))
        del phi
        gc.collect()
    a, b = found
    measures, places = compare(a, b) if set(a) & set(b) else ([], [])
    if not measures:
        raise TrainingError("The two have no row in common that can be measured.")
    apart = len(set(a) ^ set(b))
    if apart:
        rows = counted(apart, "row is", "rows are")
        output.warning(f"{rows} left out: only one of the two can be measured there.")
    output.table(
        ["", sides[0], sides[1], "B - A", f"{CONFIDENCE:.0%} of resampled rows", ""],
        [_line(each) for each in measures],
    )
    output.text(f"{counted(len(places), 'row')}. A is {sides[0]}, B {sides[1]}.")
    _show_rows(a, b, places, output)
    output.json(
        {
            "a": {"name": sides[0], "adapter": adapters[0]},
            "b": {"name": sides[1], "adapter": adapters[1]},
            "rows": len(places),
            "confidence": CONFIDENCE,
            "measures": {each.measure: each.as_object() for each in measures},
            "results": [
                {"place": place, "a": asdict(a[place]), "b": asdict(b[place])} for place in places
            ],
        }
    )


def is_adapter(name: str) -> bool:
    """Whether a name means an adapter that is on this machine rather than a model."""
    from phimlx.adapters.files import CONFIG
    from phimlx.files import is_file
    from phimlx.hub.resolve import resolve_adapter

    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        return is_file(folder / CONFIG) and not is_file(folder / "config.json")
    if "/" not in name:
        return False
    try:
        resolve_adapter(name)
    except ModelNotFoundError:
        return False
    return True


def _measure(phi: Phi, side: str, measuring: Measuring, output: Output) -> Results:
    from phimlx.evaluation.compare import row_results
    from phimlx.evaluation.data import ask, example_losses, examples_of, questions_of, read_data
    from phimlx.training.data.examples import RowSettings
    from phimlx.training.data.loss_mask import RowEncoder

    batch_size, asked = measuring.batch_size, measuring.asked
    longest = measuring.max_length or phi.context_length
    settings = RowSettings(**measuring.rows, max_length=longest)
    read = read_data(*measuring.data)
    encoder = RowEncoder.of(phi)
    examples = examples_of(phi, read, settings, encoder)
    with output.progress(len(examples.examples), f"Measuring {side}", " rows") as bar:
        shown = (batch_size, bar.update, encoder.media)
        losses = example_losses(phi.model, examples.examples, *shown)
    found = row_results(phi, examples, losses)
    if asked is None:
        return found
    questions, _ = questions_of(phi, read, settings, encoder)
    questions = [question for question in questions if question.place in found]
    with output.progress(len(questions), f"{side} answers", " rows") as bar:
        answers = ask(phi, questions, asked[0], batch_size, bar.update, asked[1])
    if answers.cut:
        output.warning(
            f"{answers.cut} of {len(questions)} answers of {side} were cut off after {asked[0]} "
            "tokens; --max-tokens raises that."
        )
    for answer in answers.answers:
        found[answer.place] = replace(found[answer.place], answer=answer)
    return found


def _line(each: Difference) -> list[str]:
    low, high = (f"{value:+.4f}" for value in (each.low, each.high))
    clear = "" if each.is_clear else "not clear"
    return [
        each.measure,
        f"{each.a:.4f}",
        f"{each.b:.4f}",
        f"{each.difference:+.4f}",
        f"{low} to {high}",
        clear,
    ]


def _show_rows(a: Results, b: Results, places: list[str], output: Output) -> None:
    """Show where one answers right and the other wrong; without answers the largest differences."""
    pairs = [(place, a[place].answer, b[place].answer) for place in places]
    told = [(place, x, y) for place, x, y in pairs if x is not None and y is not None]
    if told:
        differ = [(place, x, y) for place, x, y in told if x.exact != y.exact]
        output.text(f"\nOne of the two is right in {len(differ):,} of {len(told):,} rows.")
        head = ["row", "expected", "A", "B", "right"]
        lines = [
            [place, *(shortened(text, WIDEST) for text in (x.expected, x.given, y.given)),
             "A" if x.exact else "B"]
            for place, x, y in differ
        ]  # fmt: skip
    else:
        gaps = {place: (b[place].nats - a[place].nats) for place in places}
        differ_most = sorted(places, key=lambda place: -abs(gaps[place]))
        output.text("\nWhere they differ most, in nats of the whole row:")
        head = ["row", "A", "B", "B - A"]
        lines = [
            [place, f"{a[place].nats:.3f}", f"{b[place].nats:.3f}", f"{gaps[place]:+.3f}"]
            for place in differ_most
            if gaps[place]
        ]
    if lines:
        output.table(head, lines[:SHOWN])
    if len(lines) > SHOWN:
        output.text(f"… and {len(lines) - SHOWN:,} more; --json has all.")
