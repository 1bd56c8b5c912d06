"""https: by whom the server is reached then, and what it is called."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx2
import pytest

from phimlx.errors import SettingsError
from phimlx.server.run import listen, local_address, read_certificate
from phimlx.server.settings import ServerSettings
from tests.certificate import CERTIFICATE, KEY
from tests.server.running import SECONDS, running


@pytest.fixture(params=["one file", "two files"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """A certificate with its key in the same file, or in one of its own."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    apart = request.param == "two files"
    certificate.write_text(CERTIFICATE if apart else CERTIFICATE + KEY)
    key.write_text(KEY)
    found = {"ssl_certfile": str(certificate)}
    return {**found, "ssl_keyfile": str(key)} if apart else found


def test_a_server_with_a_certificate_is_asked_by_https_alone(files: dict[str, str]) -> None:
    trusting = ssl.create_default_context(cadata=CERTIFICATE)
    with running(model="nano", **files) as server:
        where = server.url.replace("http://127.0.0.1", "https://localhost")
        with httpx2.Client(verify=trusting, timeout=SECONDS, trust_env=False) as client:
            body = {"model": "nano", "prompt": "Once", "max_tokens": 4}
            assert client.post(f"{where}/v1/completions", json=body).status_code == 200
            with pytest.raises(httpx2.HTTPError):
                server.client.get("/health")
            assert client.get(f"{where}/health").json()["status"] == "ok"


def test_addresses_say_https(files: dict[str, str]) -> None:
    settings = ServerSettings(port=0, **files)
    read_certificate(settings)
    with listen(settings) as opened:
        assert local_address(settings, opened).startswith("https://127.0.0.1:")


@pytest.mark.parametrize("text", ["", CERTIFICATE, KEY, "nonsense"])
def test_a_file_that_is_no_certificate_with_its_key_is_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "certificate.pem"
    file.write_text(text)
    with pytest.raises(SettingsError, match="is no certificate with its key"):
        read_certificate(ServerSettings(ssl_certfile=str(file)))
