"""`phimlx transcribe`: recordings of any length to text, each piece as soon as it is understood."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from phimlx.cli.options import (
    MULTIMODAL,
    check_files,
    dtype_option,
    json_option,
    kv_bits_option,
    limit_options,
    load_or_download,
    pop_limits,
)
from phimlx.errors import PhimlxError
from phimlx.media.subtitles import FORMATS
from phimlx.preferences.sampling import FiniteRange
from phimlx.terminal.output import Output
from phimlx.terminal.sink import StreamError
from phimlx.terminal.transcripts import STDIN, Transcript, TranscriptWriter

if TYPE_CHECKING:
    from phimlx.transcription import TranscriptSegment


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1)
@click.option("--live", is_flag=True, help="Write down what the microphone hears, until Ctrl-C.")
@click.option(
    "--model",
    metavar="MODEL",
    default=MULTIMODAL,
    help=f"An alias, a Hub id or a folder  [default: {MULTIMODAL}]",
)
@dtype_option
@kv_bits_option
@click.option(
    "--translate-to",
    metavar="LANG",
    help="Write it in another language, such as French.",
)
@click.option("--prompt", "-p", metavar="TEXT", help="What to ask about each piece instead.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(list(FORMATS)),
    help="Plain text, subtitles, or times and texts as JSON  [default: as --output ends, else txt]",
)
@click.option(
    "--segment-seconds",
    metavar="S",
    type=FiniteRange(1, 40),
    default=30.0,
    show_default=True,
    help="Longest piece that the model hears at once.",
)
@click.option(
    "--output",
    "-o",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Write to this file instead of stdout.",
)
@click.option(
    "--output-dir",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write a file for each recording into this folder, named as the recording is.",
)
@click.option("--overwrite", is_flag=True, help="Replace files that are there already.")
@limit_options("max_seconds", "max_bytes", "max_download", usual={"max_seconds": "any"})
@json_option
def command(
    files: tuple[str, ...],
    live: bool,
    model: str,
    dtype: str | None,
    kv_bits: int | None,
    translate_to: str | None,
    prompt: str | None,
    format_name: str | None,
    segment_seconds: float,
    output: Path | None,
    output_dir: Path | None,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write down what is said in each FILE: a path, an https URL, or - for stdin.

    A recording may be of any length, and a video too: its sound is cut at silences into pieces that
    the model hears one by one, and each is printed as soon as it is understood. Ctrl-C keeps what
    has come. A file that cannot be read does not stop the others; the exit code is 1 in the end.

    \b
      phimlx transcribe interview.mp3 -o interview.srt
      phimlx transcribe movie.mp4 --format vtt -o movie.vtt
      phimlx transcribe *.wav --output-dir transcripts
      phimlx transcribe speech.flac --translate-to French
      phimlx transcribe --live -o talk.srt
    """
    from phimlx.prompt.media_parts import no_media
    from phimlx.terminal.live import MICROPHONE, transcribe_live
    from phimlx.transcription import question

    check_source(files, live, output_dir, settings)
    question(prompt, translate_to)
    format_name = format_name or format_of(output)
    named = (MICROPHONE,) if live else files
    transcripts = plan_transcripts(named, format_name, output, output_dir, overwrite, as_json)
    screen = Output(json=as_json)
    limits = pop_limits(settings, max_seconds=math.inf)
    options = {
        "prompt": prompt,
        "translate_to": translate_to,
        "segment_seconds": segment_seconds,
        "kv_bits": kv_bits,
    }
    for transcript in transcripts:
        if transcript.name != STDIN and not live:
            with _reporting_errors(transcript, screen):
                check_files([transcript.name])
    found = [transcript for transcript in transcripts if transcript.error is None]
    if found:
        phi = load_or_download(model, screen, dtype=dtype)
        model = phi.name
        if not phi.hears:
            raise no_media(model, phi.takes_media)
    try:
        for transcript in found:
            if len(files) > 1 and transcript.target is None:
                gap = "" if transcript is found[0] else "\n"
                screen.text(f"{gap}==> {transcript.label} <==")
            with (
                _reporting_errors(transcript, screen),
                TranscriptWriter(transcript, FORMATS[format_name], screen, live) as writer,
            ):
                if live:
                    transcribe_live(partial(phi.transcribe, **options), transcript, writer, screen)
                    continue
                listen = partial(phi.transcribe, transcript.source, limits=limits, **options)
                _transcribe(listen, transcript, writer, screen)
    except KeyboardInterrupt:
        screen.json(as_object(model, transcripts))
        raise
    screen.json(as_object(model, transcripts))
    if any(transcript.error for transcript in transcripts):
        raise click.exceptions.Exit(1)


def check_source(
    files: Sequence[str], live: bool, output_dir: Path | None, limits: Mapping[str, Any]
) -> None:
    """Raise `click.UsageError` where there is nothing to transcribe, or more than one means."""
    if not live and not files:
        raise click.UsageError("Missing argument 'FILE...'; --live hears the microphone.")
    if not live:
        return
    if files:
        raise click.UsageError("--live hears the microphone: it takes no FILE.")
    given = [f"--{name.replace('_', '-')}" for name, value in limits.items() if value is not None]
    unused = ["--output-dir"] if output_dir is not None else given
    if unused:
        raise click.UsageError(f"{unused[0]} is for files, not for --live.")


def as_object(model: str, transcripts: Sequence[Transcript]) -> dict[str, Any]:
    """Make the object that `--json` prints; with what went wrong, where something did."""
    found = {"model": model, "files": [each.as_object() for each in transcripts]}
    failed = [each for each in transcripts if each.error is not None]
    if not failed:
        return found
    message, hint = failed[0].error, failed[0].hint
    if len(failed) > 1:
        message = f"{len(failed)} of {len(transcripts)} recordings were not transcribed."
        hint = "The file of each has the reason."
    return {**found, "error": {"message": message, "hint": hint}}


def format_of(target: Path | None) -> str:
    """Return the format that the end of a file's name tells, else plain text."""
    suffix = "" if target is None else target.suffix.lower().removeprefix(".")
    return suffix if suffix in FORMATS else "txt"


def plan_transcripts(
    files: Sequence[str],
    format_name: str,
    output: Path | None,
    output_dir: Path | None,
    overwrite: bool,
    as_json: bool,
) -> list[Transcript]:
    """Decide where each transcript goes; raises `click.UsageError` where that cannot be."""
    if output is not None and output_dir is not None:
        raise click.UsageError("The transcript goes to --output or into --output-dir, not both.")
    if output is not None and len(files) > 1:
        raise click.UsageError("--output takes one recording; --output-dir takes several.")
    to_stdout = output is None and output_dir is None and not as_json
    if to_stdout and len(files) > 1 and format_name != "txt":
        raise click.UsageError(
            f"Several transcripts on stdout would be no {format_name}; add --output-dir FOLDER."
        )
    if files.count(STDIN) > 1:
        raise click.UsageError("stdin (-) can be read once.")
    if output_dir is not None:
        _make_folder(output_dir)
    transcripts: list[Transcript] = []
    for file in files:
        target = output
        if output_dir is not None:
            target = output_dir / f"{_stem(file)}.{format_name}"
        earlier = next((t for t in transcripts if target is not None and t.target == target), None)
        if earlier is not None:
            raise click.UsageError(f"{earlier.name} and {file} would both be written to {target}.")
        if target is not None and target.exists() and not overwrite:
            raise click.UsageError(f"{target} exists already; --overwrite replaces it.")
        if output is not None and not output.parent.is_dir():
            raise click.UsageError(f"There is no folder {output.parent} to write to.")
        transcripts.append(Transcript(file, target))
    return transcripts


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PhimlxError(f"{folder} cannot be made: {error.strerror}.") from error


def _stem(file: str) -> str:
    if file == STDIN:
        return "stdin"
    path = urlsplit(file).path if "://" in file else file
    return PurePosixPath(path).stem or "transcript"


@contextlib.contextmanager
def _reporting_errors(transcript: Transcript, output: Output) -> Iterator[None]:
    """Tell of an error, with the file's name, and go on."""
    try:
        yield
    except StreamError:
        raise
    except PhimlxError as error:
        text = str(error)
        transcript.error = text if transcript.label in text else f"{transcript.label}: {text}"
        transcript.hint = error.hint
        output.error(PhimlxError(transcript.error, error.hint))


def _transcribe(
    listen: Callable[..., Iterator[TranscriptSegment]],
    transcript: Transcript,
    writer: TranscriptWriter,
    output: Output,
) -> None:
    """Let the pieces come, and show each."""
    heard = 0
    with output.progress(None, f"Transcribing {transcript.label}", " s") as bar:

        def expect(seconds: float | None) -> None:
            transcript.seconds = seconds
            bar.total = None if seconds is None else round(seconds)

        for piece in listen(on_open=expect):
            writer.add(piece)
            bar.update(int(piece.end) - heard)
            heard = int(piece.end)
    transcript.complete = True
