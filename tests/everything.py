"""Tests that take minutes, and are run where PHIMLX_TEST_EVERYTHING is set."""

from __future__ import annotations

import os

import pytest

EVERYTHING = bool(os.environ.get("PHIMLX_TEST_EVERYTHING"))

everything = pytest.mark.skipif(
    not EVERYTHING,
    reason="takes minutes: set PHIMLX_TEST_EVERYTHING",
)
