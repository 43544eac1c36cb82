"""`/v1/chat/completions`: whole answers, and answers streamed as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from cafe.errors import first_line
from cafe.serving.engine import Call
from cafe.serving.errors import ApiError, json_response
from cafe.serving.messages import Completion, EngineModel, Prompt, TokenLogProb, WorkItem
from cafe.serving.middleware import DEADLINE
from cafe.serving.schema import ChatRequest
from cafe.serving.service import Service, as_api_errors
from cafe.types import Conversation

if TYPE_CHECKING:  # it imports torch
    from cafe.serving.constrained import JsonMatcher


def chat_routes(service: Service) -> APIRouter:
    """The route for chat completions."""
    router = APIRouter()

    streamed: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @router.post("/v1/chat/completions", operation_id="chat", responses=streamed)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        begin = time.monotonic()
        service.accept(request, body)
        model = service.engine.model
        if body.stream and body.n > 1:
            raise ApiError.invalid("n: only one answer can be streamed", "n")
        conversation = await service.reader(request).messages(body.messages)
        matcher = await _matcher(service, body)
        prompts = [_prompt(body, conversation, service, i) for i in range(body.n)]
        items = [WorkItem(replace(prompt, matcher=matcher)) for prompt in prompts]
        if body.stream:
            return await _stream(service, request, body, items[0])
        answers: list[Completion] = await service.results(request, "generate", items)
        service.metrics.first_token(time.monotonic() - begin)
        usage = _usage(answers)
        service.metrics.tokens(usage["prompt_tokens"], usage["completion_tokens"])
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": await service.run_in_thread(_logprobs, model, answer),
                "finish_reason": answer.finish_reason,
            }
            for i, answer in enumerate(answers)
        ]
        return json_response(
            _head(service, "chat.completion") | {"choices": choices, "usage": usage}
        )

    return router


def _prompt(body: ChatRequest, conversation: Conversation, service: Service, number: int) -> Prompt:
    """What the engine answers; `number` is that of the answer."""
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
        seed=None if body.seed is None else _seed(body.seed + number),
        stop=tuple(stops),
        stream=bool(body.stream),
        top_k=max(body.top_k, 0),
        frequency=body.frequency_penalty,
        presence=body.presence_penalty,
        bias=_biases(body, service.engine.model.vocabulary),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


async def _matcher(service: Service, body: ChatRequest) -> JsonMatcher | None:
    """What keeps an answer to its format. Raises ApiError (400) for a schema that cannot be."""
    asked = body.response_format
    if asked is None or asked.type == "text":
        return None
    schema: dict[str, Any] = {"type": "object"}
    if asked.type == "json_schema" and asked.json_schema is not None:
        schema = asked.json_schema.json_schema or schema
    try:
        return await service.run_in_thread(service.engine.model.json_matcher, schema)
    except ImportError:
        reason = "this server lacks llguidance; install it with pip install 'cafe-vlm[serve]'"
    except ValueError as error:
        reason = first_line(error)
    raise ApiError.invalid(f"response_format: {reason}", "response_format")


def _seed(value: int) -> int:
    """`value` in 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


def _biases(body: ChatRequest, vocabulary: int) -> dict[int, float]:
    """Raises ApiError (400) for a token that the model does not have."""
    biases = {int(token): value for token, value in (body.logit_bias or {}).items()}
    unknown = [token for token in biases if token >= vocabulary]
    if unknown:
        raise ApiError.invalid(
            f"logit_bias: token {unknown[0]} is not in the model's vocabulary of {vocabulary:,}",
            "logit_bias",
        )
    return biases


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

    def chunk(
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
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
    logprobs = await service.run_in_thread(_logprobs, service.engine.model, answer)
    yield chunk({}, answer.finish_reason, logprobs)
    if usage:
        yield _event(head | {"choices": [], "usage": _usage([answer])})
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


def _usage(answers: Sequence[Completion]) -> dict[str, int]:
    """Tokens of the answers to one prompt, which counts once."""
    prompt, new = answers[0].prompt_tokens, sum(answer.new_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _logprobs(model: EngineModel, answer: Completion) -> dict[str, Any] | None:
    """The log-probabilities of an answer's tokens, in OpenAI's shape; None: not asked for."""
    if answer.logprobs is None:
        return None

    text_of = cache(model.token_text)

    def described(token: int, value: float) -> dict[str, Any]:
        text = text_of(token)
        # A part of a character has no text, and what its bytes are the tokenizer does not say.
        whole = None if "\ufffd" in text else list(text.encode("utf-8", "replace"))
        return {"token": text, "logprob": value, "bytes": whole}

    def place(one: TokenLogProb) -> dict[str, Any]:
        return described(one.token, one.value) | {"top_logprobs": [described(*t) for t in one.top]}

    return {"content": [place(one) for one in answer.logprobs], "refusal": None}
