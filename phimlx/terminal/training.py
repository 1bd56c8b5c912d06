"""A training run on the screen, in its log and its trackers: each event where it belongs.

Knows what a run tells; knows nothing of how it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimlx.errors import PhimlxError
from phimlx.files import write_file
from phimlx.sizes import size_text
from phimlx.terminal.curves import draw, legend
from phimlx.terminal.output import Output
from phimlx.training.run.card import adapter_card
from phimlx.training.run.checkpoints import writing
from phimlx.training.run.events import Advanced, Event, Report, Sample, Validation
from phimlx.training.run.log import Log, draw_png, numbers_of, open_sink, row_of
from phimlx.training.run.loop import INTERRUPTED, Outcome, Run

if TYPE_CHECKING:
    from phimlx.prompt.tokenizer.tokenizer import Tokenizer
    from phimlx.terminal.progress import Progress
    from phimlx.training.data.examples import Dataset
    from phimlx.training.run.session import Session

LOG, CURVE, CARD = "log.jsonl", "curve.png", "README.md"
LEARNED = "bold"  # style of what is learned in an example


class Show:
    """Takes a run's events, on the machine that writes and prints.

    Args:
        tell: says what is read while the run goes on, and leaves the bar whole.
    """

    def __init__(
        self, session: Session, run: Run, output: Output, tell: Callable[[str], None]
    ) -> None:
        self.session = session
        self.run = run
        self.output = output
        self.tell = tell
        self.folder = session.store.folder
        self.log: Log | None = None
        self.bar: Progress | None = None
        self.sinks: list[Any] = []

    @contextmanager
    def watching(self) -> Iterator[Show]:
        """Open log, trackers and bar while the block runs."""
        if not self.session.machines.is_first:
            yield self
            return
        settings, step = self.session.settings, self.run.state.step
        path = Path(settings.log) if settings.log else self.folder / LOG
        self.log = Log(path, step, resumed=self.session.resumed is not None)
        with ExitStack() as stack:
            for name in settings.report_to:
                sink = open_sink(name, self.folder, settings.as_object())
                stack.callback(sink.close)
                self.sinks.append(sink)
            plan = self.run.plan
            if step:
                self.output.note(f"Going on after step {step:,} of {plan.steps:,}.")
            self.bar = stack.enter_context(self.output.progress(plan.steps, "Training", " steps"))
            self.bar.update(step)
            yield self

    def __call__(self, event: Event) -> None:
        row = row_of(event)
        if row is not None and self.log is not None:
            self.log.add(row)
            for sink in self.sinks:
                sink.add(row["step"], numbers_of(row))
        if isinstance(event, Advanced) and self.bar is not None:
            self.bar.update(1)
        line = LINES.get(type(event))
        if line is not None:
            self.tell(line(event))

    def finish(self, outcome: Outcome) -> None:
        """Write card and curve, and say what came of the run."""
        assert self.log is not None
        curves = self.log.curves()
        picture = draw(curves["train"], curves["validation"])
        try:
            draw_png(curves, self.folder / CURVE)
        except PhimlxError as error:  # the curve stands in the log all the same
            self.output.note(f"{error} {error.hint}")
        with writing(self.folder):
            card = adapter_card(self.session, self.run, outcome)
            write_file(self.folder / CARD, card)
        if picture:
            self.output.text(f"{picture}\n{legend(curves)}\n")
        best = ""
        if outcome.best_loss is not None:
            best = f", validation loss {outcome.best_loss:.4f} at step {outcome.best_step:,}"
        self.output.text(f"{self.folder}: {outcome.ending} after {outcome.step:,} steps{best}")
        if outcome.ending != INTERRUPTED:
            name = self.session.settings.model
            model = f" --model {name}" if name else ""
            self.output.note(f"Try it: phimlx chat{model} --adapter-path {self.folder}")


def show_examples(data: Dataset, tokenizer: Tokenizer, output: Output) -> None:
    """Some examples, what is learned in them in bold, or between ⟦ and ⟧ where nothing is bold."""
    from phimlx.training.data.statistics import abridged, rendered_samples

    for source, spans in rendered_samples(data, tokenizer):
        output.text(f"\n{source}", "dim")
        for text, learned in abridged(spans):
            if not output.is_terminal and learned:
                text = f"⟦{text}⟧"
            output.write(text, LEARNED if learned else None)
        output.text()


def _report(event: Report) -> str:
    parts = [f"step {event.step:,}", f"loss {event.loss:.4f}"]
    parts += [f"{name} {value:.3f}" for name, value in event.metrics.items()]
    parts += [
        f"rate {event.learning_rate:.2e}",
        f"{event.tokens_per_second:,.0f} tokens/s",
        f"peak {size_text(event.peak_memory)}",
        f"{clock(event.left)} left",
    ]
    return "  ".join(parts)


def _validation(event: Validation) -> str:
    metrics = "".join(f"  {name} {value:.3f}" for name, value in event.metrics.items())
    best = "  the lowest so far" if event.best else ""
    return f"step {event.step:,}  validation loss {event.loss:.4f}{metrics}{best}"


def _sample(event: Sample) -> str:
    return (
        f"step {event.step:,}  {event.source}\n"
        f"  expected {event.expected!r}\n  answered {event.answer!r}"
    )


def clock(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:11`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


LINES: dict[type[Any], Callable[[Any], str]] = {
    Report: _report,
    Validation: _validation,
    Sample: _sample,
}
"""What of a run a person reads while it goes on."""
