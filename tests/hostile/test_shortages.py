"""Too little of everything: files, memory, a place to be. Each is a sentence, and no traceback."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from phimlx.errors import shortage

ROOT = Path(__file__).parents[2]
FILES = "This process may not open enough files."
MEMORY = "There is not enough memory."


def chained(error: BaseException) -> BaseException:
    """An error of a library's, behind which stands another."""
    outer = RuntimeError("it did not work")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), FILES),
        (chained(OSError(errno.ENFILE, os.strerror(errno.ENFILE))), FILES),
        (ImportError(f"core.so: cannot open: {os.strerror(errno.EMFILE)}"), FILES),
        (ValueError("not allowed to raise maximum limit"), FILES),
        (MemoryError(), MEMORY),
        (chained(MemoryError()), MEMORY),
        (RuntimeError("[malloc] Unable to allocate 4096 bytes."), MEMORY),
        (RuntimeError("std::bad_alloc"), MEMORY),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), MEMORY),
        (ValueError("something else"), None),
        (OSError(errno.ENOENT, os.strerror(errno.ENOENT), "a"), None),
    ],
)
def test_what_the_system_lacks_is_told(error: BaseException, message: str | None) -> None:
    found = shortage(error)
    assert (None if found is None else str(found)) == message
    assert found is None or found.hint


def run(*arguments: str, cwd: Path = ROOT, files: int | None = None) -> tuple[int, str]:
    """The command line in a process of its own; its status and stderr."""

    def limit() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    ended = subprocess.run(
        [sys.executable, "-m", "phimlx", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=limit,
    )
    return ended.returncode, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("files", [6, 10, 16])  # with fewer Python itself does not start
def test_few_files_may_be_open(files: int) -> None:
    status, said = run("generate", "--model", "nano", "--prompt", "Hi", "-m", "1", files=files)
    assert status in (0, 1)
    assert "Traceback" not in said
    assert "unexpected" not in said


def test_a_working_directory_that_is_gone() -> None:
    code = (
        "import os, sys, tempfile; os.chdir(tempfile.mkdtemp()); os.rmdir(os.getcwd()); "
        "from phimlx.cli.main import main; "
        "sys.argv[1:] = ['convert', 'nano', '--mlx-path', 'out']; main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 1
    assert ended.stderr == (
        "Error: The working directory is gone.\nHint: Change to a folder that is there.\n"
    )
