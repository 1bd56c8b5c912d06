"""Claude Code. Its prompt is longer than nano's context: a copy with a longer one says anything."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile

from trying import ABSENT, LONG, LONG_URL, PROGRAM, QUESTION, attempt, check, main

HOME = tempfile.mkdtemp()
ENVIRONMENT = {
    "HOME": HOME,
    "PATH": os.environ["PATH"],
    "ANTHROPIC_BASE_URL": LONG_URL,
    "ANTHROPIC_API_KEY": "none",
    "ANTHROPIC_SMALL_FAST_MODEL": LONG,
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "60",
    "DISABLE_AUTOUPDATER": "1",
}


def claude(*arguments, model=LONG):
    done = subprocess.run(
        [PROGRAM, "-p", "--model", model, "--max-turns", "1", *arguments],
        env=ENVIRONMENT,
        cwd=HOME,
        capture_output=True,
        text=True,
        timeout=240,
        input=QUESTION,
    )
    return done.stdout + done.stderr


@attempt("print, as JSON")
def _():
    found = claude("--output-format", "json")
    check(json.loads(found)["usage"]["output_tokens"], found)


@attempt("print, events streamed")
def _():
    found = claude("--output-format", "stream-json", "--verbose", "--include-partial-messages")
    check('"message_stop"' in found, found[-600:])


@attempt("error")
def _():
    found = claude(model="absent")
    check(ABSENT in found or "absent" in found, found)


main()
