"""A run's folder: what the run is, its checkpoints, each whole or not there, and its result."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from phimlx.adapters.files import CONFIG, check_finite
from phimlx.adapters.mlx_lm import WEIGHTS
from phimlx.checkpoint.arrays import write_arrays
from phimlx.checkpoint.header import list_tensors
from phimlx.errors import CheckpointError, TrainingError
from phimlx.files import read_json, replacing, sync, translate_write_errors, write_file, write_json
from phimlx.machine.processes import ProcessGroup

RUN = "run.json"
MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.safetensors"
CHECKPOINTS = "checkpoints"
ENDED = "ended"  # in run.json, where nothing is left to be done
NAME = re.compile(r"step-(\d{7,})")
NAME_OF_FILE = re.compile(r"[\w-]+\.\w+")
FORMAT = 2
Shapes = Mapping[str, tuple[int, ...]]

TAKEN = {RUN: "a run", WEIGHTS: "an adapter", "config.json": "a model"}


@dataclass(frozen=True)
class SavedCheckpoint:
    """A whole checkpoint.

    Attributes:
        state: what the run wrote into it beside the arrays.
    """

    folder: Path
    step: int
    state: dict[str, Any]


@dataclass(frozen=True)
class DamagedCheckpoint:
    """A checkpoint that is not whole: `reason` is a sentence that says why."""

    folder: Path
    step: int
    reason: str


class RunFolder:
    """The folder of one run, which one process at a time writes into.

    ```
    run.json                what is trained on what, and how
    adapters.safetensors    of the best checkpoint, of the last one where there is no validation
    adapter_config.json     what they are
    checkpoints/step-N/     both again, optimizer.safetensors and, written last, manifest.json
    ```

    Args:
        keep: how many of the newest checkpoints stay.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.keep = keep

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder, so that no other run writes into it; make it where it is not there.

        Raises:
            TrainingError: where another process holds it, or it cannot be written.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainingError(
                    f"Another run is writing to {self.path}.",
                    hint="Wait for it, stop it, or choose another --adapter-path.",
                ) from None
            for partial in self._checkpoints.glob(".*.partial"):
                shutil.rmtree(partial)
            yield
        finally:
            os.close(descriptor)

    def refuse_existing(self) -> None:
        """Raise TrainingError where the folder holds a run, an adapter or a model."""
        for name, what in TAKEN.items():
            if (self.path / name).exists():
                raise TrainingError(
                    f"{self.path} holds {what} already.",
                    hint="Go on with a run by --resume, or choose another --adapter-path.",
                )

    def begin(self, description: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Write what the run is, and what its adapter will be."""
        with writing(self.path):
            write_json(self.path / CONFIG, config)
            write_json(self.path / RUN, {"format": FORMAT, **description})

    def description(self) -> dict[str, Any]:
        """Read what the run is.

        Raises:
            TrainingError: where the folder holds none.
        """
        path = self.path / RUN
        found = read_json(path, TrainingError, missing_ok=True)
        if not found:
            raise TrainingError(
                f"{self.path} holds no run to go on with.",
                hint="Name its folder with --adapter-path, or leave --resume out.",
            )
        if found.get("format") != FORMAT:
            raise TrainingError(f"{path} is of another version of phimlx.")
        for name, kind in (("settings", dict), ("model", str), ("data", dict)):
            if not isinstance(found.get(name), kind):
                raise damaged(path)
        try:
            json.dumps(found, allow_nan=False)  # as it will be written again
        except (ValueError, RecursionError):
            raise damaged(path) from None
        return found

    def checkpoints(self) -> list[SavedCheckpoint]:
        """Return the whole checkpoints, oldest first."""
        return [each for each in self._found() if isinstance(each, SavedCheckpoint)]

    def damaged(self, after: int) -> list[DamagedCheckpoint]:
        """Return the checkpoints beyond a step that are there and not whole, oldest first."""
        # Those before it may be what was being removed when a run was killed.
        found = (each for each in self._found() if isinstance(each, DamagedCheckpoint))
        return [each for each in found if each.step > after]

    def _found(self) -> list[SavedCheckpoint | DamagedCheckpoint]:
        found: list[SavedCheckpoint | DamagedCheckpoint] = []
        for folder in self._checkpoints.glob("step-*"):
            name = NAME.fullmatch(folder.name)
            if name is None:
                continue
            step = int(name[1])
            try:
                found.append(SavedCheckpoint(folder, step, _read_state(folder)))
            except TrainingError as error:
                found.append(DamagedCheckpoint(folder, step, str(error)))
        return sorted(found, key=lambda each: each.step)

    def save(
        self, step: int, weights: Any, optimizer: Any, state: Mapping[str, Any], best: int | None
    ) -> None:
        """Add a checkpoint; then forget what is older than the newest few and not the best.

        Args:
            weights, optimizer: trees of arrays.
            best: step of the best checkpoint so far, which may be this one.

        Raises:
            TrainingError: where it cannot be written; those before it stay whole.
        """
        final = self._checkpoint(step)
        partial = _partial(final)
        with writing(self.path):
            try:
                partial.mkdir(parents=True)
                write_arrays(partial / WEIGHTS, dict(tree_flatten(weights)))
                write_arrays(partial / OPTIMIZER, dict(tree_flatten(optimizer)))
                write_file(partial / CONFIG, (self.path / CONFIG).read_bytes())
                sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
                manifest = {"format": FORMAT, "step": step, "files": sizes, "state": state}
                write_json(partial / MANIFEST, manifest)
                if final.exists():  # damaged, or the run had begun after it
                    shutil.rmtree(final)
                partial.rename(final)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            sync(self._checkpoints)
        if best is None or best == step:
            self.publish(step)
        self.forget(best)

    def publish(self, step: int) -> None:
        """Put a checkpoint's weights where a reader of the whole folder finds them.

        Raises:
            TrainingError: where they cannot be written.
        """
        weights, place = self._checkpoint(step) / WEIGHTS, self.path / WEIGHTS
        if place.exists() and place.samefile(weights):
            return  # renaming one link to a file over another does nothing, and leaves both
        with writing(self.path), replacing(place) as temporary:
            temporary.unlink()
            try:
                os.link(weights, temporary)
            except OSError:  # a file system without links
                shutil.copyfile(weights, temporary)

    def forget(self, best: int | None) -> None:
        """Remove the checkpoints that are older than the newest few and not the best."""
        with writing(self.path):
            for old in self.checkpoints()[: -self.keep]:
                if old.step != best:
                    # Renamed first: half a checkpoint must not look like a whole one.
                    shutil.rmtree(old.folder.rename(_partial(old.folder)))

    def end(self, ending: str) -> None:
        """Note that nothing is left to be done: the run came to an end, and all of it is here."""
        with writing(self.path):
            write_json(self.path / RUN, {**self.description(), ENDED: ending})

    def load(
        self, saved: SavedCheckpoint, weights: Shapes, optimizer: Shapes, processes: ProcessGroup
    ) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
        """Weights and the optimizer's arrays of a checkpoint by name, which the main process has.

        Args:
            weights, optimizer: the shapes that they have to have, by name.

        Raises:
            TrainingError: where it is damaged.
        """
        loaded = []
        for name, expected in ((WEIGHTS, weights), (OPTIMIZER, optimizer)):
            arrays = read_arrays(saved.folder / name, processes)
            if {key: array.shape for key, array in arrays.items()} != expected:
                raise damaged(saved.folder / name)
            loaded.append(arrays)
        return loaded[0], loaded[1]

    def _checkpoint(self, step: int) -> Path:
        return self._checkpoints / f"step-{step:07d}"

    @property
    def _checkpoints(self) -> Path:
        return self.path / CHECKPOINTS


def _partial(checkpoint: Path) -> Path:
    """Name a checkpoint while it comes or goes; what has such a name is nobody's."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def _read_state(folder: Path) -> dict[str, Any]:
    """Return the state that a checkpoint holds; raise TrainingError where it is not whole."""
    path = folder / MANIFEST
    manifest = read_json(path, TrainingError)
    if manifest.get("format") != FORMAT:
        raise TrainingError(f"{path} is of another version of phimlx.")
    files, state = manifest.get("files"), manifest.get("state")
    if not isinstance(files, dict) or not isinstance(state, dict):
        raise TrainingError(f"{path} names no files or no state.")
    for name, size in files.items():
        file = folder / name
        if type(size) is not int or not NAME_OF_FILE.fullmatch(name):
            raise TrainingError(f"{path} is damaged.")
        actual = file.stat().st_size if file.is_file() else None
        if actual is None:
            raise TrainingError(f"There is no file {file}.")
        if actual != size:
            raise TrainingError(f"{file} has {actual:,} bytes, but {size:,} were written.")
    return state


def read_arrays(path: Path, processes: ProcessGroup) -> dict[str, mx.array]:
    """Read arrays by name from a file that the main process has; raise TrainingError if damaged."""
    if processes.is_main:
        try:
            for _ in list_tensors(path):  # safetensors' own parser sees it before MLX does
                pass
        except CheckpointError as error:
            raise damaged(path) from error
    if processes.group is None:
        arrays = _load(path, str(path))
    else:
        data = processes.broadcast(path.read_bytes() if processes.is_main else b"")
        arrays = _load(path, io.BytesIO(data))
    try:
        check_finite(arrays)
    except CheckpointError as error:
        raise damaged(path) from error
    return arrays


def _load(path: Path, source: str | io.BytesIO) -> dict[str, mx.array]:
    try:
        arrays = mx.load(source, format="safetensors")
    except RuntimeError as error:
        raise damaged(path) from error
    assert isinstance(arrays, dict)
    return arrays


def damaged(path: Path) -> TrainingError:
    """Make the error of a run's file that is not what was written."""
    hint = "Put it back as it was, or choose another --adapter-path for a new run."
    if NAME.fullmatch(path.parent.name):
        hint = f"Remove {path.parent}: the run then goes on from the checkpoint before it."
    return TrainingError(f"{path} is damaged.", hint=hint)


def writing(folder: Path) -> AbstractContextManager[None]:
    """Turn OSErrors of the block into a sentence that says why the folder cannot be written."""
    return translate_write_errors(
        folder,
        TrainingError,
        hint="Choose another --adapter-path.",
        when_full="Free some space, then go on with --resume: earlier checkpoints are whole.",
    )
