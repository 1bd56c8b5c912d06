"""Many prompts from a file, and their replies in another: one a line, in order, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from phimlx.errors import GenerationError, PhimlxError, PromptError, shortened
from phimlx.files import parse_json, replacing, translate_read_errors, translate_write_errors
from phimlx.generation.engine import Engine
from phimlx.generation.options import SHAPES, GenerationOptions
from phimlx.generation.prompt_reader import Prompt
from phimlx.generation.request import Request
from phimlx.sizes import size_text

MAX_LINE = 64_000_000  # bytes
FORMS = '"…", {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'

# What a line may say of its own reply; as `GenerationOptions` has it.
OPTIONS = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "stop", "seed", "tools", "images", "audio"),
    *("logit_bias", "logprobs", "top_logprobs", "prompt_logprobs", "continue_final_message"),
    *("schema", "regex", "grammar", "tool_choice", "adapter", "reasoning"),
)
IDS = ("custom_id", "id")
USED = {"prompt", "messages", "system", "body", *IDS, *OPTIONS}
# Of OpenAI's batch files, beside those: https://platform.openai.com/docs/guides/batch
IGNORED = {"method", "url", "model"}


Parsed = tuple[Prompt, dict[str, Any], Any, set[str]]
"""A prompt, its options, its id, and the keys that mean nothing here."""


class Answers(Protocol):
    """The part of `phimlx.Phi` that answers."""

    name: str
    engine: Engine

    def request(self, prompt: Prompt, options: GenerationOptions) -> Request: ...


@dataclass
class Result:
    """What came of a file of prompts.

    Attributes:
        answered: lines that have a reply.
        kept: of these, those that an earlier run had answered.
        failed: number of a line -> why it has none.
        unused: keys that lines hold and nothing is made of -> in how many lines.
    """

    answered: int = 0
    kept: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Line:
    """A line of the file: its number from 1 on, its text, and what its reply is known by."""

    number: int
    text: bytes
    key: str


def answer_file(
    phi: Answers,
    source: Path,
    target: Path,
    settings: Mapping[str, Any],
    *,
    system: str | None = None,
    about: Sequence[str] = (),
    batch_size: int = 8,
    advance: Callable[[int], object] = lambda count: None,
) -> Result:
    """Answer every line of a file of prompts.

    Replies go to `TARGET.part` as they come, and to `target` when all are there, in the order of
    the lines: objects as `Reply.as_object` makes them, with `line` and, where the line has one,
    `id`. A line that cannot be answered has an object with `line` and `error`. What an earlier run
    left in `TARGET.part` for the same line and settings is not asked again.

    Args:
        source: a prompt a line, in one of `FORMS`; a line may also have `system`, an `id` or
            `custom_id`, and options of its own, such as the name of an `adapter`.
        settings: options of every reply that a line does not have itself.
        system: what the model is told first, where a line does not say it itself.
        about: what else a reply depends on, such as the model.
        batch_size: lines that are answered together.
        advance: called with the number of lines that have been seen to.

    Raises:
        PromptError: where the file cannot be read, or the output is there already.
        GenerationError: where the output cannot be written.
    """
    identity = json.dumps([*about, system, dict(settings)], sort_keys=True, default=str)
    refuse_existing(target)
    lines = list(read_lines(source, identity))

    def parse(line: Line) -> Parsed:
        return parse_line(line, system)

    return answer_lines(phi, lines, target, settings, parse, batch_size, advance)


def refuse_existing(target: Path) -> None:
    """Raise `PromptError` where an output is there already."""
    if target.exists():
        raise PromptError(
            f"{target} exists already.", hint="Give another --output, or remove it first."
        )


def answer_lines(
    phi: Answers,
    lines: Sequence[Line],
    target: Path,
    settings: Mapping[str, Any],
    parse: Callable[[Line], Parsed],
    batch_size: int,
    advance: Callable[[int], object],
    encode: Callable[[Iterator[dict[str, Any]]], Iterable[bytes]] = lambda rows: map(_row, rows),
) -> Result:
    """Answer lines as `answer_file` does.

    Args:
        parse: makes a line's prompt and options.
        encode: makes of the rows, one a line in their order, what is written to `target`.
    """
    result = Result()
    with closing(Journal(target)) as journal:
        result.kept = sum(line.key in journal for line in lines)
        advance(result.kept)
        left = [line for line in lines if line.key not in journal]
        requests = _requests(phi, left, settings, parse, result)
        asked: dict[Request, tuple[Line, Any]] = {}

        def coming() -> Iterator[Request]:
            for line, identifier, request in requests:
                if request is None:
                    advance(1)
                else:
                    asked[request] = line, identifier
                    yield request

        with closing(phi.engine.run_each(coming(), batch_size)) as ended:
            for request in ended:
                line, identifier = asked.pop(request)
                if request.error is not None and not isinstance(request.error, PhimlxError):
                    raise request.error
                if request.error is not None:
                    result.failed[line.number] = str(request.error)
                else:
                    named = {} if identifier is None else {"id": identifier}
                    journal.add(line.key, {**named, **request.reply.as_object(phi.name)})
                advance(1)
        result.answered = len(lines) - len(result.failed)
        journal.finish(encode(_rows(lines, journal, result)))
    return result


def count_lines(source: Path) -> int:
    """Count the lines that hold a prompt; raises PromptError as `answer_file`."""
    return sum(1 for _ in read_lines(source, ""))


def read_lines(source: Path, identity: str) -> Iterator[Line]:
    """Read the lines that are not empty.

    Args:
        identity: of settings, by which the same line is told from itself under others.

    Raises:
        PromptError: where the file cannot be read, or a line is too long.
    """
    seen: Counter[str] = Counter()
    with translate_read_errors(source, PromptError):
        if not source.exists():
            raise PromptError(f"There is no file {source}.")
        if not source.is_file():
            raise PromptError(f"{source} is not a regular file.")
        with source.open("rb") as file:
            number = 0
            while text := file.readline(MAX_LINE + 1):
                number += 1
                if len(text) > MAX_LINE:
                    raise PromptError(
                        f"{source}: line {number} is longer than {size_text(MAX_LINE)}."
                    )
                if text := text.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip():
                    digest = hashlib.sha256(identity.encode() + b"\0" + text).hexdigest()
                    seen[digest] += 1  # the same line again is another reply
                    yield Line(number, text, f"{digest}-{seen[digest]}")


def parse_line(line: Line, system: str | None = None) -> Parsed:
    """Read a line: its prompt, its options, its id, and the keys that mean nothing here.

    Args:
        system: what the model is told first, where the line does not say it itself.

    Raises:
        PromptError: where it is none of `FORMS`.
    """
    value = parse_json(line.text, f"Line {line.number}", PromptError)
    if isinstance(value, str):
        value = {"prompt": value}
    elif isinstance(value, list):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise PromptError(f"Line {line.number} is no prompt.", hint=f"A line is {FORMS}.")
    identifier = next((value[key] for key in IDS if value.get(key) is not None), None)
    unused = value.keys() - USED - IGNORED
    body = value.get("body")
    if isinstance(body, dict):
        unused |= body.keys() - USED - IGNORED
        value = body
    forms = [value[key] for key in ("messages", "prompt") if value.get(key) is not None]
    if len(forms) != 1 or not isinstance(forms[0], str | list):
        problem = "has both a prompt and messages" if len(forms) > 1 else "is no prompt"
        raise PromptError(f"Line {line.number} {problem}.", hint=f"A line is {FORMS}.")
    prompt = forms[0]
    system = value.get("system", system)
    if system is not None:
        said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not any(isinstance(each, Mapping) and each.get("role") == "system" for each in said):
            prompt = [{"role": "system", "content": system}, *said]
    options = {key: value[key] for key in OPTIONS if value.get(key) is not None}
    return prompt, options, identifier, unused


class Journal:
    """Replies as they come, in a file beside the output, each known by its line's key.

    Raises:
        GenerationError: where it cannot be written.
    """

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f"{target.name}.part")
        self._target = target
        self._places: dict[str, int] = {}
        with self._writing():
            self._file = open(self.path, "a+b")  # noqa: SIM115 (closed by `close`)
            self._file.seek(0)
            end = 0
            for row in self._file:
                key = _key_of(row)
                if key is None:  # the run was killed within it
                    break
                self._places[key] = end
                end += len(row)
            self._file.truncate(end)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def add(self, key: str, reply: Mapping[str, Any]) -> None:
        """Keep a reply."""
        with self._writing():
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(_row({"key": key, **reply}))
            self._file.flush()
            self._places[key] = place

    def read(self, key: str) -> dict[str, Any]:
        """Read the reply with a key."""
        self._file.seek(self._places[key])
        reply: dict[str, Any] = json.loads(self._file.readline())
        del reply["key"]
        return reply

    def finish(self, rows: Iterable[bytes]) -> None:
        """Write the output, as a whole or not at all, and go away."""
        with (
            self._writing(),
            replacing(self._target) as temporary,
            temporary.open("wb") as file,
        ):
            file.writelines(rows)
            file.flush()
        self.path.unlink()

    def close(self) -> None:
        """Close the file, which stays where it was not finished; an empty one does not."""
        self._file.close()
        if not self._places:
            self.path.unlink(missing_ok=True)

    def _writing(self) -> Any:
        return translate_write_errors(self._target, GenerationError)


def _requests(
    phi: Answers,
    lines: Iterable[Line],
    settings: Mapping[str, Any],
    parse: Callable[[Line], Parsed],
    result: Result,
) -> Generator[tuple[Line, Any, Request | None]]:
    """Make the request of each line, with its id; None for a line that has failed."""
    for line in lines:
        try:
            prompt, own, identifier, unused = parse(line)
            result.unused.update(unused)
            shaped = not own.keys().isdisjoint(SHAPES)  # in its own way alone
            usual = {key: settings[key] for key in settings if not (shaped and key in SHAPES)}
            request = phi.request(prompt, GenerationOptions(**{**usual, **own}))
        except PhimlxError as error:
            result.failed[line.number] = str(error)
            yield line, None, None
        except (TypeError, ValueError) as error:  # an option that is of another kind
            result.failed[line.number] = f"Line {line.number}: {shortened(error)}."
            yield line, None, None
        else:
            yield line, identifier, request


def _rows(lines: Iterable[Line], journal: Journal, result: Result) -> Iterator[dict[str, Any]]:
    for line in lines:
        failed = result.failed.get(line.number)
        answer = journal.read(line.key) if failed is None else {"error": failed}
        yield {"line": line.number, **answer}


def _row(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=True) + "\n").encode()


def _key_of(row: bytes) -> str | None:
    """The key of a whole row of the journal; None for one that is cut or none of ours."""
    if not row.endswith(b"\n"):
        return None
    try:
        key = json.loads(row)["key"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return key if isinstance(key, str) else None
