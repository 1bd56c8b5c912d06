"""`phimlx doctor`: what of this machine helps or hinders, and whether it computes right.

Shows findings; `phimlx.machine.doctor` and `phimlx.evaluation.parity` make them.
"""

from __future__ import annotations

import click

from phimlx.cli.options import json_option
from phimlx.terminal.output import Output

MARKS = {"ok": "✓", "warning": "!", "problem": "✗"}


@click.command()
@click.option(
    "--self-test",
    "self_test",
    is_flag=True,
    help="Compute with the bundled model here and compare with the reference's numbers.",
)
@json_option
def command(self_test: bool, as_json: bool) -> None:
    """Check this machine and installation.

    With --self-test the bundled nano model runs on the backend that is really here: both LongRoPE
    tables, the step between them, float32, float16, bfloat16, 8 and 4 bits, and a batch, against
    numbers from the reference implementation. The exit code is 1 where a check or a case fails.
    """
    output = Output(json=as_json)
    healthy = test_numbers(output) if self_test else examine_machine(output)
    if not healthy:
        click.get_current_context().exit(1)


def examine_machine(output: Output) -> bool:
    from phimlx.hub.layout import cache_folder
    from phimlx.machine import doctor

    with output.status("Looking…"):
        findings = list(doctor.run_checks(cache_folder()))
    rows = [(MARKS[finding.state], finding.subject, finding.found) for finding in findings]
    output.table(["", "what", "found"], rows)
    hints = [finding for finding in findings if finding.hint]
    if hints:
        output.text()
    for finding in hints:
        output.text(f"{MARKS[finding.state]} {finding.subject}: {finding.hint}")
    problems = [finding for finding in findings if finding.state == "problem"]
    output.json({"healthy": not problems, "findings": [vars(finding) for finding in findings]})
    return not problems


def test_numbers(output: Output) -> bool:
    import mlx.core as mx

    from phimlx.evaluation import parity as selftest
    from phimlx.hub.resolve import NANO

    results = []
    with output.progress(None, "Self-test", " cases") as bar:
        for result in selftest.run(NANO, NANO / "reference.safetensors"):
            results.append(result)
            bar.update(1)
    rows = [
        (
            MARKS["ok" if result.passed else "problem"],
            result.case,
            f"{result.difference:.1e}",
            f"{result.allowed:.1e}",
            f"{result.top1:.0%}",
        )
        for result in results
    ]
    output.table(["", "case", "difference", "allowed", "top-1"], rows)
    failed = [result for result in results if not result.passed]
    device = mx.default_device().type.name
    output.text()
    output.text(
        f"{len(results) - len(failed)} of {len(results)} cases equal the reference on this "
        f"machine's {device.upper()}."
    )
    output.json(
        {
            "device": device,
            "passed": not failed,
            "cases": [{**vars(result), "passed": result.passed} for result in results],
        }
    )
    return not failed
