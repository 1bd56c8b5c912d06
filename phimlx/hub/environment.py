"""What the environment says of the Hub, looked at before huggingface_hub fails at it."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from phimlx.errors import SettingsError, shortened

TIMEOUTS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
LONGEST = 86_400  # seconds


def check_environment() -> None:
    """Raise `SettingsError` for an address of the Hub that is none, or seconds that are none."""
    address = os.environ.get("HF_ENDPOINT")
    if address and not _is_address(address):
        raise SettingsError(
            f"HF_ENDPOINT is {shortened(address)}, which is no address of a Hub.",
            hint="Unset it, or give one such as https://huggingface.co.",
        )
    for name in TIMEOUTS:
        text = os.environ.get(name)
        if text is not None and not (_is_number(text) and int(text) <= LONGEST):
            raise SettingsError(
                f"{name} is {shortened(text)}, which is no number of seconds.",
                hint=f"Unset it, or give a whole number up to {LONGEST:,}.",
            )


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that are no IPv6 address, a port that is no number
        return False


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9
