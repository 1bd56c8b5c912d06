"""Continue's command, over chat completions. Its prompt is longer than nano's context, too."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from trying import ABSENT, LONG, LONG_URL, PROGRAM, QUESTION, attempt, check, main

HOME = tempfile.mkdtemp()
ENVIRONMENT = {"HOME": HOME, "PATH": os.environ["PATH"], "CONTINUE_TELEMETRY_ENABLED": "0"}
CONFIG = """name: phimlx
version: 1.0.0
schema: v1
models:
  - name: local
    provider: openai
    model: {model}
    apiBase: {url}/v1
    apiKey: none
    roles: [chat]
    defaultCompletionOptions: {{maxTokens: 60}}
"""


def ask(*arguments, model=LONG):
    config = Path(HOME, f"{model}.yaml")
    config.write_text(CONFIG.format(model=model, url=LONG_URL))
    done = subprocess.run(
        [PROGRAM, "-p", "--config", str(config), *arguments, QUESTION],
        env=ENVIRONMENT,
        cwd=HOME,
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout + done.stderr


@attempt("print")
def _():
    code, found = ask()
    check(code == 0 and found.strip(), found[-800:])


@attempt("error")
def _():
    _, found = ask(model="absent")
    check(ABSENT in found, found[-800:])


main()
