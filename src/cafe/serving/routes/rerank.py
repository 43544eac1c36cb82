"""Reranking (Jina's, Cohere's and TEI's shapes) and `/score`: pairs judged by the model."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cafe.serving.errors import ApiError, json_response
from cafe.serving.inputs import instructed, read_items
from cafe.serving.messages import Embedding, Score, WorkItem
from cafe.serving.schema import Content
from cafe.serving.schema_vectors import RerankRequest, ScoreRequest
from cafe.serving.service import Service
from cafe.serving.streams import as_api_errors
from cafe.serving.vectors import unit_vectors
from cafe.types import Conversation, Image

if TYPE_CHECKING:
    from cafe.model.rerank import RerankBy, Reranked


def rerank_routes(service: Service) -> APIRouter:
    """The routes for reranking and scoring."""
    router = APIRouter()

    @router.post("/v2/rerank", operation_id="cohere_rerank")
    @router.post("/v1/rerank", operation_id="rerank")
    @router.post("/rerank", operation_id="tei_rerank")
    async def rerank(body: RerankRequest, request: Request) -> Response:
        """Order documents by the probability that each is the one meant, as `CAFe.rerank` does."""
        service.accept(request, body)
        ranked, tokens = await _ranked(service, request, body)
        order = np.argsort(-ranked.posterior, kind="stable")[: body.top_n or None].tolist()
        if body.texts is not None:
            return json_response(
                [
                    {"index": i, "score": float(ranked.posterior[i])}
                    | ({"text": body.texts[i]} if body.return_text else {})
                    for i in order
                ]
            )
        results = [_result(body, ranked, i) for i in order]
        return json_response(
            {
                "id": f"rerank-{uuid.uuid4().hex}",
                "object": "rerank",
                "model": service.name,
                "results": results,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
                "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
            }
        )

    @router.post("/v1/score", operation_id="score")
    @router.post("/score", operation_id="vllm_score")
    async def score(body: ScoreRequest, request: Request) -> Response:
        """The probability of "yes" to the question about each pair, as `CAFe.score`."""
        service.accept(request, body)
        pairs = await _pairs(service, request, body)
        scores: list[Score]
        scores, tokens = await service.counted(request, "score", pairs)
        # Late: the server listens before torch is imported.
        from cafe.model.rerank import probability_of_yes

        probabilities = probability_of_yes(np.array([one.value for one in scores]))
        return json_response(
            {
                "id": f"score-{uuid.uuid4().hex}",
                "object": "list",
                "created": int(time.time()),
                "model": service.name,
                "data": [
                    {"index": i, "object": "score", "score": value}
                    for i, value in enumerate(probabilities.tolist())
                ],
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    return router


async def _ranked(service: Service, request: Request, body: RerankRequest) -> tuple[Reranked, int]:
    """The scores of each document, and the number of tokens that were read."""
    temperature = service.engine.model.temperature  # refuses while the model loads
    # Late: the server listens before torch is imported.
    from cafe.model.rows.matching import caption_dialogue, pair_question

    reader = service.reader(request)
    name = "documents" if body.texts is None else "texts"
    (query,) = await read_items(service, reader, body.query, "query")
    documents = await read_items(service, reader, getattr(body, name), name)
    _check_repeated(service, query, len(documents), "query")
    with as_api_errors():
        ask = pair_question if body.rerank_by == "question" else caption_dialogue
        questions = [instructed(ask(query, one), body.instruction) for one in documents]
    pairs = [WorkItem(one, number) for number, one in enumerate(questions)]
    asked = WorkItem(instructed(query, body.instruction))
    sides = [asked, *(WorkItem(one, number) for number, one in enumerate(documents))]
    (scores, judged), (embeddings, embedded) = await asyncio.gather(
        service.counted(request, "score", pairs), service.counted(request, "embed", sides)
    )
    ranked = await service.run_in_thread(_rerank, embeddings, scores, temperature, body.rerank_by)
    return ranked, judged + embedded


async def _pairs(service: Service, request: Request, body: ScoreRequest) -> list[WorkItem]:
    """The questions about one query and each document, or about each query and its own."""
    _ = service.engine.model  # refuses while the model loads
    from cafe.model.rows.matching import pair_question

    reader = service.reader(request)
    queries = await read_items(service, reader, body.queries, "queries")
    documents = await read_items(service, reader, body.documents, "documents")
    if len(queries) == 1:
        _check_repeated(service, queries[0], len(documents), "queries")
        queries *= len(documents)
    if len(queries) != len(documents):
        raise ApiError.invalid(
            f"queries: {len(queries)} with {len(documents)} documents; give one query, or one "
            "for each document",
            "queries",
        )
    with as_api_errors():
        questions = [pair_question(*pair) for pair in zip(queries, documents, strict=True)]
    return [WorkItem(instructed(q, body.instruction), i) for i, q in enumerate(questions)]


def _check_repeated(service: Service, query: Conversation, count: int, param: str) -> None:
    """Raises ApiError (400) for a query that is too much to be read with each document.

    The limits of a request count it once, and it may be as long as they allow.
    """
    limits = service.limits
    images = sum(isinstance(part, Image) for message in query for part in message.content)
    characters = sum(len(message.text) for message in query)
    if characters * (count - 1) > limits.request_characters or (
        images > 1 and images * count > limits.images
    ):
        raise ApiError.invalid(
            f"{param}: {characters:,} characters and {images} images, read again with each of "
            f"{count:,} documents, exceed {limits.request_characters:,} characters or "
            f"{limits.images} images; send fewer documents at a time",
            param,
        )


def _rerank(
    embeddings: list[Embedding], scores: list[Score], temperature: float, by: RerankBy
) -> Reranked:
    """The scores of each document.

    embeddings   of the query, then of the documents
    scores       of the documents
    """
    from cafe.model.rerank import reranked  # late, as above

    vectors = np.stack([one.vector for one in embeddings])
    query, *documents = unit_vectors(vectors, vectors.shape[1])
    judged = np.array([score.value for score in scores])
    return reranked(np.stack(documents) @ query, judged, temperature, by)


def _result(body: RerankRequest, ranked: Reranked, i: int) -> dict[str, Any]:
    result: dict[str, Any] = {"index": i, "relevance_score": float(ranked.posterior[i])}
    for name in ("match", "log_likelihood"):
        values = getattr(ranked, name)
        if values is not None:
            result[name] = float(values[i])
    if body.return_documents and body.documents is not None:
        result["document"] = _echo(body.documents[i])
    return result


def _echo(document: str | Content) -> dict[str, Any]:
    """The document's text; images are not returned."""
    text = document if isinstance(document, str) else document.text
    return {} if text is None else {"text": text}
