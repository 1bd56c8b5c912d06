"""A response as it comes to be, and the events that tell of it, in order."""

from __future__ import annotations

import time
from secrets import token_hex
from typing import Any

from phimlx.generation.logprobs import TokenLogprob
from phimlx.generation.reply import Chunk
from phimlx.prompt.tools import ToolCall
from phimlx.server.errors import RequestError
from phimlx.server.logprobs import token_objects
from phimlx.server.openai.response_body import ResponseBody
from phimlx.server.openai.shapes import ThoughtCounter, call_object
from phimlx.server.service import Answer

Event = dict[str, Any]


class Written:
    """A response under way.

    Attributes:
        id: of the response.
        output: its items so far.
    """

    def __init__(self, body: ResponseBody, answer: Answer) -> None:
        self.id = f"resp_{token_hex(16)}"
        self.output: list[dict[str, Any]] = []
        self._body = body
        self._phi = answer.phi
        self._model = answer.model
        self._request = answer.requests[0]
        self._created = int(time.time())
        self._number = 0
        self._status = "in_progress"
        self._error: dict[str, Any] | None = None
        self._thought = ThoughtCounter()
        self._scored: list[TokenLogprob] = []  # tokens whose text has not come yet
        self._calls = 0

    def response(self) -> dict[str, Any]:
        """The response so far, whole where the reply is."""
        body, sampling = self._body, self._request.sampler.sampling
        cut = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        done = self._status != "in_progress"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "status": self._status,
            "background": False,
            "error": self._error,
            "incomplete_details": cut,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "model": self._model,
            "output": [dict(item) for item in self.output],
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": body.reasoning.effort, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": body.store,
            "temperature": sampling.temperature,
            "text": {"format": _dumped(body.text.format), "verbosity": "medium"},
            "tool_choice": (
                body.tool_choice if isinstance(body.tool_choice, str) else _dumped(body.tool_choice)
            ),
            "tools": [_dumped(tool) for tool in body.tools],
            "top_logprobs": body.top_logprobs,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": self._usage() if done else None,
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def begin(self) -> list[Event]:
        """Make the events before any item."""
        return [
            self._event("response.created", response=self.response()),
            self._event("response.in_progress", response=self.response()),
        ]

    def add(self, chunk: Chunk) -> list[Event]:
        """Take a chunk of the reply; make its events."""
        self._thought.add(chunk)
        self._scored += chunk.logprobs
        made = []
        if chunk.text:
            kind = "reasoning" if chunk.kind == "reasoning" else "message"
            made = self._say(kind, chunk)
        for call in chunk.tool_calls:
            self._calls += 1
            if self._calls == 1 or self._body.parallel_tool_calls:
                made += self._call(call)
        return made

    def end(self) -> list[Event]:
        """Make the events after the last chunk."""
        cut = self._request.reply.finish_reason == "length"
        self._status = "incomplete" if cut else "completed"
        made = [] if self.output else self._open("message")
        made += self._close(self._status)
        return [*made, self._event(f"response.{self._status}", response=self.response())]

    def fail(self, error: RequestError) -> list[Event]:
        """Make the event of a response that cannot go on."""
        self._status = "failed"
        code = error.code or ("server_error" if error.status >= 500 else "invalid_prompt")
        self._error = {"code": code, "message": error.message}
        return [self._event("response.failed", response=self.response())]

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _item_event(self, kind: str, **fields: Any) -> Event:
        """Make an event of the last item."""
        place = {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}
        return self._event(kind, **place, **fields)

    def _whole_item(self, kind: str) -> Event:
        index, item = len(self.output) - 1, dict(self.output[-1])
        return self._event(kind, output_index=index, item=item)

    def _say(self, kind: str, chunk: Chunk) -> list[Event]:
        made = []
        if not self.output or self.output[-1]["type"] != kind:
            if self.output and self.output[-1]["type"] == "reasoning":
                self._scored = list(chunk.logprobs)  # those before end the reasoning
            made = [*self._close("completed"), *self._open(kind)]
        part = self.output[-1]["content"][0]
        part["text"] += chunk.text
        told: dict[str, Any] = {}
        if kind == "message":
            scored = token_objects(self._phi, self._scored)
            part["logprobs"] += scored
            told["logprobs"] = scored
        self._scored = []
        name = DELTAS[kind]
        made.append(self._item_event(f"{name}.delta", content_index=0, delta=chunk.text, **told))
        return made

    def _open(self, kind: str) -> list[Event]:
        """Begin an item that holds text."""
        item, part = _empty(kind)
        self.output.append(item)
        made = [self._whole_item("response.output_item.added")]
        item["content"] = [part]
        shown = dict(part)
        made.append(self._item_event("response.content_part.added", content_index=0, part=shown))
        return made

    def _close(self, status: str) -> list[Event]:
        """End the last item, where it holds text and has not ended."""
        if not self.output or self.output[-1]["status"] != "in_progress":
            return []
        item = self.output[-1]
        item["status"] = status
        part = dict(item["content"][0])
        told = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
        name = DELTAS[item["type"]]
        return [
            self._item_event(f"{name}.done", content_index=0, text=part["text"], **told),
            self._item_event("response.content_part.done", content_index=0, part=part),
            self._whole_item("response.output_item.done"),
        ]

    def _call(self, call: ToolCall) -> list[Event]:
        made = self._close("completed")
        called = call_object(call)
        arguments = called["function"]["arguments"]
        item = {
            "id": f"fc_{token_hex(16)}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": called["id"],
            "name": call.name,
            "arguments": "",
            **self._body.namespace(call.name),
        }
        self.output.append(item)
        made.append(self._whole_item("response.output_item.added"))
        item |= {"arguments": arguments, "status": "completed"}
        name = "response.function_call_arguments"
        return [
            *made,
            self._item_event(f"{name}.delta", delta=arguments),
            self._item_event(f"{name}.done", name=call.name, arguments=arguments),
            self._whole_item("response.output_item.done"),
        ]

    def _usage(self) -> dict[str, Any]:
        stats = self._request.reply.stats
        return {
            "input_tokens": stats.prompt_tokens,
            "input_tokens_details": {"cached_tokens": stats.cached_tokens},
            "output_tokens": stats.generated_tokens,
            "output_tokens_details": {"reasoning_tokens": self._thought.tokens},
            "total_tokens": stats.prompt_tokens + stats.generated_tokens,
        }


DELTAS = {"message": "response.output_text", "reasoning": "response.reasoning_text"}


def _empty(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make an item without content, and its empty content."""
    begun = {"type": kind, "status": "in_progress", "content": []}
    if kind == "reasoning":
        item = {"id": f"rs_{token_hex(16)}", "summary": [], "encrypted_content": None, **begun}
        return item, {"type": "reasoning_text", "text": ""}
    item = {"id": f"msg_{token_hex(16)}", "role": "assistant", **begun}
    return item, {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _dumped(value: Any) -> dict[str, Any]:
    """Write a part of a body as it was sent."""
    found: dict[str, Any] = value.model_dump(by_alias=True, exclude_none=True)
    return found
