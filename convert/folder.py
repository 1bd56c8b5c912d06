"""An output folder that appears whole or not at all, and the small files that go into it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from phimlx.errors import ConversionError
from phimlx.files import read_json, sync, translate_write_errors, write_json
from phimlx.hub import transfer
from phimlx.sizes import size_text

JOURNAL = ".journal.json"
Companions = Mapping[str, Path | bytes]
"""Small files that go along with weights, by name: where they are, or what is in them."""

MARK = ".phimlx"  # in a folder that is not complete: it is ours, and may be emptied
SEAL_BYTES = 64  # of a mark in a folder that only waits for its name


@dataclass(frozen=True)
class Journal:
    """Progress of filling a folder, kept in it, so that a killed run can be continued.

    Attributes:
        folder: being filled.
        plan: a digest of everything that decides what is to be written.
        done: steps of it that an earlier run has brought to the disk.
    """

    folder: Path
    plan: str
    done: int

    @classmethod
    def open(cls, folder: Path, plan: str, names: Collection[str]) -> Journal:
        """Take up what a run of the same plan left in `folder`; of any other, leave nothing.

        Args:
            names: files that are worth keeping.
        """
        try:
            value = read_json(folder / JOURNAL, ConversionError, missing_ok=True)
        except ConversionError:  # it tells nothing, so nothing counts as done
            value = {}
        done = value.get("done", 0) if value.get("plan") == plan else 0
        if not all((folder / name).is_file() for name in names):
            done = 0
        kept = {*names, JOURNAL} if done and type(done) is int else set()
        _empty(folder, kept)
        return cls(folder, plan, done if kept else 0)

    def record(self, done: int) -> None:
        """Note that the first `done` steps are on the disk."""
        write_json(self.folder / JOURNAL, {"plan": self.plan, "done": done})

    def close(self) -> None:
        """Forget it: the folder is filled."""
        (self.folder / JOURNAL).unlink(missing_ok=True)


@contextmanager
def new_folder(
    out: Path,
    plan: str,
    names: Collection[str],
    keep_after: tuple[type[BaseException], ...] = (),
) -> Iterator[Journal]:
    """Fill a folder beside `out`, which becomes `out` when the block has ended well.

    Where the block raises, what it wrote is removed; where the process is killed, the next run of
    the same plan goes on where this one was, and any other removes it.

    Args:
        plan, names: see `Journal`.
        keep_after: errors after which the next run may go on as after a kill.

    Raises:
        ConversionError: where `out` exists, is being written by another process, or cannot be.
    """
    with _filling(out, plan, names, keep_after) as journal:
        yield journal
        journal.close()
        files = [file for file in journal.folder.iterdir() if file.name != MARK]
        (journal.folder / MARK).write_text(_seal(plan, files))
        for file in [*journal.folder.iterdir(), journal.folder]:
            sync(file)
        # Where another has made `out` meanwhile this fails, unless it is an empty folder.
        _place(journal.folder, out)
        (out / MARK).unlink()  # last of all: a run that was killed before is taken up again


@contextmanager
def new_file(
    out: Path, plan: str, keep_after: tuple[type[BaseException], ...] = ()
) -> Iterator[Journal]:
    """Fill the file of `out`'s name in a folder beside it; otherwise as `new_folder`."""
    with _filling(out, plan, [out.name], keep_after) as journal:
        yield journal
        file = journal.folder / out.name
        sync(file)
        refuse_existing(out)
        (journal.folder / MARK).write_text(_seal(plan, [file]))
        _place(file, out)
        discard(journal.folder)


@contextmanager
def _filling(
    out: Path, plan: str, names: Collection[str], keep_after: tuple[type[BaseException], ...]
) -> Iterator[Journal]:
    partial = partial_folder(out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _take_back(out, plan)
        refuse_existing(out)
        lock = claim(partial, out)
        try:
            yield Journal.open(partial, plan, names)
        except keep_after:
            raise
        except BaseException:
            discard(partial)
            raise
        finally:
            os.close(lock)


def stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of files: what tells that one is not the same any more."""
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def partial_folder(out: Path) -> Path:
    """Name the folder that `out` is while it is not complete."""
    return out.parent / f".{out.name}.partial"


def source_folder(out: Path) -> Path:
    """Name the folder of what comes from the Hub to become `out`."""
    return out.parent / f".{out.name}.source"


def refuse_existing(out: Path) -> None:
    """Raise `ConversionError` where there is something at `out`.

    What a run left there that was killed after its last file was whole and before it had ended does
    not count: the same run takes it up again.
    """
    if not os.path.lexists(out) or _sealed(out):
        return
    for leftover in (partial_folder(out), source_folder(out)):
        _sweep(leftover)
    raise ConversionError(
        f"{out} exists already.", hint="Choose another folder, or remove it first."
    )


def _seal(plan: str, files: Iterable[Path]) -> str:
    """Digest of a plan and of the files that it has made, which tells if one was touched since."""
    found = [(file.name, file.stat()) for file in sorted(files)]
    facts = [(name, each.st_ino, each.st_size, each.st_mtime_ns) for name, each in found]
    return hashlib.sha256(repr((plan, facts)).encode()).hexdigest()


def _sealed(out: Path) -> str | None:
    """Return the seal of what stands at `out` while its run has not ended; None for none."""
    for mark in (out / MARK, partial_folder(out) / MARK):
        with contextlib.suppress(OSError, ValueError):
            if mark.lstat().st_size == SEAL_BYTES:
                return mark.read_text()
    return None


def _place(made: Path, out: Path) -> None:
    """Give what was made its name, for good."""
    made.rename(out)
    try:
        sync(out.parent)
    except BaseException:
        out.rename(made)
        raise


def _take_back(out: Path, plan: str) -> None:
    """Put what a killed run of the same plan had made, and not ended with, where it was filled.

    Where anything in it has changed since, or another plan made it, it stays where it is.
    """
    seal = _sealed(out)
    if seal is None or not os.path.lexists(out):
        return
    partial = partial_folder(out)
    if out.is_dir() and not out.is_symlink():
        files = [file for file in out.iterdir() if file.name != MARK]
        place, locked = partial, out
    else:
        files, place, locked = [out], partial / out.name, partial
    with _lock(locked) as held:
        if held and seal == _seal(plan, files):
            out.rename(place)
        elif held:
            # Somebody's own by now.
            (locked / MARK).unlink()


def _sweep(folder: Path) -> None:
    """Remove what a run left beside an output that is complete, unless one is still at it."""
    with contextlib.suppress(OSError), _lock(folder) as held:
        if held and (folder / MARK).is_file():
            discard(folder)
        elif held:
            folder.rmdir()  # which fails unless nothing but the mark was left to remove


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Lock a folder while the block runs; whether that was possible."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def check_space(out: Path, needed: int) -> None:
    """Raise `ConversionError` where the disk of `out` has no room for so many bytes."""
    partial = partial_folder(out)
    if partial.is_dir():  # what is there will be continued or removed
        needed -= sum(file.lstat().st_blocks * 512 for file in partial.iterdir())
    free = transfer.free_space(out.parent)
    if needed > free:
        raise ConversionError(
            f"{out} needs {size_text(needed)} of disk space, but its disk has {size_text(free)}.",
            hint="Free some space, or choose a folder on another disk.",
        )


def copy_companions(companions: Companions, folder: Path) -> None:
    """Write small files to a folder."""
    for name, source in companions.items():
        if isinstance(source, Path):
            shutil.copyfile(source, folder / name)
        else:
            (folder / name).write_bytes(source)


def size_of(companions: Companions) -> int:
    """Count the bytes of small files."""
    return sum(
        source.stat().st_size if isinstance(source, Path) else len(source)
        for source in companions.values()
    )


def claim(partial: Path, out: Path) -> int:
    """Make a folder for `out` and lock it for this process; the lock goes with the process.

    Raises:
        ConversionError: where another process holds it, or it is not ours: it holds something and
            not our mark.
    """
    made = not partial.is_dir()
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
    if not (partial / MARK).is_file():
        if any(partial.iterdir()):
            os.close(descriptor)
            raise ConversionError(
                f"{partial} was not made by phimlx, so it is left alone.",
                hint="Move it elsewhere, or choose another output.",
            )
        try:
            (partial / MARK).touch()
        except BaseException:
            os.close(descriptor)
            if made:
                partial.rmdir()
            raise
    return descriptor


def discard(folder: Path) -> None:
    """Remove a folder that was claimed, as far as that goes; the mark goes last."""
    with contextlib.suppress(OSError):
        _empty(folder, ())
        (folder / MARK).unlink()
        folder.rmdir()


def _empty(folder: Path, kept: Collection[str]) -> None:
    """Remove what a folder holds, but the mark and the files of these names."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.is_symlink() or entry.name not in {*kept, MARK}:
            entry.unlink()


def writing(out: Path) -> AbstractContextManager[None]:
    """Say in a sentence why `out` cannot be written."""
    return translate_write_errors(
        out,
        ConversionError,
        hint="Choose a folder that can be written.",
        when_full="Free some space, or choose a folder on another disk.",
    )
