"""One model on several machines: the first loads it and leads, the others load their part too."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from phimlx.adapters.adapter import Adapter
from phimlx.adapters.attach import attach, delete_adapter
from phimlx.checkpoint.folder import DTYPES, Checkpoint
from phimlx.checkpoint.load import load_model, map_model
from phimlx.errors import CheckpointError, ConfigError, MachineLostError, PhimlxError
from phimlx.files import translate_read_errors
from phimlx.hub.content_hash import Contents
from phimlx.hub.layout import place_of
from phimlx.hub.resolve import meant, resolve, resolve_adapter
from phimlx.machine.processes import FIRST_PATIENCE, ProcessGroup
from phimlx.models.base import CausalLM
from phimlx.models.lockstep import Follower, Leader, Lockstep
from phimlx.models.lora import DEFAULT, LoRALinear
from phimlx.models.tensor_parallel import adopt, own_adapter

SAMPLES = 256  # places of each file that are compared
SAMPLE_BYTES = 4096

Result = TypeVar("Result")


class Machines:
    """The machines that share models, as the first of them sees them."""

    def __init__(self, processes: ProcessGroup) -> None:
        self.size = processes.size
        self._lockstep = Lockstep(processes)

    @property
    def lost(self) -> MachineLostError | None:
        """How they lost each other; None while they have not."""
        return self._lockstep.lost

    def on_lost(self, act: Callable[[MachineLostError], object]) -> None:
        """Call a function, in another thread, where one is lost while nobody asks for anything."""
        self._lockstep.on_lost = act

    def load(
        self,
        source: str | Path | None,
        rope_scaling: Mapping[str, Any] | None,
        adapter: Path | None,
        checkpoint: Checkpoint,
        dtype: mx.Dtype | None = None,
    ) -> CausalLM:
        """Load a model, of which each machine reads its own part.

        Args:
            source: by which the others find it, too.
            rope_scaling: in place of its config's own.
            adapter: folder of the one that it is loaded with; None for none.

        Raises:
            ConfigError, CheckpointError: as `load_model` and `load_adapter`, and where another
                machine has not the same files or cannot load its part.
            MachineLostError: where one is gone.
        """
        names = {each: name for name, each in DTYPES.items()}
        told = {
            "source": _place(None if source is None else meant(source)),
            "rope_scaling": None if rope_scaling is None else dict(rope_scaling),
            "dtype": None if dtype is None else names[dtype],
            "digest": sampled_digest(checkpoint),
            "adapter": _told_adapter(adapter),
        }
        key, processes = self._lockstep.new_key(), self._lockstep.processes
        with self._lockstep.together("load", key, told):
            part = _Part(checkpoint, dtype, processes)
            model = _all_do(processes, lambda: part.load(adapter))
        weakref.finalize(model, self._lockstep.note, "unload", key).atexit = False
        model.leader = _Leader(self._lockstep, key, part)
        return model

    def end(self) -> None:
        """Let the other machines go.

        Raises:
            MachineLostError: where they have been lost.
        """
        self._lockstep.end()


class Peers:
    """Machines that share a model and do the same with it; none of them leads."""

    def __init__(self, processes: ProcessGroup) -> None:
        self._processes = processes

    def load(
        self,
        source: str | Path | None,
        rope_scaling: Mapping[str, Any] | None,
        adapter: Path | None,
        checkpoint: Checkpoint,
        dtype: mx.Dtype | None = None,
    ) -> CausalLM:
        """Load this machine's part; arguments and errors as of `Machines.load`."""
        if adapter is not None:
            raise ConfigError(
                "Machines that train a model together begin without an adapter.",
                hint="Fuse the adapter into the model first: phimlx fuse --model MODEL "
                "--adapter-path ADAPTER --mlx-path FOLDER",
            )
        first = self._processes.broadcast_json(sampled_digest(checkpoint))
        part = _Part(checkpoint, dtype, self._processes)

        def load() -> CausalLM:
            _check_same(checkpoint, first)
            return part.load(None)

        return _all_do(self._processes, load)


def _check_same(checkpoint: Checkpoint, digest: str) -> None:
    """Check that a machine has the first one's model."""
    if sampled_digest(checkpoint) != digest:
        raise CheckpointError(
            f"{checkpoint.folder} holds another model than the first machine's.",
            hint="Copy the model's folder there, or download or convert it again on both.",
        )


def follow(processes: ProcessGroup) -> None:
    """Load parts of what the first machine loads, and compute with it until it lets go.

    Where this machine cannot load its part, the first one says so.

    Raises:
        MachineLostError: where another machine is gone.
    """
    _Follower(processes).follow()


@dataclass
class _Part:
    """Where a machine's part of a model comes from.

    Attributes:
        adapter: that it was loaded with; None for none.
    """

    checkpoint: Checkpoint
    dtype: mx.Dtype | None
    processes: ProcessGroup
    adapter: Adapter | None = None

    def load(self, adapter: Path | None) -> CausalLM:
        """Load it, with an adapter in a folder."""

        def prepare(model: CausalLM) -> None:
            if adapter is not None:
                self.adapter = self._attach(model, adapter, DEFAULT)

        return load_model(self.checkpoint, self.dtype, self.processes.group, prepare)

    def load_adapter(self, model: CausalLM, find: Callable[[], Path], name: str) -> Adapter:
        """Put one more adapter beside its layers, as all machines do."""
        group = self.processes.group
        assert group is not None

        def read() -> tuple[CausalLM, dict[str, LoRALinear], Adapter]:
            whole = map_model(self.checkpoint)
            if self.dtype is not None:
                whole.set_dtype(self.dtype)
            adapter = self._attach(whole, find(), name)
            return whole, own_adapter(whole, name, group), adapter

        whole, share, adapter = _all_do(self.processes, read)
        adopt(model, whole, share, name)
        return adapter

    def _attach(self, model: CausalLM, adapter: Path, name: str) -> Adapter:
        return attach(model, adapter, self.checkpoint.folder, self.checkpoint.config, name)


class _Leader(Leader):
    """Does one model's passes with the others, and lets them load adapters of it."""

    def __init__(self, lockstep: Lockstep, key: int, part: _Part) -> None:
        super().__init__(lockstep, key)
        self._part = part

    def load_adapter(self, model: CausalLM, folder: Path, name: str) -> Adapter:
        """Load an adapter; arguments and errors as of `adapters.attach.load_adapter`.

        The default one came with the model.
        """
        if name == DEFAULT:
            assert self._part.adapter is not None
            return self._part.adapter
        model.check_adapter(None)
        with self.lockstep.together("load_adapter", self.key, _told_adapter(folder), name):
            return self._part.load_adapter(model, lambda: folder, name)


class _Follower(Follower):
    """Follows, and loads what the leader loads."""

    def __init__(self, processes: ProcessGroup) -> None:
        super().__init__(processes)
        self._parts: dict[int, _Part] = {}

    def _load(self, key: int, told: dict[str, Any]) -> None:
        def load() -> tuple[_Part, CausalLM]:
            checkpoint = Checkpoint(resolve(told["source"]), told["rope_scaling"])
            _check_same(checkpoint, told["digest"])
            dtype = None if told["dtype"] is None else DTYPES[told["dtype"]]
            adapter = None if told["adapter"] is None else _find_adapter(*told["adapter"])
            part = _Part(checkpoint, dtype, self.processes)
            return part, part.load(adapter)

        self._parts[key], self.models[key] = _all_do(self.processes, load)

    def _unload(self, key: int) -> None:
        del self._parts[key], self.models[key]
        mx.clear_cache()

    def _load_adapter(self, key: int, told: list[str], name: str) -> None:
        find = partial(_find_adapter, *told)
        self._parts[key].load_adapter(self.models[key], find, name)

    def _delete_adapter(self, key: int, name: str) -> None:
        delete_adapter(self.models[key], name)
        mx.clear_cache()


def _all_do(processes: ProcessGroup, work: Callable[[], Result]) -> Result:
    """Do this machine's part of something, and hear whether all others have done theirs.

    Raises:
        PhimlxError: as the work; CheckpointError for what another machine's raised.
        MachineLostError: where one is gone.
    """
    error: PhimlxError | None = None
    processes.watchdog.allow(FIRST_PATIENCE)
    try:
        result = work()
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
    return result


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


def _told_adapter(folder: Path | None) -> list[str] | None:
    """Name an adapter for the others, and tell its files from any others."""
    if folder is None:
        return None
    with translate_read_errors(folder, CheckpointError):
        return [str(_place(folder)), Contents(folder).digest]


def _find_adapter(place: str, digest: str) -> Path:
    """Find what `_told_adapter` names."""
    folder = resolve_adapter(place)
    with translate_read_errors(folder, CheckpointError):
        if Contents(folder).digest != digest:
            raise CheckpointError(
                f"{folder} holds another adapter than the first machine's.",
                hint="Copy the adapter's folder there, or download it again on both.",
            )
    return folder


def _place(source: str | Path | None) -> str | None:
    """Name a model or adapter so that others find it: a folder by its whole path."""
    if source is None:
        return None
    folder = Path(os.path.expanduser(source))
    if not folder.is_dir():
        return str(source)
    cached = place_of(folder)
    return str(folder.resolve()) if cached is None else cached[0]
