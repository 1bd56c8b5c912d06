"""OpenAI's models."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phimlx.server.http import Json
from phimlx.server.served import Served


async def list_models(request: Request) -> Response:
    """`GET /v1/models`."""
    models = [_model_object(model) for model in request.app.service.models.list()]
    return Json({"object": "list", "data": models})


async def show_model(request: Request) -> Response:
    """`GET /v1/models/{model}`."""
    served = request.app.service.models.find(request.path_params["model"])
    return Json(_model_object(served))


def _model_object(model: Served) -> dict[str, Any]:
    length = model.context_length
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "phimlx",
        "context_length": length,
        "max_model_len": length,
    }


ROUTES = (
    Route("/v1/models", list_models),
    Route("/v1/models/{model:path}", show_model),
)
