"""What responses of OpenAI's dialect are made of: errors, usage, calls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from secrets import token_hex
from typing import Any

from phimlx.generation.reply import Chunk
from phimlx.generation.request import Request
from phimlx.prompt.tools import ToolCall
from phimlx.server.errors import RequestError
from phimlx.server.http import dump

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    429: "rate_limit_error",
}
_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


def error_object(error: RequestError) -> dict[str, Any]:
    """Make the body of an error; places in a list are written as `messages[0]`."""
    kind = ERROR_TYPES.get(error.status)
    if kind is None:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
    message, param = error.message, error.param
    if param is not None:
        place = _INDEX.sub(r"[\1]", param)
        message, param = message.replace(param, place, 1), place
    return {"error": {"message": message, "type": kind, "param": param, "code": error.code}}


def call_object(call: ToolCall) -> dict[str, Any]:
    """Make a call of a tool, with an id of its own."""
    function = {"name": call.name, "arguments": dump(call.arguments)}
    return {"id": f"call_{token_hex(12)}", "type": "function", "function": function}


def usage(requests: Sequence[Request], thought: int, prompts: int = 1) -> dict[str, Any]:
    """Count tokens.

    Args:
        requests: as many of each prompt, those of one after those of another.
        thought: tokens of reasoning.
        prompts: how many there were.
    """
    stats = [request.reply.stats for request in requests]
    asked = stats[:: len(stats) // prompts]
    prompt = sum(each.prompt_tokens for each in asked)
    generated = sum(each.generated_tokens for each in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in asked)},
        "completion_tokens_details": {"reasoning_tokens": thought},
    }


class ThoughtCounter:
    """Counts the tokens of a reply before its answer, where these are reasoning."""

    def __init__(self) -> None:
        self._tokens = 0
        self._reasons = self._answers = False

    @property
    def tokens(self) -> int:
        return self._tokens if self._reasons else 0

    def add(self, chunk: Chunk) -> None:
        """Take the next chunk of the reply."""
        self._reasons |= chunk.kind == "reasoning" and bool(chunk.text)
        self._answers |= chunk.kind == "text" and bool(chunk.text or chunk.tool_calls)
        self._tokens += chunk.token is not None and not self._answers
