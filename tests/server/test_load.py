"""Some hundred mixed requests, hang-ups and malformed ones: nothing is left of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.everything import everything

SCRIPT = Path(__file__).parents[2] / "scripts" / "serve_load.py"


@everything
@pytest.mark.slow
def test_every_good_request_is_answered_and_nothing_is_left() -> None:
    """Memory is for the script alone: so few requests have not yet met all that is kept."""
    flags = ["--requests", "160", "--warm", "80", "--growth", "1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
