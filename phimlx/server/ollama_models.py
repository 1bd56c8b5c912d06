"""Ollama's list of models, what it tells of each, and how one comes here."""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phimlx import catalog
from phimlx.catalog import Model
from phimlx.errors import PhimlxError
from phimlx.generation.generation_config import GenerationConfig
from phimlx.generation.sampler import Sampling
from phimlx.hub.client import RemoteFile
from phimlx.hub.download import download
from phimlx.hub.layout import model_name
from phimlx.hub.transfer import DownloadPlan, ProgressCallback
from phimlx.models.registry import of_config
from phimlx.server.errors import RequestError, bad_request, explain, overloaded
from phimlx.server.http import Json, Streamed, dump, read_body
from phimlx.server.models import Loaded
from phimlx.server.ollama_body import LATEST, ModelBody, own_name
from phimlx.server.served import Served
from phimlx.server.service import Service

VERSION = "0.13.0"  # of the API that is followed here; programs ask for one that is new enough
MAX_PULLS = 4
STEPS = 200  # lines about one file that comes, at most

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# What Ollama does beside, and why it is not done here.
REFUSED = {
    "/api/embed": "The models here make no embeddings: they were trained to write.",
    "/api/embeddings": "The models here make no embeddings: they were trained to write.",
    "/api/create": "Models are made with: phimlx convert, phimlx fuse.",
    "/api/copy": "Models have the names of the Hub here, and are not copied.",
    "/api/push": "Models are published with: phimlx convert --upload-repo.",
    "/api/delete": "Models are removed with: phimlx remove.",
}


def full_name(name: str) -> str:
    """The name of a model as Ollama lists it: with a tag."""
    return name if ":" in name else f"{name}{LATEST}"


def timestamp(when: datetime) -> str:
    return when.isoformat().replace("+00:00", "Z")


def known_model(served: Served) -> Model | None:
    """Find a model in the catalogue."""
    return catalog.find(served.name) or catalog.by_config(served.config, model_name(served.folder))


def reasons(served: Served) -> bool:
    """Whether a model thinks before it answers, or may; reads its folder, which takes a while."""
    known = known_model(served)
    return (known is not None and known.reasoning) or _prompt_form(served).reasons


async def list_models(request: Request) -> Response:
    """`GET /api/tags`."""
    models = request.app.service.models.list()
    return Json({"models": [_entry(served) for served in models]})


async def list_loaded(request: Request) -> Response:
    """`GET /api/ps`."""
    loaded = request.app.service.models.loaded
    return Json({"models": [_loaded_entry(each) for each in loaded]})


def _loaded_entry(loaded: Loaded) -> dict[str, Any]:
    entry = _entry(loaded.served)
    del entry["modified_at"]
    forever = math.isinf(loaded.remaining)
    # Seconds beyond what a date can hold are for ever, too.
    remaining = timedelta(days=100 * 365)
    if not forever:
        remaining = min(remaining, timedelta(seconds=min(loaded.remaining, 1e9)))
    return {
        **entry,
        "expires_at": timestamp(datetime.now(UTC) + remaining),
        "size_vram": entry["size"],
        "context_length": loaded.served.context_length,
    }


def _entry(served: Served) -> dict[str, Any]:
    name = full_name(served.name)
    return {
        "name": name,
        "model": name,
        "modified_at": timestamp(datetime.fromtimestamp(served.created, UTC)),
        "size": served.nbytes,
        "digest": _digest(served),
        "details": _details(served),
    }


def _digest(served: Served) -> str:
    """Tell models apart by their files' names and sizes; their contents would take minutes."""
    files = sorted((file.name, file.stat().st_size) for file in served.folder.iterdir())
    return hashlib.sha256(repr((served.name, files)).encode()).hexdigest()


def _details(served: Served) -> dict[str, Any]:
    config, known = served.config, known_model(served)
    family = config.get("model_type", "")
    quantization = config.get("quantization")
    level = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "")
    if isinstance(quantization, dict):
        level = f"Q{quantization.get('bits')}"
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": "" if known is None else _count_text(known.parameters),
        "quantization_level": level,
    }


def _count_text(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


async def show(request: Request) -> Response:
    """`POST /api/show`."""
    body = await read_body(request, ModelBody)
    served = request.app.service.models.find(own_name(body.model))
    return Json(await asyncio.to_thread(_describe, served))


def _describe(served: Served) -> dict[str, Any]:
    config, known = served.config, known_model(served)
    form = _prompt_form(served)
    takes = of_config(config).takes
    capabilities = {
        "completion": True,
        "tools": form.takes_tools,
        "vision": "image" in takes,
        "audio": "audio" in takes,
        "thinking": reasons(served),
    }
    settings = GenerationConfig.read(served.folder)
    sampling = Sampling.defaults(settings.values, known.sampling if known else {})
    usual = Sampling()
    parameters = [
        f"{name} {dump(value)}"
        for name, value in vars(sampling).items()
        if value != getattr(usual, name)
    ]
    family = config["model_type"]
    info = {
        "context_length": served.context_length,
        "embedding_length": config.get("hidden_size"),
        "block_count": config.get("num_hidden_layers"),
        "feed_forward_length": config.get("intermediate_size"),
        "attention.head_count": config.get("num_attention_heads"),
        "attention.head_count_kv": config.get("num_key_value_heads"),
        "vocab_size": config.get("vocab_size"),
    }
    return {
        "modelfile": f"FROM {served.name}\n",
        "parameters": "\n".join(parameters),
        "template": form.template,
        "license": known.licence if known else "",
        "details": _details(served),
        "model_info": {
            "general.architecture": family,
            "general.basename": served.name,
            **({} if known is None else {"general.parameter_count": known.parameters}),
            **{f"{family}.{name}": value for name, value in info.items() if value is not None},
        },
        "capabilities": [name for name, has in capabilities.items() if has],
        "modified_at": timestamp(datetime.fromtimestamp(served.created, UTC)),
    }


@dataclass(frozen=True)
class PromptForm:
    """A model's chat template: its text, whether it has a place for tools, whether replies reason.

    Nothing of it where there is none.
    """

    template: str = ""
    takes_tools: bool = False
    reasons: bool = False


@cache
def _prompt_form(served: Served) -> PromptForm:
    from phimlx.prompt.chat_template import ChatTemplate
    from phimlx.prompt.tokenizer.tokenizer import Tokenizer

    try:
        form = ChatTemplate.load(
            served.folder, Tokenizer.load(served.folder), model_name(served.folder)
        )
        return PromptForm(form.text, form.takes_tools, form.reasons)
    except PhimlxError:
        return PromptForm()


async def version(request: Request) -> Response:
    """`GET /api/version`."""
    return Json({"version": VERSION})


async def pull(request: Request) -> Response:
    """`POST /api/pull`: download a model, as `phimlx download` does."""
    service: Service = request.app.service
    body = await read_body(request, ModelBody)
    if service.settings.model is not None:
        raise bad_request(f"This server serves {service.settings.model} alone.", "model")
    lines = _pull(own_name(body.model))
    if body.stream:
        return Streamed(_written(lines), AsyncExitStack(), None, "application/x-ndjson")
    async for line in lines:
        last = line
    return Json(last)


async def _written(lines: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for line in lines:
            yield f"{dump(line)}\n".encode()
    except Exception as error:
        yield f"{dump({'error': explain(error).message})}\n".encode()


class Stopped(Exception):
    """The client has gone, and the download with it."""


class Pull:
    """A download in a thread of its own, which tells of itself on the event loop.

    The thread ends with the process: a server that stops waits for no answer of the Hub.

    Attributes:
        lines: what it tells; the last is what went wrong, or None.
    """

    def __init__(self, name: str) -> None:
        self.lines: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="phimlx-pull", daemon=True)

    def stop(self) -> None:
        """Let the download end where it is; what has come stays."""
        self._stopped.set()

    def _run(self) -> None:
        ended: Exception | None = None
        try:
            download(self._name, show_progress=self._show)
        except Exception as error:
            ended = error
        _pulls.release()
        self._tell(ended)

    @contextmanager
    def _show(self, plan: DownloadPlan) -> Iterator[ProgressCallback]:
        done: dict[str, int] = {}
        told: dict[str, int] = {}

        def progress(file: RemoteFile, nbytes: int) -> None:
            if self._stopped.is_set():
                raise Stopped
            done[file.name] = done.get(file.name, 0) + nbytes
            step = max(1, file.size // STEPS)
            if (
                file.name not in told
                or done[file.name] == file.size
                or (abs(done[file.name] - told[file.name]) >= step)
            ):
                told[file.name] = done[file.name]
                self._tell(_progress(file, done[file.name]))

        yield progress
        self._tell({"status": "verifying sha256 digest"})
        self._tell({"status": "writing manifest"})

    def _tell(self, line: dict[str, Any] | Exception | None) -> None:
        with suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(self.lines.put_nowait, line)


def _progress(file: RemoteFile, completed: int) -> dict[str, Any]:
    return {
        "status": f"pulling {file.hash[:12]}",
        "digest": f"{'sha256' if len(file.hash) == 64 else 'sha1'}:{file.hash}",
        "total": file.size,
        "completed": completed,
    }


_pulls = threading.BoundedSemaphore(MAX_PULLS)


async def _pull(name: str) -> AsyncIterator[dict[str, Any]]:
    if not _pulls.acquire(blocking=False):
        raise overloaded("Too many downloads are under way; try again later.", 60)
    under_way = Pull(name)
    under_way.thread.start()
    try:
        yield {"status": "pulling manifest"}
        while isinstance(line := await under_way.lines.get(), dict):
            yield line
        if line is not None:
            raise line
        yield {"status": "success"}
    finally:
        under_way.stop()


def refuse(path: str) -> Route:
    """Make the route of something that is not done here."""

    async def route(request: Request) -> Response:
        raise RequestError(400, REFUSED[path], code="not_supported")

    return Route(path, route, methods=["POST", "DELETE"])


ROUTES = (
    Route("/api/tags", list_models),
    Route("/api/ps", list_loaded),
    Route("/api/show", show, methods=["POST"]),
    Route("/api/version", version),
    Route("/api/pull", pull, methods=["POST"]),
    *map(refuse, REFUSED),
)
