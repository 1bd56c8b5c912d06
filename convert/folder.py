"""An output folder that appears whole or not at all, and the small files that go into it.

Knows names, sizes and links; knows nothing of what the files say.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phimlx.errors import ConversionError

# What goes along with the weights, where the source has it. Never code.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.md",
)
MAX_COMPANION_BYTES = 64 << 20  # Phi-4-mini's tokenizer.json has 16 MB


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Fill a folder beside `out`, which becomes `out` when the block has ended well.

    Where the block raises, what it wrote is removed; where the process is killed, the next run for
    the same `out` removes it.

    Raises:
        ConversionError: where `out` exists, is being written by another process, or cannot be.
    """
    partial = out.parent / f".{out.name}.partial"
    with _writing(out):
        refuse_existing(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(partial, out)
        try:
            _empty(partial)
            yield partial
            for file in [*partial.iterdir(), partial]:
                _sync(file)
            # Where another has made `out` meanwhile this fails, unless it is an empty folder.
            partial.rename(out)
            _sync(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(lock)


def refuse_existing(out: Path) -> None:
    """Raise `ConversionError` where there is something at `out`."""
    if os.path.lexists(out):
        raise ConversionError(
            f"{out} exists already.", hint="Choose another folder, or remove it first."
        )


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, template, licence: what of `COMPANIONS` is there, links followed.

    Raises:
        ConversionError: for one that is too large, no file, or a link out of the source.
    """
    for name, file in companions(source).items():
        shutil.copyfile(file, folder / name)


def companions(source: Path) -> dict[str, Path]:
    """Name and real file of each; see `copy_companions`."""
    home = source.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent  # the Hub's cache keeps a snapshot's files in ../../blobs
    found = {}
    for name in COMPANIONS:
        if not os.path.lexists(source / name):
            continue
        file = (source / name).resolve()
        if not file.is_file():
            raise ConversionError(f"{name} is not a file.")
        if not file.is_relative_to(home):
            raise ConversionError(
                f"{name} is a link to a file outside the model's folder.",
                hint="Put the file itself there.",
            )
        if file.stat().st_size > MAX_COMPANION_BYTES:
            raise ConversionError(f"{name} is larger than {MAX_COMPANION_BYTES >> 20} MB.")
        found[name] = file
    return found


def _claim(partial: Path, out: Path) -> int:
    """Make `partial` and lock it for this process; the lock goes with the process."""
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between opening and locking, the process that held it may have renamed or removed it.
        mine = os.path.samestat(os.fstat(descriptor), os.stat(partial))
    except OSError as error:
        mine = False
        if error.errno not in (errno.EWOULDBLOCK, errno.ENOENT):
            os.close(descriptor)
            raise
    if not mine:
        os.close(descriptor)
        raise ConversionError(
            f"{out} is being written by another process.", hint="Wait for it, or stop it."
        )
    return descriptor


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Say in a sentence why `out` cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConversionError(
                f"The disk is full: {out} could not be written.",
                hint="Free some space, or choose a folder on another disk.",
            ) from error
        reason = error.strerror or str(error)
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = f"{error.filename} is not a folder"
        raise ConversionError(
            f"{out} cannot be written: {reason}.",
            hint="Choose a folder that can be written.",
        ) from error
