"""Many prompts answered on the screen: progress, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimlx.errors import GenerationError, shortened, some
from phimlx.sizes import counted
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
        lines = counted(count, "line holds", "lines hold")
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
        output.note(f"{result.kept:,} of {counted(total, noun)} had been answered before.")
    return result


def finish(
    result: Result,
    noun: str,
    target: Path,
    output: Output,
    name: Callable[[int], str] = str,
) -> None:
    """Tell what came of it.

    Args:
        name: makes of a number from 1 on what a person calls that prompt.

    Raises:
        GenerationError: where some could not be answered.
    """
    failed = [(name(number), why) for number, why in sorted(result.failed.items())]
    about = {"output": str(target), "answered": result.answered, "failed": dict(failed)}
    for why in faults(failed, noun)[:FAULTS]:
        output.note(why)
    if failed:
        total = result.answered + len(failed)
        error = GenerationError(
            f"{len(failed):,} of {counted(total, noun)} could not be answered: "
            f"{some([name for name, _ in failed])}.",
            hint=f"{target} has the reason in the place of each.",
        )
        error.result = about
        raise error
    output.json(about)
    output.text(f"{counted(result.answered, 'reply is', 'replies are')} in {target}.")


def faults(failed: Iterable[tuple[str, str]], noun: str) -> list[str]:
    """Say each fault once, with how often it is there and where first.

    Args:
        failed: what a person calls each prompt, and why it has no answer.
    """
    alike: dict[str, list[tuple[str, str]]] = {}
    for name, why in failed:
        alike.setdefault(why.replace(f"Line {name}", ""), []).append((name, why))
    told = []
    for same in alike.values():
        names = [name for name, _ in same]
        more = f" So it is with {len(names):,} {noun}s: {some(names)}." if names[1:] else ""
        told.append(same[0][1] + more)
    return told
