"""The models in memory: loaded on demand, beside each other where they fit, and unloaded."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx

from phimlx.api import Phi
from phimlx.errors import ModelNotFoundError, PhimlxError
from phimlx.generation.engine import Engine
from phimlx.machine.memory import cache_bytes, machine_memory
from phimlx.models.lora import DEFAULT
from phimlx.server.errors import RequestError
from phimlx.server.served import Served, list_served
from phimlx.server.settings import ServerSettings
from phimlx.server.worker import Worker
from phimlx.shared_model import Machines
from phimlx.sizes import size_text

log = logging.getLogger("phimlx.server")


@dataclass(eq=False)
class Loaded:
    """A model in memory, or an adapter beside it.

    Attributes:
        base: the model that has the adapter; None for a model.
        keep_alive: seconds for which it stays when nobody uses it; infinite for ever.
        users: requests that are using it, with adapters or without.
        last_used: by `time.monotonic`, when the last of them went.
    """

    served: Served
    phi: Phi
    keep_alive: float
    base: Loaded | None = None
    users: int = 0
    last_used: float = field(default_factory=time.monotonic)

    @property
    def adapter(self) -> str:
        """Which adapter its requests name."""
        return self.served.label or DEFAULT

    @property
    def remaining(self) -> float:
        """Seconds until it is unloaded, if nobody asks for it."""
        used = time.monotonic() if self.users else self.last_used
        return used + self.keep_alive - time.monotonic()

    def hold(self, keep_alive: float | None = None) -> None:
        """Count a request more; `keep_alive` as `Models.use` takes it."""
        self.users += 1
        if keep_alive is not None:
            self.keep_alive = keep_alive
        if self.base is not None:
            self.base.hold(None if keep_alive is None else max(keep_alive, self.base.keep_alive))

    def let_go(self) -> None:
        """Count a request less."""
        self.users -= 1
        self.last_used = time.monotonic()
        if self.base is not None:
            self.base.let_go()


class Models:
    """Finds, loads and unloads models and adapters. Used from the event loop alone.

    Args:
        settings: what is served, `keep_alive`, `batch_size`.
        worker: loads them, in its thread.
        machines: which share them; None where this one has them whole.

    Raises:
        PhimlxError: as `list_served`.
    """

    def __init__(
        self, settings: ServerSettings, worker: Worker, machines: Machines | None = None
    ) -> None:
        self._settings = settings
        self._worker = worker
        self._machines = machines
        served = list_served(settings)
        self._fixed = None if settings.model is None else served
        self._loaded: dict[str, Loaded] = {}
        self._loading = asyncio.Lock()
        self._releasing: asyncio.Future[None] | None = None

    @property
    def loaded(self) -> list[Loaded]:
        """Models and adapters in memory."""
        return list(self._loaded.values())

    def list(self) -> list[Served]:
        """List what may be asked for, by name."""
        return list_served(self._settings) if self._fixed is None else self._fixed

    def find(self, name: str) -> Served:
        """Find the model that a request names; a path means none.

        Raises:
            ModelNotFoundError: where it is not here.
        """
        for loaded in self.loaded:
            if loaded.served.is_called(name):
                return loaded.served
        models = self.list()
        for model in models:
            if model.is_called(name):
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
        loaded = self._loaded.get(served.name)
        if loaded is not None:
            loaded.hold(keep_alive)
        else:
            async with self._loading:
                loaded = self._loaded.get(served.name) or await self._load(served)
                loaded.hold(keep_alive)
        try:
            yield loaded
        finally:
            loaded.let_go()
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
        """Unload what nobody has used for as long as it is kept."""
        async with self._loading:
            for loaded in self.loaded:
                if not loaded.users and loaded.remaining <= 0 and loaded in self.loaded:
                    await self.unload(loaded)

    async def unload(self, loaded: Loaded) -> None:
        """Let go of a model, and of its adapters with it, or of an adapter, which nobody uses."""
        if loaded.base is not None:
            del self._loaded[loaded.served.name]
            await self._worker.call(lambda: loaded.phi.delete_adapter(loaded.adapter))
        else:
            gone = [each for each in self.loaded if loaded in (each, each.base)]
            for each in gone:
                del self._loaded[each.served.name]

            def free() -> None:
                loaded.phi.engine.save_prefixes()
                for each in gone:
                    del each.phi
                mx.clear_cache()

            await self._worker.call(free)
            await self._share_memory()
        log.info("unloaded %s", loaded.served.name)

    async def save_prefixes(self) -> None:
        """Keep on disk what long prompts have left, for the next time a model is loaded."""
        for loaded in self.loaded:
            if loaded.base is None:
                await self._worker.call(loaded.phi.engine.save_prefixes)

    async def load_again(self) -> None:
        """Load what was in memory anew, as for a worker that has taken the place of one that died.

        What cannot be loaded any more is left out.
        """
        async with self._loading:
            before = self.loaded
            self._loaded.clear()
            for each in before:
                try:
                    if each.served.name not in self._loaded:
                        await self._load(each.served)
                except (PhimlxError, RequestError, RuntimeError):
                    log.exception("%s cannot be loaded again", each.served.name)

    async def _load(self, served: Served) -> Loaded:
        started = time.monotonic()
        base = None
        if served.base is not None:
            base = self._loaded.get(served.base.name) or await self._load(served.base)
            base.hold()
        try:
            await self._make_room(served)
            phi = await self._worker.call(lambda: self._read(served, base))
        finally:
            if base is not None:
                base.let_go()
        loaded = Loaded(served, phi, self._settings.keep_alive, base)
        self._loaded[served.name] = loaded
        await self._share_memory()
        log.info("loaded %s in %.1f s", served.name, time.monotonic() - started)
        return loaded

    def _read(self, served: Served, base: Loaded | None) -> Phi:
        if base is None:
            phi = self._read_model(served)
            store = None if self._settings.no_cache else phi.prefix_store(log.info)
            itemsize = phi.model.compute_dtype.size
            kept = cache_bytes(phi.model.config, self._settings.prefix_tokens, itemsize)
            rows = self._settings.batch_size
            phi.engine = Engine(
                phi.model, phi.engine.pass_cost, rows, prefix_memory=kept, prefixes=store
            )
            return phi
        assert served.adapter is not None
        for remark in base.phi.load_adapter(served.adapter, served.label):
            log.info("%s: %s", served.name, remark)
        return base.phi

    def _read_model(self, served: Served) -> Phi:
        if self._machines is None:
            return Phi(served.folder)
        load_part = partial(self._machines.load, self._settings.model, None, None)
        return Phi(served.folder, load_weights=load_part)

    async def _make_room(self, served: Served) -> None:
        """Unload idle models, the one used longest ago first, until another one fits."""
        needed = await asyncio.to_thread(lambda: served.forecast.total)
        for loaded in sorted(self.loaded, key=lambda each: each.last_used):
            if self._held() + needed <= machine_memory():
                return
            if not loaded.users and loaded in self.loaded:
                await self.unload(loaded)
        if self._loaded and self._held() + needed > machine_memory():
            busy = ", ".join(self._loaded)
            raise RequestError(
                503,
                f"{served.name} takes {size_text(needed)}, which do not fit beside {busy}, in use.",
                code="out_of_memory",
                headers={"Retry-After": "30"},
            )

    def _held(self) -> int:
        return sum(loaded.served.forecast.total for loaded in self.loaded)

    async def _share_memory(self) -> None:
        """Divide what weights leave for keys and values among the models."""
        models = [loaded for loaded in self.loaded if loaded.base is None]
        left = machine_memory() - self._held()

        def share() -> None:
            for loaded in models:
                own = loaded.served.forecast.cache + max(0, left) // len(models)
                loaded.phi.engine.limit_memory(own if len(models) > 1 else None)

        await self._worker.call(share)
