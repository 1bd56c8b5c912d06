"""A training run on the screen, in its log and its trackers: each event where it belongs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimlx.errors import PhimlxError
from phimlx.files import write_file
from phimlx.sizes import counted, size_text
from phimlx.terminal.curves import draw, legend
from phimlx.terminal.output import Output
from phimlx.training.run.card import adapter_card
from phimlx.training.run.checkpoints import writing
from phimlx.training.run.events import (
    CheckpointSkipped,
    Event,
    SampleReply,
    StepTaken,
    TrainingReport,
    Validation,
)
from phimlx.training.run.log import TrainingLog, row_of
from phimlx.training.run.loop import INTERRUPTED, Outcome, TrainingRun
from phimlx.training.run.loss_plot import draw_png
from phimlx.training.run.trackers import Tracker, numbers_of, open_tracker

if TYPE_CHECKING:
    from phimlx.prompt.tokenizer.tokenizer import Tokenizer
    from phimlx.terminal.progress import Progress
    from phimlx.training.data.examples import Dataset
    from phimlx.training.run.session import Session

LOG, CURVE, CARD = "log.jsonl", "curve.png", "README.md"
LEARNED = "bold"  # style of what is learned in an example


class RunDisplay:
    """Shows and keeps a run's events, in the main process.

    Args:
        log: writes a line that is read while the run goes on, and leaves the bar whole.
    """

    def __init__(
        self, session: Session, run: TrainingRun, output: Output, log: Callable[[str], None]
    ) -> None:
        self.session = session
        self.run = run
        self.output = output
        self.write_line = log
        self.folder = session.run_folder.path
        self.log: TrainingLog | None = None
        self.bar: Progress | None = None
        self.trackers: list[Tracker] = []

    @contextmanager
    def opened(self) -> Iterator[RunDisplay]:
        """Open log, trackers and bar while the block runs."""
        if not self.session.processes.is_main:
            yield self
            return
        settings, step = self.session.settings, self.run.state.step
        path = Path(settings.log) if settings.log else self.folder / LOG
        self.log = TrainingLog(path, step, resumed=self.session.resumed is not None)
        with ExitStack() as stack:
            for name in settings.report_to:
                tracker = open_tracker(name, self.folder, settings.as_object())
                stack.callback(tracker.close)
                self.trackers.append(tracker)
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
            for tracker in self.trackers:
                tracker.add(row["step"], numbers_of(row))
        if isinstance(event, StepTaken) and self.bar is not None:
            self.bar.update(1)
        line = LINES.get(type(event))
        if line is not None:
            self.write_line(line(event))

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
        taken = counted(outcome.step, "step")
        self.output.text(f"{self.folder}: {outcome.ending} after {taken}{best}")
        if outcome.ending != INTERRUPTED:
            self._warn(dict(curves["validation"]).get(0), outcome.best_loss)
            name = self.session.settings.model
            model = f" --model {name}" if name else ""
            self.output.note(f"Try it: phimlx chat{model} --adapter-path {self.folder}")

    def _warn(self, before: float | None, best: float | None) -> None:
        """Say so where the model was better before the first step than at any validation since."""
        if before is not None and best is not None and best > before:
            self.output.warning(
                f"The validation loss was {before:.4f} before the first step: what was learned "
                "makes it worse. Try a lower --learning-rate, or more steps."
            )


def answers_bar(output: Output) -> Callable[[int, int], None]:
    """Make a function to call with the answers that a step has and will have: it draws a bar."""
    stack = ExitStack()
    bar: Progress | None = None
    seen = 0

    def report(done: int, total: int) -> None:
        nonlocal bar, seen
        if bar is None:
            bar, seen = stack.enter_context(output.progress(total, "Answering", " answers")), 0
        bar.update(done - seen)
        seen = done
        if done >= total:
            stack.close()
            bar = None

    return report


def note_unused(data: Mapping[str, Dataset], output: Output) -> None:
    """Say what the rows of each file hold that nothing is made of."""
    from phimlx.training.data.statistics import unused_notes

    for line in unused_notes(data.values()):
        output.note(line)


def show_examples(data: Dataset, tokenizer: Tokenizer, output: Output) -> None:
    """Print some examples, what is learned in bold, or between ⟦ and ⟧ where nothing is bold."""
    from phimlx.training.data.statistics import abridged, rendered_samples

    for source, pieces in rendered_samples(data, tokenizer):
        output.text(f"\n{source}", "dim")
        for text, learned in abridged(pieces):
            if not output.is_terminal and learned:
                text = f"⟦{text}⟧"
            output.write(text, LEARNED if learned else None)
        output.text()


def _report(event: TrainingReport) -> str:
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


def _skipped(event: CheckpointSkipped) -> str:
    return (
        f"The checkpoint of step {event.step:,} is left out: {event.reason} The steps after the "
        "last whole one are taken again."
    )


def _sample(event: SampleReply) -> str:
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
    TrainingReport: _report,
    Validation: _validation,
    SampleReply: _sample,
    CheckpointSkipped: _skipped,
}
"""Lines that a person reads while a run goes on."""
