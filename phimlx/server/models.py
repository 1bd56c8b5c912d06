"""The models that a server answers with: found by name, loaded on demand, unloaded when idle."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from phimlx import catalog
from phimlx.api import Phi
from phimlx.errors import ModelNotFoundError
from phimlx.files import read_json
from phimlx.generation.engine import Engine
from phimlx.hub.cache import list_models
from phimlx.hub.layout import model_name
from phimlx.hub.resolve import NANO, NANO_MULTIMODAL, resolve
from phimlx.machine.memory import machine_memory
from phimlx.server.errors import RequestError
from phimlx.server.settings import ServerSettings
from phimlx.server.worker import Worker
from phimlx.sizes import size_text

log = logging.getLogger("phimlx.server")


@dataclass(frozen=True)
class Served:
    """A model that may be asked for.

    Attributes:
        name: as the server calls it: an alias of the catalogue, a Hub id, or a folder's name.
        folder: where it lies.
        other_names: that mean it too.
    """

    name: str
    folder: Path
    other_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Path, name: str | None = None) -> Served:
        known = catalog.find(name or model_name(folder))
        if known is None:
            return cls(name or folder.resolve().name, folder)
        return cls(known.alias, folder, known.names)

    @property
    def created(self) -> int:
        """When its config came here, in seconds since 1970."""
        return int((self.folder / "config.json").stat().st_mtime)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return read_json(self.folder / "config.json")

    @property
    def context_length(self) -> int:
        """Tokens that prompt and reply may have together."""
        return int(self.config.get("max_position_embeddings", 0))

    @cached_property
    def nbytes(self) -> int:
        """Size of its weights on disk."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))


def list_served(settings: ServerSettings) -> list[Served]:
    """List the models that may be asked for: the one of the settings, or all on this machine.

    Raises:
        ModelNotFoundError, CheckpointError: where that one is none, as `phimlx.load`.
    """
    if settings.model is not None:
        name = settings.model if catalog.find(settings.model) else None
        return [Served.of(resolve(settings.model), name)]
    found = [Served.of(NANO, "nano"), Served.of(NANO_MULTIMODAL, "nano-multimodal")]
    for model in list_models():
        if model.snapshot is not None and not model.is_adapter:
            found.append(Served.of(model.snapshot, model.repository))
    return list({model.name: model for model in found}.values())


@dataclass(eq=False)
class Loaded:
    """A model in memory.

    Attributes:
        keep_alive: seconds for which it stays when nobody uses it; infinite for ever.
        users: requests that are using it.
        last_used: by `time.monotonic`, when the last of them went.
    """

    served: Served
    phi: Phi
    keep_alive: float
    users: int = 0
    last_used: float = field(default_factory=time.monotonic)

    @property
    def remaining(self) -> float:
        """Seconds until it is unloaded, if nobody asks for it."""
        used = time.monotonic() if self.users else self.last_used
        return used + self.keep_alive - time.monotonic()


class Models:
    """Finds, loads and unloads models. Used from the event loop alone.

    Args:
        settings: `model` to serve that one alone, `keep_alive`, `batch_size`.
        worker: loads them, in its thread.
    """

    def __init__(self, settings: ServerSettings, worker: Worker) -> None:
        self._settings = settings
        self._worker = worker
        self._fixed = None if settings.model is None else list_served(settings)
        self._loaded: dict[str, Loaded] = {}
        self._loading = asyncio.Lock()
        self._releasing: asyncio.Future[None] | None = None

    @property
    def loaded(self) -> list[Loaded]:
        return list(self._loaded.values())

    def list(self) -> list[Served]:
        """List the models that may be asked for, by name."""
        return list_served(self._settings) if self._fixed is None else self._fixed

    def find(self, name: str) -> Served:
        """Find the model that a request names; a path means none.

        Raises:
            ModelNotFoundError: where it is not here.
        """
        models = self.list()
        for model in models:
            if name.lower() in {other.lower() for other in (model.name, *model.other_names)}:
                return model
        here = ", ".join(model.name for model in models)
        raise ModelNotFoundError(f"There is no model {name[:100]} here.", f"There are: {here}.")

    @asynccontextmanager
    async def use(self, name: str, keep_alive: float | None = None) -> AsyncIterator[Loaded]:
        """Hold a model in memory for the block; it is loaded where it is not there.

        Args:
            keep_alive: seconds for which it stays afterwards, 0 for not at all; as before where
                None.

        Raises:
            ModelNotFoundError, ConfigError, CheckpointError: as `find` and `phimlx.load`.
            RequestError: 503 where it does not fit beside those that are being used.
        """
        served = self.find(name)
        async with self._loading:
            loaded = self._loaded.get(served.name)
            if loaded is None:
                loaded = await self._load(served)
            loaded.users += 1
            if keep_alive is not None:
                loaded.keep_alive = keep_alive
        try:
            yield loaded
        finally:
            loaded.users -= 1
            loaded.last_used = time.monotonic()
            if loaded.keep_alive == 0:
                # Later, for who used it still refers to it.
                self._releasing = asyncio.ensure_future(self.unload_idle())

    async def release(self, name: str) -> None:
        """Unload a model now, or as soon as nobody uses it. Raises ModelNotFoundError as `find`."""
        loaded = self._loaded.get(self.find(name).name)
        if loaded is not None:
            loaded.keep_alive = 0
            await self.unload_idle()

    async def unload_idle(self) -> None:
        """Unload models that nobody has used for as long as they are kept."""
        async with self._loading:
            for loaded in self.loaded:
                if not loaded.users and loaded.remaining <= 0:
                    await self.unload(loaded)

    async def unload(self, loaded: Loaded) -> None:
        """Let go of a model that nobody uses."""
        del self._loaded[loaded.served.name]
        name = loaded.served.name

        def free() -> None:
            import mlx.core as mx

            del loaded.phi
            mx.clear_cache()

        await self._worker.call(free)
        log.info("unloaded %s", name)

    async def _load(self, served: Served) -> Loaded:
        await self._make_room(served)

        def load() -> Phi:
            phi = Phi(served.folder)
            phi.engine = Engine(phi.model, phi.engine.pass_cost, self._settings.batch_size)
            return phi

        started = time.monotonic()
        phi = await self._worker.call(load)
        loaded = Loaded(served, phi, self._settings.keep_alive)
        self._loaded[served.name] = loaded
        log.info("loaded %s in %.1f s", served.name, time.monotonic() - started)
        return loaded

    async def _make_room(self, served: Served) -> None:
        """Unload idle models, the one used longest ago first, until another one fits."""
        for loaded in sorted(self.loaded, key=lambda each: each.last_used):
            if self._held() + served.nbytes <= machine_memory():
                return
            if not loaded.users:
                await self.unload(loaded)
        if self._loaded and self._held() + served.nbytes > machine_memory():
            busy = ", ".join(self._loaded)
            raise RequestError(
                503,
                f"{served.name} takes {size_text(served.nbytes)}, which do not fit beside {busy}, "
                "in use.",
                code="out_of_memory",
                headers={"Retry-After": "30"},
            )

    def _held(self) -> int:
        return sum(loaded.served.nbytes for loaded in self._loaded.values())
