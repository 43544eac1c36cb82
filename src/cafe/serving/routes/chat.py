"""`/v1/chat/completions`: whole answers, and answers streamed as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from cafe.serving.engine import Call
from cafe.serving.errors import ApiError, json_response
from cafe.serving.messages import Completion, Prompt, WorkItem
from cafe.serving.middleware import DEADLINE
from cafe.serving.schema import ChatRequest
from cafe.serving.service import Service, as_api_errors
from cafe.types import Conversation


def chat_routes(service: Service) -> APIRouter:
    """The route for chat completions."""
    router = APIRouter()

    streamed: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @router.post("/v1/chat/completions", operation_id="chat", responses=streamed)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        begin = time.monotonic()
        service.check_model(body.model)
        conversation = await service.reader(request).messages(body.messages)
        item = WorkItem(_prompt(body, conversation, service))
        if body.stream:
            return await _stream(service, request, body, item)
        (answer,) = await service.results(request, "generate", [item])
        service.metrics.first_token(time.monotonic() - begin)
        service.metrics.tokens(answer.prompt_tokens, answer.new_tokens)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }
        return json_response(
            _head(service, "chat.completion") | {"choices": [choice], "usage": _usage(answer)}
        )

    return router


def _prompt(body: ChatRequest, conversation: Conversation, service: Service) -> Prompt:
    limits = service.limits
    max_tokens = body.max_completion_tokens or body.max_tokens
    if max_tokens is not None and max_tokens > limits.new_tokens:
        raise ApiError.invalid(
            f"max_tokens: at most {limits.new_tokens:,} are allowed", "max_tokens"
        )
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return Prompt(
        conversation,
        max_new_tokens=max_tokens or min(limits.default_new_tokens, limits.new_tokens),
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=tuple(stops),
        stream=bool(body.stream),
    )


async def _stream(
    service: Service, request: Request, body: ChatRequest, item: WorkItem
) -> Response:
    """Stream an answer; a failure before the first piece of text is an ordinary error response."""
    begin = time.monotonic()
    call, pieces = await service.stream(request, item)
    first = await pieces.get()
    if first is None:
        with as_api_errors():
            call.future.result()
    service.metrics.first_token(time.monotonic() - begin)
    usage = body.stream_options is not None and body.stream_options.include_usage
    events = _events(service, call, pieces, first, usage, request.scope[DEADLINE])
    return StreamingResponse(
        events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


async def _events(
    service: Service,
    call: Call,
    pieces: asyncio.Queue[str | None],
    piece: str | None,
    usage: bool,
    deadline: float,
) -> AsyncIterator[str]:
    head = _head(service, "chat.completion.chunk")
    no_usage = {"usage": None} if usage else {}

    def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event(head | {"choices": [choice]} | no_usage)

    yield chunk({"role": "assistant", "content": ""})
    try:
        while piece is not None:
            yield chunk({"content": piece})
            async with asyncio.timeout_at(deadline):
                piece = await pieces.get()
        with as_api_errors():
            (answer,) = call.future.result()
    except TimeoutError:
        yield _event(
            ApiError(504, "the answer was not finished within the time limit", code="timeout").body
        )
        return
    except ApiError as error:
        yield _event(error.body)
        return
    except Exception:
        yield _event(ApiError(500, "internal error").body)
        raise
    service.metrics.tokens(answer.prompt_tokens, answer.new_tokens)
    yield chunk({}, answer.finish_reason)
    if usage:
        yield _event(head | {"choices": [], "usage": _usage(answer)})
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _head(service: Service, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.name,
    }


def _usage(answer: Completion) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.new_tokens,
        "total_tokens": answer.prompt_tokens + answer.new_tokens,
    }
