"""A teacher's probabilities on disk: one safetensors file, written in place and taken up again.

    tokens     [positions, k]  U16 or U32   the k likeliest tokens, likeliest first
    logs       [positions, k]  F16          their log-probabilities
    rest       [positions]     F32          log-probability of all others together
    examples   [examples, 32]  U8           SHA-256 of each example's tokens and loss mask
    offsets    [examples + 1]  I64          where the positions of each example begin

Its metadata say which teacher, k, temperature and vocabulary these are of, and the SHA-256 of all
that follows the header. Examples are found by their own hash, so that the file serves any run whose
examples are in it, in whatever order or split. Probabilities were rounded, so they are normalized
again as they are read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from phimlx.checkpoint.header import list_tensors
from phimlx.errors import CheckpointError, TrainingError
from phimlx.files import read_json, sync, translate_read_errors, translate_write_errors, write_json
from phimlx.hub.transfer import free_space
from phimlx.sizes import size_text
from phimlx.training.data.batches import Example

FORMAT = "phimlx teacher probabilities 1"
TYPES = {"U16": np.uint16, "U32": np.uint32, "F16": np.float16, "F32": np.float32,
         "U8": np.uint8, "I64": np.int64}  # fmt: skip
LOWEST = -30_000.0  # log-probability; float16 holds no more than -65,504
UNHASHED = "0" * 64
HASHED_AT_ONCE = 16 << 20  # bytes
SMALL_VOCABULARY = 1 << 16

Arrays = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Type, by safetensors' name, and shape of each tensor, in the order of their bytes."""
Advance = Callable[[int], object]


def digest_of(example: Example) -> bytes:
    """SHA-256 of an example's tokens and of which of them are learned."""
    found = hashlib.sha256(example.tokens.astype("<i4").tobytes())
    found.update(np.packbits(example.supervised).tobytes())
    return found.digest()


def positions_of(example: Example) -> int:
    """Count the positions of an example at which something is learned."""
    return int(example.supervised[1:].sum())


@dataclass(frozen=True)
class LogitsPlan:
    """What a file will hold, known before the teacher is loaded.

    Attributes:
        teacher: fingerprint of the model.
        examples: each once, in the order in which they are written: the longest first.
    """

    teacher: str
    vocab_size: int
    k: int
    temperature: float
    examples: tuple[Example, ...]

    @classmethod
    def of(
        cls, teacher: str, vocab_size: int, k: int, temperature: float, examples: Sequence[Example]
    ) -> LogitsPlan:
        """Plan for examples, of which the same may come again."""
        unique = {digest_of(example): example for example in examples}
        # One token at least is left for the rest, so that there always is one.
        ordered = sorted(unique.items(), key=lambda item: (-item[1].inputs, item[0]))
        chosen = tuple(example for _, example in ordered)
        return cls(teacher, vocab_size, min(k, vocab_size - 1), temperature, chosen)

    @cached_property
    def offsets(self) -> list[int]:
        """Where the positions of each example begin, and where the last ones end."""
        return [0, *accumulate(map(positions_of, self.examples))]

    @property
    def positions(self) -> int:
        return self.offsets[-1]

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        return tuple(map(digest_of, self.examples))

    @property
    def about(self) -> dict[str, str]:
        """What the file's metadata say of it."""
        return {
            "format": FORMAT,
            "teacher": self.teacher,
            "vocab_size": str(self.vocab_size),
            "k": str(self.k),
            "temperature": repr(self.temperature),
        }

    @property
    def shapes(self) -> Shapes:
        """Type and shape of each tensor, in the order of their bytes."""
        return _shapes(len(self.examples), self.positions, self.k, self.vocab_size)

    @property
    def nbytes(self) -> int:
        """Bytes of the file, but for its header."""
        return sum(map(_size, self.shapes.values()))

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides what is written."""
        found = hashlib.sha256(json.dumps(self.about).encode())
        for digest in self.digests:
            found.update(digest)
        return found.hexdigest()

    def header(self, content: str = UNHASHED) -> bytes:
        """Length and table of contents. Source: https://github.com/huggingface/safetensors#format

        Args:
            content: SHA-256 of what follows; as long while it is not known.
        """
        table: dict[str, Any] = {"__metadata__": {**self.about, "sha256": content}}
        offset = 0
        for name, (kind, shape) in self.shapes.items():
            end = offset + _size((kind, shape))
            table[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def check_size(self, path: Path, limit: int) -> None:
        """Raise TrainingError where the file would be larger than a limit, or than its disk."""
        have = sum(file.stat().st_size for file in (path, _part(path)) if file.is_file())
        if self.nbytes > limit:
            raise TrainingError(
                f"The teacher's probabilities of {self.positions:,} tokens would take "
                f"{size_text(self.nbytes)} of disk space; the limit is {size_text(limit)}.",
                hint="Keep fewer of them (--top-k), or raise --logits-limit.",
            )
        free = free_space(path.absolute().parent) + have
        if self.nbytes > free:
            raise TrainingError(
                f"{path} needs {size_text(self.nbytes)} of disk space, but its disk has "
                f"{size_text(free)}.",
                hint="Free some space, keep fewer probabilities (--top-k), or choose another "
                "--teacher-data.",
            )


class LogitsWriter:
    """Writes the file of a plan, example by example, beside where it will be.

    Attributes:
        done: examples that are written, by an earlier run of the same plan too.
    """

    def __init__(self, path: Path, plan: LogitsPlan, descriptor: int, done: int) -> None:
        self.path, self.plan, self.done = path, plan, done
        self._descriptor = descriptor
        self._starts: dict[str, int] = {}
        start = len(plan.header())
        for name, shape in plan.shapes.items():
            self._starts[name] = start
            start += _size(shape)
        self._end = start

    @classmethod
    @contextmanager
    def open(cls, path: Path, plan: LogitsPlan) -> Iterator[LogitsWriter]:
        """Take up what a run of the same plan left, or begin.

        Raises:
            TrainingError: where it cannot be written, or another process writes it.
        """
        part, journal = _part(path), _journal(path)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise TrainingError(
                        f"Another run is writing {path}.", hint="Wait for it, or stop it."
                    ) from None
                writer = cls(path, plan, descriptor, _progress(journal, plan))
                if os.fstat(descriptor).st_size < writer._end:
                    writer.done = 0
                if not writer.done:
                    writer._begin()
                yield writer
            finally:
                os.close(descriptor)

    def _begin(self) -> None:
        os.ftruncate(self._descriptor, 0)
        os.ftruncate(self._descriptor, self._end)
        self._put(0, self.plan.header())
        self._put(self._starts["offsets"], np.array(self.plan.offsets, "<i8").tobytes())
        self._put(self._starts["examples"], b"".join(self.plan.digests))

    def add(self, count: int, arrays: Arrays) -> None:
        """Write the positions of the next `count` examples: `tokens`, `logs` and `rest`."""
        first, last = (self.plan.offsets[number] for number in (self.done, self.done + count))
        with _writing(self.path):
            for name, array in arrays.items():
                kind, shape = self.plan.shapes[name]
                assert array.shape == (last - first, *shape[1:])
                stored = np.ascontiguousarray(array.astype(TYPES[kind]))
                width = _size((kind, (1, *shape[1:])))
                self._put(self._starts[name] + first * width, stored.tobytes())
        self.done += count

    def save(self) -> None:
        """Note how far it has come, when all of that is on the disk."""
        with _writing(self.path):
            os.fsync(self._descriptor)
            write_json(_journal(self.path), {"plan": self.plan.digest, "done": self.done})

    def finish(self) -> None:
        """Give the file, all of whose examples are written, its hash and its name."""
        assert self.done == len(self.plan.examples)
        with _writing(self.path):
            digest = _hash(_part(self.path), len(self.plan.header()), lambda count: None)
            self._put(0, self.plan.header(digest))
            os.fsync(self._descriptor)
            os.replace(_part(self.path), self.path)
            _journal(self.path).unlink(missing_ok=True)
            sync(self.path.absolute().parent)

    def _put(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written


class TeacherLogits:
    """A whole file, checked, read position by position.

    Attributes:
        about: its metadata.
    """

    def __init__(self, path: Path, advance: Advance = lambda count: None) -> None:
        """Open a file.

        Args:
            advance: called with the bytes that were checked.

        Raises:
            TrainingError: where it is not what was written.
        """
        self.path = path
        try:
            tensors = dict(list_tensors(path))
            with safe_open(str(path), framework="numpy") as opened:
                self.about: dict[str, str] = opened.metadata() or {}
        except CheckpointError as error:
            raise self._damaged(str(error)) from error
        if self.about.get("format") != FORMAT:
            raise TrainingError(
                f"{path} holds no teacher's probabilities that this version of phimlx reads.",
                hint="Choose another --teacher-data, or remove the file: it is made again.",
            )
        try:
            self.vocab_size, self.k = int(self.about["vocab_size"]), int(self.about["k"])
            self.temperature = float(self.about["temperature"])
            self.teacher, self.content = self.about["teacher"], self.about["sha256"]
            count, positions = (tensors[name].shape[0] for name in ("examples", "rest"))
        except (KeyError, ValueError, IndexError):
            raise self._damaged("its header is incomplete") from None
        expected = _shapes(count, positions, self.k, self.vocab_size)
        if {name: (info.dtype, info.shape) for name, info in tensors.items()} != expected:
            raise self._damaged("its arrays have other shapes than its header says")
        start = min(info.offset for info in tensors.values())
        with translate_read_errors(path, TrainingError):
            if _hash(path, start, advance) != self.content:
                raise self._damaged("its contents are not what was written")
            maps = {
                name: np.memmap(path, TYPES[info.dtype], "r", info.offset, info.shape)
                for name, info in tensors.items()
                if info.shape[0]
            }
        if len(maps) < len(tensors):
            raise self._damaged("it holds nothing")
        self._tokens, self._logs, self._rest = (maps[name] for name in ("tokens", "logs", "rest"))
        offsets = np.array(maps["offsets"])
        if offsets[0] or offsets[-1] != positions or (np.diff(offsets) < 0).any():
            raise self._damaged("its examples have no places")
        digests = [bytes(each) for each in np.array(maps["examples"])]
        self._places = {
            digest: (int(first), int(last))
            for digest, first, last in zip(digests, offsets[:-1], offsets[1:], strict=True)
        }

    def __contains__(self, example: Example) -> bool:
        first, last = self._places.get(digest_of(example), (0, -1))
        return last - first == positions_of(example)

    def place(self, example: Example) -> int:
        """Find where the positions of an example begin."""
        return self._places[digest_of(example)][0]

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read positions.

        Returns:
            Tokens int32 `[n, k]`, and log-probabilities float32 `[n, k + 1]` of these and the rest.

        Raises:
            TrainingError: where they are none.
        """
        tokens = self._tokens[rows].astype(np.int64)
        logs = self._logs[rows].astype(np.float32)
        logs = np.concatenate([logs, self._rest[rows][:, None]], axis=-1)
        if tokens.max(initial=0) >= self.vocab_size or not np.isfinite(logs).all():
            raise self._damaged("it holds tokens or probabilities that are none")
        largest = logs.max(axis=-1, keepdims=True)
        total = np.log(np.exp(logs - largest).sum(axis=-1, keepdims=True))
        return tokens.astype(np.int32), (logs - largest) - total

    def _damaged(self, reason: str) -> TrainingError:
        return TrainingError(
            f"{self.path} cannot be used: {reason}.",
            hint="Remove it: the teacher then computes it again.",
        )


def _shapes(examples: int, positions: int, k: int, vocab_size: int) -> Shapes:
    tokens = "U16" if vocab_size <= SMALL_VOCABULARY else "U32"
    return {
        "offsets": ("I64", (examples + 1,)),
        "rest": ("F32", (positions,)),
        "examples": ("U8", (examples, 32)),
        "tokens": (tokens, (positions, k)),
        "logs": ("F16", (positions, k)),
    }


def _size(shape: tuple[str, tuple[int, ...]]) -> int:
    kind, dimensions = shape
    return int(np.dtype(TYPES[kind]).itemsize * np.prod(dimensions, dtype=np.int64))


def _hash(path: Path, start: int, advance: Advance) -> str:
    """SHA-256 of a file from a place on."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while data := file.read(HASHED_AT_ONCE):
            found.update(data)
            advance(len(data))
    return found.hexdigest()


def _progress(journal: Path, plan: LogitsPlan) -> int:
    """Examples that a run of the same plan has brought to the disk."""
    try:
        found = read_json(journal, TrainingError, missing_ok=True)
    except TrainingError:
        return 0
    done = found.get("done")
    if found.get("plan") != plan.digest or type(done) is not int:
        return 0
    return done if 0 <= done <= len(plan.examples) else 0


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}.part.json")


def _writing(path: Path) -> Any:
    return translate_write_errors(
        path,
        TrainingError,
        hint="Choose another --teacher-data.",
        when_full="Free some space, then start the same command again: it goes on from there.",
    )
