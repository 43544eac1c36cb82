"""`/v1/decisions`: probabilities of the answers to typed questions; nothing is generated.

A predicate is a yes/no question, judged as `CAFe.score` judges. For a choice and a score the model
is shown all options, and each has the probability of being written as the answer, log P(option),
normalised over the options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cafe.serving.content import Reader
from cafe.serving.errors import ApiError, json_response
from cafe.serving.messages import Score, WorkItem
from cafe.serving.schema_decisions import (
    Choice,
    DecisionRequest,
    Predicate,
    Rating,
    as_chat_content,
)
from cafe.serving.service import Service
from cafe.types import Conversation, Image, Message, Part


@dataclass(frozen=True, slots=True)
class AskedQuestion:
    """A question as the model is asked it.

    options   texts that may be the answer; empty: yes or no
    """

    question: Predicate | Choice | Rating
    parts: tuple[Part, ...]
    options: tuple[str, ...]

    def conversations(self, state: Conversation) -> list[Conversation]:
        """What is judged: the question, or the question with each of its options as the answer."""
        *before, last = state
        if last.role == "user":
            asked = (*before, Message("user", (*last.content, "\n", *self.parts)))
        else:
            asked = (*state, Message("user", self.parts))
        if not self.options:
            return [asked]
        return [(*asked, Message("assistant", (option,))) for option in self.options]


def decision_routes(service: Service) -> APIRouter:
    """The route for decisions."""
    router = APIRouter()

    @router.post("/v1/decisions", operation_id="decisions")
    async def decisions(body: DecisionRequest, request: Request) -> Response:
        """Answer yes/no questions, choices and ratings about one input, with probabilities."""
        service.accept(request, body)
        _ = service.engine.model  # refuses while the model loads
        reader = service.reader(request)
        state = await _state(reader, body)
        asked = [
            await read_question(reader, q, f"questions.{i}") for i, q in enumerate(body.questions)
        ]
        values, tokens = await scored(service, request, state, asked)
        answers = [_answer(*one) for one in zip(asked, values, strict=True)]
        usage = {
            "input_tokens": tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens,
        }
        return json_response({"model": service.name, "answers": answers, "usage": usage})

    return router


async def scored(
    service: Service, request: Request, state: Conversation, asked: list[AskedQuestion]
) -> tuple[list[np.ndarray], int]:
    """What the model says of each question, and the number of tokens that were read.

    The log-odds of yes, [1], or log P of each of the question's options, [options].

    Raises:
        ApiError: As in `Service.results`; or the questions are too many.
    """
    _check_size(service, state, asked)
    judged = [one for question in asked for one in question.conversations(state)]
    items = [WorkItem(one, number) for number, one in enumerate(judged)]
    scores: list[Score]
    scores, tokens = await service.counted(request, "score", items)
    values = iter([one.value for one in scores])
    counts = [len(one.options) or 1 for one in asked]
    return [np.array([next(values) for _ in range(count)]) for count in counts], tokens


async def _state(reader: Reader, body: DecisionRequest) -> Conversation:
    if isinstance(body.input, str):
        return reader.text(body.input, "input")
    messages: list[Message] = []
    for i, message in enumerate(body.input):
        content = as_chat_content(message.content)
        (read,) = await reader.parts(content, f"input.{i}.content")
        role = "system" if message.role == "developer" else message.role
        messages.append(Message(role, read.content))
    return tuple(messages)


async def read_question(
    reader: Reader, question: Predicate | Choice | Rating, param: str
) -> AskedQuestion:
    """A question with its options. Raises ApiError (400) for two options of the same text."""
    content = as_chat_content(question.instructions)
    (read,) = await reader.parts(content, f"{param}.instructions")
    match question:
        case Predicate():
            return AskedQuestion(question, (*read.content, "\nIs this true? Answer yes or no."), ())
        case Choice():
            texts = [_text(option.value) for option in question.choices]
            described = [option.description for option in question.choices]
        case Rating():
            texts = [level.label for level in question.levels]
            described = [level.description for level in question.levels]
    if len(set(texts)) < len(texts):
        raise ApiError.invalid(f"{param}: two of the answers have the same text", param)
    lines = [f"- {t}: {d}" if d else f"- {t}" for t, d in zip(texts, described, strict=True)]
    listed = "\nAnswer with one of these:\n" + "\n".join(lines)
    reader.text(listed, param)  # counts towards the limits
    return AskedQuestion(question, (*read.content, listed), tuple(texts))


def _text(value: bool | str) -> str:
    return value if isinstance(value, str) else str(value).lower()


def _check_size(service: Service, state: Conversation, asked: list[AskedQuestion]) -> None:
    """Raises ApiError (400) for more than the limits allow: the input is read for each option."""
    limits = service.limits
    counts = [len(one.options) or 1 for one in asked]
    service.check_count(sum(counts), "questions")
    characters = sum(len(message.text) for message in state) * sum(counts)
    images = _images(part for message in state for part in message.content) * sum(counts)
    for one, count in zip(asked, counts, strict=True):
        characters += sum(len(part) for part in one.parts if isinstance(part, str)) * count
        images += _images(one.parts) * count
    if characters > limits.request_characters or images > max(limits.images, sum(counts)):
        raise ApiError.invalid(
            f"questions: the input, read again for each of {sum(counts):,} answers, has "
            f"{characters:,} characters and {images:,} images in all; the limits are "
            f"{limits.request_characters:,} and {max(limits.images, sum(counts)):,}; ask fewer "
            "questions at a time",
            "questions",
        )


def _images(parts: Any) -> int:
    return sum(isinstance(part, Image) for part in parts)


def _answer(asked: AskedQuestion, values: np.ndarray) -> dict[str, Any]:
    """One answer in OpenAI's shape; `values` are log-odds, or log P of each option."""
    # Late: the server listens before torch is imported.
    from cafe.model.rerank import probability_of_yes, softmax

    question = asked.question
    head = {"type": question.type, "name": question.name}
    if isinstance(question, Predicate):
        return head | {"probability": float(probability_of_yes(values)[0])}
    p = softmax(values)
    head["confidence"] = confidence(p)
    if isinstance(question, Choice):
        each = zip(question.choices, p.tolist(), strict=True)
        return head | {
            "choice": question.choices[int(p.argmax())].value,
            "probabilities": [{"value": o.value, "probability": one} for o, one in each],
        }
    labels = enumerate(zip(question.levels, p.tolist(), strict=True))
    return head | {
        "score": float(p @ np.arange(len(p))),
        "probabilities": [
            {"value": i, "label": level.label, "probability": one} for i, (level, one) in labels
        ],
    }


def confidence(probabilities: np.ndarray) -> float:
    """How concentrated a distribution is: 1 - entropy / log n; 0 for a uniform one.

    Args:
        probabilities: [n], n > 1, sum 1.
    """
    some = probabilities[probabilities > 0]
    entropy = -float((some * np.log(some)).sum())
    return min(1.0, max(0.0, 1 - entropy / float(np.log(len(probabilities)))))
