"""OpenAI's responses: items in and out, and conversations that go on from one kept in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phimlx.server.errors import RequestError, bad_request, explain
from phimlx.server.http import Json, Streamed, dump, event, read_body
from phimlx.server.openai.response_body import ITEM, ReferenceItem, ResponseBody, turns_of
from phimlx.server.openai.response_events import Event, Written
from phimlx.server.service import Answer, Service


@dataclass(frozen=True)
class KeptResponse:
    """A response that may be read again, or gone on from.

    Attributes:
        response: as it was told.
        turns: the conversation up to its end, without the instructions.
    """

    response: dict[str, Any]
    turns: list[dict[str, Any]]


async def create_response(request: Request) -> Response:
    """`POST /v1/responses`."""
    service: Service = request.app.service
    body = await read_body(request, ResponseBody)
    turns = _turns(service, body)
    async with AsyncExitStack() as stack:
        answer = await stack.enter_async_context(service.answer(body.ask(turns)))
        written = Written(body, answer)
        if body.stream:
            return Streamed(_stream(service, body, turns, written, answer), stack.pop_all())
        async for _, chunk in answer.chunks():
            written.add(chunk)
        written.end()
        _keep(service, body, turns, written)
        return Json(written.response())


async def _stream(
    service: Service,
    body: ResponseBody,
    turns: list[dict[str, Any]],
    written: Written,
    answer: Answer,
) -> AsyncIterator[bytes]:
    try:
        for made in written.begin():
            yield _sent(made)
        async for _, chunk in answer.chunks():
            for made in written.add(chunk):
                yield _sent(made)
        ended = written.end()
        _keep(service, body, turns, written)
        for made in ended:
            yield _sent(made)
    except Exception as error:
        for made in written.fail(explain(error)):
            yield _sent(made)


def _sent(made: Event) -> bytes:
    return event(made, made["type"])


def _turns(service: Service, body: ResponseBody) -> list[dict[str, Any]]:
    """Make the conversation: what was kept, and what is sent.

    Raises:
        RequestError: where it goes on from nothing that is kept.
    """
    before: list[dict[str, Any]] = []
    if body.previous_response_id is not None:
        kept = service.responses.get(body.previous_response_id)
        if kept is None:
            raise bad_request(
                "previous_response_id: there is no response "
                f"{body.previous_response_id[:100]} here, or no more.",
                "previous_response_id",
                "previous_response_not_found",
            )
        before = kept.turns
    items = [
        _refer(service, item.id, index) if isinstance(item, ReferenceItem) else item
        for index, item in enumerate(body.input)
    ]
    return turns_of(items, before)


def _refer(service: Service, name: str, index: int) -> Any:
    """Find the item of a kept response that a reference means."""
    for kept in service.responses:
        for item in kept.response["output"]:
            if item["id"] == name:
                return ITEM.validate_python(item)
    place = f"input.{index}.id"
    raise bad_request(f"{place}: there is no item {name[:100]} here, or no more.", place)


def _keep(
    service: Service, body: ResponseBody, turns: list[dict[str, Any]], written: Written
) -> None:
    if not body.store:
        return
    response = written.response()
    said = turns_of([ITEM.validate_python(item) for item in response["output"]], turns)
    kept = KeptResponse(response, said)
    service.responses.put(written.id, kept, len(dump([response, said])))


def _find(request: Request) -> tuple[Service, str, KeptResponse]:
    service: Service = request.app.service
    name = request.path_params["response"]
    kept = service.responses.get(name)
    if kept is None:
        raise RequestError(404, f"There is no response {name[:100]} here, or no more.")
    return service, name, kept


async def show_response(request: Request) -> Response:
    """`GET /v1/responses/{response}`."""
    if request.query_params.get("stream", "false") != "false":
        raise bad_request("stream: what was told is not told again in pieces.", "stream")
    return Json(_find(request)[2].response)


async def delete_response(request: Request) -> Response:
    """`DELETE /v1/responses/{response}`."""
    service, name, _ = _find(request)
    service.responses.delete(name)
    return Json({"id": name, "object": "response", "deleted": True})


ROUTES = (
    Route("/v1/responses", create_response, methods=["POST"]),
    Route("/v1/responses/{response}", show_response, methods=["GET"]),
    Route("/v1/responses/{response}", delete_response, methods=["DELETE"]),
)
