"""What phimlx asks of its own server beside the dialects: about models, and tokens of a prompt."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phimlx.generation.options import PromptOptions
from phimlx.server.http import Json, read_body
from phimlx.server.models import Loaded
from phimlx.server.openai.chat import ChatBody
from phimlx.server.service import Service

PROMPT_OPTIONS = {field.name for field in fields(PromptOptions)}


async def loaded_models(request: Request) -> Response:
    """`GET /phimlx/models`: those in memory."""
    service: Service = request.app.service
    return Json({"models": [_about(service, each) for each in service.models.loaded]})


async def show_model(request: Request) -> Response:
    """`GET /phimlx/models/{model}`: one, which is loaded where it is not there."""
    service: Service = request.app.service
    async with service.hold(request.path_params["model"]) as loaded:
        return Json(_about(service, loaded))


async def tokens(request: Request) -> Response:
    """`POST /phimlx/tokens`: the tokens of a chat completion's prompt."""
    service: Service = request.app.service
    ask = (await read_body(request, ChatBody)).ask()
    own = {name: value for name, value in ask.options.items() if name in PROMPT_OPTIONS}
    return Json({"tokens": await service.tokens(replace(ask, options=own))})


def _about(service: Service, loaded: Loaded) -> dict[str, Any]:
    """Make the object that `phimlx.remote.phi.About` reads."""
    phi = loaded.phi
    return {
        "name": loaded.served.name,
        "stamp": phi.stamp(loaded.adapter),
        "context_length": phi.context_length,
        "is_base": phi.is_base,
        "takes_media": phi.takes_media,
        "hears": phi.hears,
        "chat_form": phi.chat_form,
        "max_tokens": service.settings.max_tokens,
        "sampling": {
            field.name: getattr(phi.sampling, field.name)
            for field in fields(phi.sampling)
            if field.name != "logit_bias"
        },
    }


ROUTES = (
    Route("/phimlx/models", loaded_models),
    Route("/phimlx/models/{model:path}", show_model),
    Route("/phimlx/tokens", tokens, methods=["POST"]),
)
