"""A file of prompts answered on the screen: progress, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimlx.errors import GenerationError, shortened, some
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.prompt_file import Answers


def answer_prompts(
    phi: Answers, source: Path, target: Path, settings: dict[str, Any], output: Output, **more: Any
) -> None:
    """Answer every line of a file; arguments as `phimlx.prompt_file.answer_file` takes them.

    Raises:
        PromptError: where the file cannot be read, or the output is there already.
        GenerationError: where lines could not be answered; the others have been written then.
    """
    from phimlx.prompt_file import answer_file, count_lines

    total = count_lines(source)
    try:
        with output.progress(total, "Answering", " lines") as bar:
            result = answer_file(phi, source, target, settings, advance=bar.update, **more)
    except KeyboardInterrupt:
        output.note("Interrupted; the same command goes on where it was.")
        raise
    if result.kept:
        output.note(f"{result.kept:,} of {total:,} lines had been answered before.")
    for key, count in result.unused.items():
        lines = "1 line holds" if count == 1 else f"{count:,} lines hold"
        output.warning(f"{lines} {shortened(key)}, of which nothing is made.")
    failed = {str(number): why for number, why in sorted(result.failed.items())}
    output.json({"output": str(target), "answered": result.answered, "failed": failed})
    for why in list(failed.values())[:10]:
        output.note(why)
    if failed:
        raise GenerationError(
            f"{len(failed):,} of {total:,} lines could not be answered: {some(list(failed))}.",
            hint=f"{target} has the reason in the place of each.",
        )
    output.text(f"{result.answered:,} replies are in {target}.")
