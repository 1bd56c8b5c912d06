"""`phimlx convert --q-method`: the flags of calibrated quantization, and its bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.flags import flag
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from convert import CalibrationSettings, ConversionPlan, ConversionResult

METHODS = ("rtn", "gptq", "dwq", "sensitivity")

# Field of `CalibrationFlags`: its flag, the setting of `convert.CalibrationSettings`, and the
# methods that it goes with.
DETAILS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "calibration": ("--calibration", "text", METHODS[1:]),
    "calibration_samples": ("--calibration-samples", "samples", METHODS[1:]),
    "calibration_length": ("--calibration-length", "length", METHODS[1:]),
    "learning_steps": ("--learning-steps", "steps", ("dwq",)),
    "learning_rate": ("--learning-rate", "learning_rate", ("dwq",)),
    "target_bits": ("--q-target-bits", "target_bits", ("sensitivity",)),
}


@dataclass(frozen=True)
class CalibrationFlags:
    """The way in which quantized weights are found."""

    method: str | None = flag(
        "--q-method",
        type=click.Choice(METHODS),
        help="How quantized weights are found, with -q or --recipe. rtn rounds. The others "
        "calibrate on a text, in hours for a large model, with much of it in memory: gptq (a run "
        "that was stopped goes on where it was), dwq (2 to 6 bits), and sensitivity, which gives "
        "more bits to layers where they count; these two begin anew  [default: rtn]",
    )
    target_bits: float | None = flag(
        "--q-target-bits",
        type=click.FloatRange(2, 9),
        help="Bits per weight of the whole model, with --q-method sensitivity; --q-bits are the "
        "fewest of a layer.",
    )
    calibration: Path | None = flag(
        "--calibration",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Text to calibrate on, like what the model will read; 50,000 tokens are good  "
        "[default: a short one that comes along]",
    )
    calibration_samples: int | None = flag(
        "--calibration-samples",
        type=click.IntRange(min=8),
        help="Windows of it that are read  [default: 128]",
    )
    calibration_length: int | None = flag(
        "--calibration-length", type=click.IntRange(min=32), help="Tokens in each  [default: 512]"
    )
    learning_steps: int | None = flag(
        "--learning-steps",
        type=click.IntRange(min=1),
        help="Of training, with --q-method dwq  [default: 512]",
    )
    learning_rate: float | None = flag(
        "--learning-rate",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        help="Of training, with --q-method dwq  [default: 1e-5]",
    )

    @property
    def calibrates(self) -> bool:
        """Tells whether weights are more than rounded."""
        return self.method not in (None, "rtn")

    def settings(self) -> CalibrationSettings | None:
        """Read what the flags say; None where weights are rounded.

        Raises:
            click.UsageError: where they do not go together.
            ConversionError: where the text cannot be read.
        """
        given: dict[str, Any] = {}
        for name, (spelled, setting, methods) in DETAILS.items():
            value = getattr(self, name)
            if value is not None and self.method not in methods:
                raise click.UsageError(f"{spelled} goes with --q-method {' or '.join(methods)}.")
            if value is not None:
                given[setting] = value
        if self.method is None or not self.calibrates:
            return None
        if self.method == "sensitivity" and self.target_bits is None:
            raise click.UsageError("--q-method sensitivity needs --q-target-bits.")
        from convert import CalibrationSettings
        from phimlx.cli.report import read_text

        return CalibrationSettings(self.method, **{**given, "text": read_text(self.calibration)})


def run_calibrated(plan: ConversionPlan, output: Output) -> ConversionResult:
    """Run a plan that calibrates: first one bar in hundredths, then the usual one in bytes."""
    assert plan.calibration is not None
    output.note(plan.calibration.announcement)
    with (
        _say_what_stays(output, bool(plan.calibration.files)),
        output.progress(100, "Calibrating", "%") as calibrating,
        output.progress(plan.bytes_before, "Converting", "B") as converting,
    ):
        return plan.run(converting.update, calibrating.update)


@contextmanager
def _say_what_stays(output: Output, stays: bool) -> Iterator[None]:
    """Say after an interrupt whether the work was for nothing."""
    try:
        yield
    except KeyboardInterrupt:
        output.note(
            "The calibration so far stays: the same command goes on from there."
            if stays
            else "Stopped; nothing is left of it."
        )
        raise
