"""The bundled models' held-out questions: asking them and telling right answers from wrong ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phimlx.api import Phi
from phimlx.generation.reply import Reply
from phimlx.hub.resolve import NANO, NANO_MULTIMODAL
from phimlx.prompt.reply_parser import ReplyParser
from phimlx.prompt.tools import ToolCall
from phimlx.transcription import TRANSCRIBE

MAX_TOKENS = 96  # more than any right answer needs


@dataclass(frozen=True)
class Question:
    """A conversation that waits for its answer, none of it seen in training.

    Attributes:
        answer: the text, or the tool call as the model writes it.
        kind: "arithmetic", "capital", "word", "translation", "multi-turn" or "tool".
        long: whether the prompt alone is past the LongRoPE step.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    answer: str
    kind: str
    long: bool


def questions(folder: Path = NANO) -> list[Question]:
    """All held-out questions of a model folder, from its `heldout.jsonl`."""
    lines = (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [Question(**{"tools": None, **row}) for row in rows]


def sample(asked: Sequence[Question], of_each_kind: int) -> list[Question]:
    """The first questions of each kind, in the order of all."""
    counts: Counter[str] = Counter()
    chosen = []
    for question in asked:
        counts[question.kind] += 1
        if counts[question.kind] <= of_each_kind:
            chosen.append(question)
    return chosen


def ask(phi: Phi, question: Question) -> Reply:
    """The model's answer, decoded greedily."""
    return phi.generate(
        question.messages, tools=question.tools, max_tokens=MAX_TOKENS, temperature=0.0
    )


def is_right(reply: Reply, question: Question) -> bool:
    """Whether the reply has the expected text and the expected calls, names and arguments."""
    return (reply.text.strip(), reply.tool_calls) == _expected(question)


def count_right(
    phi: Phi, asked: Sequence[Question], advance: Callable[[], object]
) -> dict[str, tuple[int, int]]:
    """For each kind, how many were right of how many; "long" counts the long prompts of all kinds.

    Args:
        advance: called after each question.
    """
    counts: dict[str, tuple[int, int]] = {}
    for question in asked:
        right = is_right(ask(phi, question), question)
        for kind in (question.kind, *(["long"] if question.long else [])):
            before = counts.get(kind, (0, 0))
            counts[kind] = (before[0] + right, before[1] + 1)
        advance()
    return counts


@dataclass(frozen=True)
class Scene:
    """A picture, a sound or both that wait for their answer, none of them seen in training.

    Attributes:
        modality: "speech" to write down, "vision" to answer a question about, or "both": the
            question about the picture is the sound.
        said: what the sound of "both" says.
    """

    modality: str
    kind: str
    answer: str
    image: Path | None = None
    audio: Path | None = None
    question: str = ""
    said: str = ""


def scenes(folder: Path = NANO_MULTIMODAL) -> list[Scene]:
    """All held-out pictures and sounds of a folder, from its `heldout.jsonl`."""
    lines = (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for row in map(json.loads, lines):
        files = {name: folder / row[name] for name in ("image", "audio") if name in row}
        found.append(Scene(**{**row, **files}))
    return found


def look_and_listen(phi: Phi, scene: Scene) -> Reply:
    """The model's answer, decoded greedily."""
    return phi.generate(
        TRANSCRIBE if scene.modality == "speech" else scene.question,
        images=scene.image,
        audio=scene.audio,
        max_tokens=MAX_TOKENS,
        temperature=0.0,
    )


def _expected(question: Question) -> tuple[str, list[ToolCall]]:
    parser = ReplyParser(tools=question.tools is not None)
    parser.feed(question.answer)
    parser.finish()
    return parser.text.strip(), parser.tool_calls
