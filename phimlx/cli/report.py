"""The quality report of a conversion: on the screen, and beside the converted model.

Knows files and the screen; `convert.measure.report` does the measuring.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimlx import files
from phimlx.errors import ConversionError, PhimlxError
from phimlx.terminal.output import Output, encode_json

if TYPE_CHECKING:
    from convert import Conversion

MAX_TEXT_BYTES = 1 << 30


def read_text(path: Path | None) -> str | None:
    """The text to measure on; None, for the bundled one, where there is no path.

    Raises:
        ConversionError: where the file cannot be read as text.
    """
    return None if path is None else files.read_text(path, ConversionError, limit=MAX_TEXT_BYTES)


def add_report(result: Conversion, text: str | None, output: Output) -> dict[str, Any]:
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
