"""One model on several machines: the first loads it and leads, the others load their part too."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from phimlx.checkpoint.folder import DTYPES, Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import CheckpointError, ConfigError, PhimlxError
from phimlx.files import translate_read_errors
from phimlx.hub.resolve import resolve
from phimlx.machine.processes import MachineLostError, ProcessGroup
from phimlx.models.base import CausalLM
from phimlx.models.lockstep import Follower, Leader

SAMPLES = 256  # places of each file that are compared
SAMPLE_BYTES = 4096


class Machines:
    """The machines that share a model, as the first of them sees them."""

    def __init__(self, processes: ProcessGroup) -> None:
        self._processes = processes
        self._processes.watchdog.idle = True
        self._leader: Leader | None = None
        self._ended = False

    def load(
        self,
        source: str | Path | None,
        rope_scaling: Mapping[str, Any] | None,
        checkpoint: Checkpoint,
        dtype: mx.Dtype | None = None,
    ) -> CausalLM:
        """Load a model, of which each machine reads its own part.

        Args:
            source: by which the others find it, too.
            rope_scaling: in place of its config's own.

        Raises:
            ConfigError, CheckpointError: as `load_model`, and where another machine has not the
                same files or cannot load its part.
            MachineLostError: where one is gone.
        """
        if self._leader is not None or self._ended:
            raise ConfigError("The machines share a model already, and load no other one.")
        told = {
            "source": _place(source),
            "rope_scaling": None if rope_scaling is None else dict(rope_scaling),
            "dtype": None
            if dtype is None
            else {each: name for name, each in DTYPES.items()}[dtype],
            "digest": sampled_digest(checkpoint),
        }
        self._ended = True  # should anything fail from here on, the others are gone
        self._processes.watchdog.idle = False
        self._processes.broadcast_json(told)
        model = _load_together(self._processes, lambda: checkpoint, dtype)
        self._processes.watchdog.idle = True
        self._ended = False
        model.leader = self._leader = Leader(self._processes)
        return model

    def end(self) -> None:
        """Let the other machines go."""
        if self._leader is not None:
            self._leader.end()
        elif not self._ended:
            self._processes.broadcast_json(None)
        self._ended = True


class Peers:
    """Machines that share a model and do the same with it; none of them leads."""

    def __init__(self, processes: ProcessGroup) -> None:
        self._processes = processes

    def load(
        self,
        source: str | Path | None,
        rope_scaling: Mapping[str, Any] | None,
        checkpoint: Checkpoint,
        dtype: mx.Dtype | None = None,
    ) -> CausalLM:
        """Load this machine's part; arguments and errors as of `Machines.load`."""
        first = self._processes.broadcast_json(sampled_digest(checkpoint))
        find = partial(_same, checkpoint, first)
        return _load_together(self._processes, find, dtype)


def _same(checkpoint: Checkpoint, digest: str) -> Checkpoint:
    """Check that a machine has the first one's model."""
    if sampled_digest(checkpoint) != digest:
        raise CheckpointError(
            f"{checkpoint.folder} holds another model than the first machine's.",
            hint="Copy the model's folder there, or download or convert it again on both.",
        )
    return checkpoint


def follow(processes: ProcessGroup) -> None:
    """Load a part of what the first machine loads, and compute with it until it lets go.

    Where a machine cannot load its part, the first one says so, and this returns.

    Raises:
        MachineLostError: where another machine is gone.
    """
    told = processes.broadcast_json(None)
    if told is None:
        return

    def find() -> Checkpoint:
        checkpoint = Checkpoint(resolve(told["source"]), told["rope_scaling"])
        return _same(checkpoint, told["digest"])

    dtype = None if told["dtype"] is None else DTYPES[told["dtype"]]
    try:
        model = _load_together(processes, find, dtype)
    except MachineLostError:
        raise
    except PhimlxError:
        return
    Follower(model, processes).follow()


def _load_together(
    processes: ProcessGroup, find: Callable[[], Checkpoint], dtype: mx.Dtype | None
) -> CausalLM:
    """Load this machine's part, and hear whether all others have theirs."""
    error: PhimlxError | None = None
    try:
        model = load_model(find(), dtype, processes.group)
    except PhimlxError as failed:
        error = failed
    said = json.dumps(None if error is None else [str(error), error.hint])
    heard = [json.loads(each) for each in processes.gather(said)]
    if error is not None:
        raise error
    for number, problem in enumerate(heard, 1):
        if problem is not None:
            sentence, hint = problem
            raise CheckpointError(f"Machine {number} of {len(heard)}: {sentence}", hint=hint)
    return model


def sampled_digest(checkpoint: Checkpoint) -> str:
    """Tell a model's files from others' by their config, their tensors and samples of all files."""
    found = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        found.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
    for path in checkpoint.files:
        with translate_read_errors(path, CheckpointError), path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            found.update(f"{path.name} {size}\n".encode())
            for place in range(SAMPLES):
                file.seek(size * place // SAMPLES)
                found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()


def shares_no_adapter() -> ConfigError:
    """The error for adapters, which machines do not share yet."""
    return ConfigError(
        "Machines that share a model use it without adapters.",
        hint="Fuse the adapter into the model first: phimlx fuse --model MODEL --adapter-path "
        "ADAPTER --mlx-path FOLDER",
    )


def _place(source: str | Path | None) -> str | None:
    """Name a model so that others find it: a folder by its whole path."""
    if source is None:
        return None
    folder = Path(os.path.expanduser(source))
    return str(folder.resolve()) if folder.is_dir() else str(source)
