"""A row -> what is to be learned from it: a conversation, a text, or replies that were judged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from phimlx.errors import MediaError, PromptError, TrainingError, shortened
from phimlx.prompt.messages import Message
from phimlx.training.data.row_messages import RowError, Turn, is_filled, read_turns
from phimlx.training.methods import RowForm

if TYPE_CHECKING:
    from phimlx.training.data.row_media import RowMedia

# What a row's keys may be called otherwise; `role` and `content` are those of its messages.
FIELDS = (
    "messages",
    "tools",
    "system",
    "prompt",
    "input",
    "completion",
    "text",
    "chosen",
    "rejected",
    "label",
    "role",
    "content",
    "image",
    "audio",
    "video",
)
# Stanford Alpaca's names.
# Source: https://github.com/tatsu-lab/stanford_alpaca#data-release
ALPACA = {"prompt": "instruction", "input": "input", "completion": "output"}
SHAREGPT = {"messages": "conversations"}

KNOWN = (
    "A row has messages, prompt and completion, instruction and output, or text; other names need "
    "a mapping, such as prompt=question."
)
KNOWN_PAIR = (
    "A row has prompt, chosen and rejected; other names need a mapping, such as chosen=better."
)
KNOWN_ANSWER = (
    "A row has prompt, completion and label, or prompt, chosen and rejected; other names need a "
    "mapping, such as label=good."
)
KNOWN_PROMPT = (
    "A row has prompt, or messages, and whatever its answer is judged by; other names need a "
    "mapping, such as prompt=question."
)
# What a label may be, in files that know no other values too.
LABELS = {"true": True, "false": False, "1": True, "0": False}


# A row's fault, whether this module finds it or reading messages and templates does.
ROW_FAULTS = (RowError, PromptError, MediaError)


@dataclass(frozen=True)
class Conversation:
    """Messages, and the functions that the model is offered in them.

    `given`: how many of the messages are never to be learned, whoever speaks. `unlearned`: those
    that are not, by their index, for their own weight is 0.
    """

    messages: list[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    given: int = 0
    unlearned: frozenset[int] = frozenset()

    def excerpt(self, head: int, start: int, stop: int) -> Conversation:
        """Return the first `head` messages, and then those from `start` to before `stop`."""
        places = [*range(head), *range(start, stop)]
        return Conversation(
            [self.messages[place] for place in places],
            self.tools,
            sum(place < self.given for place in places),
            frozenset(i for i, place in enumerate(places) if place in self.unlearned),
        )


@dataclass(frozen=True)
class PlainText:
    """Text without turns, in which control tokens are recognised."""

    text: str


@dataclass(frozen=True)
class PreferencePair:
    """Two conversations with the same beginning, of which the first ends better."""

    chosen: Conversation
    rejected: Conversation


@dataclass(frozen=True)
class JudgedAnswer:
    """A conversation whose last reply is one to give, or one not to give."""

    said: Conversation
    desirable: bool


@dataclass(frozen=True)
class OpenPrompt:
    """A conversation that waits for its answer, and the answer that the row has, if any."""

    said: Conversation
    prompt: Any
    expected: str | None


RowContent = Conversation | PlainText | PreferencePair | JudgedAnswer | OpenPrompt


def check_mapping(mapping: Mapping[str, str]) -> None:
    """Raise TrainingError where a mapping names what no row has."""
    for name in mapping:
        if name not in FIELDS:
            raise TrainingError(
                f"The mapping names {shortened(name)}, which is nothing that a row has.",
                hint=f"What can be mapped: {', '.join(FIELDS)}.",
            )


class ReadRow(NamedTuple):
    """What a row says, and the names of what it holds besides, which nothing is made of."""

    content: RowContent
    unused: frozenset[str]


def read_content(
    values: Mapping[str, Any],
    mapping: Mapping[str, str],
    form: RowForm = "examples",
    *,
    thinks: bool = False,
    media: RowMedia | None = None,
    question: str | None = None,
) -> ReadRow:
    """Read what a row says.

    Its keys tell what it is: `messages` (or `conversations`), else `prompt` and `completion`, else
    Alpaca's `instruction` and `output`, else `text`. Of the form "pairs" it has `chosen` and
    `rejected`; of the form "answers" `label` beside an answer, or a pair, which is two answers; of
    the form "prompts" a prompt, or messages whose last reply is only compared with. A mapping
    tells it where it names one of these. `messages` and `tools` may be the JSON text of a
    list, as they have to in CSV. A prompt or an answer is a text, which is one message, or a list
    of messages; `system` is a text that comes before all of them. Alpaca's `input`, or what a
    mapping calls so, follows the prompt after an empty line.

    Args:
        mapping: the row's own key by the name in `FIELDS`.
        thinks: whether the model's replies begin with reasoning.
        media: opens what the row shows and plays; None for a model that reads text alone.
        question: what the user asks in a row with an answer and no prompt; None for nothing.

    Raises:
        RowError, PromptError, MediaError: with the reason.
    """
    unused: set[str] = set()
    values = _asked(values, mapping, question)
    row, read = _reader(values, mapping, form)
    fields = _Fields(values, row, thinks, unused, media)
    content = read(fields)
    if media is not None and media.left:
        raise RowError(
            f"It has {media.left} that no message has a place for.",
            hint="A row of a text alone has none: name the text as the answer, and the question: "
            "--mapping completion=text --prompt TEXT.",
        )
    shown = media.used if media is not None else set()
    unused.update(
        f"the column {shortened(key, 30)}"
        for key, value in values.items()
        if key not in fields.used | shown and is_filled(value)
    )
    return ReadRow(content, frozenset(unused))


def _asked(
    values: Mapping[str, Any], mapping: Mapping[str, str], question: str | None
) -> Mapping[str, Any]:
    """Put the question into a row that has an answer, and neither a prompt nor messages."""
    names = {name: mapping.get(name, name) for name in ("prompt", "messages", "completion")}
    if question is None or any(names[name] in values for name in ("prompt", "messages")):
        return values
    return {**values, names["prompt"]: question} if names["completion"] in values else values


def _reader(
    values: Mapping[str, Any], mapping: Mapping[str, str], form: RowForm
) -> tuple[Mapping[str, str], Callable[[_Fields], RowContent]]:
    """Choose what reads a row, and the names that it reads.

    A kind of row that the row is comes first; of several one that the mapping speaks of.
    """
    readers, known = _READERS[form]
    forms = [(needed, others | dict(mapping), read) for needed, others, read in readers]
    named = [form for form in forms if any(name in mapping for name in form[0])]
    for needed, names, read in [*named, *forms]:
        if all(names.get(name, name) in values for name in needed):
            return names, read
    if named:
        return mapping, named[0][2]  # which says what is missing
    pair = all(mapping.get(name, name) in values for name in ("chosen", "rejected"))
    if pair and form == "examples":
        raise RowError(
            "This is a better and a worse answer, which only training by preference takes.",
            hint="Train with --dpo, or name the answer: completion=chosen.",
        )
    raise _unknown(values, known)


def _unknown(values: Mapping[str, Any], known: str) -> RowError:
    return RowError(f"It has {_keys(values)}, from which nothing can be learned.", hint=known)


def _keys(values: Mapping[str, Any]) -> str:
    """A row's own keys, as they may stand in a message."""
    return ", ".join(shortened(key, 30) for key in list(values)[:8]) or "no keys at all"


@dataclass(frozen=True)
class _Fields:
    """A row's values under the names in `FIELDS`; `used`: the keys that have been asked for."""

    values: Mapping[str, Any]
    mapping: Mapping[str, str]
    thinks: bool
    unused: set[str]
    media: RowMedia | None = None
    used: set[str] = field(default_factory=set)
    names: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        names = {name: name for name in FIELDS} | dict(self.mapping)
        object.__setattr__(self, "names", names)

    def has(self, name: str) -> bool:
        return self.names[name] in self.values

    def get(self, name: str) -> Any:
        """The value, or None where it is absent."""
        self.used.add(self.names[name])
        return self.values.get(self.names[name])

    def need(self, name: str) -> Any:
        key = self.names[name]
        if key not in self.values:
            raise RowError(f"It has no {shortened(key)}, but {_keys(self.values)}.", hint=KNOWN)
        return self.get(name)

    def text(self, name: str) -> str:
        """A value that has to be text, and not an empty one."""
        value, key = self.need(name), self.names[name]
        if not isinstance(value, str):
            raise RowError(f"{key!r} is {shortened(value)}, not text.")
        if not value.strip():
            raise RowError(f"{shortened(key)} is empty.")
        return value

    def listed(self, name: str) -> list[Any] | None:
        """A value that has to be a list, or JSON text of one; None where it is absent or empty."""
        value, key = self.get(name), self.names[name]
        if value is None or value == "":
            return None
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise RowError(f"{shortened(key)} is text, but no JSON list.") from error
            if value is None:
                return None
        if not isinstance(value, list):
            raise RowError(f"{key!r} is {shortened(value)}, not a list.")
        return value

    def turns(self, name: str, role: str) -> list[Turn]:
        """Messages, given as a list of them or as the text of one."""
        value = self.need(name)
        if isinstance(value, list):
            if value and all(map(_is_part, value)):
                value = [{"role": role, "content": value}]  # the parts of one message
            return self.listed_turns(name, value)
        return self.said(name, role, self.text(name))

    def said(self, name: str, role: str, text: str) -> list[Turn]:
        """One message, whose places for pictures and sounds are filled where the user says it."""
        if self.media is not None and role == "user":
            return self.listed_turns(name, [{"role": role, "content": text}])
        return [Turn(Message(role, text))]

    def listed_turns(self, name: str, listed: list[Any]) -> list[Turn]:
        """The messages in a list."""
        key = self.names[name]
        show = None if self.media is None else self.media.content
        return read_turns(
            listed, key, self.names, thinks=self.thinks, unused=self.unused, show=show
        )

    def shown(self, turns: Sequence[Turn]) -> list[Turn]:
        """Put in what the row's columns show and play, where no place is for it."""
        return list(turns) if self.media is None else self.media.attached(turns)


def _is_part(value: Any) -> bool:
    """Whether a value is a part of a message's content rather than a message."""
    return isinstance(value, Mapping) and "type" in value and "role" not in value


def _conversation(
    turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] | None, given: int = 0
) -> Conversation:
    unlearned = frozenset(i for i, turn in enumerate(turns) if not turn.is_learned)
    return Conversation([turn.message for turn in turns], tools, given, unlearned)


def _messages(row: _Fields) -> Conversation:
    row.need("messages")
    listed = row.listed("messages")
    if listed is None:
        raise RowError(f"{shortened(row.names['messages'])} is empty.")
    turns = row.listed_turns("messages", listed)
    if row.get("system"):
        if turns[0].message.role == "system":
            raise RowError(
                f"It has a system message in its messages and {shortened(row.names['system'])}."
            )
        turns.insert(0, Turn(Message("system", row.text("system"))))
    return _conversation(row.shown(turns), row.listed("tools"))


def _answer(row: _Fields) -> Conversation:
    asked = _question(row)
    said = [*asked, *row.turns("completion", "assistant")]
    return _conversation(said, row.listed("tools"), len(asked))


def _question(row: _Fields) -> list[Turn]:
    system = [Turn(Message("system", row.text("system")))] if row.get("system") else []
    if "input" not in row.mapping or not is_filled(row.get("input")):
        asked = row.turns("prompt", "user")
    elif isinstance(row.need("prompt"), list):
        raise RowError(
            f"{shortened(row.names['prompt'])} is a list of messages, which "
            f"{shortened(row.names['input'])} cannot be added to."
        )
    else:
        asked = row.said("prompt", "user", f"{row.text('prompt')}\n\n{row.text('input')}")
    return row.shown([*system, *asked])


def _text(row: _Fields) -> PlainText:
    return PlainText(row.text("text"))


def _pair(row: _Fields) -> PreferencePair:
    """Answers that are lists may hold the prompt as well, or be all that there is."""
    asked = _question(row) if row.has("prompt") else []
    tools = row.listed("tools")
    whole = []
    for name in ("chosen", "rejected"):
        if not asked and row.media is not None:
            row.media.begin_again()
        said = row.turns(name, "assistant")
        if not asked:
            said = row.shown(said)
        messages = [turn.message for turn in said]
        if messages[0].role == "assistant":
            said = [*asked, *said]
        elif any(turn.message not in messages for turn in asked):
            raise RowError(f"The prompt is no part of {shortened(row.names[name])}.")
        whole.append(_conversation(said, tools))
    chosen, rejected = whole
    if chosen.messages == rejected.messages:
        raise RowError("The chosen and the rejected answer are the same.")
    pairs = zip(chosen.messages, rejected.messages, strict=False)
    shared = next(
        (i for i, (one, other) in enumerate(pairs) if one != other),
        min(len(chosen.messages), len(rejected.messages)),
    )
    if not shared:
        raise RowError(
            "The chosen and the rejected answer belong to no common prompt.", hint=KNOWN_PAIR
        )
    return PreferencePair(replace(chosen, given=shared), replace(rejected, given=shared))


def _judged(row: _Fields) -> JudgedAnswer:
    label = row.need("label")
    found = LABELS.get(label.strip().lower()) if isinstance(label, str) else label
    if found not in (0, 1):
        raise RowError(
            f"{shortened(row.names['label'])} is {shortened(label)}; it must be true or false.",
            hint="True stands by an answer to give, false by one not to give.",
        )
    said = _messages(row) if row.has("messages") else _answer(row)
    if said.messages[-1].role != "assistant":
        raise RowError("Its last message is no reply, which the label could be about.")
    return JudgedAnswer(replace(said, given=max(said.given, _last_question(said))), bool(found))


def _last_question(said: Conversation) -> int:
    """Count the messages up to the last one of the user."""
    asked = (i for i, message in enumerate(said.messages, 1) if message.role == "user")
    return max(asked, default=0)


def _open(row: _Fields) -> OpenPrompt:
    """Whatever else a row holds is there for rewards."""
    row.used.update(row.values)
    expected = None
    if row.has("messages"):
        said = _messages(row)
        asked = said.messages
        if asked[-1].role == "assistant":
            expected = asked[-1].content
            said = said.excerpt(0, 0, len(asked) - 1)
        listed = row.listed("messages") or []
        prompt: Any = listed[: len(listed) - (expected is not None)]
    else:
        said = _conversation(_question(row), row.listed("tools"))
        prompt = row.need("prompt")
        if row.has("completion"):
            answer = row.need("completion")
            if isinstance(answer, int | float) and not isinstance(answer, bool):
                answer = f"{answer}"  # of a sum, as data sets have it
            elif isinstance(answer, list):
                answer = row.turns("completion", "assistant")[-1].message.content
            expected = answer if isinstance(answer, str) else row.text("completion")
    if not said.messages or said.messages[-1].role == "assistant":
        raise RowError("It asks nothing that could be answered.")
    return OpenPrompt(said, prompt, expected)


# Of each kind of row the names that it must have, what it calls them, and what reads it.
_Kind = tuple[tuple[str, ...], dict[str, str], Callable[[_Fields], RowContent]]
_PAIRS: tuple[_Kind, ...] = (
    (("prompt", "chosen", "rejected"), {}, _pair),
    (("prompt", "chosen", "rejected"), ALPACA, _pair),
    (("chosen", "rejected"), {}, _pair),
)
_EXAMPLES: tuple[_Kind, ...] = (
    (("messages",), {}, _messages),
    (("prompt", "completion"), {}, _answer),
    (("prompt", "completion"), ALPACA, _answer),
    (("text",), {}, _text),
    (("messages",), SHAREGPT, _messages),
)
_ANSWERS: tuple[_Kind, ...] = (
    *(
        ((*needed, "label"), others, _judged)
        for needed, others, read in _EXAMPLES
        if read is not _text
    ),
    *_PAIRS,
)
_PROMPTS: tuple[_Kind, ...] = (
    (("messages",), {}, _open),
    (("prompt",), {}, _open),
    (("prompt",), ALPACA, _open),
    (("messages",), SHAREGPT, _open),
)
_READERS: dict[RowForm, tuple[tuple[_Kind, ...], str]] = {
    "examples": (_EXAMPLES, KNOWN),
    "pairs": (_PAIRS, KNOWN_PAIR),
    "answers": (_ANSWERS, KNOWN_ANSWER),
    "prompts": (_PROMPTS, KNOWN_PROMPT),
}
"""Kinds of rows, and the hint where a row is none of them."""
