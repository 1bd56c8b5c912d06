"""OpenAI's completions of text as it stands, without a prompt form: the older API.

Editors use it, and evaluation harnesses, which have the tokens of prompts scored.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Annotated, Any, ClassVar

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phimlx.api import Phi
from phimlx.generation.logprobs import MAX_TOP, TokenLogprob
from phimlx.generation.request import Request as Generated
from phimlx.server.errors import bad_request, explain
from phimlx.server.http import Json, Refusal, Streamed, event, read_body
from phimlx.server.logprobs import token_bytes
from phimlx.server.openai.bodies import OTHERS_FIELDS, SamplingBody, chosen
from phimlx.server.openai.shapes import error_object, usage
from phimlx.server.service import Answer, Ask, Service

MAX_CHOICES = 64  # of all prompts together

Prompts = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
Tokens = Annotated[list[int], Field(min_length=1)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=MAX_CHOICES)]


class CompletionBody(SamplingBody):
    """The body of a completion."""

    refused: ClassVar = {
        **OTHERS_FIELDS,
        "suffix": Refusal("these models do not fill in what stands between", ("",)),
        "prompt_embeds": Refusal("send the prompt as text or tokens"),
        "prompt_logprobs": Refusal("use echo and logprobs"),
    }

    prompt: str | Prompts | Tokens | TokenLists
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    echo: bool = False

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    def asks(self) -> list[Ask]:
        """Say it in no dialect, each prompt on its own. Raises RequestError."""
        if len(self.prompts) * self.n > MAX_CHOICES:
            raise bad_request(
                f"n: {len(self.prompts)} prompts have {self.n} completions each; at most "
                f"{MAX_CHOICES} are made together.",
                "n",
            )
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens: 0 leaves nothing to tell without echo.", "max_tokens")
        scores = self.echo and (self.logprobs is not None or self.max_tokens == 0)
        options = {
            **self.sampling(),
            **self.held_to(),
            "max_tokens": 16 if self.max_tokens is None else self.max_tokens,
            "logprobs": self.logprobs is not None,
            "top_logprobs": self.logprobs,
            "prompt_logprobs": (self.logprobs or 0) if scores else None,
            "raw": True,
            "plain": True,
        }
        return [Ask(self.model, each, chosen(options), self.n) for each in self.prompts]


class Scored:
    """Tokens with their log-probabilities in the older form, as they come.

    Args:
        phi: whose tokens they are.
        text: in which they stand; offsets count its characters.
    """

    def __init__(self, phi: Phi) -> None:
        self._phi = phi
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def add(
        self, tokens: Iterable[int], logprobs: Iterable[TokenLogprob | None]
    ) -> dict[str, list[Any]]:
        """Make the object of the next tokens; the first of a prompt has no log-probability."""
        found: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token, scored in zip(tokens, logprobs, strict=True):
            data = token_bytes(self._phi, token)
            found["tokens"].append(_name(data))
            found["text_offset"].append(self._length)
            found["token_logprobs"].append(None if scored is None else scored.logprob)
            found["top_logprobs"].append(None if scored is None else self._top(scored))
            self._length += len(self._decoder.decode(data))
        return found

    def _top(self, scored: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the token itself where it is none of them."""
        named: dict[str, float] = {}
        for token, logprob in (*scored.top, (scored.token, scored.logprob)):
            named.setdefault(_name(token_bytes(self._phi, token)), logprob)
        return named


def _name(data: bytes) -> str:
    """A token as text; where it is none, its bytes, for two of them must not read the same."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass(frozen=True)
class Completion:
    """What the chunks of one response have in common."""

    model: str
    id: str = field(default_factory=lambda: f"cmpl-{token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def object(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": "text_completion", "created": self.created}
        return {
            **head,
            "model": self.model,
            "system_fingerprint": "phimlx",
            "choices": choices,
            **more,
        }


class Choice:
    """One completion, told piece by piece.

    Args:
        given: the prompt, as it was sent.
    """

    def __init__(
        self, body: CompletionBody, phi: Phi, request: Generated, given: str | list[int], index: int
    ) -> None:
        self._body = body
        self._phi = phi
        self._request = request
        self._given = given
        self._index = index
        self._scored = Scored(phi)
        self._told = 0

    def begin(self) -> dict[str, Any] | None:
        """Make the echo of the prompt, all of which has been computed; None where none is asked."""
        if not self._body.echo:
            return None
        given, request = self._given, self._request
        text = given if isinstance(given, str) else self._decode(given)
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = self._scored.add(request.prompt, request.reply.prompt_logprobs)
        return self._object(text, logprobs)

    def piece(self, text: str, new: Iterable[TokenLogprob]) -> dict[str, Any]:
        """Make the next piece of the reply."""
        return self._object(text, self._score(list(new)))

    def end(self) -> dict[str, Any]:
        """Make the last piece: why the reply ended, and the token that ended it."""
        reply = self._request.reply
        logprobs = self._score(reply.logprobs[self._told : self._said])
        return self._object("", logprobs, reply.finish_reason)

    def whole(self) -> dict[str, Any]:
        """Make all of it at once."""
        reply = self._request.reply
        echo = self.begin()
        text = reply.text
        logprobs = self._score(reply.logprobs[: self._said])
        if echo is not None:
            text = echo["text"] + text
            if logprobs is not None:
                logprobs = {name: echo["logprobs"][name] + new for name, new in logprobs.items()}
        return self._object(text, logprobs, reply.finish_reason)

    @property
    def _said(self) -> int:
        """Tokens that are told: those of the text, and the one by which the model ended it."""
        reply = self._request.reply
        following = reply.tokens[reply.said : reply.said + 1]
        ended = (
            reply.stop_string is None and following and following[0] in self._request.stop_tokens
        )
        return reply.said + bool(ended)

    def _score(self, new: list[TokenLogprob]) -> dict[str, list[Any]] | None:
        if self._body.logprobs is None:
            return None
        self._told += len(new)
        return self._scored.add([each.token for each in new], new)

    def _decode(self, tokens: list[int]) -> str:
        return b"".join(token_bytes(self._phi, token) for token in tokens).decode(errors="replace")

    def _object(
        self, text: str, logprobs: dict[str, list[Any]] | None, reason: str | None = None
    ) -> dict[str, Any]:
        return {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
        }


async def completions(request: Request) -> Response:
    """`POST /v1/completions`."""
    service: Service = request.app.service
    body = await read_body(request, CompletionBody)
    asks = body.asks()
    count = min(len(asks) * body.n, service.settings.batch_size)
    async with AsyncExitStack() as stack:
        loaded = await stack.enter_async_context(service.hold(body.model, count))
        answer = await stack.enter_async_context(service.begin(loaded, *asks))
        completion = Completion(answer.model)
        choices = [
            Choice(body, answer.phi, each, body.prompts[index // body.n], index)
            for index, each in enumerate(answer.requests)
        ]
        if body.stream:
            return Streamed(_stream(completion, body, answer, choices), stack.pop_all())
        await answer.replies()
        whole = [choice.whole() for choice in choices]
        spent = usage(answer.requests, 0, len(asks))
        return Json(completion.object(whole, usage=spent))


async def _stream(
    completion: Completion, body: CompletionBody, answer: Answer, choices: list[Choice]
) -> AsyncIterator[bytes]:
    more = {"usage": None} if body.tells_usage else {}
    begun: set[int] = set()

    def begin(index: int) -> list[dict[str, Any]]:
        echo = None if index in begun else choices[index].begin()
        begun.add(index)
        return [] if echo is None else [echo]

    try:
        async for index, chunk in answer.steps():
            made = begin(index)
            if chunk is None:
                made.append(choices[index].end())
            elif chunk.text or chunk.logprobs:
                made.append(choices[index].piece(chunk.text, chunk.logprobs))
            for each in made:
                yield event(completion.object([each], **more))
        if body.tells_usage:
            spent = usage(answer.requests, 0, len(body.prompts))
            yield event(completion.object([], usage=spent))
    except Exception as error:
        yield event(error_object(explain(error)))
    yield event("[DONE]")


ROUTES = (Route("/v1/completions", completions, methods=["POST"]),)
