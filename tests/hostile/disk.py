"""A disk that counts each system call that writes, and fails at one of them.

What Python writes goes through `os` and `io`, whose functions are replaced while a `Disk` is
mounted: a file object gets a raw file of ours below its buffer, so that what is counted are the
calls of write(2) and not those of `file.write`. Only paths below one folder count.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from phimlx.checkpoint import arrays

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
GROWING = {"open", "write", "pwrite", "sendfile", "truncate", "mkdir", "symlink", "link"}
"""Calls that a full disk refuses for as long as it is full."""


class Killed(BaseException):
    """The process is gone: it writes nothing more, whatever it still runs."""


@dataclass
class Disk:
    """Counts the calls that write below a folder, and fails at one of them.

    Attributes:
        at: number of the call that fails, from 0; -1 for none.
        how: "kill" before the call, "half" after half of what it writes, "full" for ENOSPC there
            and at each call after it that needs room, "broken" for EIO there alone.
        calls: name and path of each so far.
    """

    root: Path
    at: int = -1
    how: str = "kill"
    calls: list[tuple[str, str]] = field(default_factory=list)
    dead: bool = False
    full: bool = False
    paths: dict[int, str] = field(default_factory=dict)

    def reach(self, name: str, path: str, half: Callable[[], object] | None = None) -> None:
        """Come to a call; raises or dies where it is the one that fails."""
        if self.dead:
            raise Killed
        number = len(self.calls)
        self.calls.append((name, os.path.relpath(path, self.root)))
        if self.full and name in GROWING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if number != self.at:
            return
        if self.how == "full":
            self.full = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if self.how == "broken":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        if self.how == "half" and half is not None:
            half()
        self.dead = True
        raise Killed

    def inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Return the path of a call's argument where it lies below the folder."""
        if isinstance(path, int):
            return self.paths.get(path)
        text = os.fsdecode(path)
        if dir_fd is not None:
            text = os.path.join(self.paths.get(dir_fd, "/"), text)
        text = os.path.abspath(text)
        return text if text.startswith(f"{self.root}/") else None

    @contextmanager
    def mounted(self) -> Iterator[Disk]:
        """Replace the functions that write while the block runs."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("mkdir", "rmdir", "unlink", "remove", "truncate", "chmod"):
                patch.setattr(os, name, self._at_path(name, getattr(os, name)))
            for name in ("rename", "replace", "link", "symlink"):
                patch.setattr(os, name, self._at_target(name, getattr(os, name)))
            for name in ("fsync", "ftruncate"):
                patch.setattr(os, name, self._at_descriptor(name, getattr(os, name)))
            for name in ("write", "pwrite"):
                patch.setattr(os, name, self._writing(name, getattr(os, name)))
            if hasattr(os, "sendfile"):
                patch.setattr(os, "sendfile", self._at_descriptor("sendfile", os.sendfile))
            patch.setattr(os, "open", self._open(os.open))
            patch.setattr(os, "close", self._close(os.close))
            patch.setattr(io, "open", self._file(io.open))
            patch.setattr(builtins, "open", io.open)
            patch.setattr(arrays, "_Stream", self._stream())
            yield self

    def _at_path(self, name: str, call: Any) -> Any:
        def made(path: Any, *rest: Any, dir_fd: int | None = None, **more: Any) -> Any:
            place = self.inside(path, dir_fd)
            if place is not None:
                self.reach(name, place)
            if dir_fd is not None:
                more["dir_fd"] = dir_fd
            return call(path, *rest, **more)

        return made

    def _at_target(self, name: str, call: Any) -> Any:
        def made(source: Any, target: Any, *rest: Any, **more: Any) -> Any:
            place = self.inside(target)
            if place is not None:
                self.reach(name, place)
            return call(source, target, *rest, **more)

        return made

    def _at_descriptor(self, name: str, call: Any) -> Any:
        def made(descriptor: int, *rest: Any) -> Any:
            if descriptor in self.paths:
                self.reach(name, self.paths[descriptor])
            return call(descriptor, *rest)

        return made

    def _writing(self, name: str, call: Any) -> Any:
        def made(descriptor: int, data: Any, *rest: Any) -> Any:
            if descriptor in self.paths:
                view = memoryview(data).cast("B")
                half = lambda: call(descriptor, view[: len(view) // 2], *rest)  # noqa: E731
                self.reach(name, self.paths[descriptor], half)
            return call(descriptor, data, *rest)

        return made

    def _open(self, call: Any) -> Any:
        def made(path: Any, flags: int, *rest: Any, dir_fd: int | None = None, **more: Any) -> int:
            place = self.inside(path, dir_fd)
            if place is not None and flags & WRITING:
                self.reach("open", place)
            if dir_fd is not None:
                more["dir_fd"] = dir_fd
            descriptor = int(call(path, flags, *rest, **more))
            if place is not None or str(path) == str(self.root):
                self.paths[descriptor] = place or str(self.root)
            return descriptor

        return made

    def _close(self, call: Any) -> Any:
        def made(descriptor: int) -> None:
            self.paths.pop(descriptor, None)
            call(descriptor)

        return made

    def _file(self, call: Any) -> Any:
        def made(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            if not {*mode} & {*"wax+"} or self.inside(file) is None:
                return call(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = self._raw()(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            if buffering == 0:
                return raw
            kind = io.BufferedRandom if "+" in mode else io.BufferedWriter
            buffered = kind(raw)
            return (
                buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)
            )

        return made

    def _raw(self) -> type[io.FileIO]:
        disk = self

        class Raw(io.FileIO):
            """A file whose calls count."""

            def __init__(
                self, file: Any, mode: str = "r", closefd: bool = True, opener: Any = None
            ) -> None:
                self.place = disk.inside(file) or ""
                if self.place and not isinstance(file, int) and opener is None:
                    disk.reach("open", self.place)
                super().__init__(file, mode, closefd, opener)
                if self.place:
                    disk.paths[self.fileno()] = self.place

            def write(self, data: Any) -> int:
                view = memoryview(data).cast("B")
                if disk.dead:
                    return len(view)  # a buffer that Python empties on its way out
                if self.place:
                    write = super().write
                    disk.reach("write", self.place, lambda: write(view[: len(view) // 2]))
                return super().write(data)

            def truncate(self, size: int | None = None, /) -> int:
                if self.place:
                    disk.reach("truncate", self.place)
                return super().truncate(size)

            def close(self) -> None:
                if not self.closed and self.closefd:
                    disk.paths.pop(self.fileno(), None)
                super().close()

        return Raw

    def _stream(self) -> type[io.FileIO]:
        raw: Any = self._raw()

        class Stream(arrays._Stream, raw):  # type: ignore[misc]
            """What MLX writes to."""

        return Stream
