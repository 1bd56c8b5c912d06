"""The quality report of a conversion: on the screen, and beside the converted model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx import files
from phimlx.cli.flags import flag
from phimlx.errors import ConversionError, PhimlxError
from phimlx.terminal.output import Output, encode_json

if TYPE_CHECKING:
    from convert import ConversionResult

MAX_TEXT_BYTES = 1_000_000_000


@dataclass(frozen=True)
class ReportFlags:
    """The measurement of a conversion's quality."""

    report: bool = flag(
        "--report",
        is_flag=True,
        help="Measure what the conversion costs: perplexity, KL divergence, top-1 agreement, error "
        "of each layer; a table here, report.json, report.png and the model card in OUT.",
    )
    report_text: Path | None = flag(
        "--report-text",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Text to measure on, with --report  [default: one that comes along]",
    )

    def check(self, calibrates: bool, calibration_text: Path | None) -> None:
        """Refuse flags that do not go together.

        Args:
            calibrates: whether weights are calibrated, and on which text.
        """
        if self.report_text is not None and not self.report:
            raise click.UsageError("--report-text goes with --report.")
        if self.report and calibrates and calibration_text == self.report_text:
            raise click.UsageError(
                "--report would measure on the text that the weights are calibrated on: give "
                "another one with --report-text or --calibration."
            )


def read_text(path: Path | None) -> str | None:
    """Read a text to measure or calibrate on; None, for the bundled one, where there is no path.

    Raises:
        ConversionError: where the file cannot be read as text.
    """
    return None if path is None else files.read_text(path, ConversionError, limit=MAX_TEXT_BYTES)


def add_report(result: ConversionResult, text: str | None, output: Output) -> dict[str, Any]:
    """Measure a finished conversion, show it, and put it into the folder.

    Returns what `--json` adds to the result.
    """
    from convert.measure.report import COLUMNS, measure

    with output.progress(100, "Measuring", "%") as bar:
        report = measure(result.source, result.path, text, advance=bar.update)
    output.text()
    output.table(COLUMNS, report.rows())
    if report.note:
        output.note(report.note)
    found = report.as_object()
    with files.translate_write_errors(result.path, ConversionError):
        files.write_file(result.path / "report.json", encode_json(found, indent=2) + "\n")
        card = result.path / "README.md"
        if card.is_file():
            text = files.read_text(card, ConversionError).rstrip()
            files.write_file(card, f"{text}\n\n{report.markdown()}")
    try:
        report.chart(result.path / "report.png")
    except PhimlxError as error:  # the numbers are there all the same
        output.warning(f"{error} {error.hint or ''}".rstrip())
    return {"report": found}
