"""Queries with candidate lists, MMEB's shape: hit@1.

Anything that can be embedded can be a query or a candidate. Each distinct candidate is embedded
once, however many lists contain it, and a list that all queries share (a global ranking) is one
object, not a copy per query.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from cafe.data.formats.mmeb import Ranked
from cafe.errors import DataError
from cafe.evaluation.datasets.rows import check_unique
from cafe.evaluation.task import Encode
from cafe.metrics import candidate_scores, hit_at_1
from cafe.types import Conversation, content_key

QUERIES_PER_BLOCK = 256


@dataclass(frozen=True, slots=True)
class RankingResult:
    """Per query, the result of ranking its candidates.

    hit      whether the best candidate is a positive, and strictly better than every negative
    chance   the hit rate of random guessing
    """

    ids: tuple[str, ...]
    hit: np.ndarray
    chance: np.ndarray


def rank_candidates(
    encode: Encode, queries: Iterable[Ranked], source: str = "queries"
) -> RankingResult:
    """Embed queries and candidates, and rank each query's own list. Ties count against the model.

    Raises:
        DataError: a query without candidates, without a positive, with a positive that is not in
            its list; two queries with one id; no queries.
    """
    candidates: dict[Hashable, int] = {}
    embedded: list[np.ndarray] = []
    ids: list[str] = []
    hits, chances = [], []
    remaining = iter(queries)
    while block := list(islice(remaining, QUERIES_PER_BLOCK)):
        for query in block:
            _check(query, source)
        embedded += _embed_new(encode, block, candidates)
        vectors = encode([query.query for query in block])
        lists: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for query, vector in zip(block, vectors, strict=True):
            if id(query.candidates) not in lists:
                numbers = np.array([candidates[content_key(c)] for c in query.candidates])
                lists[id(query.candidates)] = numbers, np.stack([embedded[i] for i in numbers])
            numbers, table = lists[id(query.candidates)]
            scores = candidate_scores(vector[None], table, [range(len(table))])[0]
            # A duplicate of a positive is a positive too: no model could distinguish them.
            relevant = np.isin(numbers, numbers[list(query.positives)])
            hits.append(_hit(scores, relevant))
            chances.append(float(relevant.mean()))
            ids.append(query.id)
    if not ids:
        raise DataError(f"{source}: there are no queries")
    check_unique(ids, source)
    return RankingResult(tuple(ids), np.array(hits), np.array(chances))


def _embed_new(
    encode: Encode, block: Sequence[Ranked], known: dict[Hashable, int]
) -> list[np.ndarray]:
    """Embed the candidates of the block that are new, and add their numbers to `known`."""
    new: dict[Hashable, Conversation] = {}
    seen: set[int] = set()
    for query in block:
        if id(query.candidates) in seen:
            continue
        seen.add(id(query.candidates))
        for candidate in query.candidates:
            key = content_key(candidate)
            if key not in known:
                known[key] = len(known)
                new[key] = candidate
    return list(encode(list(new.values()))) if new else []


def _hit(scores: np.ndarray, relevant: np.ndarray) -> bool:
    """Best positive first, then all negatives: `hit_at_1` compares the first with the rest."""
    return bool(hit_at_1([np.concatenate([[scores[relevant].max()], scores[~relevant]])])[0])


def _check(query: Ranked, source: str) -> None:
    count = len(query.candidates)
    if not count:
        raise DataError(f"{source}, query {query.id!r}: the list of candidates is empty")
    if not query.positives or not all(0 <= p < count for p in query.positives):
        raise DataError(
            f"{source}, query {query.id!r}: its positive is not among the {count} candidates "
            f"(positives: {list(query.positives)})"
        )
