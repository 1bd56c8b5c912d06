"""What an answer is worth: rewards by name, and functions in a user's own Python file."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from phimlx.errors import PhimlxError, TrainingError, shortened
from phimlx.files import read_bytes, read_json_value
from phimlx.prompt.reply_parser import END_THINK
from phimlx.training.data.batches import Task

MAX_CODE_BYTES = 1 << 20
MAX_SCHEMA_BYTES = 1 << 20
KINDS = "exact, regex:PATTERN, schema:FILE, length:N or FILE.py:NAME"


@dataclass(frozen=True)
class Answered:
    """An answer to be judged.

    Attributes:
        text: without the token that ends it.
        tokens: how many it has, that one included.
    """

    task: Task
    text: str
    tokens: int

    @property
    def said(self) -> str:
        """The text after the reasoning, without white space around it."""
        return self.text.rpartition(END_THINK)[2].strip()


Reward = Callable[[Sequence[Answered]], list[float]]
"""Takes some answers; gives a number for each, the higher the better."""


def names_file(spec: str) -> bool:
    """Whether a reward names a Python file to be run."""
    return spec.partition(":")[0] not in BUILT_IN and spec != "exact"


def read_rewards(specs: Sequence[str], forbidden: Collection[Path] = ()) -> list[Reward]:
    """Make the rewards of these names.

    Args:
        specs: as `--reward` takes them.
        forbidden: folders from which no code is run: models and data come from anywhere.

    Raises:
        TrainingError: for a name that means nothing, and what is wrong with a file.
    """
    return [_read(spec, forbidden) for spec in specs]


def fingerprints(specs: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of the file that each reward is made of, where it is made of one."""
    found = {}
    for spec in specs:
        kind, _, value = spec.partition(":")
        file = _file_of(spec)[0] if names_file(spec) else Path(value)
        if kind == "schema" or names_file(spec):
            content = read_bytes(file, TrainingError, limit=MAX_CODE_BYTES)
            found[spec] = hashlib.sha256(content).hexdigest()
    return found


def needs_answers(specs: Collection[str]) -> bool:
    """Whether a reward compares with the answer of a row."""
    return "exact" in specs


def _read(spec: str, forbidden: Collection[Path]) -> Reward:
    if spec == "exact":
        return _exact
    kind, _, value = spec.partition(":")
    if kind in BUILT_IN and value:
        return BUILT_IN[kind](value)
    if kind in BUILT_IN:
        raise TrainingError(f"The reward {kind} says nothing after its colon.", hint=_usage())
    return _from_file(spec, forbidden)


def _usage() -> str:
    return f"A reward is {KINDS}."


def _exact(answers: Sequence[Answered]) -> list[float]:
    expected = (each.task.expected for each in answers)
    return [
        float(wanted is not None and each.said == wanted.strip())
        for each, wanted in zip(answers, expected, strict=True)
    ]


def _regex(pattern: str) -> Reward:
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise TrainingError(f"The reward's pattern is no regular expression: {error}.") from None
    return lambda answers: [float(compiled.search(each.text) is not None) for each in answers]


def _length(given: str) -> Reward:
    """1 up to so many tokens, then falling to 0 in a straight line at twice as many."""
    if not (given.isascii() and given.isdigit() and 0 < int(given[:12]) < 1 << 31):
        raise TrainingError(
            f"The reward length:{shortened(given)} has no number of tokens.", hint=_usage()
        )
    longest = int(given)
    return lambda answers: [
        min(1.0, max(0.0, 2 - each.tokens / longest)) for each in answers
    ]  # fmt: skip


def _schema(name: str) -> Reward:
    """1 for JSON that is valid under a schema."""
    from phimlx.training.json_schema import JSONSchema, NotJSONError

    path = Path(os.path.expanduser(name))
    schema = JSONSchema(read_json_value(path, TrainingError, limit=MAX_SCHEMA_BYTES), str(path))

    def judge(answer: Answered) -> float:
        try:
            return float(schema.allows(answer.said))
        except NotJSONError:
            return 0.0

    return lambda answers: list(map(judge, answers))


BUILT_IN: dict[str, Callable[[str], Reward]] = {
    "regex": _regex,
    "schema": _schema,
    "length": _length,
}


def _file_of(spec: str) -> tuple[Path, str]:
    """Divide FILE.py:NAME."""
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise TrainingError(f"There is no reward {shortened(spec)}.", hint=_usage())
    return Path(os.path.expanduser(file)), name


def _from_file(spec: str, forbidden: Collection[Path]) -> Reward:
    """Run a user's file, and take a function out of it.

    It is called with keywords, each a list with one value an answer: `prompts`, `completions`, and
    the columns of the rows by their names, as far as it takes them.
    """
    path, name = _file_of(spec)
    read_bytes(path, TrainingError, limit=MAX_CODE_BYTES)  # which says what is wrong with it
    place = path.resolve()
    for folder in forbidden:
        if place.is_relative_to(folder.resolve()):
            raise TrainingError(
                f"{path} lies in {folder}, whose files are never run.",
                hint="Read it, and copy it to a folder of your own.",
            )
    made = importlib.util.spec_from_file_location(f"phimlx_reward_{path.stem}", place)
    assert made is not None
    assert made.loader is not None
    module = importlib.util.module_from_spec(made)
    try:
        made.loader.exec_module(module)
    except Exception as error:
        raise _failed(str(path), error) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise TrainingError(f"{path} has no function {name}.")
    try:
        taken = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise TrainingError(f"{spec} is no function that keywords can be given to.") from None
    names = {
        each.name for each in taken if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    }
    takes_all = any(each.kind is each.VAR_KEYWORD for each in taken)
    return partial(_call, spec, function, None if takes_all else names)


def _call(
    spec: str, function: Callable[..., Any], names: set[str] | None, answers: Sequence[Answered]
) -> list[float]:
    columns = dict.fromkeys(key for each in answers for key in each.task.values)
    given: dict[str, list[Any]] = {
        str(key): [each.task.values.get(key) for each in answers] for key in columns
    }
    given["prompts"] = [each.task.prompt for each in answers]
    given["completions"] = [each.text for each in answers]
    if names is not None:
        given = {key: value for key, value in given.items() if key in names}
    try:
        found = function(**given)
        numbers = [float(value) for value in found]
    except PhimlxError:
        raise
    except Exception as error:
        raise _failed(spec, error) from error
    if len(numbers) != len(answers):
        raise TrainingError(f"{spec} gave {len(numbers)} numbers for {len(answers)} answers.")
    if not all(map(math.isfinite, numbers)):
        raise TrainingError(f"{spec} gave a number that is not finite.")
    return numbers


def _failed(what: str, error: Exception) -> TrainingError:
    """Say which line of a user's code has raised what."""
    trace = error.__traceback__
    line = None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(".py"):
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f" at line {line}" if line is not None else ""
    return TrainingError(
        f"{what} failed{where}: {type(error).__name__}: {shortened(str(error), 200)}.",
        hint="The function takes lists by keyword, such as def reward(completions, **columns), and "
        "returns a number for each answer.",
    )
