"""Rows of data -> questions for a teacher, each with the answer that the row has, if it has one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phimlx.prompt.messages import Message
from phimlx.training.data.faults import DataError, Faults
from phimlx.training.data.row_messages import RowError
from phimlx.training.data.row_types import ALPACA, ROW_FAULTS, Conversation, read_content
from phimlx.training.data.rows import Problem, Row

NO_ANSWER = "-"  # stands where a row has none, while it is read; it is left out again


@dataclass(frozen=True)
class Question:
    """A conversation that waits for its answer.

    Attributes:
        place: file and line of the row that it comes from.
        messages: as objects of JSON.
        expected: the answer that the row has; None where it has none in words.
    """

    place: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    expected: str | None = None

    @property
    def as_json(self) -> bytes:
        """All that an answer depends on."""
        asked = {"messages": self.messages, "tools": self.tools}
        return json.dumps(asked, ensure_ascii=False, sort_keys=True).encode()

    @property
    def text(self) -> str:
        """The conversation in words, as a judge reads it."""
        if len(self.messages) == 1:
            return str(self.messages[0]["content"])
        return "\n\n".join(f"{each['role']}: {each['content']}" for each in self.messages)

    def answered(self, reply: Mapping[str, Any]) -> dict[str, Any]:
        """Make a row to learn of a reply, as `Reply.as_object` has it, and of nothing before it."""
        before = [
            {**message, "weight": 0} if message["role"] == "assistant" else message
            for message in self.messages
        ]
        said = {"role": "assistant", "content": reply["text"]}
        for name, value in (("reasoning_content", reply.get("reasoning")),
                            ("tool_calls", reply.get("tool_calls"))):  # fmt: skip
            if value:
                said[name] = value
        row: dict[str, Any] = {"messages": [*before, said]}
        return row | ({"tools": self.tools} if self.tools else {})


def read_questions(
    rows: Iterable[Row | Problem], mapping: Mapping[str, str], thinks: bool
) -> list[Question]:
    """Read the question of each row: its conversation up to the last answer, which is left out.

    Args:
        mapping: what rows call the things in `phimlx.training.data.row_types.FIELDS`.
        thinks: whether the teacher's replies begin with reasoning.

    Raises:
        DataError: naming the rows that ask nothing.
    """
    questions: list[Question] = []
    faults = Faults()
    for row in rows:
        if isinstance(row, Problem):
            faults.note(row)
            continue
        try:
            questions.append(_question(row, mapping, thinks))
        except ROW_FAULTS as error:
            faults.note(Problem(row.place, str(error), error.hint))
    if faults.count:
        raise DataError(faults)
    return questions


def _question(row: Row, mapping: Mapping[str, str], thinks: bool) -> Question:
    said, _ = read_content(_completed(row.values, mapping), mapping, thinks=thinks)
    if not isinstance(said, Conversation):
        raise RowError(
            "This is a text, which asks nothing.",
            hint="A teacher answers rows of messages, of prompt, or of instruction; learn texts "
            "with --via logits.",
        )
    messages, expected = said.messages, None
    while messages and messages[-1].role == "assistant":
        *messages, last = messages
        expected = None if last.content == NO_ANSWER or last.tool_calls else last.content
    if not messages:
        raise RowError("It asks nothing.", hint="Put a user's message first.")
    return Question(row.place, [_as_object(each) for each in messages], said.tools, expected)


def _completed(values: Mapping[str, Any], mapping: Mapping[str, str]) -> Mapping[str, Any]:
    """Give a prompt that stands alone an answer, without which no row of that form is read."""
    for names in ({"prompt": "prompt", "completion": "completion"}, ALPACA):
        prompt, answer = (mapping.get(name, names[name]) for name in ("prompt", "completion"))
        if prompt in values and not values.get(answer):
            return {**values, answer: NO_ANSWER}
    return values


def _as_object(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        found["tool_calls"] = [call.as_object() for call in message.tool_calls]
    for name in ("tools", "name", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            found[name] = value
    return found
