"""`/v1/systemone`: named questions about a text or JSON, in the shape of vLLM and transformers.

They are judged as those of `/v1/decisions` are: a noul as a predicate, a choice and a score by the
probability that the model writes each option. Confidence is defined as these servers define it.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cafe.serving.content import Reader
from cafe.serving.errors import json_response
from cafe.serving.routes.decisions import AskedQuestion, read_question, scored
from cafe.serving.schema_decisions import (
    Choice,
    Described,
    Level,
    Option,
    Predicate,
    Rating,
    SystemOneQuestion,
    SystemOneRequest,
)
from cafe.serving.service import Service


def systemone_routes(service: Service) -> APIRouter:
    """The route for System One's questions."""
    router = APIRouter()

    @router.post("/v1/systemone", operation_id="systemone")
    async def systemone(body: SystemOneRequest, request: Request) -> Response:
        """Answer named yes/no questions, choices and scores about a state, with probabilities."""
        service.accept(request, body)
        _ = service.engine.model  # refuses while the model loads
        reader = service.reader(request)
        state = reader.text(_text(body.state), "state")
        asked = [
            await _asked(reader, question, f"questions.{name[:60]}")
            for name, question in body.questions.items()
        ]
        values, tokens = await scored(service, request, state, asked)
        answers = {
            name: _answer(question, one)
            for (name, question), one in zip(body.questions.items(), values, strict=True)
        }
        usage = {"input_tokens": tokens, "output_tokens": 0}
        return json_response({"model": service.name, "answers": answers, "usage": usage})

    return router


def _text(value: Described | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


async def _asked(reader: Reader, question: SystemOneQuestion, param: str) -> AskedQuestion:
    instructions = _text(question.instructions)
    match question.type, question.criteria:
        case "choice", dict(options):
            choices = [Option(value=k, description=_text(v) or None) for k, v in options.items()]
            same = Choice(type="choice", instructions=instructions, choices=choices)
            return await read_question(reader, same, param)
        case "score", list(levels):
            labels = [Level(label=_text(level)) for level in levels]
            same = Rating(type="score", instructions=instructions, levels=labels)
            return await read_question(reader, same, param)
    meanings = question.criteria if isinstance(question.criteria, dict) else {}
    lines = [f"{key}: {_text(value)}" for key, value in meanings.items() if value]
    said = "\n".join([instructions, *lines])
    return await read_question(reader, Predicate(type="predicate", instructions=said), param)


def _answer(question: SystemOneQuestion, values: np.ndarray) -> dict[str, Any]:
    """`values` are log-odds of yes, or log P of each option."""
    # Late: the server listens before torch is imported.
    from cafe.model.rerank import probability_of_yes, softmax

    if question.type == "noul":
        return {"type": "noul", "noul": float(probability_of_yes(values)[0])}
    p = softmax(values)
    count, best = len(p), int(p.argmax())
    criteria = question.criteria or []
    if question.type == "choice":
        names = list(criteria)
        return {
            "type": "choice",
            "choice": names[best],
            "confidence": max(0.0, float((p[best] - 1 / count) / (1 - 1 / count))),
            "probabilities": dict(zip(names, p.tolist(), strict=True)),
        }
    places = np.arange(count)
    uniform = float(np.abs(places - (count - 1) / 2).mean())
    names = list(map(str, places))
    return {
        "type": "score",
        "score": float(p @ places),
        "legend": dict(zip(names, criteria, strict=True)),
        "confidence": max(0.0, 1 - float(p @ np.abs(places - best)) / uniform),
        "probabilities": dict(zip(names, p.tolist(), strict=True)),
    }
