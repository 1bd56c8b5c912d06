"""The bytes behind an https URL: from public addresses alone, within a size and a time."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import httpcore2
import httpx2

from phimlx.errors import MediaError, shortened
from phimlx.media.limits import Limits, check_size, source_name

REDIRECTS = 5
HEADERS = (("User-Agent", "phimlx"), ("Accept", "*/*"), ("Accept-Encoding", "identity"))
_MOVED = {301, 302, 303, 307, 308}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052


def fetch(url: str, limits: Limits) -> bytes:
    """Follow a URL and its redirects to bytes, past no proxy: who answers must be known.

    Raises:
        MediaError: the URL or a redirect is not https or leads to an address that is not public,
            or what is there cannot be had within the limits.
    """
    name = source_name(url)
    if not limits.allow_urls:
        raise MediaError(
            f"{name} is a URL, and URLs are switched off.",
            hint="Send the file's bytes instead.",
        )
    deadline = time.monotonic() + limits.download_seconds
    network = _CheckedNetwork(url, limits, deadline)
    with (
        _translated_errors(url, limits, deadline),
        httpcore2.ConnectionPool(ssl.create_default_context(), network_backend=network) as pool,
    ):
        here = httpx2.URL(url)
        for _ in range(REDIRECTS + 1):
            with pool.stream("GET", _checked_url(here, name), headers=HEADERS) as response:
                headers = httpx2.Headers(response.headers)
                if response.status not in _MOVED or "Location" not in headers:
                    return _body(response, headers, url, limits)
                here = here.join(headers["Location"])
    raise MediaError(f"{name} is redirected more than {REDIRECTS} times.")


def _checked_url(url: httpx2.URL, name: str) -> httpcore2.URL:
    if url.scheme != "https":
        raise MediaError(
            f"{name} leads to {shortened(url.scheme)}; only https is followed.",
            hint="Use an https:// address, or download the file and name its path.",
        )
    if not url.host or url.userinfo:
        raise _no_url(name)
    return httpcore2.URL(scheme="https", host=url.raw_host, port=url.port, target=url.raw_path)


def _body(
    response: httpcore2.Response, headers: httpx2.Headers, asked: str, limits: Limits
) -> bytes:
    if response.status != 200:
        raise MediaError(
            f"{source_name(asked)} cannot be had: the server answers {response.status}."
        )
    declared = headers.get("Content-Length", "0")
    check_size(asked, int(declared), limits.max_download, "max_download")
    body = bytearray()
    try:
        for chunk in response.iter_stream():
            body += chunk
            check_size(asked, len(body), limits.max_download, "max_download")
    except httpcore2.RemoteProtocolError as error:
        raise MediaError(f"{source_name(asked)} came only in part.", hint="Try again.") from error
    return bytes(body)


class _CheckedNetwork(httpcore2.NetworkBackend):
    """Connects to the very addresses that were checked: no second lookup can deceive it."""

    def __init__(self, asked: str, limits: Limits, deadline: float) -> None:
        self._asked = asked
        self._limits = limits
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> _TimedStream:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if not self._limits.allow_private:
            for *_, place in places:
                _check_public(str(place[0]), self._asked)
        failure: OSError = OSError("no address")
        for family, kind, protocol, _, place in places:
            link = socket.socket(family, kind, protocol)
            try:
                link.settimeout(_seconds_until(self._deadline))
                link.connect(place)
            except OSError as error:
                link.close()
                failure = error
            else:
                return _TimedStream(link, self._deadline)
        raise failure


class _TimedStream(httpcore2.NetworkStream):
    """A connection that ends at the deadline, also where a byte comes now and then."""

    def __init__(self, link: socket.socket, deadline: float) -> None:
        self._link = link
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._link.settimeout(_seconds_until(self._deadline))
        return self._link.recv(max_bytes)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._link.settimeout(_seconds_until(self._deadline))
        self._link.sendall(buffer)

    def close(self) -> None:
        self._link.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> _TimedStream:
        self._link.settimeout(_seconds_until(self._deadline))
        link = ssl_context.wrap_socket(self._link, server_hostname=server_hostname)
        return _TimedStream(link, self._deadline)


def _seconds_until(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _check_public(address: str, asked: str) -> None:
    """Refuse an address of this machine or a private network, also one wrapped in IPv6."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        found = inner or found
    if not found.is_global or found.is_multicast:
        raise MediaError(
            f"{source_name(asked)} leads to {address}, an address that is not public.",
            hint="Download the file and name its path.",
        )


def _no_url(name: str) -> MediaError:
    return MediaError(f"{name} is not a URL of the form https://host/path.")


@contextmanager
def _translated_errors(url: str, limits: Limits, deadline: float) -> Iterator[None]:
    """MediaError for whatever the network and its libraries raise."""
    name = source_name(url)
    try:
        yield
    except httpx2.InvalidURL as error:
        raise _no_url(name) from error
    except TimeoutError as error:
        raise MediaError(
            f"{name} did not come within {limits.download_seconds:g} s.",
            hint="Try again, or download the file and name its path.",
        ) from error
    except ssl.SSLCertVerificationError as error:
        raise MediaError(
            f"{name} has a certificate that this machine does not trust.",
            hint="Download the file and name its path.",
        ) from error
    except socket.gaierror as error:
        raise MediaError(
            f"{name} names a host that is not known.", hint="Check the address and the network."
        ) from error
    except (OSError, httpcore2.ProtocolError) as error:
        raise MediaError(
            f"{name} cannot be reached.", hint="Check the address and the network."
        ) from error
