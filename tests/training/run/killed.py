"""The command line, ended from outside: `python -m tests.training.run.killed HOW STEP ARGUMENT...`.

HOW is a signal that the process gets while step STEP is computed, or "saving": SIGKILL while the
checkpoint of that step is half written. `SIGKILL@1` is for the second of several machines alone;
with SIGSTOP the others wait 20 seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401 (the same BLAS as in the run that it is compared with)
from phimlx.checkpoint.arrays import write_arrays
from phimlx.cli.main import main
from phimlx.machine import processes
from phimlx.training.data.batches import Batch
from phimlx.training.run import checkpoints as state
from phimlx.training.step import StepResult, TrainingStep

(how, _, rank), at = sys.argv[1].partition("@"), int(sys.argv[2])
at = at if rank in ("", os.environ.get("MLX_RANK")) else 0
sys.argv = ["phimlx", *sys.argv[3:]]
if how == "SIGSTOP":
    processes.PATIENCE, processes.PATIENCE_FACTOR = 20.0, 1
take = TrainingStep.__call__


def taken(self: TrainingStep, number: int, batches: Sequence[Batch]) -> StepResult:
    if number == at and how != "saving":
        os.kill(os.getpid(), getattr(signal, how))
    return take(self, number, batches)


def written(path: Path, arrays: Any) -> None:
    write_arrays(path, arrays)
    if how == "saving" and f"step-{at:07d}" in path.parent.name:
        os.kill(os.getpid(), signal.SIGKILL)


TrainingStep.__call__ = taken  # type: ignore[method-assign]
state.write_arrays = written  # type: ignore[attr-defined]
main()
