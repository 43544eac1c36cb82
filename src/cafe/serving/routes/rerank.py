"""`/v1/rerank`: documents ordered by the probability that each is the one meant."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cafe.serving.errors import json_response
from cafe.serving.messages import Embedding, Score, WorkItem
from cafe.serving.routes.embeddings import unit_vectors
from cafe.serving.schema import Content, RerankRequest
from cafe.serving.service import Service, as_api_errors

if TYPE_CHECKING:
    from cafe.model.rerank import RerankBy, Reranked


def rerank_routes(service: Service) -> APIRouter:
    """The route for reranking."""
    router = APIRouter()

    @router.post("/v1/rerank", operation_id="rerank")
    async def rerank(body: RerankRequest, request: Request) -> Response:
        """Order documents by the probability that each is the one meant, as `CAFe.rerank` does."""
        service.check_model(body.model)
        temperature = service.engine.model.temperature  # refuses while the model loads
        # Late: the server listens before torch is imported.
        from cafe.model.rows.matching import caption_dialogue, match_question

        service.check_count(len(body.documents), "documents")
        reader = service.reader(request)
        query = await reader.content(body.query, "query")
        documents = await asyncio.gather(
            *[reader.content(d, f"documents.{i}") for i, d in enumerate(body.documents)]
        )
        with as_api_errors():
            ask = match_question if body.rerank_by == "question" else caption_dialogue
            pairs = [WorkItem(ask(query, one), number) for number, one in enumerate(documents)]
        sides = [WorkItem(query), *(WorkItem(one, number) for number, one in enumerate(documents))]
        scores, embeddings = await asyncio.gather(
            service.results(request, "score", pairs), service.results(request, "embed", sides)
        )
        tokens = sum(one.tokens for one in (*scores, *embeddings))
        service.metrics.tokens(tokens)
        ranked = await service.run_in_thread(
            _rerank, embeddings, scores, temperature, body.rerank_by
        )
        results = [
            {"index": i, "relevance_score": float(ranked.posterior[i])}
            | {
                name: float(values[i])
                for name in ("match", "log_likelihood")
                if (values := getattr(ranked, name)) is not None
            }
            | ({"document": _echo(body.documents[i])} if body.return_documents else {})
            for i in np.argsort(-ranked.posterior, kind="stable")[: body.top_n].tolist()
        ]
        return json_response(
            {
                "id": f"rerank-{uuid.uuid4().hex}",
                "model": service.name,
                "results": results,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    return router


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


def _echo(document: str | Content) -> dict[str, Any]:
    """The document's text; images are not returned."""
    text = document if isinstance(document, str) else document.text
    return {} if text is None else {"text": text}
