"""`/v1/chat/completions`: whole answers, and answers streamed as server-sent events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import cache
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cafe.serving.answering import (
    ToolChoices,
    answer_matcher,
    described_call,
    new_tokens,
    usage_of,
)
from cafe.serving.errors import ApiError, json_response
from cafe.serving.messages import Completion, EngineModel, Prompt, TokenLogProb, WorkItem
from cafe.serving.schema import ChatRequest
from cafe.serving.service import Service
from cafe.serving.streams import AnswerStream, data_event, event_stream
from cafe.serving.tools import CallReader, read_calls
from cafe.types import Conversation, ToolCall


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
        tools = ToolChoices(service, body.tools, body.tool_choice)
        conversation = tools.told(await service.reader(request).messages(body.messages))
        matcher = await answer_matcher(service, body.response_format, tools)
        prompts = [_prompt(body, conversation, service, i) for i in range(body.n)]
        items = [WorkItem(replace(prompt, matcher=matcher)) for prompt in prompts]
        if body.stream:
            return await _stream(service, request, body, items, bool(tools.offered))
        answers: list[Completion] = await service.results(request, "generate", items)
        service.metrics.first_token(time.monotonic() - begin)
        usage = usage_of(answers)
        service.metrics.tokens(usage["prompt_tokens"], usage["completion_tokens"])
        choices: list[dict[str, Any]] = []
        for i, answer in enumerate(answers):
            text, calls = read_calls(answer.text) if tools.offered else (answer.text, [])
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls := calls if body.parallel_tool_calls else calls[:1]:
                message["content"] = text or None
                message["tool_calls"] = [described_call(call) for call in calls]
            choices.append(
                {
                    "index": i,
                    "message": message,
                    "logprobs": await service.run_in_thread(_logprobs, model, answer),
                    "finish_reason": _reason(answer, bool(calls)),
                }
            )
        return json_response(
            _head(service, "chat.completion") | {"choices": choices, "usage": usage}
        )

    return router


def _prompt(body: ChatRequest, conversation: Conversation, service: Service, number: int) -> Prompt:
    """What the engine answers; `number` is that of the answer."""
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return Prompt(
        conversation,
        max_new_tokens=new_tokens(service, body.max_completion_tokens or body.max_tokens),
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
    service: Service, request: Request, body: ChatRequest, items: list[WorkItem], calls: bool
) -> Response:
    """Stream answers; a failure before the first piece of text is an ordinary error response."""
    begin = time.monotonic()
    stream = await service.stream(request, items)
    await stream.begin()
    service.metrics.first_token(time.monotonic() - begin)
    return event_stream(_events(service, body, stream, calls))


async def _events(
    service: Service, body: ChatRequest, stream: AnswerStream, calls: bool
) -> AsyncIterator[str]:
    """Server-sent events; with `calls`, calls of tools are read, and sent each as a whole."""
    head = _head(service, "chat.completion.chunk")
    usage = body.stream_options is not None and body.stream_options.include_usage
    no_usage = {"usage": None} if usage else {}

    def chunk(number: int, delta: dict[str, Any], **end: Any) -> str:
        choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}
        return data_event(head | {"choices": [choice | end]} | no_usage)

    for number in range(body.n):
        yield chunk(number, {"role": "assistant", "content": ""})
    readers = [CallReader() for _ in range(body.n)]
    counts = [0] * body.n
    answers: list[Completion] = []
    async for number, piece in stream:
        found: list[str | ToolCall] = [] if isinstance(piece, Completion) else [piece]
        if calls:
            reader = readers[number]
            ended = isinstance(piece, Completion)
            found = [reader.end()] if ended else list(reader.feed(str(piece)))
        for one in found:
            if isinstance(one, str):
                if one:
                    yield chunk(number, {"content": one})
            elif body.parallel_tool_calls or not counts[number]:
                call = {"index": counts[number]} | described_call(one)
                counts[number] += 1
                yield chunk(number, {"tool_calls": [call]})
        if isinstance(piece, Completion):
            answers.append(piece)
            logprobs = await service.run_in_thread(_logprobs, service.engine.model, piece)
            reason = _reason(piece, bool(counts[number]))
            yield chunk(number, {}, logprobs=logprobs, finish_reason=reason)
    total = usage_of(answers)
    service.metrics.tokens(total["prompt_tokens"], total["completion_tokens"])
    if usage:
        yield data_event(head | {"choices": [], "usage": total})
    yield "data: [DONE]\n\n"


def _reason(answer: Completion, called: bool) -> str:
    return "tool_calls" if called and answer.finish_reason == "stop" else answer.finish_reason


def _head(service: Service, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.name,
    }


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
