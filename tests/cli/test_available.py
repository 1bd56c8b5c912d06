"""`phimlx list --available`: the catalogue as a person chooses from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phimlx import catalog
from tests.cli.test_list_cli import cache, keep, run

__all__ = ["cache"]  # a fixture

MEMORY = 8_000_000_000


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 8 GB."""
    monkeypatch.setattr("phimlx.machine.memory.machine_memory", lambda: MEMORY)


def available() -> dict[str, dict[str, Any]]:
    result = run("--available", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return {entry["name"]: entry for entry in json.loads(result.stdout)["models"]}


def test_every_model_of_the_catalogue_says_what_it_is_good_at(cache: Path) -> None:
    found = available()
    assert list(found) == [model.alias for model in catalog.FAMILY]
    assert all(entry["good_at"] for entry in found.values())


def test_size_bits_and_reach_are_those_of_what_the_alias_brings(cache: Path) -> None:
    found = available()
    mini, phi_4, medium, nano = (
        found[name] for name in ("phi-4-mini", "phi-4", "phi-3-medium", "nano")
    )
    assert (mini["bytes"], mini["bits"]) == (2_157_762_240, 4)
    assert mini["repository"] == "mlx-community/Phi-4-mini-instruct-4bit"
    assert 0 < mini["longest_context_here"] < mini["context_length"]
    assert (phi_4["longest_context_here"], medium["longest_context_here"]) == (0, 0)
    assert (medium["repository"], medium["bits"]) == ("microsoft/Phi-3-medium-4k-instruct", 16)
    assert nano["longest_context_here"] == nano["context_length"] == 1024


def test_what_is_here_is_told_quantized_or_not(cache: Path) -> None:
    keep(cache, "mlx-community/phi-4-4bit", quantization={"bits": 4})
    keep(cache, "microsoft/Phi-4-mini-instruct")
    keep(cache, "microsoft/phi-2", whole=False)
    states = {name: entry["state"] for name, entry in available().items()}
    here = {name: state for name, state in states.items() if state}
    assert here == {
        "phi-4-mini": "complete",
        "phi-4": "complete",
        "phi-2": "partial",
        "nano": "complete",
        "nano-multimodal": "complete",
    }


def test_what_a_person_reads(cache: Path) -> None:
    result = run("--available")
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert rows[0] == "model size bits good at fits here"
    assert "phi-4 8.25 GB 4 answers and code with more knowledge no" in rows
    assert rows[-1] == "This machine has 8.00 GB for a model; tokens are prompt and reply."
    (mini,) = (row for row in rows if row.startswith("phi-4-mini "))
    assert mini.startswith("phi-4-mini 2.16 GB 4 answers, code, tools; the usual one to 4")
    assert result.stderr == "Get one with: phimlx download NAME\n"
