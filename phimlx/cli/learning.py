"""`phimlx convert --q-method`: the options of learned quantization, and its bar.

Knows flags and the screen; the learning is `convert.quantize.calibrated`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from convert import Conversion, Learning, Plan

Command = TypeVar("Command", bound=Callable[..., Any])

METHODS = ("rtn", "gptq", "dwq", "sensitivity")

# For each option: the setting of `convert.Learning`, and the methods that it goes with.
DETAILS: dict[str, tuple[str, tuple[str, ...]]] = {
    "--calibration": ("text", METHODS[1:]),
    "--calibration-samples": ("samples", METHODS[1:]),
    "--calibration-length": ("length", METHODS[1:]),
    "--learning-steps": ("steps", ("dwq",)),
    "--learning-rate": ("learning_rate", ("dwq",)),
    "--q-target-bits": ("target_bits", ("sensitivity",)),
}

OPTIONS = (
    click.option(
        "--q-method",
        "method",
        type=click.Choice(METHODS),
        help="How quantized weights are found, with -q or --recipe. rtn rounds. The others learn "
        "from text, in hours for a large model, with much of it in memory: gptq (2, 4 or 8 bits; a "
        "run that was stopped goes on where it was), dwq (2 to 6 bits), and sensitivity, which "
        "gives more bits to layers where they count; these two begin anew  [default: rtn]",
    ),
    click.option(
        "--q-target-bits",
        "target_bits",
        type=click.FloatRange(2, 9),
        help="Bits per weight of the whole model, with --q-method sensitivity; --q-bits are the "
        "fewest of a layer.",
    ),
    click.option(
        "--calibration",
        "calibration",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Text to learn from, like what the model will read; 50,000 tokens are good  "
        "[default: a short one that comes along]",
    ),
    click.option(
        "--calibration-samples",
        "calibration_samples",
        type=click.IntRange(min=8),
        help="Windows of it to learn from  [default: 128]",
    ),
    click.option(
        "--calibration-length",
        "calibration_length",
        type=click.IntRange(min=32),
        help="Tokens in each  [default: 512]",
    ),
    click.option(
        "--learning-steps",
        "learning_steps",
        type=click.IntRange(min=1),
        help="Of training, with --q-method dwq  [default: 512]",
    ),
    click.option(
        "--learning-rate",
        "learning_rate",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        help="Of training, with --q-method dwq  [default: 1e-5]",
    ),
)


def learning_options(command: Command) -> Command:
    """Add the options to a command, which gets `method` and those of `DETAILS` by their names."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def read_learning(method: str | None, options: Mapping[str, Any]) -> Learning | None:
    """What the options say; None where weights are rounded.

    Args:
        options: by name, as the command got them; None where one is not given.

    Raises:
        click.UsageError: where they do not go together.
        ConversionError: where the text cannot be read.
    """
    given = {
        option: value
        for option in DETAILS
        if (value := options[option.removeprefix("--").removeprefix("q-").replace("-", "_")])
        is not None
    }
    for option in given:
        methods = DETAILS[option][1]
        if method not in methods:
            raise click.UsageError(f"{option} goes with --q-method {' or '.join(methods)}.")
    if method is None or method == "rtn":
        return None
    if method == "sensitivity" and "--q-target-bits" not in given:
        raise click.UsageError("--q-method sensitivity needs --q-target-bits.")
    from convert import Learning
    from phimlx.cli.report import read_text

    settings = {DETAILS[option][0]: value for option, value in given.items()}
    if "text" in settings:
        settings["text"] = read_text(settings["text"])
    return Learning(method, **settings)


def run_learning(plan: Plan, output: Output) -> Conversion:
    """Carry out a plan that learns: first one bar in hundredths, then the usual one in bytes."""
    assert plan.lesson is not None
    output.note(plan.lesson.announcement)
    with (
        _what_stays(output, bool(plan.lesson.files)),
        output.progress(100, "Learning", "%") as learning,
        output.progress(plan.bytes_before, "Converting", "B") as converting,
    ):
        return plan.run(converting.update, learning.update)


@contextmanager
def _what_stays(output: Output, stays: bool) -> Iterator[None]:
    """Say after an interrupt whether the work was for nothing."""
    try:
        yield
    except KeyboardInterrupt:
        output.note(
            "What has been learned stays: the same command goes on from there."
            if stays
            else "Stopped; nothing is left of it."
        )
        raise
