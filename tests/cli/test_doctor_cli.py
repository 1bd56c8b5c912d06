"""`phimlx doctor` and its self-test: tables for people, one object for programs, exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from phimlx.cli.group import cli
from phimlx.evaluation import parity as selftest
from phimlx.evaluation.parity import Result
from phimlx.files import read_json
from phimlx.hub.resolve import NANO
from phimlx.machine import doctor
from phimlx.machine.doctor import Finding
from phimlx.models import registry

FINDINGS = [
    Finding("versions", "phimlx 0.1.0"),
    Finding("backend", "CPU, which is slow", "warning", "Get a Mac."),
]
PROBLEM = Finding("memory", "none", "problem", "Add some.")
NONE = Finding("settings", "none of the user's own")
RESULTS = [Result("64 tokens", 2e-6, 1e-4, 1.0), Result("batch", 0.5, 1e-4, 0.25)]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["doctor", *arguments], prog_name="phimlx")


def find(monkeypatch: pytest.MonkeyPatch, findings: list[Finding]) -> None:
    monkeypatch.setattr(doctor, "run_checks", lambda cache: iter(findings))


def test_findings_as_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    find(monkeypatch, FINDINGS)
    result = run()
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split() for line in lines[2:5]] == [
        ["✓", "versions", "phimlx", "0.1.0"],
        ["!", "backend", "CPU,", "which", "is", "slow"],
        ["✓", "settings", "none", "of", "the", "user's", "own"],
    ]
    assert lines[-1] == "! backend: Get a Mac."


def test_a_problem_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    find(monkeypatch, [*FINDINGS, PROBLEM])
    result = run("--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "healthy": False,
        "findings": [vars(finding) for finding in (*FINDINGS, PROBLEM, NONE)],
        "error": {"message": "There is a problem with: memory.", "hint": "Add some."},
    }


def test_a_case_that_differs_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def results() -> Iterator[tuple[str, Result]]:
        return iter(zip(("nano", "phi"), RESULTS, strict=True))

    monkeypatch.setattr(selftest, "self_test", results)
    result = run("--self-test")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert [line.split() for line in lines[2:4]] == [
        ["✓", "nano", "64", "tokens", "2.0e-06", "1.0e-04", "100%"],
        ["✗", "phi", "batch", "5.0e-01", "1.0e-04", "25%"],
    ]
    assert lines[-1].startswith("1 of 2 cases equal the reference on this machine's ")


@pytest.mark.slow
def test_the_self_test_passes_here() -> None:
    result = run("--self-test", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["passed"] is True
    models = {case["model"] for case in report["cases"]}
    types = {
        read_json(folder / "config.json")["model_type"]
        for folder in (NANO, *selftest.SELF_TEST.iterdir())
        if folder.name in models
    }
    assert {registry.of_config({"model_type": each}).model_type for each in types} == {
        architecture.model_type for architecture in registry.ARCHITECTURES
    }
    assert "llama" in types
    names = " ".join(case["case"] for case in report["cases"])
    for part in (
        "short table",
        "long table",
        "chunks",
        "across the step",
        "float16",
        "bfloat16",
        "8 bits",
        "4 bits",
        "batch",
    ):
        assert part in names
