"""A process that meets hostile inputs, one for each name on its stdin.

`python -m tests.hostile.child` answers each with a line of JSON on stdout: what is wrong, or null;
seconds of CPU; bytes by which its memory grew.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from click.testing import CliRunner

import tests.conftest  # noqa: F401 (a fast BLAS)
from phimlx.cli.group import cli
from phimlx.errors import PhimlxError
from tests.hostile.inputs import ROWS, Bench

LONGEST = 1500  # characters that a failure may say: some faults of data, a line each
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Wrong(Exception):
    """An input was met badly."""


def run(*arguments: Any) -> None:
    """Run a command, which has to end well or with one sentence."""
    result = CliRunner().invoke(cli, [*map(str, arguments)], prog_name="phimlx")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise Wrong("".join(traceback.format_exception(result.exception))[-1500:])
    said = result.stderr
    if "Error: unexpected " in said or "Traceback" in said or len(said) > 3 * LONGEST:
        raise Wrong(f"{arguments[0]} says {said[:300]} … {said[-500:]}")
    if result.exit_code == 1:
        judge(said.rpartition("Error: ")[2])
    elif result.exit_code not in (0, 2):
        raise Wrong(f"{arguments[0]} ends with {result.exit_code}: {said[-500:]}")


def judge(message: str) -> None:
    """Look at what a failure says."""
    if not message or len(message) > LONGEST:
        raise Wrong(f"it says {len(message)} characters: {message[:200]!r} … {message[-100:]!r}")
    message.encode()  # no half surrogates
    if any(ord(each) < 32 and each != "\n" for each in message):
        raise Wrong(f"it says {message[:300]!r}")


def meet(name: str, home: Path) -> str | None:
    """Meet an input; what is wrong, in words."""
    place = Path(tempfile.mkdtemp(dir=home))
    bench.place = place
    try:
        ROWS[name](bench)
    except PhimlxError as error:
        try:
            message = f"{error}\n{error.hint or ''}"
            if len(message) > LONGEST:
                return f"it says {len(message)} characters: {message[:300]!r}"
            message.encode()
        except UnicodeEncodeError as odd:
            return repr(odd)
    except Wrong as wrong:
        return str(wrong)
    except BaseException as error:
        return "".join(traceback.format_exception(error))[-1500:]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return None


def peak() -> int:
    """Bytes of memory at the peak since `CLEAR` was last written to."""
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def used() -> float:
    """Seconds of CPU of this process and of those that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


if __name__ == "__main__":
    home = Path(tempfile.mkdtemp(prefix="hostile-"))
    os.chdir(home)
    bench = Bench(home, home, run)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    try:
        for name in (line.rstrip("\n") for line in sys.stdin):
            before = 0
            with contextlib.suppress(OSError):
                CLEAR.write_text("5")
                before = peak()
            started = used()
            wrong = meet(name, home)
            seconds, grew = used() - started, 0
            with contextlib.suppress(OSError):
                grew = peak() - before
            answers.write(json.dumps([wrong, seconds, grew]) + "\n")
    finally:
        shutil.rmtree(home, ignore_errors=True)
