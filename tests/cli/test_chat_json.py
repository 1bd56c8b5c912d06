"""`phimlx chat --json`: the conversation as one object, or the error that ended it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from phimlx.cli.group import cli
from phimlx.errors import GenerationError
from tests.terminal.fake_phi import FakePhi, Script


def run(monkeypatch: pytest.MonkeyPatch, *scripts: Any, text: str) -> Result:
    phi = FakePhi(*scripts)
    monkeypatch.setattr("phimlx.api.load", lambda *given, **more: phi)
    arguments = ["chat", "--model", "nano", "--private", "--json"]
    return CliRunner().invoke(cli, arguments, input=text, prog_name="phimlx")


def test_the_conversation_is_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(monkeypatch, "One.", "Two.", text="first\nsecond\n")
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["model"] == "nano"
    assert [(each["role"], each["content"]) for each in told["messages"]] == [
        ("user", "first"),
        ("assistant", "One."),
        ("user", "second"),
        ("assistant", "Two."),
    ]


def test_an_error_is_the_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Script(["So"])
    failing.error = GenerationError("It is too long.", "Say less.")
    done = run(monkeypatch, "One.", failing, text="first\nsecond\n")
    assert done.exit_code == 1
    assert json.loads(done.stdout) == {"error": {"message": "It is too long.", "hint": "Say less."}}
    assert done.stderr == "Error: It is too long.\nHint: Say less.\n"
