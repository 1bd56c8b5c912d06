"""A certificate for servers of tests, and its key."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

# For localhost and pictures.example, until 2120; nothing but these tests trusts it.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBhjCCASygAwIBAgIUXCpq3XriYPzhD0zrzRJWfWbP/fIwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAx
MDAwMDAwWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAASTVxJX6albUaQisFH9ChJtO2qh3VLsCwNZ7WCksMMzBfc0lSBq7e51
b8Vylk/+dSdMbZZ7vtP/x6Fa28G2kIFXo1owWDAPBgNVHRMBAf8EBTADAQH/MCYG
A1UdEQQfMB2CCWxvY2FsaG9zdIIQcGljdHVyZXMuZXhhbXBsZTAdBgNVHQ4EFgQU
0dtSthUpuSxoCXyoXk9Y5ttjxyUwCgYIKoZIzj0EAwIDSAAwRQIhAMaMKqw40z+J
w8s5ZjMQxoRkeBLSbanSZo3ncGVgEVCvAiBVWz7Lewl58KP+HfR/ZpiDgHD91g7o
7QboM30Zo651Zg==
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgyO6HfYSxdhNn3wfM
41YKOr1jFvWoEhBYSc+NvLXwlgWhRANCAASTVxJX6albUaQisFH9ChJtO2qh3VLs
CwNZ7WCksMMzBfc0lSBq7e51b8Vylk/+dSdMbZZ7vtP/x6Fa28G2kIFX
-----END PRIVATE KEY-----
"""


@contextmanager
def serving(server: ThreadingHTTPServer, certificate: Path) -> Iterator[int]:
    """Run a server over TLS for the block; its port."""
    with server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_port
        server.shutdown()
