"""The command line under `mlx.launch`: `python -m tests.sharing.killed HOW PASS ARGUMENT...`.

HOW is a signal that one of the machines gets before pass number PASS through the model, such as
SIGKILL@1 for the second; "never" for none. The others wait 10 seconds for one that is stopped.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import count
from typing import Any

import tests.conftest  # noqa: F401 (the same BLAS as in the run that it is compared with)
from phimlx.cli.main import main
from phimlx.machine import processes
from phimlx.models import lockstep

(how, _, rank), at = sys.argv[1].partition("@"), int(sys.argv[2])
sys.argv = ["phimlx", *sys.argv[3:]]
processes.PATIENCE, processes.PATIENCE_FACTOR = 10.0, 1
run, passes = lockstep._run, count()


def counted(*arguments: Any) -> Any:
    if next(passes) == at and rank == os.environ.get("MLX_RANK"):
        os.kill(os.getpid(), getattr(signal, how))
    return run(*arguments)


lockstep._run = counted  # type: ignore[assignment]
main()
