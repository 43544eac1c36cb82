"""Search by words: LanceDB's own full-text index over an index's texts, and its order beside the
vectors' one.

Texts are the items' own ones and their captions (`text`), and what a model wrote of images
(`generated_caption`). Each column has an inverted index, scored by BM25, which new rows join
whenever the table is compacted; rows that have not yet joined are read one by one. Words are cut as
Unicode says (ICU), which also works without spaces, and compared by their English stems, without
case and accents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cafe.errors import DataError
from cafe.index.rows import GENERATED_CAPTION, VECTOR, hit_of
from cafe.index.store import lance_errors
from cafe.index.tokens import TOKENS
from cafe.metrics.ranking import reciprocal_rank_fusion
from cafe.types import Hit

TEXT_COLUMNS = ("text", GENERATED_CAPTION)

CANDIDATES = 100
"""Rows of each order that are fused, at least; what neither ranks so high is hardly among the first
of both."""

MAX_WORDS = 200
"""Distinct words of a query that are looked up, the first ones: a search costs time for each."""

_KIND = "FTS"


class NoTextsError(DataError):
    """An index has nothing that can be searched by words."""


def build(table: Any, uri: str) -> None:
    """Index the text columns that have texts and no full-text index yet."""
    from lancedb.index import FTS

    with lance_errors(uri):
        built = indexed_columns(table)
        for name in _with_texts(table):
            if name not in built:
                # Its stop words are those of all languages, "cat" (Romanian) and "dog" (Danish)
                # among them; BM25 gives frequent words little weight anyway.
                config = FTS(base_tokenizer="icu", remove_stop_words=False)
                table.create_index(name, config=config)


def indexed_columns(table: Any) -> list[str]:
    """The columns that can be searched by words."""
    built = [index for index in table.list_indices() if index.index_type == _KIND]
    return [name for name in TEXT_COLUMNS if any(name in index.columns for index in built)]


def searchable_columns(table: Any, uri: str) -> list[str]:
    """The columns that can be searched by words, at least one.

    Raises:
        NoTextsError: there is none; says what would help.
    """
    with lance_errors(uri):
        columns = indexed_columns(table)
        texts = [] if columns else _with_texts(table)  # which reads the whole table
    if columns:
        return columns
    if texts:
        raise NoTextsError(
            f"index {uri} has texts, but was made before they could be searched; bring it up to "
            "date by the command that made it"
        )
    raise NoTextsError(
        f"index {uri} has no texts to search by words: its items are images without captions; make "
        "one of a data file with captions, or let a model write them: cafe index … --caption"
    )


def matching(
    table: Any,
    uri: str,
    words: str,
    vector: np.ndarray,
    top: int,
    where: str | None,
    shown: Sequence[str],
) -> list[Hit]:
    """The rows whose texts have most of the rarest of the words, best first.

    Args:
        table: LanceDB's.
        uri: of the index, for errors.
        words: of the query, in any form.
        vector: of the query, of length one; or the vectors of its tokens.
        top: number of hits.
        where: SQL that the rows fulfil; None: any.
        shown: the columns of a hit's metadata.

    Raises:
        NoTextsError: as `searchable_columns` does.
    """
    from lancedb.query import FullTextOperator, MultiMatchQuery

    columns = searchable_columns(table, uri)
    few = " ".join([*dict.fromkeys(words.split())][:MAX_WORDS])
    with lance_errors(uri):
        query = MultiMatchQuery(few, columns, boosts=None, operator=FullTextOperator.OR)
        search = table.search(query, query_type="fts").limit(top)
        column = VECTOR if vector.ndim == 1 else TOKENS
        search = search.select(["id", column, *shown, "_score"])
        if where is not None:
            search = search.where(where, prefilter=True)
        rows = sorted(search.to_list(), key=lambda row: (-row["_score"], row["id"]))
    return [hit_of(row, _score(vector, row[column]), shown) for row in rows]


def _score(query: np.ndarray, stored: Any) -> float:
    """The score that a search by vectors gives: the cosine, or the mean of tokens' best ones."""
    cosines = query @ np.asarray(stored, np.float32).T
    return float(cosines if query.ndim == 1 else cosines.max(axis=1).mean())


def fused(by_vector: Sequence[Hit], by_words: Sequence[Hit], top: int) -> list[Hit]:
    """The first `top` hits of both orders together (`reciprocal_rank_fusion`)."""
    hits = {hit.id: hit for hit in (*by_words, *by_vector)}
    orders = [[hit.id for hit in order] for order in (by_vector, by_words)]
    return [hits[id] for id, _ in reciprocal_rank_fusion(orders)[:top]]


def _with_texts(table: Any) -> list[str]:
    """The text columns in which a row has a text."""
    columns = [name for name in TEXT_COLUMNS if name in table.schema.names]
    return [name for name in columns if table.count_rows(f"{name} IS NOT NULL AND {name} != ''")]
