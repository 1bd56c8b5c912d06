"""The thread that computes: MLX runs in it and nowhere else, for a stream belongs to its thread.

Tasks run between steps; engines with requests are stepped in turn. What comes of a step is handed
to the event loop at once.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar
from weakref import WeakSet

from phimlx.generation.engine import Engine
from phimlx.generation.reply import Chunk
from phimlx.generation.request import Request
from phimlx.machine.exiting import COMPUTING
from phimlx.server.errors import shutting_down

STOP_SECONDS = 10.0  # for a step to end when the thread is to stop

log = logging.getLogger("phimlx.server")
Result = TypeVar("Result")


Step = tuple["Generation", list[Chunk], bool]
"""What a step of an engine gave a request, and whether that was the last of it."""


class Generation:
    """A reply under way, as the event loop sees it.

    Attributes:
        request: whose reply it is; to be read once it has ended.
        came: where its steps go.
    """

    def __init__(self, request: Request, engine: Engine, came: asyncio.Queue[Step]) -> None:
        self.request = request
        self.engine = engine
        self.came = came
        self.error: BaseException | None = None

    def put(self, chunks: list[Chunk], ended: bool) -> None:
        """Take what a step gave; called on the event loop."""
        self.came.put_nowait((self, chunks, ended))


class Worker:
    """A thread that steps engines, and goes on whatever happens in a step.

    Attributes:
        loop: that requests come from.
        restarts: how often something that nobody expected ended its loop, or the thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.restarts = 0
        self.loop = loop
        self._tasks: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._active: dict[Request, Generation] = {}
        self._stopping = self._ending = False
        self._busy_since: float | None = None
        self._thread = self._make_thread()

    def _make_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name="phimlx-worker", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def busy_seconds(self) -> float:
        """For how long the step or task has been running that runs now; 0 where none does."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def start(self) -> None:
        _started.add(self)
        self._thread.start()

    def hold(self) -> None:
        """Let the thread stand still after the step that runs, for the process ends."""
        self._tasks.put(COMPUTING.hold)

    def end_requests(self) -> None:
        """End every request, and take no more."""
        self._ending = True
        self._tasks.put(lambda: self._fail(list(self._active), shutting_down()))

    def stop(self) -> None:
        """End every request, then the thread; returns when it has ended, or hangs."""
        self._stopping = True
        self._tasks.put(None)
        self._thread.join(STOP_SECONDS)

    def revive(self) -> None:
        """Start a thread in place of one that has died, whose requests end."""
        self.restarts += 1
        self._busy_since = None
        requests, self._active = self._active, {}
        for generation in requests.values():
            generation.request.cancel()
            generation.error = generation.error or RuntimeError("the worker died")
            generation.put([], ended=True)
        self._thread = self._make_thread()
        self._thread.start()

    async def call(self, function: Callable[[], Result]) -> Result:
        """Run a function in the thread, between two steps; raises what it raises."""
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._tasks.put(run)
        return await asyncio.wrap_future(future)

    async def add(self, generations: Sequence[Generation]) -> None:
        """Let requests join their engines' batches.

        Raises:
            RequestError: where the server stops, and what `Engine.add` does.
        """

        def join() -> None:
            if self._ending:
                raise shutting_down()
            for generation in generations:
                generation.engine.add(generation.request)
                self._active[generation.request] = generation

        await self.call(join)

    def cancel(self, generation: Generation) -> None:
        """End a request; its row is free before the next step."""
        self._tasks.put(lambda: generation.engine.cancel(generation.request))

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._work()
            except BaseException as error:  # the thread must not die: every client would wait
                log.exception("the worker failed and goes on")
                self.restarts += 1
                self._fail(list(self._active), error)
        self._fail(list(self._active), shutting_down())

    def _work(self) -> None:
        while not self._stopping:
            while not self._active or not self._tasks.empty():
                task = self._tasks.get()
                if task is None:
                    return
                self._busy_since = time.monotonic()
                with COMPUTING:
                    task()
                self._deliver({})
                self._busy_since = None
            for engine in {generation.engine: None for generation in self._active.values()}:
                self._busy_since = time.monotonic()
                self._step(engine)
            self._busy_since = None

    def _step(self, engine: Engine) -> None:
        came: dict[Request, list[Chunk]] = {}
        try:
            for request, chunk in engine.step():
                came.setdefault(request, []).append(chunk)
        except Exception as error:
            log.exception("a step failed")
            own = [request for request, each in self._active.items() if each.engine is engine]
            self._fail(own, error)
        self._deliver(came)

    def _fail(self, requests: list[Request], error: BaseException) -> None:
        for request in requests:
            self._active[request].error = error
            request.cancel()
        self._deliver({})

    def _deliver(self, came: dict[Request, list[Chunk]]) -> None:
        """Hand chunks to the event loop, and let go of requests that have ended."""
        deliveries = []
        ended = [request for request in self._active if request.finished]
        for request in {**came, **dict.fromkeys(ended)}:
            generation = self._active.get(request)
            if generation is not None:
                generation.error = generation.error or request.error
                deliveries.append((generation, came.get(request, []), request.finished))
        for request in ended:
            del self._active[request]
        if deliveries and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(_put_all, deliveries)


_started: WeakSet[Worker] = WeakSet()


@atexit.register
def _hold_all() -> None:
    for worker in _started:
        worker.hold()


def _put_all(deliveries: list[tuple[Generation, list[Chunk], bool]]) -> None:
    for generation, chunks, ended in deliveries:
        generation.put(chunks, ended)
