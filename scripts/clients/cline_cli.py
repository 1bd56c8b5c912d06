"""Cline, over chat completions. Its prompt is longer than nano's context, too."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile

from trying import ABSENT, LONG, LONG_URL, PROGRAM, QUESTION, attempt, check, main

HOME = tempfile.mkdtemp()
ENVIRONMENT = {"HOME": HOME, "PATH": os.environ["PATH"], "CLINE_TELEMETRY_DISABLED": "1"}


def cline(*arguments):
    done = subprocess.run(
        [PROGRAM, *arguments],
        env=ENVIRONMENT,
        cwd=HOME,
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout + done.stderr


def ask(model=LONG):
    base = ("-p", "openai-compatible", "-k", "none", "-b", f"{LONG_URL}/v1")
    cline("auth", *base, "-m", model)
    return cline("--json", "--plan", "-P", "openai-compatible", "-t", "200", "-m", model, QUESTION)


@attempt("plan")
def _():
    found = ask()
    check(re.search(r'"type":"run_result".*"inputTokens":[1-9]', found), found[-800:])


@attempt("error")
def _():
    found = ask("absent")
    check(ABSENT in found, found[-800:])


main()
