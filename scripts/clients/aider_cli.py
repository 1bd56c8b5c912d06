"""Aider, over chat completions."""

from __future__ import annotations

import os
import subprocess
import tempfile

from trying import ABSENT, LONG, LONG_URL, PROGRAM, QUESTION, attempt, check, main

HOME = tempfile.mkdtemp()
ENVIRONMENT = {
    "HOME": HOME,
    "PATH": os.environ["PATH"],
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}


def aider(*arguments, model=LONG):
    done = subprocess.run(
        [
            PROGRAM,
            "--model",
            f"openai/{model}",
            "--openai-api-base",
            f"{LONG_URL}/v1",
            "--openai-api-key",
            "none",
            "--no-git",
            "--yes-always",
            "--no-pretty",
            "--no-analytics",
            "--no-check-update",
            "--no-show-model-warnings",
            "--no-auto-lint",
            "--no-show-release-notes",
            "--no-detect-urls",
            "--no-suggest-shell-commands",
            "--chat-mode",
            "ask",
            "--map-tokens",
            "0",
            "--timeout",
            "200",
            "--message",
            QUESTION,
            *arguments,
        ],
        env=ENVIRONMENT,
        cwd=HOME,
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout + done.stderr


@attempt("ask, streamed")
def _():
    found = aider()
    check("Tokens:" in found, found[-800:])


@attempt("ask, whole")
def _():
    found = aider("--no-stream")
    check("Tokens:" in found, found[-800:])


@attempt("error")
def _():
    found = aider(model="absent")
    check(ABSENT in found, found[-800:])


main()
