"""What every dialect asks of the server: a model, a prompt, options, and replies to it."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import mlx.core as mx

from phimlx.api import Phi
from phimlx.generation.options import GenerationOptions, PromptOptions
from phimlx.generation.prompt_reader import Prompt
from phimlx.generation.reply import Chunk, Reply
from phimlx.generation.request import Request
from phimlx.media.limits import Limits
from phimlx.server.errors import RequestError, bad_request, explain, overloaded, shutting_down
from phimlx.server.kept import Kept
from phimlx.server.metrics import Metrics
from phimlx.server.models import Loaded, Models
from phimlx.server.settings import ServerSettings
from phimlx.server.worker import Generation, Step, Worker

log = logging.getLogger("phimlx.server")

PREPARING = 2  # threads that make prompts of requests
FETCHING = 4  # threads for prompts whose pictures come from elsewhere, which may take long
FETCH_SECONDS = 30.0  # for one picture
RETRY_SECONDS = 5
MAX_CHOICES = 8
KEPT_RESPONSES = 1000
KEPT_BYTES = 64 << 20
MAX_MEDIA = 64  # pictures and sounds of one prompt

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ask:
    """What a client wants, in no dialect.

    Attributes:
        model: its name.
        prompt: as `phimlx.Phi.stream` takes it, media as bytes or https addresses.
        options: of `GenerationOptions`, by name; None for the model's own.
        n: replies to the prompt, each with a seed of its own.
        fit: whether a reply that may be longer than the context allows ends there; else it is
            refused.
        before: tokens that stand before the prompt, as an earlier reply told them.
        keep_alive: seconds for which the model stays afterwards; as before where None.
        reasons: whether the reply is to begin with thought; the model's own way where None.
        insists: whether a model that leaves no choice in that, and does otherwise, is an error.
    """

    model: str
    prompt: Prompt
    options: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    fit: bool = False
    before: Sequence[int] = ()
    keep_alive: float | None = None
    reasons: bool | None = None
    insists: bool = True


class Answer:
    """The replies to an `Ask`, under way.

    Attributes:
        model: the name that the server has for it.
        generations: one for each choice.
        load_seconds: until the model was there.
    """

    def __init__(self, loaded: Loaded, requests: Sequence[Request], worker: Worker) -> None:
        self.model = loaded.served.name
        self.phi = loaded.phi
        self.load_seconds = 0.0
        self._worker = worker
        self._came: asyncio.Queue[Step] = asyncio.Queue()
        self.generations = [Generation(each, loaded.phi.engine, self._came) for each in requests]

    @property
    def requests(self) -> list[Request]:
        return [generation.request for generation in self.generations]

    def cancel(self) -> None:
        """End the replies here; nothing for those that have ended."""
        for generation in self.generations:
            if not generation.request.finished:
                self._worker.cancel(generation)

    async def chunks(self) -> AsyncIterator[tuple[int, Chunk]]:
        """Hand over the chunks of all choices as they come, each with its choice's number.

        Raises:
            RequestError: where a choice could not go on.
        """
        async with aclosing(self.steps()) as steps:  # type: ignore[type-var]
            async for index, chunk in steps:
                if chunk is not None:
                    yield index, chunk

    async def steps(self) -> AsyncIterator[tuple[int, Chunk | None]]:
        """Hand over chunks as `chunks` does, and None where a choice has ended."""
        numbers = {generation: number for number, generation in enumerate(self.generations)}
        while numbers:
            generation, chunks, ended = await self._came.get()
            for chunk in chunks:
                yield numbers[generation], chunk
            if ended and generation.error is not None:
                raise explain(generation.error) from generation.error
            if ended:
                yield numbers.pop(generation), None

    async def replies(self) -> list[Reply]:
        """Wait for all replies. Raises RequestError where one could not be generated."""
        async for _ in self.steps():
            pass
        return [request.reply for request in self.requests]


class Service:
    """Answers what dialects ask. Used from the event loop alone.

    Attributes:
        settings, models, worker: as given.
        running: replies that are under way, those that wait for their turn among them.
        metrics: what has been counted.
        responses: that clients may read again or go on from, by their ids.
        draining: whether the server is about to stop, and takes no more.
    """

    def __init__(self, settings: ServerSettings, models: Models, worker: Worker) -> None:
        self.settings = settings
        self.models = models
        self.worker = worker
        self.running = 0
        self.draining = False
        self._stuck = False
        self.responses: Kept[Any] = Kept(KEPT_RESPONSES, KEPT_BYTES)
        self.metrics = Metrics(
            {
                "replies_running": ("Replies under way or waiting.", lambda: self.running),
                "models_loaded": ("Models in memory.", lambda: len(models.loaded)),
                "requests_waiting": (
                    "Requests that have no row yet.",
                    lambda: self._sum("waiting"),
                ),
                "requests_computed": ("Requests that have a row.", lambda: self._sum("running")),
                "worker_restarts": ("Failures of the worker.", lambda: worker.restarts),
                "memory_bytes": ("Memory that arrays take.", mx.get_active_memory),
            }
        )
        self._threads = ThreadPoolExecutor(PREPARING, "phimlx-prompt")
        self._fetching = ThreadPoolExecutor(FETCHING, "phimlx-fetch")

    @asynccontextmanager
    async def answer(self, ask: Ask) -> AsyncIterator[Answer]:
        """Begin the replies; who leaves the block before they have ended ends them.

        Raises:
            RequestError: 429 where too many wait, 503 where the server stops or a model does not
                fit.
            PhimlxError: where there is no such model, or the prompt or an option is wrong.
        """
        started = time.perf_counter()
        async with self.hold(ask.model, ask.n, ask.keep_alive) as loaded:
            load_seconds = time.perf_counter() - started
            async with self.begin(loaded, ask) as answer:
                answer.load_seconds = load_seconds
                yield answer

    async def count_tokens(self, ask: Ask) -> int:
        """Count the tokens of a prompt; errors as `tokens` raises them."""
        return len(await self.tokens(ask))

    async def tokens(self, ask: Ask) -> list[int]:
        """Make a prompt into tokens, those of its media and tools among them.

        Raises:
            RequestError, PhimlxError: as `answer`.
        """
        async with self.hold(ask.model) as loaded:
            chosen = await self.run(lambda: _reasoning(loaded.phi, ask))
            options = PromptOptions(**{"limits": self.limits, **chosen, **ask.options})
            return await self.run(lambda: _tokens(loaded, ask, options), _fetches(ask))

    @asynccontextmanager
    async def hold(
        self, model: str, count: int = 1, keep_alive: float | None = None
    ) -> AsyncIterator[Loaded]:
        """Hold a model for so many replies at a time; errors as `answer` raises them."""
        self._admit(count)
        self.running += count
        try:
            async with self.models.use(model, keep_alive) as loaded:
                yield loaded
        finally:
            self.running -= count

    @asynccontextmanager
    async def begin(self, loaded: Loaded, *asks: Ask) -> AsyncIterator[Answer]:
        """Begin the replies of a model that is held; errors as `answer` raises them."""
        requests = await self.run(
            lambda: [each for ask in asks for each in self._requests(loaded, ask)],
            any(map(_fetches, asks)),
        )
        answer = Answer(loaded, requests, self.worker)
        seconds = self.settings.request_seconds
        loop = asyncio.get_running_loop()
        deadline = loop.call_later(seconds, self._expire, answer.generations)
        try:
            await self.worker.add(answer.generations)
            yield answer
        finally:
            deadline.cancel()
            answer.cancel()
            for request in requests:
                self.metrics.count_reply(answer.model, request)
                if self.settings.log_prompts:
                    _log_words(answer, request)

    async def run(self, function: Callable[[], Result], fetches: bool = False) -> Result:
        """Run what takes a while in another thread; it must compute nothing with MLX.

        Args:
            fetches: whether it waits for other machines, for which nobody else should wait.
        """
        threads = self._fetching if fetches else self._threads
        return await asyncio.get_running_loop().run_in_executor(threads, function)

    @property
    def limits(self) -> Limits:
        """What media of requests may be."""
        most = self.settings.max_body
        return Limits(
            max_bytes=most,
            max_download=most,
            allow_urls=self.settings.fetch_media,
            download_seconds=FETCH_SECONDS,
        )

    @property
    def state(self) -> str:
        """What /health tells: "ok", "stopping", "failed", or "stuck" where a step does not end."""
        if self.draining:
            return "stopping"
        if not self.worker.is_alive:
            return "failed"
        return "stuck" if self.worker.busy_seconds > self.settings.step_seconds else "ok"

    async def look_after_worker(self) -> None:
        """Put a new thread in the place of one that has died, and load its models again.

        A thread whose step does not end cannot be ended; it is told.
        """
        if not self.worker.is_alive:
            log.error("the worker died and is started again")
            self.worker.revive()
            await self.models.load_again()
        stuck, self._stuck = self._stuck, self.state == "stuck"
        if self._stuck and not stuck:
            log.error("a step has not ended for %.0f s", self.worker.busy_seconds)

    def close(self) -> None:
        for threads in (self._threads, self._fetching):
            threads.shutdown(wait=False, cancel_futures=True)

    def _sum(self, name: str) -> int:
        """Add up what the engines of all models say."""
        engines = {loaded.phi.engine for loaded in self.models.loaded}
        return sum(getattr(engine, name) for engine in engines)

    def _expire(self, generations: Sequence[Generation]) -> None:
        for generation in generations:
            generation.error = RequestError(504, "The request took too long.", code="timeout")
            self.worker.cancel(generation)

    def _admit(self, count: int) -> None:
        if self.draining:
            raise shutting_down()
        if self.running + count > self.settings.batch_size + self.settings.queue:
            raise overloaded("Too many requests wait here; try again later.", RETRY_SECONDS)

    def _requests(self, loaded: Loaded, ask: Ask) -> list[Request]:
        if not 1 <= ask.n <= MAX_CHOICES:
            raise bad_request(f"n is {ask.n}; it must be from 1 to {MAX_CHOICES}.", "n")
        if (count := len(_media(ask.prompt))) > MAX_MEDIA:
            raise bad_request(
                f"There are {count} pictures and sounds; at most {MAX_MEDIA} are read."
            )
        own = {"limits": self.limits, "adapter": loaded.adapter}
        given = {**own, **_reasoning(loaded.phi, ask), **ask.options}
        wanted = given.pop("max_tokens", None)
        most = [limit for limit in (wanted, self.settings.max_tokens) if limit is not None]
        if wanted is not None and not ask.fit:
            given["max_tokens"] = min(most)
        options = GenerationOptions(**given)
        prompt = _tokens(loaded, ask, options) if ask.before else ask.prompt
        requests = loaded.phi.requests(prompt, options, ask.n)
        for request in requests:
            request.max_tokens = min([request.max_tokens, *most])
        return requests


def _log_words(answer: Answer, request: Request) -> None:
    """Write what was asked and answered to the log, a line of JSON."""
    known = [token for token in request.prompt if token >= 0]  # others stand for pictures
    words: dict[str, Any] = {"prompt": known, "reply": request.reply.tokens}
    if answer.phi.tokenizer is not None:
        words = {name: answer.phi.tokenizer.decode(tokens) for name, tokens in words.items()}
    log.info("model=%s words=%s", answer.model, json.dumps(words))


def _reasoning(phi: Phi, ask: Ask) -> dict[str, str]:
    """The option that says whether a reply begins with thought, where that is asked for."""
    if ask.reasons is None:
        return {}
    is_open = phi.tokenizer is not None and bool(phi.template.modes)
    if not is_open and (not ask.insists or not (ask.reasons or phi.reasons)):
        return {}
    return {"reasoning": "on" if ask.reasons else "off"}


def _media(prompt: Prompt) -> list[Mapping[str, Any]]:
    """The parts of messages that are more than text."""
    messages = [] if isinstance(prompt, str) else [e for e in prompt if isinstance(e, Mapping)]
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if isinstance(part, Mapping) and part.get("type") != "text"]


def _fetches(ask: Ask) -> bool:
    """Whether its prompt has pictures that are named by an address."""
    pictures = [part.get("image_url") for part in _media(ask.prompt)]
    urls = [each.get("url") for each in pictures if isinstance(each, Mapping)]
    return any(isinstance(url, str) and not url.lower().startswith("data:") for url in urls)


def _tokens(loaded: Loaded, ask: Ask, options: PromptOptions) -> list[int]:
    """Make the whole prompt into tokens."""
    given = {field.name: getattr(options, field.name) for field in fields(PromptOptions)}
    return [*ask.before, *loaded.phi.encode(ask.prompt, loaded.adapter, **given)]
