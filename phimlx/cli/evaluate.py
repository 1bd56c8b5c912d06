"""`phimlx evaluate`: loss, perplexity, answers and tasks of a model, with or without an adapter."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.options import (
    adapter_option,
    dtype_option,
    json_option,
    kv_bits_option,
    load_or_download,
    model_option,
    own_adapter,
    rope_scaling_option,
)
from phimlx.cli.preferences import preferences
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.api import Phi

COUNT = click.IntRange(min=1)


@click.command()
@model_option
@adapter_option
@dtype_option
@rope_scaling_option
@kv_bits_option
@click.option(
    "--compare",
    "sides",
    nargs=2,
    metavar="A B",
    help="Measure two models, or two adapters of --model, on the same rows of --data.",
)
@click.option(
    "--data",
    metavar="DATA",
    help="A file (JSONL, JSON, CSV, parquet), a folder with train, valid and test files, or a data "
    "set of the Hub.",
)
@click.option(
    "--split",
    type=click.Choice(("train", "valid", "test")),
    help="Which part of it  [default: test, else valid, else train]",
)
@click.option(
    "--loss-on",
    type=click.Choice(("assistant", "last", "all")),
    default="assistant",
    show_default=True,
    help="Measure the loss of every answer, of the last one, or of all text.",
)
@click.option(
    "--max-seq-length",
    metavar="N",
    type=click.IntRange(min=2),
    help="Longest row, in tokens  [default: the model's context]",
)
@click.option(
    "--overlong",
    type=click.Choice(("refuse", "cut", "split")),
    default="refuse",
    show_default=True,
    help="What becomes of longer rows.",
)
@click.option("--mapping", metavar="NAME=COLUMN,…", help="Columns of other names.")
@click.option("--prompt", metavar="TEXT", help="What rows with an answer and no prompt ask.")
@click.option(
    "--media-root",
    metavar="FOLDER",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The folder that paths of pictures and sounds are relative to, and may not leave  "
    "[default: that of the data file]",
)
@click.option(
    "--answers",
    is_flag=True,
    help="Let the model answer each row's last question, and compare.",
)
@click.option(
    "--max-tokens",
    metavar="N",
    type=COUNT,
    default=256,
    show_default=True,
    help="Of an answer, with --answers.",
)
@click.option(
    "--save-answers",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write each answer as a line of JSON, with --answers.",
)
@click.option("--tasks", metavar="NAME,…", help="Tasks of lm-eval. Needs phimlx[lm-eval].")
@click.option("--num-shots", metavar="N", type=click.IntRange(min=0), help="Examples before each.")
@click.option(
    "--include-path",
    metavar="FOLDER",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Tasks of your own.",
)
@click.option(
    "--apply-chat-template/--no-chat-template",
    "chat_template",
    default=None,
    help="Put a task's questions as chats  [default: where the model has a template]",
)
@click.option("--limit", metavar="N", type=COUNT, help="Only so many of the first rows.")
@click.option(
    "--batch-size", metavar="N", type=COUNT, default=8, show_default=True, help="Rows at a time."
)
@json_option
def command(
    model: str | None,
    adapter: str | None,
    dtype: str | None,
    rope_scaling: dict[str, Any] | None,
    kv_bits: int | None,
    sides: tuple[str, str] | None,
    data: str | None,
    split: str | None,
    loss_on: str,
    max_seq_length: int | None,
    overlong: str,
    mapping: str | None,
    prompt: str | None,
    media_root: Path | None,
    answers: bool,
    max_tokens: int,
    save_answers: Path | None,
    tasks: str | None,
    num_shots: int | None,
    include_path: Path | None,
    chat_template: bool | None,
    limit: int | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Measure a model on data of one's own, or on lm-eval's tasks.

    \b
      phimlx evaluate --model nano --data test.jsonl
      phimlx evaluate --model nano --adapter-path adapters --data test.jsonl --answers
      phimlx evaluate --model phi-4-mini --tasks arc_easy,winogrande --limit 200
      phimlx evaluate --model nano --compare nano adapters --data test.jsonl --answers

    Rows are those that phimlx train takes. Perplexity is e to the mean loss of a token that
    training would teach. Answers are compared as SQuAD does it, without case, punctuation and
    articles: exact match, and F1 of the words that the two share.
    """
    output = Output(json=as_json)
    if data is None and tasks is None:
        raise click.UsageError("There is nothing to measure: give --data or --tasks.")
    if save_answers is not None and not answers:
        raise click.UsageError("--save-answers goes with --answers.")
    if data is None and (answers or split or mapping or prompt or media_root):
        raise click.UsageError(
            "--answers, --split, --mapping, --prompt and --media-root go with --data."
        )
    if kv_bits is not None and not answers and tasks is None:
        raise click.UsageError("--kv-bits goes with --answers or --tasks.")
    for name, value in (
        ("--num-shots", num_shots),
        ("--include-path", include_path),
        ("--apply-chat-template", chat_template),
    ):
        if value is not None and tasks is None:
            raise click.UsageError(f"{name} goes with --tasks.")
    for name, is_given in (
        ("--adapter-path", adapter is not None),
        ("--tasks", tasks is not None),
        ("--save-answers", save_answers is not None),
    ):
        if sides and is_given:
            raise click.UsageError(f"{name} does not go with --compare.")
    if sides and data is None:
        raise click.UsageError("--compare goes with --data.")
    columns = _pairs(mapping)
    if sides:
        from phimlx.cli.compare import Measuring, compare_on_data

        assert data is not None
        load = partial(load_or_download, output=output, dtype=dtype, rope_scaling=rope_scaling)
        rows: dict[str, Any] = {"loss_on": loss_on, "overlong": overlong, "mapping": columns}
        rows |= {"question": prompt, "media_root": media_root}
        told = (max_tokens, kv_bits) if answers else None
        measuring = Measuring((data, split, limit), rows, max_seq_length, batch_size, told)
        compare_on_data(sides, model, load, measuring, output)
        return
    phi = load_or_download(model, output, adapter, dtype=dtype, rope_scaling=rope_scaling)
    adapter = adapter or own_adapter(preferences().choose(model).name)
    found: dict[str, Any] = {"model": phi.name, "adapter": adapter}
    if data is not None:
        from phimlx.training.data.examples import RowSettings

        settings = RowSettings(
            loss_on=loss_on,  # type: ignore[arg-type]
            max_length=max_seq_length or phi.context_length,
            overlong=overlong,  # type: ignore[arg-type]
            mapping=columns,
            question=prompt,
            media_root=media_root,
        )
        asked = (max_tokens, save_answers, kv_bits) if answers else None
        found |= _on_data(phi, data, split, limit, settings, batch_size, asked, output)
    if tasks is not None:
        from phimlx.evaluation.lm_eval import run_tasks

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        found["tasks"] = run_tasks(
            phi,
            names,
            shots=num_shots,
            limit=limit,
            batch_size=batch_size,
            chat_template=chat_template,
            include_path=include_path,
            kv_bits=kv_bits,
        )
    _print_results(found, output)
    output.json(found)


def _on_data(
    phi: Phi,
    data: str,
    split: str | None,
    limit: int | None,
    settings: Any,
    batch_size: int,
    asked: tuple[int, Path | None, int | None] | None,
    output: Output,
) -> dict[str, Any]:
    """Loss, and where `asked` for (tokens of an answer, file to write to, bits of the
    cache) answers."""
    from phimlx.evaluation.data import ask, examples_of, measure_loss, questions_of, read_data
    from phimlx.training.data.loss_mask import RowEncoder
    from phimlx.training.data.statistics import unused_notes

    encoder = RowEncoder.of(phi)
    rows = read_data(data, split, limit)
    examples = examples_of(phi, rows, settings, encoder)
    for line in unused_notes([examples]):
        output.note(line)
    with output.progress(len(examples.examples), "Measuring", " rows") as bar:
        batches = (examples.examples, batch_size, bar.update, encoder.media)
        loss = measure_loss(phi.model, *batches)
    found: dict[str, Any] = {**asdict(loss), "perplexity": loss.perplexity}
    skipped = sum(examples.skipped.values())
    if skipped:
        found["skipped"] = dict(examples.skipped)
        reasons = ", ".join(examples.skipped)
        output.note(f"{skipped} of {len(rows)} rows were passed over: {reasons}.")
    if asked is None:
        return found
    questions, without = questions_of(phi, rows, settings, encoder)
    if without:
        output.note(f"{without} of {len(rows)} rows ask nothing that is answered in words.")
    with output.progress(len(questions), "Answering", " rows") as bar:
        answers = ask(phi, questions, asked[0], batch_size, bar.update, asked[2])
    if answers.cut:
        output.warning(
            f"{answers.cut} of {len(questions)} answers were cut off after {asked[0]} tokens; "
            "--max-tokens raises that."
        )
    if asked[1] is not None:
        from phimlx.errors import TrainingError
        from phimlx.files import translate_write_errors, write_file

        lines = [json.dumps(asdict(answer), ensure_ascii=False) for answer in answers.answers]
        with translate_write_errors(asked[1], TrainingError):
            write_file(asked[1], "\n".join(lines) + "\n")
    return {
        **found,
        "questions": len(questions),
        "exact_match": answers.exact_match,
        "f1": answers.f1,
        "identical": answers.identical,
        "cut": answers.cut,
    }


def _print_results(found: dict[str, Any], output: Output) -> None:
    """The result for a person."""
    rows: list[tuple[str, str]] = []
    if "loss" in found:
        rows += [
            ("Loss", f"{found['loss']:.4f}"),
            ("Perplexity", f"{found['perplexity']:.4g}"),
            ("Measured on", f"{found['tokens']:,} tokens of {found['examples']:,} rows"),
        ]
    if "exact_match" in found:
        rows += [
            ("Exact match", f"{found['exact_match']:.1%}"),
            ("Token F1", f"{found['f1']:.1%}"),
            ("Same text", f"{found['identical']:.1%}"),
            ("Questions", f"{found['questions']:,}"),
        ]
    for task, metrics in found.get("tasks", {}).items():
        rows += [(f"{task} {name}", f"{value:.4f}") for name, value in metrics.items()]
    output.table(("Measure", "Value"), rows)


def _pairs(mapping: str | None) -> dict[str, str]:
    """`prompt=question,completion=answer` as a table."""
    if mapping is None:
        return {}
    pairs = [pair.partition("=") for pair in mapping.split(",")]
    if not all(name.strip() and column.strip() for name, _, column in pairs):
        raise click.UsageError("--mapping takes pairs such as prompt=question,completion=answer.")
    return {name.strip(): column.strip() for name, _, column in pairs}
