"""Many prompts answered on the screen: progress, and what came of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimlx.errors import GenerationError, shortened, some
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.prompt_file import Answers, Result

FAULTS = 10  # that are told apart


def answer_prompts(
    phi: Answers, source: Path, target: Path, settings: dict[str, Any], output: Output, **more: Any
) -> None:
    """Answer every line of a file; arguments as `phimlx.prompt_file.answer_file` takes them.

    Raises:
        PromptError: where the file cannot be read, or the output is there already.
        GenerationError: where lines could not be answered; the others have been written then.
    """
    from phimlx.prompt_file import answer_file, count_lines

    def answer(advance: Callable[[int], object]) -> Result:
        return answer_file(phi, source, target, settings, advance=advance, **more)

    result = follow(answer, count_lines(source), "line", target, output)
    for key, count in result.unused.items():
        lines = "1 line holds" if count == 1 else f"{count:,} lines hold"
        output.warning(f"{lines} {shortened(key)}, of which nothing is made.")
    finish(result, "line", target, output)


def follow(
    answer: Callable[[Callable[[int], object]], Result],
    total: int,
    noun: str,
    target: Path,
    output: Output,
) -> Result:
    """Show how far an answering is that is given what to call with the number of those done."""
    try:
        with output.progress(total, "Answering", f" {noun}s") as bar:
            result = answer(bar.update)
    except KeyboardInterrupt:
        output.note("Interrupted; the same command goes on where it was.")
        raise
    if result.kept:
        output.note(f"{result.kept:,} of {total:,} {noun}s had been answered before.")
    return result


def finish(result: Result, noun: str, target: Path, output: Output) -> None:
    """Tell what came of it; raises `GenerationError` where some could not be answered."""
    failed = {str(number): why for number, why in sorted(result.failed.items())}
    about = {"output": str(target), "answered": result.answered, "failed": failed}
    for why in list(faults(failed, noun))[:FAULTS]:
        output.note(why)
    if failed:
        total = result.answered + len(failed)
        error = GenerationError(
            f"{len(failed):,} of {total:,} {noun}s could not be answered: {some(list(failed))}.",
            hint=f"{target} has the reason in the place of each.",
        )
        error.result = about
        raise error
    output.json(about)
    output.text(f"{result.answered:,} replies are in {target}.")


def faults(failed: dict[str, str], noun: str) -> list[str]:
    """Say each fault once, with how often it is there and where first."""
    alike: dict[str, list[str]] = {}
    for number, why in failed.items():
        alike.setdefault(why.replace(f"Line {number}", ""), []).append(number)
    return [
        failed[numbers[0]]
        + (f" So it is with {len(numbers):,} {noun}s: {some(numbers)}." if numbers[1:] else "")
        for numbers in alike.values()
    ]
