"""Codex, over responses. Its prompt is longer than nano's context, as Claude Code's is."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from trying import ABSENT, LONG, LONG_URL, PROGRAM, QUESTION, attempt, check, main

HOME = tempfile.mkdtemp()
ENVIRONMENT = {"HOME": HOME, "CODEX_HOME": HOME, "PATH": os.environ["PATH"], "KEY": "none"}
Path(HOME, "config.toml").write_text(
    f"""model_provider = "phimlx"
model_context_window = 65536
check_for_update_on_startup = false
[model_providers.phimlx]
name = "phimlx"
base_url = "{LONG_URL}/v1"
env_key = "KEY"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
[analytics]
enabled = false
"""
)


def codex(model=LONG):
    done = subprocess.run(
        [
            PROGRAM,
            "exec",
            "--json",
            "--skip-git-repo-check",
            "-s",
            "read-only",
            "-m",
            model,
            QUESTION,
        ],
        env=ENVIRONMENT,
        cwd=HOME,
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout + done.stderr


@attempt("exec")
def _():
    found = codex()
    check('"turn.completed"' in found, found[-800:])


@attempt("error")
def _():
    found = codex("absent")
    check(ABSENT in found, found[-800:])


main()
