"""The page that people chat on in a browser: its files, and what it asks beside OpenAI's API.

The page's files hold no secret and are given to anyone who reaches the server; what they ask needs
the key. Its conversations are those of `phimlx chat`.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

from pydantic import Field
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from phimlx.errors import HistoryError, SessionError, SettingsError
from phimlx.files import read_json
from phimlx.history.export import summary_object
from phimlx.history.records import Head, Kept, Place
from phimlx.history.store import History
from phimlx.models.registry import of_config
from phimlx.preferences.personas import list_personas, read_persona
from phimlx.server.errors import RequestError, bad_request
from phimlx.server.http import Body, Json, read_body
from phimlx.server.served import Served
from phimlx.server.service import Service

TYPES = {
    "app.js": "text/javascript",
    "api.js": "text/javascript",
    "highlight.js": "text/javascript",
    "icon.svg": "image/svg+xml",
    "markdown.js": "text/javascript",
    "math.js": "text/javascript",
    "record.js": "text/javascript",
    "recorder.js": "text/javascript",
    "style.css": "text/css",
}
"""The page's files, and their media types."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; media-src blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
    "cache-control": "no-cache",
}
LISTED = 200  # conversations
PERSONA_KEYS = ("system", "model", "temperature", "top_p", "max_tokens", "seed")

Result = TypeVar("Result")


@cache
def _read(name: str) -> bytes:
    return (files("phimlx.server") / "page" / name).read_bytes()


async def home(request: Request) -> Response:
    """`GET /`: the page for browsers; Ollama's clients look for its sentence here."""
    if "text/html" not in request.headers.get("accept", ""):
        return PlainTextResponse("Ollama is running")
    return Response(_read("index.html"), media_type="text/html", headers=HEADERS)


async def page_file(request: Request) -> Response:
    """`GET /ui/page/{name}`: a file of the page."""
    name = request.path_params["name"]
    if name not in TYPES:
        raise RequestError(404, "The page has no such file.")
    return Response(_read(name), media_type=TYPES[name], headers=HEADERS)


class SessionBody(Body):
    """A token from the address that `phimlx ui` opened."""

    token: str


async def session(request: Request) -> Response:
    """`POST /ui/session`: the key for a token, which is then spent."""
    body = await read_body(request, SessionBody)
    app = request.app
    token, app.token = app.token, None
    if token is None or not hmac.compare_digest(_bytes(body.token), _bytes(token)):
        raise RequestError(403, "This address has been used already.", code="token_used")
    return Json({"key": app.key})


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


async def models(request: Request) -> Response:
    """`GET /ui/models`: the models, what they take, and the personas."""
    service: Service = request.app.service
    found = await service.run(lambda: [_model_object(each) for each in service.models.list()])
    personas = await service.run(_personas)
    keeps = request.app.keeps_history
    return Json({"models": found, "personas": personas, "keeps": keeps})


def _model_object(served: Served) -> dict[str, Any]:
    takes = of_config(read_json(served.folder / "config.json")).takes
    return {"name": served.name, "takes": takes, "context_length": served.context_length}


def _personas() -> list[dict[str, Any]]:
    """Make objects of the personas that hold, without what names a place on this machine."""
    found = []
    for name in list_personas():
        with suppress(SettingsError):
            values = read_persona(name).values
            told = {key: values[key] for key in PERSONA_KEYS if values.get(key) is not None}
            found.append({"name": name, **told})
    return found


class ConversationBody(Body):
    """A conversation as the page holds it."""

    model: str
    system: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    messages: list[dict[str, Any]] = Field(max_length=2000)
    revision: int | None = None
    stats: dict[str, Any] | None = None


async def conversations(request: Request) -> Response:
    """`GET /ui/conversations`: those that were kept, or in which `?search=` occurs."""
    text = request.query_params.get("search", "").strip()

    def read(history: History) -> list[dict[str, Any]]:
        if not text:
            return [summary_object(each) for each in history.conversations(LISTED)]
        found = [match.conversation for match in history.search(text[:200], LISTED)]
        return [summary_object(each) for each in {each.id: each for each in found}.values()]

    return Json({"conversations": await _with_history(request, read)})


async def show_conversation(request: Request) -> Response:
    """`GET /ui/conversations/{id}`."""
    kept = await _with_history(request, lambda history: history.read(request.path_params["id"]))
    return Json(_conversation_object(kept))


def _conversation_object(kept: Kept) -> dict[str, Any]:
    return {
        "id": kept.place.id,
        "revision": kept.place.revision,
        "title": kept.about.title,
        "model": kept.head.model,
        "system": kept.head.system,
        "settings": dict(kept.head.settings),
        "messages": [
            {**entry.message, "stats": entry.stats, "model": entry.model} for entry in kept.entries
        ],
    }


async def keep_conversation(request: Request) -> Response:
    """`POST /ui/conversations` and `PUT /ui/conversations/{id}`: keep it as the page has it.

    One that another writer has changed since is left to it, and a new one begins.
    """
    body = await read_body(request, ConversationBody)
    head = Head(body.model, None, body.system, body.settings)
    place = None
    if "id" in request.path_params:
        if body.revision is None:
            raise bad_request("revision is missing.", "revision")
        place = Place(request.path_params["id"], body.revision)

    def write(history: History) -> Place:
        put = history.put(place, head, body.messages, body.stats)
        history.configure(put.id, head)
        return history.read(put.id).place

    try:
        kept = await _with_history(request, write)
    except SessionError as error:
        raise bad_request(str(error), "messages") from None
    return Json({"id": kept.id, "revision": kept.revision})


async def delete_conversation(request: Request) -> Response:
    """`DELETE /ui/conversations/{id}`."""
    await _with_history(request, lambda history: history.delete(request.path_params["id"]))
    return Json({"deleted": True})


async def _with_history(request: Request, use: Callable[[History], Result]) -> Result:
    """Use the history in another thread. Raises RequestError where it cannot be, or is off."""
    if not request.app.keeps_history:
        raise RequestError(404, "Conversations are not kept here.", code="history_off")

    def run() -> Result:
        with History() as history:
            return use(history)

    try:
        return await request.app.service.run(run)
    except HistoryError as error:
        raise RequestError(404, str(error), code="history") from None


ROUTES = (
    Route("/", home),
    Route("/ui/page/{name}", page_file),
    Route("/ui/session", session, methods=["POST"]),
    Route("/ui/models", models),
    Route("/ui/conversations", conversations),
    Route("/ui/conversations", keep_conversation, methods=["POST"]),
    Route("/ui/conversations/{id:int}", show_conversation),
    Route("/ui/conversations/{id:int}", keep_conversation, methods=["PUT"]),
    Route("/ui/conversations/{id:int}", delete_conversation, methods=["DELETE"]),
)
