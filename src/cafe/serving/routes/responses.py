"""`/v1/responses` in its basic form: texts, images, instructions, tools, formats; also streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cafe.serving.answering import ToolChoices, answer_matcher, new_tokens, usage_of
from cafe.serving.content import Reader
from cafe.serving.errors import ApiError, json_response
from cafe.serving.messages import Completion, Prompt, WorkItem
from cafe.serving.schema import (
    JsonSchema,
    NamedFunction,
    NamedTool,
    ResponseFormat,
)
from cafe.serving.schema_decisions import as_chat_content
from cafe.serving.schema_responses import (
    CallItem,
    CallOutput,
    Item,
    NamedFunctionTool,
    ResponsesRequest,
)
from cafe.serving.service import Service
from cafe.serving.streams import AnswerStream, data_event, event_stream
from cafe.serving.tools import CallReader, read_calls
from cafe.types import Conversation, Message, ToolCall


def response_routes(service: Service) -> APIRouter:
    """The route for OpenAI's responses."""
    router = APIRouter()
    streamed: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @router.post("/v1/responses", operation_id="responses", responses=streamed)
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        """Answer an input; the response is not stored."""
        begin = time.monotonic()
        service.accept(request, body)
        _ = service.engine.model  # refuses while the model loads
        choice = body.tool_choice
        if isinstance(choice, NamedFunctionTool):
            choice = NamedTool(type="function", function=NamedFunction(name=choice.name))
        tools = ToolChoices(service, [tool.nested for tool in body.tools or []], choice)
        conversation = tools.told(await _conversation(service.reader(request), body))
        prompt = Prompt(
            conversation,
            max_new_tokens=new_tokens(service, body.max_output_tokens, "max_output_tokens"),
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            stream=body.stream,
            matcher=await answer_matcher(service, _format(body), tools),
        )
        items = [WorkItem(prompt)]
        reply = _Reply(service, body, bool(tools.offered))
        if body.stream:
            stream = await service.stream(request, items)
            await stream.begin()
            service.metrics.first_token(time.monotonic() - begin)
            return event_stream(reply.events(stream))
        (answer,) = await service.results(request, "generate", items)
        service.metrics.first_token(time.monotonic() - begin)
        text, calls = read_calls(answer.text) if tools.offered else (answer.text, [])
        output = [_message(text)] if text or not calls else []
        output += [_call(one) for one in (calls if body.parallel_tool_calls else calls[:1])]
        return json_response(reply.whole(output, answer))

    return router


async def _conversation(reader: Reader, body: ResponsesRequest) -> Conversation:
    turns: list[Message] = []
    if body.instructions is not None:
        turns.append(Message("system", reader.text(body.instructions, "instructions")[0].content))
    if isinstance(body.input, str):
        return (*turns, *reader.text(body.input, "input"))
    for i, item in enumerate(body.input):
        param = f"input.{i}"
        match item:
            case CallItem():
                reader.text(item.name + item.arguments, f"{param}.arguments")
                called = ToolCall(item.name, item.arguments)
                before = turns[-1] if turns and turns[-1].role == "assistant" else None
                turns = turns[:-1] if before else turns
                text, calls = (before.content, before.calls) if before else ((), ())
                turns.append(Message("assistant", text, calls=(*calls, called)))
            case CallOutput():
                turns.append(
                    Message("tool", reader.text(item.output, f"{param}.output")[0].content)
                )
            case _:
                content = as_chat_content(item.content)
                (read,) = await reader.parts(content, f"{param}.content")
                role = "system" if item.role == "developer" else item.role
                turns.append(Message(role, read.content))
    return tuple(turns)


def _format(body: ResponsesRequest) -> ResponseFormat | None:
    asked = body.text.format
    if asked.type == "json_schema" and asked.json_schema is None:
        raise ApiError.invalid("text.format.schema: the field is missing", "text.format.schema")
    return ResponseFormat(type=asked.type, json_schema=JsonSchema(json_schema=asked.json_schema))


class _Reply:
    """One response, whole or as events."""

    def __init__(self, service: Service, body: ResponsesRequest, calls: bool) -> None:
        self._service, self._body, self._calls = service, body, calls
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())

    def whole(self, output: list[Item], answer: Completion | None) -> dict[str, Any]:
        """The response; without an answer it is in progress."""
        cut = answer is not None and answer.finish_reason == "length"
        usage = None
        if answer is not None:
            counts = usage_of([answer])
            self._service.metrics.tokens(answer.prompt_tokens, answer.new_tokens)
            usage = {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            }
        body = self._body.model_dump(
            mode="json", include={"instructions", "max_output_tokens", "temperature", "top_p"}
        )
        return body | {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress" if answer is None else "incomplete" if cut else "completed",
            "model": self._service.name,
            "output": output,
            "usage": usage,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "metadata": {},
            "parallel_tool_calls": self._body.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "text": {"format": {"type": self._body.text.format.type}},
            "tool_choice": "auto",
            "tools": [
                tool.model_dump(include={"type", "name", "description", "parameters"})
                | {"strict": False}
                for tool in self._body.tools or []
            ],
        }

    async def events(self, stream: AnswerStream) -> AsyncIterator[str]:
        """Server-sent events in OpenAI's order; a call is sent as a whole."""
        output: list[Item] = []
        number = -1

        def event(kind: str, **fields: Any) -> str:
            nonlocal number
            number += 1
            return data_event({"type": kind, "sequence_number": number} | fields, kind)

        yield event("response.created", response=self.whole([], None))
        yield event("response.in_progress", response=self.whole([], None))
        item, text = _message("", "in_progress"), ""
        place = {"item_id": item["id"], "output_index": 0}
        part = place | {"content_index": 0}
        reader = CallReader()
        calls: list[ToolCall] = []
        answer: Completion | None = None
        async for _, piece in stream:
            found: list[str | ToolCall]
            if isinstance(piece, Completion):
                answer, found = piece, [reader.end()]
            else:
                found = list(reader.feed(piece)) if self._calls else [piece]
            calls += [one for one in found if isinstance(one, ToolCall)]
            for one in found:
                if not isinstance(one, str) or not one:
                    continue
                if not text:
                    started = item | {"content": []}
                    yield event("response.output_item.added", output_index=0, item=started)
                    yield event("response.content_part.added", **part, part=_text_part(""))
                text += one
                yield event("response.output_text.delta", **part, delta=one, logprobs=[])
        if text or not calls:
            if not text:
                started = item | {"content": []}
                yield event("response.output_item.added", output_index=0, item=started)
                yield event("response.content_part.added", **part, part=_text_part(""))
            output.append(_message(text) | {"id": item["id"]})
            yield event("response.output_text.done", **part, text=text, logprobs=[])
            yield event("response.content_part.done", **part, part=_text_part(text))
            yield event("response.output_item.done", output_index=0, item=output[0])
        for one in calls if self._body.parallel_tool_calls else calls[:1]:
            called, at = _call(one), len(output)
            output.append(called)
            head = {"item_id": called["id"], "output_index": at}
            begun = called | {"arguments": "", "status": "in_progress"}
            yield event("response.output_item.added", output_index=at, item=begun)
            whole = {"arguments": one.arguments, "name": one.name}
            yield event("response.function_call_arguments.delta", **head, delta=one.arguments)
            yield event("response.function_call_arguments.done", **head, **whole)
            yield event("response.output_item.done", output_index=at, item=called)
        assert answer is not None
        end = "incomplete" if answer.finish_reason == "length" else "completed"
        yield event(f"response.{end}", response=self.whole(output, answer))


def _message(text: str, status: str = "completed") -> Item:
    head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "status": status}
    return head | {"role": "assistant", "content": [_text_part(text)]}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(call: ToolCall) -> Item:
    return {
        "id": f"fc_{uuid.uuid4().hex}",
        "type": "function_call",
        "status": "completed",
        "call_id": f"call_{uuid.uuid4().hex[:24]}",
        "name": call.name,
        "arguments": call.arguments,
    }
