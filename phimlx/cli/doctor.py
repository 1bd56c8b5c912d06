"""`phimlx doctor`: what of this machine helps or hinders, and whether it computes right.

Shows findings; `phimlx.machine.doctor` and `phimlx.evaluation.parity` make them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.options import json_option
from phimlx.cli.preferences import apply, preferences
from phimlx.errors import SettingsError, some
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.machine.doctor import Finding

MARKS = {"ok": "✓", "warning": "!", "problem": "✗"}


@click.command()
@click.option(
    "--self-test",
    "self_test",
    is_flag=True,
    help="Compute with bundled models here and compare with the reference's numbers.",
)
@json_option
def command(self_test: bool, as_json: bool) -> None:
    """Check this machine and installation.

    With --self-test the bundled nano model runs on the backend that is really here: both LongRoPE
    tables, the step between them, float32, float16, bfloat16, 8 and 4 bits, and a batch, and a tiny
    model of every other architecture, against numbers from the reference implementations. The exit
    code is 1 where a check or a case fails.
    """
    output = Output(json=as_json)
    healthy = test_numbers(output) if self_test else examine_machine(output)
    if not healthy:
        click.get_current_context().exit(1)


def examine_machine(output: Output) -> bool:
    from phimlx.hub.layout import cache_folder
    from phimlx.machine import doctor

    with contextlib.suppress(SettingsError):  # which the last finding tells
        apply(preferences())

    with output.status("Looking…"):
        findings = [*doctor.run_checks(cache_folder()), examine_settings()]
    rows = [(MARKS[finding.state], finding.subject, finding.found) for finding in findings]
    output.table(["", "what", "found"], rows)
    hints = [finding for finding in findings if finding.hint]
    if hints:
        output.text()
    for finding in hints:
        output.text(f"{MARKS[finding.state]} {finding.subject}: {finding.hint}")
    problems = [finding for finding in findings if finding.state == "problem"]
    about: dict[str, Any] = {
        "healthy": not problems,
        "findings": [vars(finding) for finding in findings],
    }
    if problems:
        message = f"There is a problem with: {some([each.subject for each in problems])}."
        about["error"] = {"message": message, "hint": problems[0].hint}
    output.json(about)
    return not problems


def examine_settings() -> Finding:
    """Say which of the user's settings come from where, or what is wrong with them."""
    from phimlx.cli.config import listed, literal
    from phimlx.machine.doctor import Finding

    try:
        rows = listed(preferences())
    except SettingsError as error:
        return Finding("settings", str(error), "problem", error.hint)
    found = [f"{name} = {literal(value)} from {source}" for name, value, source in rows]
    return Finding("settings", "; ".join(found) or "none of the user's own")


def test_numbers(output: Output) -> bool:
    import mlx.core as mx

    from phimlx.evaluation import parity as selftest

    results = []
    with output.progress(None, "Self-test", " cases") as bar:
        for result in selftest.self_test():
            results.append(result)
            bar.update(1)
    rows = [
        (
            MARKS["ok" if result.passed else "problem"],
            model,
            result.case,
            f"{result.difference:.1e}",
            f"{result.allowed:.1e}",
            f"{result.top1:.0%}",
        )
        for model, result in results
    ]
    output.table(["", "model", "case", "difference", "allowed", "top-1"], rows)
    failed = [result for _, result in results if not result.passed]
    device = mx.default_device().type.name
    output.text()
    output.text(
        f"{len(results) - len(failed)} of {len(results)} cases equal the reference on this "
        f"machine's {device.upper()}."
    )
    about: dict[str, Any] = {
        "device": device,
        "passed": not failed,
        "cases": [
            {"model": model, **vars(result), "passed": result.passed} for model, result in results
        ],
    }
    if failed:
        message = f"{len(failed)} of {len(results)} cases differ from the reference."
        about["error"] = {"message": message, "hint": None}
    output.json(about)
    return not failed
