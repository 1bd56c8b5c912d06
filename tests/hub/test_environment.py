"""The environment's names for the Hub and its timeouts, looked at before they fail elsewhere."""

from __future__ import annotations

import pytest

from phimlx.cli.group import explain
from phimlx.errors import DownloadError, PhimlxError, SettingsError
from phimlx.hub.environment import check_environment


@pytest.mark.parametrize(
    "address",
    [
        *("garbage", "http://", "http://[::1", "http://a:99999", "http://a:b", "http://a:0"),
        *("file:///etc", "http://[\x1b[2J]/", "//huggingface.co"),
    ],
)
def test_what_is_no_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(SettingsError) as wrong:
        check_environment()
    assert str(wrong.value) == f"HF_ENDPOINT is {address!r}, which is no address of a Hub."
    assert wrong.value.hint == "Unset it, or give one such as https://huggingface.co."


@pytest.mark.parametrize("name", ["HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"])
@pytest.mark.parametrize("text", ["", "abc", "-1", "1.5", "nan", "1e400", "9" * 30, "٣", "86401"])
def test_what_is_no_number_of_seconds(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(SettingsError) as wrong:
        check_environment()
    assert str(wrong.value) == f"{name} is {text!r}, which is no number of seconds."


@pytest.mark.parametrize(
    "address", ["", "https://huggingface.co", "http://localhost:8080/hub", "http://[::1]:1"]
)
def test_what_is_an_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "10")
    check_environment()


def test_an_error_that_nobody_expected_is_laid_to_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error, known = ValueError("invalid literal"), DownloadError("No network.")
    assert explain(error) is error
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "abc")
    explained = explain(error)
    assert isinstance(explained, SettingsError)
    assert explained.__cause__ is error
    assert explain(known) is known


def test_a_working_directory_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> str:
        raise FileNotFoundError

    error = FileNotFoundError("no such file")
    assert explain(error) is error
    monkeypatch.setattr("os.getcwd", gone)
    explained = explain(error)
    assert isinstance(explained, PhimlxError)
    assert (str(explained), explained.hint) == (
        "The working directory is gone.",
        "Change to a folder that is there.",
    )
