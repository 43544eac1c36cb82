"""The routes as one ASGI application, behind the gate."""

from __future__ import annotations

import time
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from cafe.serve.chat import chat_routes
from cafe.serve.door import Door
from cafe.serve.gate import Gate
from cafe.serve.refusal import Refused, json_response
from cafe.serve.schema import ErrorBody
from cafe.serve.service import Service
from cafe.serve.vectors import embedding_routes, rerank_routes, search_routes

UNION_MEMBERS = {"str", "int", "Content", "ImageURL"}
"""What pydantic puts into the place of an error, beside the names of fields."""


def create_app(
    service: Service,
    *,
    api_key: str | None = None,
    hosts: frozenset[str] | None = None,
    page: bool = False,
    root: Path | None = None,
) -> Gate:
    """Everything that a client can ask of `service`; `Gate` explains the other arguments.

    page   with the web page
    root   where the pictures of the index lie, for the page
    Raises CafeError when a page is wanted and gradio is not installed.
    """
    app = FastAPI(
        title="cafe",
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    for router in (embedding_routes(service), chat_routes(service), rerank_routes(service)):
        app.include_router(router)
    if service.search is not None:
        app.include_router(search_routes(service, service.search))
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _internal)
    gate = Gate(
        app,
        meters=service.meters,
        limits=service.limits,
        api_key=api_key,
        hosts=hosts,
        routes=frozenset(),
    )
    app.include_router(_state_routes(service, gate))
    gate.routes = frozenset(app.openapi()["paths"]) | {"/openapi.json"}
    if page:
        from cafe.serve.page.mount import attach  # late: gradio takes seconds

        gate.door = Door(api_key)
        gate.app = attach(app, service, gate.door, root)
    return gate


def _state_routes(service: Service, gate: Gate) -> APIRouter:
    """What operators and clients ask about the server itself."""
    router = APIRouter()
    created = int(time.time())

    @router.get("/health", operation_id="health")
    async def health() -> Response:
        """Whether the process lives."""
        alive = service.engine.failure is None
        return json_response({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @router.get("/ready", operation_id="ready")
    async def ready() -> Response:
        """Whether a request would be taken now."""
        if not service.engine.loaded:
            return json_response({"status": "loading"}, 503)
        if gate.draining or service.engine.full:
            return json_response({"status": "draining" if gate.draining else "full"}, 503)
        return json_response({"status": "ready"})

    @router.get("/metrics", operation_id="metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.meters.text(), media_type="text/plain; version=0.0.4")

    @router.get("/v1/models", operation_id="models")
    async def models() -> Response:
        """The one model."""
        model = {
            "id": service.name,
            "object": "model",
            "created": created,
            "owned_by": "cafe",
            "max_model_len": service.engine.model.max_tokens,
        }
        return json_response({"object": "list", "data": [model]})

    return router


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response


async def _invalid(request: Request, error: Exception) -> Response:
    """What is wrong with a body, as OpenAI says it (400, not 422).

    Of the members of a union each has its complaint; the deepest one understood most of the value.
    """
    assert isinstance(error, RequestValidationError)
    first = max(error.errors(), key=lambda e: len(e["loc"]))
    if first["type"] == "json_invalid":
        return Refused.invalid(f"the body is not JSON: {first['ctx']['error']}").response
    param = _place(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "this field is unknown here or not supported"
    return Refused.invalid(f"{param}: {message}" if param else message, param).response


def _place(location: tuple[int | str, ...]) -> str | None:
    """As in "messages.0.content", without what pydantic calls the members of a union."""
    named: list[str] = []
    for part in map(str, location[1:]):
        plain = part.isdecimal() or part.isidentifier()
        if plain and part not in UNION_MEMBERS and part not in named[-1:]:
            named.append(part)
    return ".".join(named)[:200] or None


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {404: "there is nothing at this address", 405: "this address takes another method"}
    message = messages.get(error.status_code, str(error.detail))
    return Refused(error.status_code, message, headers=dict(error.headers or {})).response


async def _internal(request: Request, error: Exception) -> Response:
    """Something of ours is wrong; it is raised again behind this answer, and the gate logs it."""
    return Refused(500, "internal error").response
