"""`phimlx bench`: how fast a model is on this machine, and how fast it could be."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.options import (
    adapter_option,
    dtype_option,
    json_option,
    load_or_download,
    model_argument,
    model_option,
)
from phimlx.cli.together import machines, together
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.api import Phi
    from phimlx.evaluation.bench import BenchReport, BenchSettings

COUNT = click.IntRange(min=1)
SHOWN_PASSES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@click.command()
@model_option
@model_argument
@adapter_option
@dtype_option
@click.option(
    "--context",
    "contexts",
    metavar="TOKENS",
    type=COUNT,
    multiple=True,
    help="Length of a prompt; may be given again  [default: 128, 512, 4096, 16384, 32768]",
)
@click.option(
    "--batch-size",
    "rows",
    metavar="N",
    type=COUNT,
    multiple=True,
    help="Requests answered together; may be given again  [default: 1, 4, 8]",
)
@click.option(
    "--tokens",
    metavar="N",
    type=click.IntRange(min=2),
    default=32,
    show_default=True,
    help="Tokens to decode behind each prompt.",
)
@click.option(
    "--runs",
    metavar="N",
    type=COUNT,
    default=3,
    show_default=True,
    help="Runs of each measurement, whose median counts.",
)
@click.option(
    "--vs",
    "peer",
    type=click.Choice(("mlx-lm",)),
    help="Time the same folder in it too, in turn.",
)
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the speeds as a PNG; needs the extra plots.",
)
@json_option
@together
def command(
    model: str | None,
    adapter: str | None,
    dtype: str | None,
    contexts: tuple[int, ...],
    rows: tuple[int, ...],
    tokens: int,
    runs: int,
    peer: str | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure how fast a model is on this machine.

    That is the time to load it, from the command to the first token, and the tokens a second of
    prefill and decoding behind prompts of several lengths, those that fit, and of several requests
    at once. Beside decoding stands what memory bandwidth allows, which is Apple's figure for the
    chip or, where there is none, that of a copy.

    What passes over 1 to 32 tokens cost is kept for this machine and model, and decides how many
    tokens prompt lookup drafts. Ctrl-C ends the run and keeps what was measured.
    """
    from phimlx.evaluation import bench

    if peer is not None and adapter is not None:
        raise click.UsageError("--vs times the model alone: leave out --adapter-path.")
    if peer is not None and machines() is not None:
        raise click.UsageError("--vs times the whole model on one machine: leave out mlx.launch.")
    output = Output(json=as_json)
    if plot is not None:
        from phimlx.evaluation.bench_plot import check_plot

        check_plot(plot)
    settings = bench.BenchSettings(
        contexts=contexts or bench.CONTEXTS, tokens=tokens, runs=runs, rows=rows or bench.ROWS
    )
    start = time.perf_counter()
    phi = load_or_download(model, output, adapter, dtype=dtype)
    report = bench.new_report(phi, load_seconds=time.perf_counter() - start)
    if (shared := machines()) is not None:
        report.machines = shared.size
    interrupted = False
    try:
        measure(phi, report, settings, adapter, dtype, peer, output)
    except KeyboardInterrupt:
        interrupted = True
        output.note("Stopped. This was measured before:")
    output.json(as_object(report))
    print_report(report, output)
    if plot is not None and report.contexts:
        from phimlx.evaluation.bench_plot import draw_png

        draw_png(report, plot)
        output.note(f"Drawn in {plot}.")
    if interrupted:
        raise KeyboardInterrupt


def measure(
    phi: Phi,
    report: BenchReport,
    settings: BenchSettings,
    adapter: str | None,
    dtype: str | None,
    peer: str | None,
    output: Output,
) -> None:
    """Fill the report, and keep the cost curve."""
    from phimlx.checkpoint.folder import DTYPES
    from phimlx.evaluation import bench
    from phimlx.files import reason
    from phimlx.machine.bandwidth import memory_bandwidth
    from phimlx.machine.pass_cost import save_curve

    theirs = None
    if peer is not None:
        from phimlx.evaluation.mlx_lm_speed import load_mlx_lm

        with output.status("Loading the model with mlx-lm…"):
            theirs = load_mlx_lm(phi.path, None if dtype is None else DTYPES[dtype])
    with output.status("Measuring memory…"):
        report.bandwidth = memory_bandwidth()
    copies = 1 if theirs is None else 2
    with output.progress(bench.steps(phi, settings, copies), "Measuring", " steps") as bar:
        for _ in bench.measure(phi, report, settings, theirs):
            bar.update(1)
    assert report.pass_cost is not None
    try:
        save_curve(phi.model, report.pass_cost)
    except OSError as failure:
        output.warning(f"The cost of passes could not be kept: {reason(failure)}.")
    if report.machines > 1:
        report.notes.append("The time from the command to the first token is one machine's alone.")
        report.complete = True
        return
    flags = [] if dtype is None else ["--dtype", dtype]
    flags += [] if adapter is None else ["--adapter-path", adapter]
    with output.status("Starting a command…"):
        report.first_token_seconds = bench.first_token_seconds(phi.path, settings.runs, flags)
    report.complete = True


def as_object(report: BenchReport) -> dict[str, Any]:
    """Make the object that `--json` prints."""
    found = asdict(report)
    for entry, speed in zip(found["contexts"], report.contexts, strict=True):
        entry["share"] = speed.share
        if speed.mlx_lm_decode is not None:
            entry |= {"prefill_ratio": speed.prefill_ratio, "decode_ratio": speed.decode_ratio}
    found["pass_cost"] = report.pass_cost and [list(point) for point in report.pass_cost.points]
    return found


def print_report(report: BenchReport, output: Output) -> None:
    """Print what was measured for a person."""
    from phimlx.sizes import size_text

    shared = f", on {report.machines} machines" if report.machines > 1 else ""
    place = f"{report.device} ({report.backend}){shared}"
    output.text(f"{report.model} in {report.dtype} on {place}", "bold")
    times = {"loaded in": report.load_seconds, "first token": report.first_token_seconds}
    for what, seconds in times.items():
        if seconds is not None:
            after = " after the command" if what == "first token" else ""
            output.text(f"  {what:<13} {seconds:.2f} s{after}")
    if report.bandwidth is not None:
        rate = size_text(report.bandwidth.bytes_per_second)
        source = "as Apple publishes it" if report.bandwidth.source == "published" else "of a copy"
        output.text(f"  {'bandwidth':<13} {rate} a second, {source}")
    compared = any(speed.mlx_lm_decode is not None for speed in report.contexts)
    if report.contexts:
        columns = ["tokens", "prefill/s", "decode/s", "read a token", "at most/s", "share", "peak"]
        rows = [
            [
                f"{speed.context:,}",
                f"{speed.prefill:,.1f}",
                f"{speed.decode:,.1f}",
                size_text(speed.bytes_per_token),
                f"{speed.ceiling:,.1f}",
                f"{speed.share:.0%}",
                size_text(speed.peak_memory),
                *(_ratios(speed) if compared else ()),
            ]
            for speed in report.contexts
        ]
        output.text()
        output.table(
            [*columns, *(("prefill × mlx-lm", "decode × mlx-lm") if compared else ())], rows
        )
    if report.rows:
        alone = report.rows[0].decode / report.rows[0].rows
        output.text()
        output.table(
            ["at once", "decode/s", "× one"],
            [
                [speed.rows, f"{speed.decode:,.1f}", f"{speed.decode / alone:.2f}"]
                for speed in report.rows
            ],
        )
    if report.pass_cost is not None:
        output.text()
        costs = [f"{report.pass_cost.cost(count):.2f}" for count in SHOWN_PASSES]
        output.table(["tokens of a pass", *map(str, SHOWN_PASSES)], [["cost", *costs]])
    for note in report.notes:
        output.note(note)


def _ratios(speed: Any) -> tuple[str, str]:
    return f"{speed.prefill_ratio:.2f}", f"{speed.decode_ratio:.2f}"
