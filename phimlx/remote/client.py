"""Asks a server over HTTP, and says in a sentence what goes wrong. What it sends is not trusted."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from phimlx.errors import (
    GenerationError,
    ModelNotFoundError,
    PhimlxError,
    RemoteError,
    clipped,
    shortened,
)
from phimlx.files import parse_json_object

if TYPE_CHECKING:
    from httpx2 import Response

CONNECT_SECONDS = 10.0
SILENT_SECONDS = 60.0  # within a reply; the server writes a comment every 10
LOADING_SECONDS = 1800.0  # until a model is there
LARGEST_ANSWER = 16 << 20  # bytes; an event of a stream may have as many
LARGEST_REFUSAL = 64 << 10
EXAMPLE = "Give its address, such as http://127.0.0.1:8080."


def server_root(url: str) -> str:
    """Check the address of a server; `/v1` at its end, which other programs want, is dropped.

    Raises:
        RemoteError: where it is none.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        known = parts.scheme in ("http", "https") and parts.port != 0 and url.isprintable()
    except ValueError:
        known = False
    if not known or not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment:
        raise RemoteError(f"{shortened(url, 200)} is no address of a server.", hint=EXAMPLE)
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


def is_loopback(url: str) -> bool:
    """Whether an address is one of this machine's own."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Client:
    """A server at an address.

    Attributes:
        url: of its root, without a slash at the end.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises RemoteError where `url` is no address. Nothing is asked yet."""
        import httpx2

        self.url = server_root(url)
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        try:
            self._http = httpx2.Client(
                base_url=self.url, headers=headers, trust_env=not is_loopback(self.url)
            )
        except (httpx2.InvalidURL, ValueError) as error:
            raise RemoteError(
                f"{shortened(url, 200)} is no address of a server.", hint=EXAMPLE
            ) from error

    def ask(
        self, path: str, body: object = None, seconds: float = LOADING_SECONDS
    ) -> dict[str, Any]:
        """Return the object that the server answers with.

        Args:
            body: of a POST; a GET without one.
            seconds: to wait for it.

        Raises:
            PhimlxError: as `open`.
        """
        with self.open(path, body, seconds) as response:
            data = b"".join(self._bounded(response, LARGEST_ANSWER))
        return parse_json_object(data, f"The answer of {self.url}", RemoteError)

    def events(self, path: str, body: object) -> Iterator[dict[str, Any] | None]:
        """Hand over the events of a stream up to its end; None for a sign of life between them.

        Raises:
            PhimlxError: as `open`, and where the stream tells of an error, or ends too early.
        """
        with self.open(path, body, SILENT_SECONDS) as response:
            for line in self._lines(response):
                if line.startswith(b":"):
                    yield None
                if not line.startswith(b"data: "):
                    continue
                data = line.removeprefix(b"data: ")
                if data == b"[DONE]":
                    return
                event = parse_json_object(data, f"What {self.url} sends", RemoteError)
                if "error" in event:
                    raise self._told(500, event)
                yield event
        raise self._ended()

    @contextmanager
    def open(self, path: str, body: object, seconds: float) -> Iterator[Response]:
        """Open an answer whose body comes as it is read; leaving the block hangs up.

        Raises:
            ModelNotFoundError, GenerationError: as the server says.
            RemoteError: where it cannot be reached, wants a key, or does not answer as one of ours.
        """
        import httpx2

        begun = False
        try:
            with self._http.stream(
                "GET" if body is None else "POST",
                path,
                content=None if body is None else json.dumps(body).encode(),
                headers={} if body is None else {"content-type": "application/json"},
                timeout=httpx2.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS)),
            ) as response:
                if response.status_code != 200:
                    raise self._refusal(response)
                begun = True
                yield response
        except httpx2.TimeoutException as error:
            raise RemoteError(f"The server at {self.url} has not answered in time.") from error
        except (httpx2.TransportError, UnicodeError) as error:  # the latter for a host's name
            raise self._ended() if begun else self._unreachable(error) from error

    def stranger(self) -> RemoteError:
        """Make the error of an answer that no server of ours gives."""
        return RemoteError(
            f"What answers at {self.url} does not speak as phimlx serve does.",
            hint="Check the address; start a server with: phimlx serve",
        )

    def _ended(self) -> RemoteError:
        return RemoteError(f"The server at {self.url} ended in the middle of its answer.")

    def _unreachable(self, error: Exception) -> RemoteError:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return RemoteError(
                    f"The certificate of {self.url} cannot be verified: {cause.verify_message}.",
                    hint="Name the authority that signed it with SSL_CERT_FILE.",
                )
            cause = cause.__cause__ or cause.__context__
        return RemoteError(
            f"The server at {self.url} cannot be reached.",
            hint="Check the address; start a server with: phimlx serve",
        )

    def _refusal(self, response: Response) -> PhimlxError:
        try:
            data = b"".join(self._bounded(response, LARGEST_REFUSAL))
            return self._told(response.status_code, parse_json_object(data, "", RemoteError))
        except RemoteError:
            return self.stranger()

    def _told(self, status: int, said: dict[str, Any]) -> PhimlxError:
        """Make an error of what the server says in OpenAI's form."""
        error = said.get("error")
        message = error.get("message") if isinstance(error, dict) else None
        if not isinstance(message, str):
            return self.stranger()
        if status == 401:
            return RemoteError(
                f"The server at {self.url} wants a key, and this is not it.",
                hint="Give it with --server-key-file FILE, or in PHIMLX_API_KEY.",
            )
        kinds = {400: GenerationError, 404: ModelNotFoundError}
        return kinds.get(status, RemoteError)(f"The server at {self.url} says: {clipped(message)}")

    def _bounded(self, response: Response, most: int) -> Iterator[bytes]:
        size = 0
        for data in response.iter_bytes():
            size += len(data)
            if size > most:
                raise self.stranger()
            yield data

    def _lines(self, response: Response) -> Iterator[bytes]:
        rest = b""
        for data in response.iter_bytes():
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > LARGEST_ANSWER:
                raise self.stranger()
            yield from lines
