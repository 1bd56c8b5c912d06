"""`phimlx distill`: a small model learns from a large one."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli import train
from phimlx.cli.memory import check_memory, ignore_memory_option
from phimlx.cli.options import (
    config_option,
    json_option,
    resume_option,
)
from phimlx.cli.train import model_folder, read_data, stop_requests
from phimlx.options import click_options, from_file, from_flags, schemas
from phimlx.sizes import counted
from phimlx.terminal.output import Output
from phimlx.training.distill.settings import DistillSettings
from phimlx.training.methods import NUMBERS
from phimlx.training.settings import TrainSettings

if TYPE_CHECKING:
    from phimlx.api import Phi
    from phimlx.training.data.examples import Dataset
    from phimlx.training.distill.answers import Asking
    from phimlx.training.distill.logits_file import LogitsPlan
    from phimlx.training.distill.session import DistillSession

# Of learning from preferences, and from rewards; and what a teacher does not know.
NOT_HERE = {"method", "dpo", *NUMBERS, "reward", "group_size", "max_tokens", "updates", "shard"}
OWN = [name for name in schemas(DistillSettings) if name not in schemas(TrainSettings)]
OTHERS = [name for name in schemas(TrainSettings) if name not in NOT_HERE]


@click.command()
@click_options(DistillSettings, ("teacher",))
@click_options(DistillSettings, ("model",))
@click_options(DistillSettings, [name for name in OWN if name != "teacher"])
@click_options(DistillSettings, [name for name in OTHERS if name != "model"])
@config_option
@resume_option
@click.option("--check", is_flag=True, help="Look at data, disk and memory, and do nothing.")
@ignore_memory_option
@json_option
def command(
    config: Path | None,
    resume: bool,
    check: bool,
    ignore_memory: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Teach a small model what a large one knows.

    \b
      phimlx distill --teacher phi-4 --student phi-4-mini --data questions.jsonl
      phimlx distill --teacher phi-4-mini --student mini-24-layers --data chats.jsonl
      phimlx distill --teacher MODEL --student MODEL-4bit --data chats.jsonl --adapter-path mine

    Where both share a vocabulary the student learns the teacher's probabilities along the answers
    of the data; where they do not, as phi-4 and phi-4-mini, it learns answers that the teacher
    writes, of which only those that pass --exact, --schema, --regex and --judge are kept. Rows
    without an answer will do for that.

    The teacher works first and is gone before the student is loaded. What it makes is kept in
    --teacher-data, and taken from there again; a stopped command goes on where it was, and a
    student's run with --resume. What is learned is an adapter, as of phimlx train.
    """
    file = None if config is None else from_file(DistillSettings, config)
    given = from_flags(DistillSettings, flags, file)
    output = Output(json=as_json)
    session = open_session(given, resume, output)
    session.check()
    run(session, check, ignore_memory, output)


def open_session(given: DistillSettings, resume: bool, output: Output) -> DistillSession:
    """Find both models, and the run to go on with where there is one."""
    from phimlx.cli.shapes import read_schema_argument
    from phimlx.machine.processes import ProcessGroup
    from phimlx.training.distill.session import DistillSession
    from phimlx.training.run.checkpoints import RUN, RunFolder
    from phimlx.training.run.session import resumed_settings
    from phimlx.training.run.trackers import check_trackers

    about, settings = None, given
    begun = (Path(given.adapter_path) / RUN).exists()
    # Stopped before the student had begun, the teacher goes on of itself.
    if resume and (begun or given.data is None):
        about = RunFolder(Path(given.adapter_path), 1).description()
        folder = {"adapter_path": given.adapter_path}
        settings = resumed_settings(about, given.model_copy(update=folder))
    if settings.teacher is None:
        raise click.UsageError("--teacher is missing: name the model to learn from.")
    if settings.data is None:
        raise click.UsageError("--data is missing: name what to learn from.")
    check_trackers(settings.report_to)
    schema = settings.json_schema
    return DistillSession(
        settings,
        model_folder(settings.model, output),
        ProcessGroup.join(),
        about,
        teacher_folder=model_folder(settings.teacher, output),
        schema=None if schema is None else read_schema_argument(schema),
    )


def run(session: DistillSession, check: bool, ignore_memory: bool, output: Output) -> None:
    """Let the teacher work, and then the student; or look at what that would take."""
    from phimlx.terminal.training import note_unused

    difference = session.vocabulary_difference
    if session.settings.via is None and difference is not None:
        output.note(
            f"The student learns the teacher's answers, not its probabilities: {difference}."
        )
    if session.uses_answers and not _answers(session, check, ignore_memory, output):
        return
    data = read_data(session, output)
    if not session.uses_answers:
        note_unused(data, output)
    if session.uses_logits:
        plan = session.logits_plan(data)
        plan.check_size(session.probabilities, session.logits_limit)
        if check:
            _check(session, data, plan, output)
            return
        _logits(session, plan, ignore_memory, output)
        _free_memory()
    elif check:
        _check(session, data, None, output)
        return
    train.run(session, data, ignore_memory, output)


def _answers(session: DistillSession, check: bool, ignore_memory: bool, output: Output) -> bool:
    """Let the teacher answer, and keep what passes the checks; whether rows are there."""
    asking = session.asking
    if check and asking.missing:
        _check_answers(session, output)
        return False
    asking.begin()
    if asking.missing:
        _check_memory(session, None, ignore_memory, output)
        _ask(asking, _load_teacher(session, output), output)
        _free_memory()
    else:
        output.note(f"The teacher's answers are taken from {asking.folder}.")
    kept = asking.filter(session.checkers, not session.settings.keep_same)
    rows = sum(kept.rows.values())
    answers = counted(asking.total, "answer is", "answers are")
    output.note(f"{rows:,} of {answers} learned: {asking.folder}/train.jsonl")
    if kept.rejected:
        output.note(f"Not learned: {kept.reasons}.")
    return True


def _ask(asking: Asking, phi: Phi, output: Output) -> None:
    """Let the teacher answer, and judge its answers where that is wanted."""
    from phimlx.terminal.prompt_file import faults, follow

    if any(asking.answers(split) in asking.missing for split in asking.questions):
        total, folder = asking.total, asking.folder
        result = follow(lambda advance: asking.ask(phi, advance), total, "answer", folder, output)
        told = [(str(number), why) for number, why in result.failed.items()]
        for why in faults(told, "question"):
            output.warning(why)
    if asking.judge is not None:
        with output.progress(asking.total, "Judging", " answers") as bar:
            asking.let_judge(phi, bar.update)


def _logits(session: DistillSession, plan: LogitsPlan, ignore_memory: bool, output: Output) -> None:
    """Bring the teacher's probabilities to the disk where they are not."""
    from phimlx.sizes import size_text
    from phimlx.training.distill.logits_file import LogitsWriter, TeacherLogits
    from phimlx.training.distill.teacher import compute

    path = session.probabilities
    if session.open_logits(plan):
        output.note(f"The teacher's probabilities are taken from {path}.")
        return
    _check_memory(session, plan, ignore_memory, output)
    size = size_text(plan.nbytes)
    output.note(f"The teacher's probabilities of {plan.positions:,} tokens take {size}: {path}")
    with (
        LogitsWriter.open(path, plan) as writer,
        output.progress(plan.positions, "Teacher", " tokens") as bar,
        stop_requests(lambda text: None) as stop_requested,
    ):
        model = _load_teacher(session, output).model
        if not compute(model, writer, bar.update, stop_requested):
            output.note("Stopped; the same command goes on from there.")
            raise KeyboardInterrupt
    session.teacher = TeacherLogits(path)


def _load_teacher(session: DistillSession, output: Output) -> Phi:
    from phimlx import api

    with output.status("Loading the teacher…"):
        return api.load(session.teacher_folder)


def _free_memory() -> None:
    """Let go of a teacher that nothing names any more, before another model is loaded."""
    import mlx.core as mx

    gc.collect()
    mx.clear_cache()


def _check_memory(
    session: DistillSession, plan: LogitsPlan | None, ignore_memory: bool, output: Output
) -> None:
    from phimlx.machine.memory import machine_memory

    memory = machine_memory()
    check_memory(lambda: session.check_teacher_memory(plan, memory), ignore_memory, output)


def _check_answers(session: DistillSession, output: Output) -> None:
    """Show what the teacher would be asked."""
    from phimlx.machine.memory import machine_memory
    from phimlx.sizes import size_text

    asking, memory = session.asking, machine_memory()
    needed = session.teacher_memory(None)
    output.table(
        ["Questions", ""],
        [(split, f"{len(questions):,}") for split, questions in asking.questions.items()],
    )
    output.text(
        f"The teacher would write {counted(asking.total, 'answer')} of at most "
        f"{session.settings.answer_tokens:,} tokens. Its weights take {size_text(needed)}; this "
        f"machine has {size_text(memory)} for it."
    )
    output.json(
        {
            "via": session.via,
            "questions": {split: len(each) for split, each in asking.questions.items()},
            "answers": asking.total,
            "memory": {"teacher": needed, "machine": memory},
        }
    )


def _check(
    session: DistillSession, data: Mapping[str, Dataset], plan: LogitsPlan | None, output: Output
) -> None:
    """Show what the data is like, and what either part would take."""
    from phimlx.machine.memory import machine_memory
    from phimlx.sizes import size_text
    from phimlx.training.data.statistics import summarize, summary_table
    from phimlx.training.run.loop import TrainingPlan

    settings, memory = session.settings, machine_memory()
    length = settings.max_seq_length if settings.pack else None
    summaries = {name: summarize(each, settings.batch_size, length) for name, each in data.items()}
    head, *rows = summary_table(summaries)
    output.table(head, rows)
    needed, steps = session.estimate_memory(data), TrainingPlan.of(
        settings, len(session.batches(data)[0])
    ).steps  # fmt: skip
    teacher = session.teacher_memory(plan)
    output.text()
    output.table(["Memory of the student at the peak", ""], needed.rows())
    output.text(f"The teacher, before it: {size_text(teacher)} of memory.")
    if plan is not None:
        output.text(
            f"Its probabilities of {plan.positions:,} tokens, {plan.k} at each: "
            f"{size_text(plan.nbytes)} of disk space."
        )
    output.text(
        f"This machine has {size_text(memory)} of memory. The run has {counted(steps, 'step')}."
    )
    warning = session.check_memory(data, memory)
    if warning:
        output.warning(warning)
    output.json(
        {
            "via": session.via,
            "data": {name: asdict(each) for name, each in summaries.items()},
            "memory": {
                "teacher": teacher,
                "student": {**asdict(needed), "total": needed.total},
                "machine": memory,
            },
            "disk": None if plan is None else plan.nbytes,
            "steps": steps,
        }
    )
