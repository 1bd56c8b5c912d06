"""Bodies of requests, read once, and responses that come piece by piece."""

from __future__ import annotations

import asyncio
import json
import string
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from phimlx.files import json_levels
from phimlx.server.errors import CLOSE, RequestError, bad_request, json_type_error
from phimlx.sizes import size_text

PING_SECONDS = 10.0
MAX_MESSAGES = 4096  # of a conversation: an agent adds one for each call and each result
DEEPEST = 100  # levels of a body's JSON
MAX_TEXT = 8_000_000  # bytes of a body's JSON without the media in it
MAX_FIELDS = 1000  # of an object that a body is made of
MAX_STOPS = 64
BASE64 = f"{string.ascii_letters}{string.digits}+/=".encode()  # letters that media are written in
MEDIA_KEYS = frozenset({"url", "image_url", "data", "images"})  # that hold media, in any dialect


@dataclass(frozen=True)
class Refusal:
    """Why a field that clients know cannot be honoured.

    Attributes:
        reason: completes "NAME: …".
        harmless: values that ask for nothing.
    """

    reason: str
    harmless: tuple[Any, ...] = ()

    def allows(self, value: Any) -> bool:
        return any(type(value) is type(each) and value == each for each in self.harmless)


class Body(BaseModel):
    """The body of a request, or an object in it, whose values keep their JSON types.

    Null is the same as absent.

    Attributes:
        refused: fields that are none of the model's, and why.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    refused: ClassVar[Mapping[str, Refusal]] = {}

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:
            raise ValueError(f"there are more than {MAX_FIELDS} fields")
        given = without_nulls(value)
        for name, refusal in cls.refused.items():
            if name in given and not refusal.allows(given.pop(name)):
                raise bad_request(f"{name}: {refusal.reason}.", name, "unsupported_parameter")
        return given


StopString = Annotated[str, Field(max_length=1024)]
AnyBody = TypeVar("AnyBody", bound=Body)


async def read_body(request: Request, kind: type[AnyBody]) -> AnyBody:
    """Read and check a JSON body.

    Raises:
        RequestError: naming the field that is wrong.
    """
    raw = await request.body()
    # What is no media is counted before it is read: objects take some hundred times their letters.
    if len(raw) > MAX_TEXT and len(raw.translate(None, BASE64)) > MAX_TEXT:
        raise _too_long()
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise bad_request("The body is not JSON.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("The body is not a JSON object.", code="invalid_json")
    if sum(1 for _ in islice(json_levels(value), DEEPEST)) == DEEPEST:
        raise bad_request(f"The body is nested more than {DEEPEST} deep.", code="invalid_json")
    if len(raw) > MAX_TEXT and len(raw) - _media_size(value) > MAX_TEXT:
        raise _too_long()
    return validate(kind, value)


def validate(kind: type[AnyBody], value: Any) -> AnyBody:
    """Check what has been read. Raises RequestError, naming the field that is wrong."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise json_type_error(error.errors(include_url=False), value) from None


def without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """Leave out fields that are null, which many clients send for what they do not set."""
    return {name: each for name, each in value.items() if each is not None}


def _too_long() -> RequestError:
    message = f"The body without its media is larger than {size_text(MAX_TEXT)}."
    return RequestError(413, message, code="too_large", headers=CLOSE)


def _media_size(value: Any) -> int:
    """Count the characters of strings that are media."""
    size, open_values = 0, [("", value)]
    while open_values:
        key, each = open_values.pop()
        if isinstance(each, dict):
            open_values += each.items()
        elif isinstance(each, list):
            open_values += [(key, item) for item in each]
        elif isinstance(each, str) and key in MEDIA_KEYS:
            size += len(each)
    return size


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class Json(JSONResponse):
    """A response of JSON, whatever a client's words in it are."""

    def render(self, content: Any) -> bytes:
        return dump(content).encode()


def event(data: Any, name: str | None = None) -> bytes:
    """Write a server-sent event."""
    text = data if isinstance(data, str) else dump(data)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


def dump(value: Any) -> str:
    """Write JSON on one line; what is half a character is written as an escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()


class Streamed(Response):
    """A response that comes piece by piece, and holds something until it has ended.

    Args:
        pieces: of the body.
        held: closed when the response has been sent, or its client has gone.
        ping: what is sent where nothing comes for a while.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        held: AsyncExitStack,
        ping: bytes | None = b": ping\n\n",
        media_type: str | None = None,
    ) -> None:
        super().__init__(
            media_type=media_type,
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        del self.headers["content-length"]
        self._pieces = pieces
        self._held = held
        self._ping = ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        turn = asyncio.Lock()
        loop = asyncio.get_running_loop()
        sent = loop.time()

        async def put(piece: bytes, more: bool = True) -> None:
            nonlocal sent
            async with turn:
                await send({"type": "http.response.body", "body": piece, "more_body": more})
                sent = loop.time()

        async def ping(piece: bytes) -> None:
            while True:
                await asyncio.sleep(sent + PING_SECONDS - loop.time())
                if loop.time() >= sent + PING_SECONDS:
                    await put(piece)

        async with self._held, aclosing(self._pieces) as pieces:  # type: ignore[type-var]
            headers = self.raw_headers
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            pinging = None if self._ping is None else asyncio.ensure_future(ping(self._ping))
            try:
                async for piece in pieces:
                    await put(piece)
            finally:
                if pinging is not None:
                    pinging.cancel()
            await put(b"", more=False)
