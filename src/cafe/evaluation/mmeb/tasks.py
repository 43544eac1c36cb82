"""MMEB: image tasks (hit@1 over each query's own candidates), V2's videos (hit@1) and visual
documents (NDCG@5).

    folder/ImageNet-1K/test-….parquet      a folder per data set, as in TIGER-Lab/MMEB-eval
    folder/images/ImageNet-1K/….JPEG       what its rows name (or folder/eval_images/, or folder/)

    folder/ViDoRe_arxivqa/queries/test-….parquet    query-id, query      BEIR's three tables, as in
    folder/ViDoRe_arxivqa/corpus/test-….parquet     corpus-id, image     vidore/… on the hub
    folder/ViDoRe_arxivqa/qrels/test-….parquet      query-id, corpus-id, score

The layout of videos is in `cafe.evaluation.mmeb.video`.

Missing data sets are named in the result, and means over groups that lack one are omitted: a mean
over other data sets would be a different number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cafe.data.formats.mmeb import Ranked, RankedReader
from cafe.data.media_paths import MediaResolver
from cafe.errors import DataError
from cafe.evaluation.datasets.rows import check_unique, column, read_rows, row_image
from cafe.evaluation.journal import Journal
from cafe.evaluation.mmeb.groups import (
    IMAGE,
    MEASURE,
    VIDEO,
    VISDOC,
    Modality,
    half_means,
    meta_means,
)
from cafe.evaluation.mmeb.video import frames_folder, video_queries
from cafe.evaluation.scoring import Ratio
from cafe.evaluation.task import Encode, TaskResult
from cafe.evaluation.tasks.ranking import rank_candidates
from cafe.metrics import ndcg_at_k, rank_relevances
from cafe.types import user

PROMPT = "none"
"""MMEB's instructions are part of the texts."""
DOCUMENT_QUERY = "Find a document image that matches the given query: "
DOCUMENT_TARGET = "Understand the content of the provided document image."

_BLOCK = 256


@dataclass(frozen=True, slots=True)
class _Measured:
    """The queries of one data set: ids, and hit@1 or NDCG@5. `skipped`: number of other rows."""

    ids: list[str]
    values: list[float]
    skipped: int = 0


def mmeb_images(
    encode: Encode, folder: Path, limit: int | None = None, journal: Journal | None = None
) -> TaskResult:
    """hit@1 of the image data sets in `folder`. Scores: one per data set, and the means of
    `half_means`.

    Raises:
        DataError: none of them is there, a row that cannot be used, an image that is missing.
    """
    root = next((p for p in (folder / "images", folder / "eval_images") if p.is_dir()), folder)

    def measure(name: str) -> _Measured:
        result = rank_candidates(encode, _image_queries(folder / name, root, limit), name)
        return _Measured(list(result.ids), result.hit.astype(float).tolist())

    folders = {name: folder / name for name in IMAGE}
    return _measure_all(folder, folders, "image", measure, half_means(IMAGE), limit, journal)


def mmeb_videos(
    encode: Encode, folder: Path, limit: int | None = None, journal: Journal | None = None
) -> TaskResult:
    """hit@1 of the video data sets in `folder`, `FRAMES` frames of each video.

    Scores: one per data set, and the means of `meta_means`. Details: rows without frames, which the
    benchmark skips too.

    Raises:
        DataError: as in `mmeb_images` and `cafe.evaluation.mmeb.video.video_queries`.
    """

    def measure(name: str) -> _Measured:
        asked = video_queries(folder, name, limit)
        result = rank_candidates(encode, asked.queries, name)
        return _Measured(list(result.ids), result.hit.astype(float).tolist(), asked.skipped)

    folders = {name: frames_folder(folder, name) for name in VIDEO}
    return _measure_all(folder, folders, "video", measure, meta_means(VIDEO), limit, journal)


def mmeb_documents(
    encode: Encode, folder: Path, limit: int | None = None, journal: Journal | None = None
) -> TaskResult:
    """Linear NDCG@5 of the visual-document data sets in `folder`, each query against all pages.

    Scores: one per data set, and the means of `meta_means`.

    Raises:
        DataError: as in `mmeb_images`; a query without a relevant page.
    """

    def measure(name: str) -> _Measured:
        return _documents(encode, folder / name, limit)

    folders = {name: folder / name for name in VISDOC}
    return _measure_all(folder, folders, "visdoc", measure, meta_means(VISDOC), limit, journal)


def _measure_all(
    folder: Path,
    folders: Mapping[str, Path],
    modality: Modality,
    measure: Callable[[str], _Measured],
    means: Mapping[str, tuple[str, ...]],
    limit: int | None,
    journal: Journal | None,
) -> TaskResult:
    """Measure every data set that is present, except those that the journal has already."""
    journal = journal or Journal()
    there = [name for name, own in folders.items() if own.is_dir()]
    if not there:
        example = next(iter(folders.values())).relative_to(folder)
        raise DataError(
            f"{folder}: none of MMEB's {modality} data sets is there, such as {example}; "
            "download them and give the folder above them with --data"
        )
    items: dict[str, np.ndarray] = {}
    ids: list[str] = []
    skipped: dict[str, int] = {}
    for name in there:
        key = (modality, name, limit)
        if key not in journal:
            result = measure(name)
            journal.put(key, [result.ids, result.values, result.skipped])
        own_ids, values, skipped[name] = journal[key]
        column_ = np.array(values)
        whole = bool(np.all(np.isin(column_, (0.0, 1.0))))
        items[f"{name}:{MEASURE[modality]}"] = column_.astype(np.int64) if whole else column_
        ids += [f"{name}:{id}" for id in own_ids]
    return TaskResult(
        len(ids),
        items,
        {name: Ratio(f"{name}:{MEASURE[modality]}") for name in there},
        {mean: names for mean, names in means.items() if set(names) <= set(there)},
        ids=tuple(ids),
        details={
            "modality": modality,
            "measure": MEASURE[modality],
            "missing": [name for name in folders if name not in there],
            "left_out": {name: count for name, count in skipped.items() if count},
            "queries": {name: len(items[f"{name}:{MEASURE[modality]}"]) for name in there},
        },
    )


def _image_queries(folder: Path, root: Path, limit: int | None) -> Iterator[Ranked]:
    reader = RankedReader(MediaResolver(root))
    for number, row in enumerate(read_rows(folder, "test", limit)):
        try:
            yield reader.read(str(number), row)
        except DataError as error:
            raise DataError(f"{folder}, row {number}: {error}") from error


def _documents(encode: Encode, folder: Path, limit: int | None) -> _Measured:
    """BEIR's three tables: all pages are every query's candidates."""
    pages: dict[str, int] = {}
    embedded: list[np.ndarray] = []
    block = []
    for row in read_rows(folder / "corpus", "test"):
        name = str(column(row, ("corpus-id", "corpus_id"), folder))
        if name in pages:
            raise DataError(f"{folder / 'corpus'}: two pages have corpus-id {name!r}; remove one")
        pages[name] = len(pages)
        block.append(user(row_image(row.get("image"), folder, f"page {name!r}"), DOCUMENT_TARGET))
        if len(block) == _BLOCK:
            embedded.append(encode(block))
            block = []
    if block:
        embedded.append(encode(block))
    grades = _grades(folder, pages)
    queries = [
        (str(column(row, ("query-id", "query_id"), folder)), column(row, ("query",), folder))
        for row in read_rows(folder / "queries", "test", limit)
    ]
    check_unique([name for name, _ in queries], folder / "queries")
    vectors = encode([user(f"{DOCUMENT_QUERY}{text}") for _, text in queries])
    table = np.concatenate(embedded).astype(np.float64)
    values = []
    for (name, _), vector in zip(queries, vectors, strict=True):
        if name not in grades:
            raise DataError(
                f"{folder / 'qrels'}: no row names a page for query-id {name!r} with a score above "
                "0; add one, or remove the query"
            )
        ranked = rank_relevances(table @ vector.astype(np.float64), grades[name])
        values.append(ndcg_at_k(ranked, 5))
    return _Measured([name for name, _ in queries], values)


def _grades(folder: Path, pages: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Query -> the relevance of every page; of two grades the higher, as in the benchmark."""
    grades: dict[str, np.ndarray] = {}
    for row in read_rows(folder / "qrels", "test"):
        query = str(column(row, ("query-id", "query_id"), folder))
        page = str(column(row, ("corpus-id", "corpus_id"), folder))
        grade = float(row.get("score", 1))
        if page not in pages:
            raise DataError(
                f"{folder / 'qrels'}: query-id {query!r} names corpus-id {page!r}, which is not in "
                f"{folder / 'corpus'}; add the page, or remove the row"
            )
        if grade > 0:
            own = grades.setdefault(query, np.zeros(len(pages)))
            own[pages[page]] = max(own[pages[page]], grade)
    return grades
