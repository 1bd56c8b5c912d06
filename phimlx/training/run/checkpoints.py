"""A run's folder: what the run is, its checkpoints, each whole or not there, and what it learned.

Knows files and arrays by name; knows nothing of models, steps or losses.
"""

from __future__ import annotations

import contextlib
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
from mlx.utils import tree_flatten, tree_unflatten

from phimlx.adapters.files import CONFIG
from phimlx.adapters.mlx_lm import WEIGHTS
from phimlx.errors import TrainingError
from phimlx.files import read_json, replacing, sync, translate_write_errors, write_file, write_json
from phimlx.training.distributed import Machines

RUN = "run.json"
MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.safetensors"
CHECKPOINTS = "checkpoints"
NAME = re.compile(r"step-(\d{7,})")
FORMAT = 2
TAKEN = {RUN: "a run", WEIGHTS: "an adapter", "config.json": "a model"}


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint.

    Attributes:
        state: what the run wrote into it beside the arrays.
    """

    folder: Path
    step: int
    state: dict[str, Any]


class Store:
    """The folder of one run, held by one process at a time.

    ```
    run.json                what is trained on what, and how
    adapters.safetensors    of the best checkpoint, of the last one where there is no validation
    adapter_config.json     what they are
    checkpoints/step-N/     both again, optimizer.safetensors and, written last, manifest.json
    ```

    Args:
        keep: how many of the newest checkpoints stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder, so that no other run writes into it; make it where it is not there.

        Raises:
            TrainingError: where another process holds it, or it cannot be written.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainingError(
                    f"Another run is writing to {self.folder}.",
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
            if (self.folder / name).exists():
                raise TrainingError(
                    f"{self.folder} holds {what} already.",
                    hint="Go on with a run by --resume, or choose another --adapter-path.",
                )

    def begin(self, about: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Note what the run is, and what its adapter will be."""
        with writing(self.folder):
            write_json(self.folder / CONFIG, config)
            write_json(self.folder / RUN, {"format": FORMAT, **about})

    def about(self) -> dict[str, Any]:
        """What the run is.

        Raises:
            TrainingError: where the folder holds none.
        """
        path = self.folder / RUN
        about = read_json(path, TrainingError, missing_ok=True)
        if not about:
            raise TrainingError(
                f"{self.folder} holds no run to go on with.",
                hint="Name its folder with --adapter-path, or leave --resume out.",
            )
        if about.get("format") != FORMAT:
            raise TrainingError(f"{path} is of another version of phimlx.")
        return about

    def saved(self) -> list[Saved]:
        """The whole checkpoints, oldest first. A folder that is not whole does not count."""
        found = []
        for folder in self._checkpoints.glob("step-*"):
            name = NAME.fullmatch(folder.name)
            with contextlib.suppress(OSError, ValueError, KeyError):
                manifest = json.loads((folder / MANIFEST).read_bytes())
                whole = all(
                    (folder / file).stat().st_size == size
                    for file, size in manifest["files"].items()
                )
                if name and whole and manifest["format"] == FORMAT:
                    found.append(Saved(folder, int(name[1]), manifest["state"]))
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
        final = self._checkpoints / f"step-{step:07d}"
        partial = self._checkpoints / f".{final.name}.partial"
        with writing(self.folder):
            try:
                partial.mkdir(parents=True)
                write_arrays(partial / WEIGHTS, weights)
                write_arrays(partial / OPTIMIZER, optimizer)
                write_file(partial / CONFIG, (self.folder / CONFIG).read_bytes())
                sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
                manifest = {"format": FORMAT, "step": step, "files": sizes, "state": state}
                write_json(partial / MANIFEST, manifest)
                if final.exists():  # not whole, or `saved` had found it
                    shutil.rmtree(final)
                partial.rename(final)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            sync(self._checkpoints)
            if best is None or best == step:
                self._publish(final / WEIGHTS)
        whole = self.saved()
        for old in whole[: -self.keep]:
            if old.step != best:
                # Its manifest first: half a checkpoint must not look like a whole one.
                (old.folder / MANIFEST).unlink()
                shutil.rmtree(old.folder)

    def load(self, saved: Saved, machines: Machines) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """Weights by name and the optimizer's tree of a checkpoint, which the first machine has."""
        weights, optimizer = (
            read_arrays(saved.folder / name, machines) for name in (WEIGHTS, OPTIMIZER)
        )
        return weights, tree_unflatten(list(optimizer.items()))

    def _publish(self, weights: Path) -> None:
        """Put a checkpoint's weights where a reader of the whole folder finds them."""
        with replacing(self.folder / WEIGHTS) as temporary:
            temporary.unlink()
            try:
                os.link(weights, temporary)
            except OSError:  # a file system without links
                shutil.copyfile(weights, temporary)

    @property
    def _checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS


class _Stream(io.FileIO):
    """A file that remembers why it could not be written, which MLX does not tell."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data)
        try:
            while view:
                view = view[super().write(view) :]
        except OSError as error:
            self.failure = error
            raise
        return memoryview(data).nbytes


def read_arrays(path: Path, machines: Machines) -> dict[str, mx.array]:
    """Arrays by name of a file that the first machine has."""
    if machines.group is None:
        arrays = mx.load(str(path))
    else:
        data = machines.share(path.read_bytes() if machines.is_first else b"")
        arrays = mx.load(io.BytesIO(data), format="safetensors")
    assert isinstance(arrays, dict)
    return arrays


def write_arrays(path: Path, tree: Any) -> None:
    """A tree of arrays as safetensors, on the disk when this returns; raises OSError."""
    with _Stream(path, "w") as stream:
        try:
            mx.save_safetensors(stream, dict(tree_flatten(tree)), {"format": "mlx"})
        except RuntimeError:
            if stream.failure is None:
                raise
            raise stream.failure from None
        os.fsync(stream.fileno())


def writing(folder: Path) -> AbstractContextManager[None]:
    """Say in a sentence why the folder cannot be written."""
    return translate_write_errors(
        folder,
        TrainingError,
        hint="Choose another --adapter-path.",
        when_full="Free some space, then go on with --resume: earlier checkpoints are whole.",
    )
