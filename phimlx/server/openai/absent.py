"""Parts of OpenAI's API that no Phi model can serve, each with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phimlx.server.errors import RequestError

NO_FILES = "No files are kept here; send what is in them with the request."
NO_AGENTS = "No agents are kept here; use /v1/responses or /v1/chat/completions."

ABSENT = {
    "/v1/assistants": NO_AGENTS,
    "/v1/audio/speech": "Phi models write text; they do not speak.",
    "/v1/batches": "There are no batches of files; requests that come together share passes.",
    "/v1/containers": NO_FILES,
    "/v1/conversations": "No conversations are kept here; use previous_response_id.",
    "/v1/embeddings": "Phi models write text; they make no embeddings. Use an embedding model.",
    "/v1/evals": "Models are evaluated with phimlx evaluate.",
    "/v1/files": NO_FILES,
    "/v1/fine_tuning": "Models are fine-tuned with phimlx train.",
    "/v1/images": "Phi models write text; they draw no pictures.",
    "/v1/moderations": "Phi models write text; they judge none by OpenAI's categories.",
    "/v1/realtime": "There are no sessions of sound; use /v1/audio/transcriptions.",
    "/v1/rerank": "Phi models write text; they rank none.",
    "/v1/score": "Phi models write text; they score no pairs.",
    "/v1/threads": NO_AGENTS,
    "/v1/uploads": NO_FILES,
    "/v1/vector_stores": NO_FILES,
    "/v1/videos": "Phi models write text; they make no videos.",
}


def _refusing(reason: str) -> Callable[[Request], Any]:
    async def refuse(request: Request) -> Response:
        """Say why."""
        raise RequestError(404, reason, code="unsupported_endpoint")

    return refuse


ROUTES = tuple(
    Route(f"{path}{rest}", _refusing(reason), methods=["GET", "POST", "DELETE"])
    for path, reason in ABSENT.items()
    for rest in ("", "/{rest:path}")
)
