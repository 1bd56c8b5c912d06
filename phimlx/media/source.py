"""The bytes of a file on disk, behind an https URL, or already in memory.

Knows sizes, addresses and redirects; knows nothing of what the bytes hold.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import re
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from phimlx.errors import MediaError, shortened
from phimlx.media.limits import Limits, raising
from phimlx.sizes import size_text

Bytes = bytes | bytearray | memoryview
Source = str | Path | Bytes | BinaryIO

PIECE = 1 << 20  # bytes read at once
REDIRECTS = 5
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_AS_IT_IS = "/%:@!$&'()*+,;=~?[]"  # what RFC 3986 allows in a path and a query
_MOVED = {301, 302, 303, 307, 308}


def source_name(source: object) -> str:
    """What a message calls a source: the path or URL as it was given, or `The data`."""
    if isinstance(source, str | Path):
        text = str(source)
        return text if len(text) <= 200 and text.isprintable() else shortened(text, 200)
    return "The data"


def is_url(source: object) -> bool:
    """Whether a source names a place on a network, of whatever scheme."""
    return isinstance(source, str) and _SCHEME.match(source) is not None


def read_bytes(source: Source, limits: Limits | None = None) -> bytes:
    """All bytes of a path, an https URL, a file object open for reading bytes, or bytes.

    Raises:
        MediaError: nothing is there, it is no regular file, it cannot be read, it is empty, it
            is larger than the limits allow, or the URL is one that is not followed.
    """
    limits = limits or Limits()
    if isinstance(source, bytes | bytearray | memoryview):
        data = source if isinstance(source, bytes) else bytes(source)
        _check_size(source, len(data), limits.max_bytes)
    elif isinstance(source, str) and is_url(source):
        data = _download(source, limits)
    elif isinstance(source, str | Path):
        data = _read_file(source, limits)
    else:
        data = _read_opened(source, limits)
    if not data:
        raise MediaError(f"{source_name(source)} is empty.")
    return data


def _check_size(source: object, size: int, most: int, limit: str = "max_bytes") -> None:
    if size > most:
        raise MediaError(
            f"{source_name(source)} is larger than {size_text(most)}.", hint=raising(limit)
        )


def _read_opened(source: object, limits: Limits) -> bytes:
    read = getattr(source, "read", None)
    data = read(limits.max_bytes + 1) if callable(read) else source
    if not isinstance(data, bytes):
        what = (
            "file opened as text"
            if isinstance(data, str)
            else f"value of type {type(source).__name__}"
        )
        raise MediaError(
            f"A {what} is nothing to read bytes from.",
            hint="Give a path, an https URL, bytes, or a file opened for reading bytes.",
        )
    _check_size(source, len(data), limits.max_bytes)
    return data


def _read_file(path: str | Path, limits: Limits) -> bytes:
    name = source_name(path)
    try:
        # A pipe or a device opens without waiting, and is then refused.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                raise MediaError(f"{name} is {what}.", hint="Name a file.")
            _check_size(path, status.st_size, limits.max_bytes)
            return file.read()
    except FileNotFoundError as error:
        raise MediaError(f"There is no file {name}.", hint="Check the path.") from error
    except IsADirectoryError as error:
        raise MediaError(f"{name} is a folder.", hint="Name a file.") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or "its name holds a null byte"
        raise MediaError(f"{name} cannot be read: {reason}.") from error


def _download(url: str, limits: Limits) -> bytes:
    """Follow a URL and its redirects to bytes, past no proxy: who answers must be known."""
    name = source_name(url)
    if not limits.allow_urls:
        raise MediaError(
            f"{name} is a URL, and URLs are switched off.",
            hint="Send the file's bytes instead.",
        )
    deadline = time.monotonic() + limits.download_seconds
    with _explained(url, limits, deadline):
        here = url
        for _ in range(REDIRECTS + 1):
            answer = _request(here, url, limits, deadline)
            if isinstance(answer, bytes):
                return answer
            here = urljoin(here, answer)
    raise MediaError(f"{name} is redirected more than {REDIRECTS} times.")


def _request(url: str, asked: str, limits: Limits, deadline: float) -> bytes | str:
    """The bytes at a URL, or the place that it redirects to."""
    name = source_name(asked)
    parts = urlsplit(url)
    if parts.scheme.lower() != "https":
        raise MediaError(
            f"{name} leads to {shortened(parts.scheme)}; only https is followed.",
            hint="Use an https:// address, or download the file and name its path.",
        )
    host, port = parts.hostname, parts.port or 443
    if not host or parts.username is not None:
        raise MediaError(f"{name} is not a URL of the form https://host/path.")
    host = host if ":" in host else host.encode("idna").decode("ascii")
    place = quote(urlunsplit(("", "", parts.path or "/", parts.query, "")), safe=_AS_IT_IS)
    connection = http.client.HTTPSConnection(host, port)
    with _connected(host, port, asked, limits, deadline) as link:
        connection.sock = link
        connection.request(
            "GET",
            place,
            headers={"User-Agent": "phimlx", "Accept": "*/*", "Accept-Encoding": "identity"},
        )
        response = connection.getresponse()
        elsewhere = response.headers.get("Location")
        if response.status in _MOVED and elsewhere:
            return elsewhere
        if response.status != 200:
            raise MediaError(f"{name} cannot be had: the server answers {response.status}.")
        return _body(response, asked, limits)


def _body(response: http.client.HTTPResponse, asked: str, limits: Limits) -> bytes:
    most = limits.max_download
    _check_size(asked, response.length or 0, most, "max_download")
    pieces = bytearray()
    while piece := response.read(min(PIECE, most + 1 - len(pieces))):
        pieces += piece
        _check_size(asked, len(pieces), most, "max_download")
    if response.length:  # what is still owed
        raise http.client.IncompleteRead(b"", response.length)
    return bytes(pieces)


@contextmanager
def _connected(
    host: str, port: int, asked: str, limits: Limits, deadline: float
) -> Iterator[ssl.SSLSocket]:
    """A TLS connection to an address that was looked at first, cut off at the deadline."""
    # Connecting to the very address that was checked leaves no second lookup to be deceived.
    places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not limits.allow_private:
        for *_, place in places:
            _check_public(str(place[0]), asked)
    raw = _first_answering(places, deadline)
    with ssl.create_default_context().wrap_socket(
        raw, server_hostname=host, do_handshake_on_connect=False
    ) as link:
        # A server that sends a byte now and then never lets a socket's own timeout pass.
        cut = threading.Timer(
            max(0.0, deadline - time.monotonic()), socket.socket.shutdown, (link, socket.SHUT_RDWR)
        )
        cut.daemon = True
        cut.start()
        try:
            link.do_handshake()
            yield link
        finally:
            cut.cancel()


def _first_answering(places: list[tuple], deadline: float) -> socket.socket:  # type: ignore[type-arg]
    failure: OSError = OSError("no address")
    for family, kind, protocol, _, place in places:
        link = socket.socket(family, kind, protocol)
        try:
            link.settimeout(max(0.1, deadline - time.monotonic()))
            link.connect(place)
        except OSError as error:
            link.close()
            failure = error
        else:
            return link
    raise failure


def _check_public(address: str, asked: str) -> None:
    """Refuse an address of this machine or a private network, also one wrapped in IPv6."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in ipaddress.ip_network("64:ff9b::/96"):  # NAT64, RFC 6052
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        found = inner or found
    if not found.is_global or found.is_multicast:
        raise MediaError(
            f"{source_name(asked)} leads to {address}, an address that is not public.",
            hint="Download the file and name its path.",
        )


@contextmanager
def _explained(url: str, limits: Limits, deadline: float) -> Iterator[None]:
    name = source_name(url)
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
            raise MediaError(
                f"{name} did not come within {limits.download_seconds:g} s.",
                hint="Try again, or download the file and name its path.",
            ) from error
        if isinstance(error, ssl.SSLCertVerificationError):
            raise MediaError(
                f"{name} has a certificate that this machine does not trust.",
                hint="Download the file and name its path.",
            ) from error
        if isinstance(error, socket.gaierror):
            raise MediaError(
                f"{name} names a host that is not known.", hint="Check the address and the network."
            ) from error
        if isinstance(error, http.client.IncompleteRead):
            raise MediaError(f"{name} came only in part.", hint="Try again.") from error
        if isinstance(error, http.client.InvalidURL | ValueError):
            raise MediaError(f"{name} is not a URL of the form https://host/path.") from error
        raise MediaError(
            f"{name} cannot be reached.", hint="Check the address and the network."
        ) from error
