"""`/search`: the search of `cafe.retrieval.search` over HTTP; the index location stays private."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cafe.errors import DataError
from cafe.index.full_text import NoTextsError
from cafe.retrieval.documents import PAGE, location_of, page_number
from cafe.retrieval.multi_vector import searched_by_tokens
from cafe.retrieval.search import Searcher
from cafe.serving.errors import ApiError, json_response
from cafe.serving.schema import Content, SearchRequest
from cafe.serving.service import SearchFunction, Service
from cafe.serving.vectors import unit_vectors
from cafe.types import Hit

if TYPE_CHECKING:
    from cafe.index import Index


class IndexSearch:
    """An index as a `cafe.serving.service.SearchFunction`.

    The engine embeds the queries, in its batches, so the searcher has no model of its own.
    """

    def __init__(self, index: Index) -> None:
        self._searcher = Searcher(index)
        self._model = index.model
        self._searcher.say_writer()

    @property
    def root(self) -> Path | None:
        """The folder that the paths of its images are relative to; None: there is none."""
        return self._searcher.root

    @property
    def by_tokens(self) -> bool:
        """Whether it is searched by the vectors of tokens (MaxSim), as `cafe search` does."""
        return searched_by_tokens(self._searcher.index, None)

    @property
    def think(self) -> int:
        """The most tokens of the thoughts after which its images were read; 0: none."""
        return self._searcher.think

    @property
    def has_words(self) -> bool:
        """Whether it has texts that can be searched by words."""
        try:
            self._searcher.index.check_words()
        except NoTextsError:
            return False
        return True

    def holds(self, path: str) -> bool:
        """Whether a page of the document at `path` is in the index."""
        index = self._searcher.index
        if PAGE not in index.columns:
            return False
        quoted = path.replace("'", "''")
        return index.count(f"path = '{quoted}' AND {PAGE} >= 1") > 0

    def __call__(
        self, vector: np.ndarray, top: int, where: str | None, words: str | None
    ) -> list[Hit]:
        """The nearest rows; with `words`, ordered by these as well.

        `vector` is [d], or [tokens, dim] where it is searched `by_tokens`.

        Raises:
            ApiError: 400 for an invalid `where`, or words where the index has no texts.
            RuntimeError: The index is broken.
        """
        if where is not None:
            try:
                self._searcher.check_filter(where)
            except DataError as error:
                raise ApiError.invalid(str(error), "where") from error
        try:
            try:
                found = self._searcher.search(vector, top, where, hybrid=words or False)
            except DataError:
                self._open_again()
                found = self._searcher.search(vector, top, where, hybrid=words or False)
            self._check_model()
            return [one.hit for one in found]
        except NoTextsError:
            raise ApiError.invalid(
                "hybrid: this index has no texts to search by words", "hybrid"
            ) from None
        except DataError as error:  # its message names the folder, which clients must not see
            raise RuntimeError("the index cannot be searched") from error

    def _open_again(self) -> None:
        """Open the index that stands there now; rows that are added are seen without that."""
        self._searcher = Searcher(type(self._searcher.index).open(self._searcher.index.uri))

    def _check_model(self) -> None:
        """Raises ApiError (503) where the index has been made again with another model."""
        if self._searcher.index.model != self._model:
            raise ApiError.unavailable(
                "the index was made again with another model, and the server needs a restart",
                "index_replaced",
            )


def search_routes(service: Service, search: SearchFunction) -> APIRouter:
    """The route for searching an index."""
    router = APIRouter()

    @router.post("/search", operation_id="search")
    async def find(body: SearchRequest, request: Request) -> Response:
        """Search the index by text, by an image, or by both."""
        service.accept(request, body)
        if body.query is None and body.image is None:
            raise ApiError.invalid("give query, image or both", "query")
        content = Content(text=body.query, image=body.image)
        hits = await hits_of(
            service,
            search,
            request,
            content,
            body.top,
            body.where,
            caption=body.caption is True,
            think=body.think,
            hybrid=body.hybrid is True,
        )
        return json_response(
            {
                "hits": [
                    {
                        "id": hit.id,
                        "score": hit.score,
                        "location": location_of(hit),
                        "page": page_number(hit),
                        "metadata": hit.metadata,
                    }
                    for hit in hits
                ]
            }
        )

    return router


async def hits_of(
    service: Service,
    search: SearchFunction,
    request: Request,
    query: Content,
    top: int,
    where: str | None = None,
    *,
    caption: bool = False,
    think: int | None = None,
    hybrid: bool = False,
) -> list[Hit]:
    """The `top` rows nearest to a query of text, an image or both. Raises ApiError.

    An image without words is read after a thought if `think` says so; None: as the index's images.
    With `hybrid` the words of the query order them as well.
    """
    if hybrid and not (query.text or "").strip():
        raise ApiError.invalid("hybrid needs words: give query", "hybrid")
    conversation = await service.reader(request).content(query, "query")
    words = query.text if hybrid else None
    if search.by_tokens:
        if caption or think:
            raise ApiError.invalid(
                "this index is searched by the vectors of tokens, and a caption or a thought "
                "changes an embedding only; leave it out",
                "caption" if caption else "think",
            )
        (tokens,) = await service.token_vectors(request, [conversation])
        return list(await service.run_in_thread(search, tokens.vectors, top, where, words))
    if think is None:
        think = 0 if caption else min(search.think, service.limits.new_tokens)
    embedded = await service.embed(request, [conversation], caption=caption, think=think)
    (vector,) = unit_vectors(embedded.vectors, embedded.vectors.shape[1])
    return list(await service.run_in_thread(search, vector, top, where, words))
