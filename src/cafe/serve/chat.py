"""`/v1/chat/completions`: whole answers, and answers as a stream of server-sent events."""

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

from cafe.serve.engine import Call
from cafe.serve.gate import DEADLINE
from cafe.serve.refusal import Refused, json_response
from cafe.serve.schema import ChatRequest
from cafe.serve.service import Service, explained
from cafe.serve.work import Answer, Item, Prompt
from cafe.types import Conversation


def chat_routes(service: Service) -> APIRouter:
    router = APIRouter()

    streamed: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @router.post("/v1/chat/completions", operation_id="chat", responses=streamed)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        begin = time.monotonic()
        service.check_model(body.model)
        conversation = await service.reader(request).messages(body.messages)
        item = Item(_prompt(body, conversation, service))
        if body.stream:
            return await _streamed(service, request, body, item)
        (answer,) = await service.results(request, "generate", [item])
        service.meters.first_token(time.monotonic() - begin)
        service.meters.tokens(answer.prompt_tokens, answer.new_tokens)
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
    wanted = body.max_completion_tokens or body.max_tokens
    if wanted is not None and wanted > limits.new_tokens:
        raise Refused.invalid(
            f"max_tokens: at most {limits.new_tokens:,} are written here", "max_tokens"
        )
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return Prompt(
        conversation,
        max_new_tokens=wanted or min(limits.default_new_tokens, limits.new_tokens),
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=tuple(stops),
        stream=bool(body.stream),
    )


async def _streamed(service: Service, request: Request, body: ChatRequest, item: Item) -> Response:
    """A stream; what fails before the first piece of text is an ordinary error."""
    begin = time.monotonic()
    call, pieces = service.stream(request, item)
    first = await pieces.get()
    if first is None:
        with explained():
            call.future.result()
    service.meters.first_token(time.monotonic() - begin)
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
    none = {"usage": None} if usage else {}

    def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event(head | {"choices": [choice]} | none)

    yield chunk({"role": "assistant", "content": ""})
    try:
        while piece is not None:
            yield chunk({"content": piece})
            async with asyncio.timeout_at(deadline):
                piece = await pieces.get()
        with explained():
            (answer,) = call.future.result()
    except TimeoutError:
        yield _event(Refused(504, "no whole answer in the time allowed", code="timeout").body)
        return
    except Refused as refused:
        yield _event(refused.body)
        return
    except Exception:
        yield _event(Refused(500, "internal error").body)
        raise
    service.meters.tokens(answer.prompt_tokens, answer.new_tokens)
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


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.new_tokens,
        "total_tokens": answer.prompt_tokens + answer.new_tokens,
    }
