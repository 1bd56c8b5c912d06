"""Bytes from disk, memory and URLs: what is followed, how far, and what is refused."""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from phimlx.errors import MediaError
from phimlx.media.limits import Limits, raising, source_name
from phimlx.media.source import read_bytes
from tests.certificate import CERTIFICATE, KEY, serving

CONTENT = bytes(range(256)) * 40
LOCAL = Limits(allow_private=True, download_seconds=20)
BY_HAND = "Download the file and name its path."
AGAIN = "Try again, or download the file and name its path."
NETWORK = "Check the address and the network."


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []
    released: ClassVar[threading.Event]

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.asked.append(self.path)
        match self.path.split("/"):
            case ["", "file" | "a%20b%C3%A9?c=d&e=%20"]:
                self.answer(CONTENT)
            case ["", "to", *place]:
                self.send_response(302)
                self.send_header("Location", "/".join(place))
                self.send_header("Content-Length", "0")
                self.end_headers()
            case ["", "loop"]:
                self.send_response(307)
                self.send_header("Location", "loop")
                self.send_header("Content-Length", "0")
                self.end_headers()
            case ["", "status", code]:
                self.answer(b"no", int(code))
            case ["", "declared", size]:
                self.answer(CONTENT, length=int(size))
                self.close_connection = True
            case ["", "endless"]:
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for _ in range(64):
                    self.wfile.write(b"2800\r\n" + CONTENT + b"\r\n")
            case ["", "moved"]:
                self.send_response(302)
                self.send_header("Location", "/file")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                while not self.released.is_set():
                    self.wfile.write(b"2800\r\n" + CONTENT + b"\r\n")
            case ["", "silent"]:
                self.released.wait(30)
            case ["", "drip"]:
                self.send_response(200)
                while not self.released.wait(0.02):
                    self.wfile.write(b"x")
            case _:
                self.answer(b"")

    def answer(self, content: bytes, status: int = 200, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is what these tests are about."""


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_text(CERTIFICATE + KEY)
    return path


@pytest.fixture
def site(trusted: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An https server on this machine, trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    Handler.asked.clear()
    Handler.released = threading.Event()
    with serving(Server(("127.0.0.1", 0), Handler), trusted) as port:
        yield f"https://localhost:{port}"
        Handler.released.set()


def refusal(source: Any, limits: Limits = LOCAL) -> tuple[str, str | None]:
    with pytest.raises(MediaError) as raised:
        read_bytes(source, limits)
    return str(raised.value), raised.value.hint


def test_paths_bytes_and_file_objects(tmp_path: Path) -> None:
    path = tmp_path / "sound"
    path.write_bytes(CONTENT)
    sources = [path, str(path), CONTENT, bytearray(CONTENT), memoryview(CONTENT)]

    for source in [*sources, io.BytesIO(CONTENT)]:
        assert read_bytes(source) == CONTENT


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    absent = tmp_path / "absent"

    assert refusal(absent) == (f"There is no file {absent}.", "Check the path.")
    assert refusal(tmp_path) == (f"{tmp_path} is a folder.", "Name a file.")
    assert refusal(tmp_path / "pipe") == (
        f"{tmp_path}/pipe is not a regular file.",
        "Name a file.",
    )
    assert refusal("/dev/zero") == ("/dev/zero is not a regular file.", "Name a file.")
    assert refusal(tmp_path / "empty") == (f"{tmp_path}/empty is empty.", None)
    assert refusal(b"") == ("The data is empty.", None)
    assert refusal("a\0b") == (
        "'a\\x00b' cannot be read: its name holds a null byte.",
        None,
    )
    message, _ = refusal(tmp_path / "loop")
    assert message.startswith(f"{tmp_path}/loop cannot be read: ")


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (3, "value of type int"),
        (None, "value of type NoneType"),
        (io.StringIO("text"), "file opened as text"),
    ],
)
def test_what_is_no_source(source: Any, what: str) -> None:
    assert refusal(source) == (
        f"A {what} is nothing to read bytes from.",
        "Give a path, an https URL, bytes, or a file opened for reading bytes.",
    )


def test_sizes_are_limited_everywhere(tmp_path: Path, site: str) -> None:
    path = tmp_path / "long"
    path.write_bytes(CONTENT)
    small = replace(LOCAL, max_bytes=len(CONTENT) - 1, max_download=len(CONTENT) - 1)
    exact = replace(LOCAL, max_bytes=len(CONTENT), max_download=len(CONTENT))

    for source, name in (
        (path, str(path)),
        (CONTENT, "The data"),
        (io.BytesIO(CONTENT), "The data"),
    ):
        assert refusal(source, small) == (
            f"{name} is larger than 10.2 kB.",
            "If you trust it, raise the limit with --max-bytes.",
        )
    for place in ("/file", "/declared/99999999999", "/endless"):
        assert refusal(site + place, small) == (
            f"{site}{place} is larger than 10.2 kB.",
            "If you trust it, raise the limit with --max-download.",
        )
    assert read_bytes(path, exact) == read_bytes(site + "/file", exact) == CONTENT


def test_a_url_is_read(site: str) -> None:
    assert read_bytes(f"{site}/file", LOCAL) == CONTENT
    assert read_bytes(f"{site.replace('https', 'HTTPS')}/file#part", LOCAL) == CONTENT
    assert read_bytes(f"{site}/a bé?c=d&e=%20", LOCAL) == CONTENT
    assert Handler.asked == ["/file", "/file", "/a%20b%C3%A9?c=d&e=%20"]


def test_redirects_are_followed_while_they_stay_https(site: str) -> None:
    assert read_bytes(f"{site}/to//file", LOCAL) == CONTENT
    assert read_bytes(f"{site}/to/{site}/file", LOCAL) == CONTENT

    assert refusal(f"{site}/to/http://localhost/file") == (
        f"{site}/to/http://localhost/file leads to 'http'; only https is followed.",
        "Use an https:// address, or download the file and name its path.",
    )
    assert refusal(f"{site}/to/file:///etc/passwd") == (
        f"{site}/to/file:///etc/passwd leads to 'file'; only https is followed.",
        "Use an https:// address, or download the file and name its path.",
    )
    assert read_bytes(f"{site}/moved", LOCAL) == CONTENT  # whatever the redirect itself holds
    Handler.asked.clear()
    loop = f"{site}/loop"
    assert refusal(loop) == (f"{loop} is redirected more than 5 times.", None)
    assert len(Handler.asked) == 6


@pytest.mark.parametrize("url", ["http://example.com/a.png", "ftp://example.com/a", "file:///a"])
def test_other_schemes_are_not_followed(url: str) -> None:
    scheme = url.partition(":")[0]

    assert refusal(url) == (
        f"{url} leads to '{scheme}'; only https is followed.",
        "Use an https:// address, or download the file and name its path.",
    )


def test_urls_can_be_switched_off(site: str) -> None:
    assert refusal(f"{site}/file", replace(LOCAL, allow_urls=False)) == (
        f"{site}/file is a URL, and URLs are switched off.",
        "Send the file's bytes instead.",
    )
    assert Handler.asked == []


PRIVATE = [
    "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "192.0.2.1", "224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1%1", "fc00::1",
    "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_never_connected_to(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lookup(host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        public = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", port))
        return [public, (family, socket.SOCK_STREAM, 6, "", (address, port))]

    def no_socket(*_: object) -> None:
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket, "socket", no_socket)

    assert refusal("https://pictures.example/a.png", Limits()) == (
        f"https://pictures.example/a.png leads to {address}, an address that is not public.",
        BY_HAND,
    )


def test_a_redirect_to_a_private_address_is_not_followed(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phimlx.media import fetch

    port = site.rpartition(":")[2]
    seen: list[str] = []
    check = fetch._check_public

    def all_but_the_first(address: str, asked: str) -> None:
        seen.append(address)
        if len(set(seen)) > 1:
            check(address, asked)

    monkeypatch.setattr(fetch, "_check_public", all_but_the_first)
    url = f"https://pictures.example:{port}/to/https://10.0.0.1/secret"
    lookup = socket.getaddrinfo

    def here(host: str, port: int, **options: Any) -> list[tuple[Any, ...]]:
        return lookup("127.0.0.1" if host == "pictures.example" else host, port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", here)

    assert refusal(url, Limits(download_seconds=20)) == (
        f"{url} leads to 10.0.0.1, an address that is not public.",
        BY_HAND,
    )


def test_a_name_is_looked_up_once(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups: list[str] = []
    lookup = socket.getaddrinfo

    def counted(host: str, port: int, **options: Any) -> list[tuple[Any, ...]]:
        lookups.append(host)
        return lookup("127.0.0.1", port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", counted)
    url = f"{site.replace('localhost', 'pictures.example')}/file"

    assert read_bytes(url, LOCAL) == CONTENT
    assert lookups == ["pictures.example"]


@pytest.mark.parametrize(
    "url", ["https://", "https:///a", "https://u:p@localhost/", "https://h:x/"]
)
def test_what_is_no_url(url: str) -> None:
    assert refusal(url) == (f"{url} is not a URL of the form https://host/path.", None)


def test_servers_that_fail(site: str) -> None:
    assert refusal(f"{site}/status/404") == (
        f"{site}/status/404 cannot be had: the server answers 404.",
        None,
    )
    assert refusal(f"{site}/declared/10241") == (
        f"{site}/declared/10241 came only in part.",
        "Try again.",
    )
    assert refusal(f"{site}/nothing") == (f"{site}/nothing is empty.", None)


@pytest.mark.parametrize("path", ["/silent", "/drip"])
def test_servers_that_take_too_long(site: str, path: str) -> None:
    assert refusal(site + path, replace(LOCAL, download_seconds=0.5)) == (
        f"{site}{path} did not come within 0.5 s.",
        AGAIN,
    )


def test_a_certificate_that_is_not_trusted(
    site: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "none.pem").touch()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    expected = f"{site}/file has a certificate that this machine does not trust."

    assert refusal(f"{site}/file") == (expected, BY_HAND)
    assert Handler.asked == []


def test_a_certificate_for_another_name(site: str) -> None:
    url = f"{site.replace('localhost', '127.0.0.1')}/file"

    assert refusal(url) == (
        f"{url} has a certificate that this machine does not trust.",
        BY_HAND,
    )


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"https://localhost:{taken.getsockname()[1]}/a.png"

        assert refusal(url) == (f"{url} cannot be reached.", NETWORK)

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert refusal("https://nowhere.example/a") == (
        "https://nowhere.example/a names a host that is not known.",
        NETWORK,
    )


def test_names_in_messages() -> None:
    assert source_name("cat.png") == "cat.png"
    assert source_name(b"cat") == "The data"
    assert source_name("\x1b[2J") == repr("\x1b[2J")
    assert len(source_name("x" * 5000)) == 200
    assert raising("max_pixels") == "If you trust it, raise the limit with --max-pixels."
