"""Lists of messages as data files have them -> turns: messages, and which of them are learned."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from phimlx.errors import TrainingError, shortened
from phimlx.prompt.messages import KEYS, Message, read_messages
from phimlx.prompt.reply_parser import END_THINK, THINK

# Other names for who speaks: ShareGPT's as LLaMA-Factory and axolotl know them, OpenAI's, Gemini's.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "developer": "system",
}
# ShareGPT's names for the keys of a message.
SHAREGPT = {"role": "from", "content": "value"}
# What a reply was thought out with: DeepSeek's name for it, OpenRouter's and Ollama's.
REASONING = ("reasoning_content", "reasoning", "thinking")

SHOWN = re.compile(r"(input_)?(image|audio|video)(_url)?")  # types of parts that are no text


class RowError(TrainingError):
    """A row that cannot be learned from; the message does not name it."""


class Turn(NamedTuple):
    """A message, and whether its own weight lets it be learned."""

    message: Message
    is_learned: bool = True


def is_filled(value: Any) -> bool:
    """Return whether a value says anything: not null, not NaN, no empty text, list or object."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and value == value and value not in ([], {})


def read_turns(
    listed: Sequence[Any],
    place: str,
    names: Mapping[str, str],
    *,
    thinks: bool = False,
    unused: set[str],
    show: Callable[[str, Any], Any] | None = None,
) -> list[Turn]:
    """Read a list of messages, each checked as those that the model is asked are.

    A message may have, beside what `phimlx.prompt.messages` reads, `weight`: 0 for what is not to
    be learned, 1 for what is, as in the files of OpenAI, Mistral and Together; and its reasoning,
    which comes before a reply between `<think>` and `</think>` where the model writes it so. Calls
    may be a message of the role `function_call`, or the key of that name. Other keys are left out.

    Args:
        place: name of the list, for messages of errors.
        names: what its messages call `role` and `content`; ShareGPT's names are known without.
        thinks: whether the model's replies begin with reasoning.
        unused: gets the names of what is left out and holds something.
        show: opens what a content shows and plays, given its message's name; None for a model that
            reads text alone.

    Raises:
        RowError, PromptError, MediaError: naming the message by its index.
    """
    plain, learned = [], []
    for index, given in enumerate(listed):
        weight = None
        if isinstance(given, Mapping):
            given = _renamed(given, names)
            weight = _weight(f"{place}[{index}]", given.pop("weight", None))
            _take_calls(f"{place}[{index}]", given)
            _take_reasoning(given, thinks)
            _leave_out(given, unused)
            content = given.get("content")
            if show is not None and content is not None:
                given["content"] = show(f"{place}[{index}]", content)
            elif _shows(content):
                raise RowError(
                    f"{place}[{index}] has a picture or a sound, and the model reads text alone.",
                    hint="Train nano-multimodal, which comes along, or phi-4-multimodal.",
                )
            if weight == 1 and given.get("role") != "assistant":
                unused.add("the key 'weight' of messages that are no replies")
        plain.append(given)
        learned.append(weight != 0)
    read = read_messages(plain)
    for index, message in enumerate(read):
        says = message.content.strip() or message.tool_calls
        if message.role == "assistant" and not says:
            raise RowError(f"{place}[{index}] is a reply without text and without calls.")
    return list(map(Turn, read, learned))


def _shows(content: Any) -> bool:
    """Whether the content of a message is parts of which some are no text."""
    parts = content if isinstance(content, list) else []
    types = [part.get("type") for part in parts if isinstance(part, Mapping)]
    return any(isinstance(each, str) and SHOWN.fullmatch(each) for each in types)


def _renamed(message: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a message under our own names of its keys."""
    renamed = dict(message)
    for name, other in SHAREGPT.items():
        key = next((key for key in (names[name], other) if key in renamed), name)
        if key != name:
            renamed[name] = renamed.pop(key)
    return renamed


def _weight(place: str, value: Any) -> int | None:
    if not is_filled(value):
        return None
    if value not in (0, 1):
        raise RowError(
            f"{place} has the weight {shortened(value)}; it must be 0 or 1.",
            hint="A reply of weight 0 is read, but not learned.",
        )
    return int(value)


def _take_calls(place: str, message: dict[str, Any]) -> None:
    """Put the calls of a message where our own form has them, and its role under our name."""
    role = message.get("role")
    calls = message.pop("function_call", None)
    if role == "function_call":
        calls, message["content"] = message.get("content"), ""
        if isinstance(calls, str):
            try:
                calls = json.loads(calls)
            except (ValueError, RecursionError) as error:
                raise RowError(f"{place} is a function_call, but no JSON.") from error
    if is_filled(calls):
        message["tool_calls"] = calls if isinstance(calls, list) else [calls]
    if isinstance(role, str):
        message["role"] = ROLES.get(role, role)


def _take_reasoning(message: dict[str, Any], thinks: bool) -> None:
    """Put the reasoning of a reply before its content, where the model has a place for it."""
    content = message.get("content") or ""
    for key in REASONING:
        reasoning = message.get(key)
        if not is_filled(reasoning):
            message.pop(key, None)
        elif (
            thinks
            and message.get("role") == "assistant"
            and isinstance(reasoning, str)
            and isinstance(content, str)
            and not content.lstrip().startswith(THINK)
        ):
            del message[key]
            content = f"{THINK}\n{reasoning.strip()}\n{END_THINK}\n\n{content.lstrip()}"
            message["content"] = content


def _leave_out(message: dict[str, Any], unused: set[str]) -> None:
    for key in [key for key in message if key not in KEYS]:
        if is_filled(message.pop(key)):
            unused.add(f"the key {shortened(key, 30)} of messages")
