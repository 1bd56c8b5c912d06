"""Prompts and options of `Phi.stream` as the body of a chat completion."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from phimlx.errors import GenerationError
from phimlx.media.limits import Limits
from phimlx.prompt.media_parts import FRAMES, attach, source_list
from phimlx.prompt.reasoning import AUTO
from phimlx.prompt.tools import read_calls, read_tools
from phimlx.remote.media import media_part

FIELDS = {
    **{name: name for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed")},
    **{name: name for name in ("presence_penalty", "frequency_penalty", "repetition_penalty")},
    **{name: name for name in ("logit_bias", "stop")},
    "regex": "guided_regex",
    "grammar": "guided_grammar",
}
"""Options that a field of the body says."""

OWN = {
    *("images", "audio", "video", "frames", "limits"),
    *("tools", "tool_choice", "schema", "continue_final_message", "reasoning"),
}
"""Options that take more than a field."""

REASONING = {AUTO: {}, "on": {"reasoning_effort": "medium"}, "off": {"reasoning_effort": "none"}}
"""Modes of reasoning, as a field says them."""

LEFT = {"cache", "on_prefill", "prompt_lookup"}
"""Options that change nothing of a reply, and are the server's own business."""

MOST = {"temperature": 2.0, "repetition_penalty": 10.0}
"""Where the ranges of a server's fields end before those of the options do."""


def chat_body(model: str, prompt: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Make the body; pictures and sounds are read here, and go along in it.

    Args:
        prompt: a text, or messages.
        options: of `Phi.stream`; those that are None are left out.

    Raises:
        GenerationError: for an option that no server honours, or a prompt of token ids.
        MediaError: for a picture, sound or video that cannot be read.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if local := sorted(
        name for name in given if name not in {*FIELDS, *OWN, *LEFT} and given[name]
    ):
        raise GenerationError(f"A server does not take {', '.join(local)}.")
    body = {FIELDS[name]: value for name, value in given.items() if name in FIELDS}
    continues = bool(given.get("continue_final_message"))  # else the server looks who said it
    body |= {"model": model, "messages": _messages(prompt, given)}
    body |= {"continue_final_message": continues, **REASONING[given.get("reasoning", AUTO)]}
    if given.get("tools"):
        tools = read_tools(given["tools"])
        body["tools"] = [{"type": "function", "function": tool} for tool in tools]
        if "tool_choice" in given:
            body["tool_choice"] = _choice(given["tool_choice"])
    if "schema" in given:
        form = {"name": "answer", "schema": given["schema"]}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    return body


def _choice(choice: str) -> Any:
    if choice in ("auto", "none", "required"):
        return choice
    return {"type": "function", "function": {"name": choice}}


def _messages(prompt: Any, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    limits = options.get("limits") or Limits()
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not all(isinstance(message, Mapping) for message in messages):
        raise GenerationError("A server takes a text or messages, not token ids.")
    images = source_list("images", options.get("images"))
    for source in source_list("video", options.get("video")):
        from phimlx.media.video import read_video

        found = read_video(source, options.get("frames", FRAMES), limits)
        images += [frame.image for frame in found]
    placed = attach(messages, images, source_list("audio", options.get("audio")))
    waiting: deque[str] = deque()
    return [_message(index, each, waiting, limits) for index, each in enumerate(placed)]


def _message(
    index: int, message: Mapping[str, Any], waiting: deque[str], limits: Limits
) -> dict[str, Any]:
    """Write one message; calls get ids, which results that follow name in their order.

    Args:
        waiting: ids of calls without a result so far.
    """
    made = {"role": message["role"], "content": _content(message.get("content"), limits)}
    if calls := message.get("tool_calls"):
        waiting.clear()
        made["tool_calls"] = []
        for number, call in enumerate(read_calls(list(calls))):
            waiting.append(f"call_{index}_{number}")
            function = {"name": call.name, "arguments": json.dumps(call.arguments)}
            made["tool_calls"].append({"id": waiting[-1], "type": "function", "function": function})
    if message["role"] == "tool":
        made["tool_call_id"] = waiting.popleft() if waiting else ""
    return made


def _content(content: Any, limits: Limits) -> Any:
    if not isinstance(content, Sequence) or isinstance(content, str):
        return content
    return [part if part["type"] == "text" else media_part(part, limits) for part in content]
