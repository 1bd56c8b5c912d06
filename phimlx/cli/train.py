"""`phimlx train`: fine-tune a model on a person's own data."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.memory import check_memory, ignore_memory_option
from phimlx.cli.options import (
    config_option,
    json_option,
    limit_options,
    own_adapter,
    pop_limits,
    resume_option,
)
from phimlx.cli.together import end_at_once, first_says
from phimlx.errors import ModelAbsentError
from phimlx.options import click_options, from_file, from_flags
from phimlx.terminal.output import Output
from phimlx.training.settings import TrainSettings

if TYPE_CHECKING:
    from phimlx.machine.processes import ProcessGroup
    from phimlx.media.limits import Limits
    from phimlx.training.data.examples import Dataset
    from phimlx.training.run.loop import Outcome
    from phimlx.training.run.session import Session


@click.command()
@click_options(TrainSettings)
@click.option(
    "--mask-prompt",
    is_flag=True,
    help="Learn answers only, which is what happens without it too: --loss-on assistant.",
)
@config_option
@resume_option
@click.option("--check", is_flag=True, help="Look at data and memory, and train nothing.")
@ignore_memory_option
@limit_options()
@json_option
def command(
    mask_prompt: bool,
    config: Path | None,
    resume: bool,
    check: bool,
    ignore_memory: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Fine-tune a model on your own data, with adapters or as a whole.

    \b
      phimlx train --model phi-4-mini --data rows.jsonl --check
      phimlx train --model phi-4-mini --data rows.jsonl
      phimlx chat --model phi-4-mini --adapter-path adapters

    A row of data has messages, prompt and completion, Alpaca's instruction, input and output, or
    text; a message's weight of 0 keeps it from being learned, and its reasoning_content becomes
    <think> for a model that reasons. All rows are checked before the first step. A model at 4 bits
    takes a quarter of the memory (QLoRA). Ctrl-C ends the run after the step that it is in;
    --resume goes on from there, or from wherever it was killed, as if it had never stopped.

    --adapter-path gets adapters.safetensors, of the best checkpoint where there is validation data
    and of the last one elsewhere; a log, a curve of the loss, and checkpoints/, of which the newest
    few and the best are kept.
    """
    if mask_prompt:
        loss_on = flags["loss_on"] = flags["loss_on"] or "assistant"
        if loss_on != "assistant":
            raise click.UsageError(f"--mask-prompt and --loss-on {loss_on} exclude each other.")
    limits = pop_limits(flags)
    file = None if config is None else from_file(TrainSettings, config)
    given = from_flags(TrainSettings, flags, file)
    if given.data is None and not resume:
        raise click.UsageError("--data is missing: name what to learn from.")

    from phimlx.machine.processes import ProcessGroup
    from phimlx.terminal.training import note_unused

    processes = ProcessGroup.join()
    output = Output(json=as_json)
    if not processes.is_main:
        output = Silent()
    with processes.watched(partial(end_at_once, output)), first_says(processes):
        session = _open(given, resume, processes, limits, output)
        if not resume and (own := own_adapter(given.model)) is not None:
            output.note(f"A new adapter is trained; that of {given.model}, {own}, is left out.")
        check_consent(session.settings.reward, flags["reward"])
        session.check()
        data = read_data(session, output)
        note_unused(data, output)
        if check:
            _check(session, data, output)
            return
        run(session, data, ignore_memory, output)


def check_consent(rewards: Sequence[str], named: Sequence[str]) -> None:
    """Raise TrainingError where a Python file would be run that the command line does not name.

    Files of settings and folders of runs may come from anybody.
    """
    from phimlx.errors import TrainingError
    from phimlx.training.rewards import names_file

    unnamed = [each for each in rewards if names_file(each) and each not in named]
    if unnamed:
        arguments = " ".join(f"--reward {each}" for each in unnamed)
        raise TrainingError(
            f"The reward {unnamed[0]} is Python to be run, which the command line has to name.",
            hint=f"Look at the file; if you trust it, add: {arguments}",
        )


class Silent(Output):
    """Output of processes other than the main one: nothing but errors."""

    def __init__(self) -> None:
        super().__init__(json=True)

    def json(self, value: Any) -> None:
        """Nothing."""

    def note(self, text: str, style_name: str | None = None) -> None:
        """Nothing."""


def _open(
    given: TrainSettings, resume: bool, processes: ProcessGroup, limits: Limits, output: Output
) -> Session:
    from phimlx.training.run.checkpoints import RunFolder
    from phimlx.training.run.session import Session, resumed_settings
    from phimlx.training.run.trackers import check_trackers

    about, settings = None, given
    if resume:
        run_folder = RunFolder(Path(given.adapter_path), 1)
        about = processes.broadcast_json(run_folder.description() if processes.is_main else None)
        folder = {"adapter_path": given.adapter_path}  # wherever the run's folder was before
        settings = resumed_settings(about, given.model_copy(update=folder))
    check_trackers(settings.report_to)
    return Session(settings, model_folder(settings.model, output), processes, about, limits)


def model_folder(model: str | None, output: Output) -> Path:
    """Find the folder of a model, which comes here where it is not and somebody can say so."""
    from phimlx.hub.resolve import resolve

    try:
        return resolve(model)
    except ModelAbsentError as absent:
        from phimlx.cli.bars import download_missing

        download_missing(model, output, absent)
    return resolve(model)


def read_data(session: Session, output: Output) -> dict[str, Dataset]:
    """Read all data of a run, with a bar."""
    seen = 0
    with output.progress(100, "Reading the data", "%") as bar:

        def advance(done: int, total: int) -> None:
            nonlocal seen
            now = 100 * done // max(total, 1)
            bar.update(now - seen)
            seen = now

        return session.load_data(advance)


def _check(session: Session, data: Mapping[str, Dataset], output: Output) -> None:
    """Show what the data is like and what a run would need."""
    from phimlx.machine.memory import machine_memory
    from phimlx.sizes import counted, size_text
    from phimlx.terminal.training import show_examples
    from phimlx.training.data.statistics import summarize, summary_table
    from phimlx.training.run.loop import TrainingPlan

    settings = session.settings
    length = settings.max_seq_length if settings.pack else None
    summaries = {name: summarize(each, settings.batch_size, length) for name, each in data.items()}
    head, *rows = summary_table(summaries)
    output.table(head, rows)
    show_examples(data["train"], session.encoder.tokenizer, output)
    needed, memory = session.estimate_memory(data), machine_memory()
    plan = TrainingPlan.of(settings, len(session.batches(data)[0]))
    output.text()
    output.table(["Memory at the peak", ""], needed.rows())
    steps = counted(plan.steps, "step")
    output.text(f"This machine has {size_text(memory)} for it. The run has {steps}.")
    warning = session.check_memory(data, memory)
    if warning:
        output.warning(warning)
    output.json(
        {
            "data": {name: asdict(each) for name, each in summaries.items()},
            "memory": {**asdict(needed), "total": needed.total, "machine": memory},
            "steps": plan.steps,
        }
    )


def run(session: Session, data: Mapping[str, Dataset], ignore_memory: bool, output: Output) -> None:
    """Train, from the beginning or from where a run was stopped."""
    from phimlx.cli.bars import logger
    from phimlx.machine.memory import machine_memory
    from phimlx.terminal.training import RunDisplay, answers_bar
    from phimlx.training.run.loop import INTERRUPTED

    check_memory(lambda: session.check_memory(data, machine_memory()), ignore_memory, output)
    with ExitStack() as stack:
        if session.processes.is_main:
            stack.enter_context(session.run_folder.locked())
        with output.status("Loading the model…"):
            phi = session.load_model()
            session.on_answers = answers_bar(output)
            run = session.run(phi, data, output.note)
        log = logger(output)

        def announce(text: str) -> None:
            with output.beside_bars():
                if output.is_watched:
                    output.note("")  # a terminal has shown ^C where the cursor stood
                output.note(text)

        stop_requested = stack.enter_context(stop_requests(announce))
        display = stack.enter_context(RunDisplay(session, run, output, log).opened())
        outcome = run.fit(display, stop_requested)
        if session.processes.is_main:
            with output.beside_bars():
                display.finish(outcome)
            if outcome.ending != INTERRUPTED:
                session.run_folder.end(outcome.ending)
    if outcome.ending == INTERRUPTED:
        output.note(f"Stopped after step {outcome.step:,}. Go on with: {_again(session)}")
        raise KeyboardInterrupt
    output.json(_as_object(session, outcome))


def _again(session: Session) -> str:
    from phimlx.training.rewards import names_file

    settings = session.settings
    rewards = [f" --reward {each}" for each in settings.reward if names_file(each)]
    return (
        f"phimlx {settings.command} --resume --adapter-path {settings.adapter_path}"
        f"{''.join(rewards)}"
    )


def _as_object(session: Session, outcome: Outcome) -> dict[str, Any]:
    """The result for --json."""
    return {"adapter_path": session.settings.adapter_path, **asdict(outcome)}


@contextmanager
def stop_requests(log: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether SIGINT or SIGTERM has come.

    The handler only takes note: what it interrupts may be printing. A thread says so. A second
    signal ends the process as it always does.
    """
    from phimlx.errors import MachineLostError

    came = False
    requests: SimpleQueue[bool] = SimpleQueue()  # whose put may interrupt itself
    handled = (signal.SIGINT, signal.SIGTERM)
    before = {each: signal.getsignal(each) for each in handled}

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        for each in handled:
            signal.signal(each, before[each])
        requests.put(True)

    def announce() -> None:
        if requests.get():
            log("Stopping after this step; once more stops at once.")

    thread = Thread(target=announce, daemon=True)
    thread.start()
    for each in handled:
        if before[each] is not signal.SIG_IGN:
            signal.signal(each, note)
    try:
        yield lambda: came
    except MachineLostError:
        # `mlx.launch` ends those that are left; first they say why.
        before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for each in handled:
            signal.signal(each, before[each])
        requests.put(False)
        thread.join()
