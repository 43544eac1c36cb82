"""All routes as one ASGI application, behind the middleware."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from cafe.serving.errors import ApiError, json_response
from cafe.serving.invalid import invalid_body
from cafe.serving.middleware import RequestGuard
from cafe.serving.page_auth import PageAuth
from cafe.serving.routes.chat import chat_routes
from cafe.serving.routes.decisions import decision_routes
from cafe.serving.routes.embed import embed_routes
from cafe.serving.routes.embeddings import embedding_routes
from cafe.serving.routes.rerank import rerank_routes
from cafe.serving.routes.responses import response_routes
from cafe.serving.routes.search import search_routes
from cafe.serving.routes.systemone import systemone_routes
from cafe.serving.routes.tokens import token_routes
from cafe.serving.schema import ErrorBody
from cafe.serving.service import Service


def create_app(
    service: Service,
    *,
    api_key: str | None = None,
    hosts: frozenset[str] | None = None,
    page: bool = False,
    access_log: bool = False,
    root: Path | None = None,
) -> RequestGuard:
    """The application that serves `service`.

    Args:
        service: The model and what the routes share.
        api_key: As in `RequestGuard`.
        hosts: As in `RequestGuard`.
        page: Whether to serve the web page.
        access_log: As in `RequestGuard`.
        root: Folder of the index's images, for the page.

    Raises:
        CafeError: `page` is set and gradio is not installed.
    """
    app = FastAPI(
        title="cafe",
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    for routes in (
        embedding_routes,
        embed_routes,
        chat_routes,
        rerank_routes,
        decision_routes,
        response_routes,
        systemone_routes,
        token_routes,
    ):
        app.include_router(routes(service))
    if service.search is not None:
        app.include_router(search_routes(service, service.search))
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, invalid_body)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    guard = RequestGuard(
        app,
        metrics=service.metrics,
        limits=service.limits,
        api_key=api_key,
        hosts=hosts,
        routes=frozenset(),
        access_log=access_log,
    )
    app.include_router(_status_routes(service, guard))
    guard.routes = frozenset(app.openapi()["paths"]) | {"/openapi.json"}
    if page:
        from cafe.serving.page.mount import mount_page  # late: importing gradio takes seconds

        guard.page_auth = PageAuth(api_key)
        guard.app = mount_page(app, service, guard.page_auth, root)
    return guard


def _status_routes(service: Service, guard: RequestGuard) -> APIRouter:
    """Health, metrics and the list of models."""
    router = APIRouter()
    created = int(time.time())

    @router.get("/health", operation_id="health")
    async def health() -> Response:
        """Whether the server is alive."""
        alive = service.engine.failure is None
        return json_response({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @router.get("/ready", operation_id="ready")
    async def ready() -> Response:
        """Whether a request would be accepted now."""
        if not service.engine.loaded:
            return json_response({"status": "loading"}, 503)
        if guard.draining or service.engine.full:
            return json_response({"status": "draining" if guard.draining else "full"}, 503)
        return json_response({"status": "ready"})

    @router.get("/metrics", operation_id="metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    def model() -> dict[str, Any]:
        return {
            "id": service.name,
            "object": "model",
            "created": created,
            "owned_by": "cafe",
            "max_model_len": service.engine.model.max_tokens,
        }

    @router.get("/v1/models", operation_id="models")
    async def models() -> Response:
        """The model that is served."""
        return json_response({"object": "list", "data": [model()]})

    @router.get("/v1/models/{name:path}", operation_id="model")
    async def one_model(name: str) -> Response:
        """The model that is served, by its name."""
        service.check_name(name)
        return json_response(model())

    return router


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {404: "not found", 405: "method not allowed"}
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=dict(error.headers or {})).response


async def _internal_error(request: Request, error: Exception) -> Response:
    """A bug in the server. Starlette raises it again after this; the middleware logs it."""
    return ApiError(500, "internal error").response
