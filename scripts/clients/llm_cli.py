"""The command llm: its models of OpenAI's dialect, and its plug-in for Ollama."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

from trying import ABSENT, CITY, NANO, PICTURE, PROGRAM, QUESTION, SEEING, URL, attempt, check, main

HOME = tempfile.mkdtemp()
ENVIRONMENT = {**os.environ, "LLM_USER_PATH": HOME, "OLLAMA_HOST": URL}
MORE = "vision: true\n  supports_schema: true\n  supports_tools: true"


def entry(model):
    return (
        f"- model_id: p-{model}\n  model_name: {model}\n  api_base: {URL}/v1\n"
        f"  api_key_name: p\n  {MORE}\n"
    )


Path(HOME, "extra-openai-models.yaml").write_text("".join(map(entry, (NANO, SEEING, "absent"))))
Path(HOME, "keys.json").write_text('{"p": "none"}')


def llm(*arguments, fails=False):
    """Run it; return what it says."""
    done = subprocess.run(
        [PROGRAM, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    if bool(done.returncode) is not fails:
        raise AssertionError(done.stdout + done.stderr)
    return (done.stderr if fails else done.stdout).strip()


@attempt("openai: streamed")
def _():
    check(llm("-m", f"p-{NANO}", QUESTION))
    check(llm("-c", "And 3 plus 4?"))


@attempt("openai: whole")
def _():
    check(llm("-m", f"p-{NANO}", "--no-stream", QUESTION))


@attempt("openai: schema")
def _():
    check(json.loads(llm("-m", f"p-{NANO}", "--schema", json.dumps(CITY), QUESTION))["city"])


@attempt("openai: tools offered")
def _():
    check(llm("-m", f"p-{NANO}", "-T", "llm_version", QUESTION))


@attempt("openai: picture")
def _():
    llm("-m", f"p-{SEEING}", "-a", str(PICTURE), "What is it?")


@attempt("openai: error")
def _():
    check(ABSENT in llm("-m", "p-absent", QUESTION, fails=True))


@attempt("ollama: models")
def _():
    check(NANO in llm("ollama", "models"))


@attempt("ollama: streamed")
def _():
    check(llm("-m", f"ollama/{NANO}:latest", QUESTION))


@attempt("ollama: schema")
def _():
    check(
        json.loads(llm("-m", f"ollama/{NANO}:latest", "--schema", json.dumps(CITY), QUESTION))[
            "city"
        ]
    )


@attempt("ollama: picture")
def _():
    llm("-m", f"ollama/{SEEING}:latest", "-a", str(PICTURE), "What is it?")


main()
