"""What goes wrong with a request, in terms that every dialect can put into its own shape."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException

from phimlx.errors import (
    CacheError,
    CheckpointError,
    ConfigError,
    ContextLengthError,
    DownloadError,
    GenerationError,
    MachineLostError,
    MediaError,
    ModelNotFoundError,
    PhimlxError,
    PromptError,
    ResourceError,
    SettingsError,
    TokenizerError,
    clipped,
    shortage,
)

CLOSE = {"connection": "close"}  # for what is left of a body is nobody's
LOCAL = ("--max-", "name its path", "Name a file")  # in hints for who sits at this machine
LONGEST = 200  # characters of a place in a body, which a client names


@dataclass(eq=False)
class RequestError(Exception):
    """A request that is refused, or that failed.

    Attributes:
        status: of HTTP.
        message: a sentence for a person.
        param: the field of the body that is wrong; None where it is none.
        code: a word for programs.
        headers: more headers of the response.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def bad_request(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """Make the error of a body that is wrong."""
    return RequestError(400, message, param, code)


def shutting_down() -> RequestError:
    """Make the error of a server that stops."""
    return RequestError(503, "The server is about to stop.", code="shutting_down")


def overloaded(message: str, seconds: int) -> RequestError:
    """Make the error of a server that has too much to do."""
    return RequestError(
        429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)}
    )


STATUSES: tuple[tuple[type[PhimlxError], int, str | None], ...] = (
    (ModelNotFoundError, 404, "model_not_found"),
    (ContextLengthError, 400, "context_length_exceeded"),
    (PromptError, 400, None),
    (GenerationError, 400, None),
    (MediaError, 400, None),
    (SettingsError, 400, None),
    (TokenizerError, 400, None),
    (ResourceError, 503, "out_of_memory"),
    (MachineLostError, 503, "machine_lost"),
    (ConfigError, 500, "model_unusable"),
    (CheckpointError, 500, "model_unusable"),
    (CacheError, 500, None),
    (DownloadError, 502, None),
)
"""What errors of our own mean to a client, the first that fits."""


def explain(error: BaseException) -> RequestError:
    """Say what an error means to a client; nothing of what is inside, where nobody expected it."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        message = f"{error.detail.rstrip('.')}."
        if error.status_code == 405:
            allowed = ", ".join(sorted(headers.get("Allow", "").split(", ")))
            message = f"Only {allowed} requests are answered here."
        return RequestError(error.status_code, message, headers=headers)
    known = error if isinstance(error, PhimlxError) else shortage(error)
    for kind, status, code in STATUSES:
        if isinstance(known, kind):
            hint = f" {known.hint}" if known.hint and status < 500 else ""
            if any(words in hint for words in LOCAL):
                hint = ""
            headers = {"Retry-After": "30"} if status == 503 else {}
            return RequestError(status, f"{known}{hint}", code=code, headers=headers)
    return RequestError(
        500, f"Something went wrong here (error {secrets.token_hex(4)}).", code="internal_error"
    )


def json_type_error(errors: Sequence[Mapping[str, Any]], value: Any) -> RequestError:
    """Say in a sentence what the first error of a pydantic model is about.

    Args:
        errors: as `ValidationError.errors` lists them.
        value: what was read.
    """
    first = errors[0]
    place = ".".join(_place(first["loc"], value, first["type"] == "missing"))[:LONGEST]
    if first["type"] == "extra_forbidden":
        return bad_request(f"There is no field {place}.", place, "unknown_parameter")
    if first["type"] == "missing":
        return bad_request(f"{place} is missing.", place, "missing_required_parameter")
    reason = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
    reason = clipped(reason[:1].lower() + reason[1:])
    return bad_request(f"{place or 'The body'}: {reason}.", place or None, "invalid_type")


def _place(loc: Sequence[str | int], value: Any, is_missing: bool) -> list[str]:
    """Name where something is wrong, without what pydantic adds for the variants of a union.

    What it adds may be the name of a field, too, so that a part is taken for a field where the
    last of the parts is then one, or more of them are.
    """
    if not loc:
        return []
    part, rest = loc[0], loc[1:]
    found = []
    if part in (range(len(value)) if isinstance(value, list) else _keys(value)):
        found.append([str(part), *_place(rest, value[part], is_missing)])
    elif is_missing and not rest and isinstance(value, Mapping):
        return [str(part)]
    if rest:
        found.append(_place(rest, value, is_missing))
    return max(found, key=lambda place: (place[-1:] == [str(loc[-1])], len(place)), default=[])


def _keys(value: Any) -> Collection[Any]:
    return value.keys() if isinstance(value, Mapping) else ()
