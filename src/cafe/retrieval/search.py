"""One search for the command line, the server and programs: find, rerank, answer from sources.

Nothing here imports torch: the server opens an index and listens before its model is loaded, and
embeds queries in its own batches.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe.errors import DataError
from cafe.files import inside
from cafe.index import Index
from cafe.retrieval.documents import hit_image, location_of, page_number
from cafe.retrieval.multi_vector import searched_by_tokens
from cafe.types import Hit, Image, Part, user

if TYPE_CHECKING:
    from cafe.model.rerank import RerankBy
    from cafe.model.rows.inputs import Input
    from cafe.model.vlm import CAFe

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"\[(\d+)\]")

_ASK = (
    "{question}\nAnswer from the sources above only, and name the numbers of those that you use in "
    "square brackets, such as [1]."
)

ONE_IMAGE = (
    "this model was not trained on several images: it answers about the best hit only, and has "
    "not seen the others"
)


@dataclass(frozen=True, slots=True)
class RankedHit:
    """A hit, its image file, and what the model says of it.

    hit        the row that was found, and its cosine with the query
    file       path of its image, or of the document whose page it is; None: the hit is a text, or
               its image is no file of an indexed folder
    posterior  probability that this is the hit meant, by the cosine and the next of these together
    match      probability that the image shows what the text says, as the model answers
    log_likelihood  log-probability of the text as the image's caption, in nats
    The last three are None where the model was not asked (`cafe.model.rerank`).
    """

    hit: Hit
    file: str | None
    posterior: float | None = None
    match: float | None = None
    log_likelihood: float | None = None

    @property
    def id(self) -> str:
        return self.hit.id

    @property
    def page(self) -> int | None:
        """Which page of the document `file` it is, from 1; None: it is no page."""
        return page_number(self.hit)

    @property
    def location(self) -> str:
        """Its file and page for people, such as "reports/2024.pdf, page 3"; without one, its id."""
        return location_of(self.hit, self.file)

    @property
    def score(self) -> float:
        """The cosine with the query; by token vectors, the mean of their best cosines."""
        return self.hit.score


@dataclass(frozen=True, slots=True)
class SearchAnswer:
    """An answer from hits.

    text     what the model wrote, with the numbers of its sources in square brackets
    sources  numbers of the hits that it names, from 1
    note     what the reader must know, such as that it names none
    """

    text: str
    sources: list[int]
    note: str | None = None


class Searcher:
    """An index and the model that made its vectors.

    Example:
        >>> searcher = Searcher.open("photos.index")
        >>> query = "a big crown and a big truck"
        >>> hits = searcher.search(query, top=4)
        >>> [hit.id for hit in hits]
        ['000003.png', '000000.png', '000002.png', '000001.png']
        >>> [hit.id for hit in searcher.rerank(query, hits)]
        ['000001.png', '000002.png', '000003.png', '000000.png']
        >>> best = searcher.rerank(query, hits)[:1]
        >>> round(best[0].match, 2), round(best[0].posterior, 2)
        (0.42, 0.87)
        >>> searcher.answer("What is in the picture?", best).text
        'truck [1]'
    """

    def __init__(self, index: Index, model: CAFe | None = None) -> None:
        """Search `index` with `model`, unchecked: `open` is what most programs need.

        Args:
            index: an open index.
            model: the model that made the index; None: queries are vectors, and hits are neither
                reranked nor answered from.
        """
        origin = index.origin
        self.index = index
        self.model = model
        self.root = None if origin is None or origin.root is None else Path(origin.root)
        """Where the paths of the images start; None: they are not files of one folder."""

    @classmethod
    def open(
        cls,
        index: str | Path | Index,
        model: CAFe | str | Path | None = None,
        *,
        load: Callable[[str], CAFe] | None = None,
    ) -> Searcher:
        """Open an index, and load the model that it is searched with.

        Args:
            index: a folder, the URI of an object store, or an open index.
            model: a loaded model, or what `CAFe.from_pretrained` takes; None: the model that the
                index records.
            load: loads the model by its name, in place of `CAFe.from_pretrained`.

        Raises:
            DataError: there is no index, or another model made it. Where the weights already
                differ, they are not loaded.
            CheckpointError: the model cannot be loaded.
        """
        from cafe.retrieval.indexing import open_model  # late: a server needs none of it

        index = index if isinstance(index, Index) else Index.open(index)
        vlm, _ = open_model(index.model.name if model is None else model, index, load=load)
        return cls(index, vlm)

    def check_filter(self, where: str) -> None:
        """Check SQL before the work of a search begins.

        Raises:
            DataError: it cannot be used; the message lists the columns.
        """
        self.index.count(where)

    def search(
        self,
        query: Input | np.ndarray,
        top: int = 10,
        where: str | None = None,
        *,
        caption: bool = False,
        think: int | None = None,
        hybrid: bool | str = False,
        multi_vector: bool | None = None,
    ) -> list[RankedHit]:
        """Find the rows that are nearest to a query, the nearest first.

        By cosine; an index of token vectors is searched by those (`CAFe.max_sim`).

        Args:
            query: what `CAFe.encode` takes for one input (a text, an image, a {"text", "image"}
                dict), or its embedding, float [d], or its token vectors, float [n, dim].
            top: number of hits.
            where: SQL over the columns of the index: "width > 640 AND text LIKE '%cat%'".
            caption: embed an image query together with a caption that the model writes of it now
                (`CAFe.encode`). A query in words is not changed by it.
            think: read the embedding of an image query after what the model says of it now, in at
                most this many tokens; None: as those of the index were read, or 0 with `caption`.
            hybrid: order by the words of the query in the texts, captions and thoughts of the index
                as well, and fuse both orders by their ranks (`cafe.index.full_text`); or the words,
                for a query that is a vector. A hit's score stays its cosine.
            multi_vector: search by token vectors; None: if the index holds them.

        Returns:
            Up to `top` hits.

        Raises:
            DataError: the query cannot be read or has another dimension, the SQL cannot be used,
                the query is not a vector and there is no model; there are no words to search for,
                or no texts to search in; or token vectors are to be searched and the index holds
                none.
        """
        words = _words(query) if hybrid is True else hybrid or None
        if words is not None:
            self.index.check_words()  # before the model embeds anything
        if isinstance(query, np.ndarray):
            vector = query
        elif searched_by_tokens(self.index, multi_vector):
            if caption or think:
                raise DataError(
                    f"index {self.index.uri} is searched by token vectors, and a caption or a "
                    "thought changes an embedding only; leave it out"
                )
            vector = self._model.encode_tokens(query)[0]
        else:
            vector = self._embedded(query, caption, think)
        walked: dict[Path, Path] = {}
        found = self.index.search(vector, top, where, words=words)
        return [RankedHit(hit, self._file(hit, walked)) for hit in found]

    def rerank(
        self,
        query: Input,
        hits: Sequence[RankedHit],
        top: int | None = None,
        *,
        by: RerankBy = "question",
    ) -> list[RankedHit]:
        """Order hits by the posterior: by the cosine and by the model's own judgement.

        Args:
            query: what was searched for. A text is compared with images, an image with texts; of
                a {"text", "image"} dict the text counts.
            hits: as `search` returned them.
            top: judge the first `top` of them only, and leave the others behind these; None: all.
            by: what the model judges by (`CAFe.rerank`).

        Returns:
            The same hits; those that were judged have a `posterior`, and a `match` or, by
            likelihood, a `log_likelihood`.

        Raises:
            DataError: a hit is of the query's own kind, or its image is gone.
        """
        asked: Any = query
        if isinstance(query, Mapping):
            asked = query.get("text") or query.get("image")
        kind = "image" if isinstance(asked, str) else "text"
        judged, others = list(hits[:top]), list(hits[len(hits[:top]) :])
        if any(one.hit.metadata.get("kind") != kind for one in judged):
            raise DataError(
                "reranking compares a text with images, or an image with texts, and some hits are "
                f"of the other kind; search --where \"kind = '{kind}'\""
            )
        if not judged:
            return others
        # Those of token vectors are no cosines of embeddings, which the posterior is about.
        by_tokens = searched_by_tokens(self.index, None)
        cosines = None if by_tokens else np.array([one.score for one in judged])
        ranked = self._model.rerank(asked, [self._part(one) for one in judged], cosines, by=by)
        order = np.argsort(-ranked.posterior, kind="stable").tolist()
        scores = {name: values for name, values in ranked._asdict().items() if values is not None}
        return [
            replace(judged[i], **{name: float(values[i]) for name, values in scores.items()})
            for i in order
        ] + others

    def answer(self, question: str, hits: Sequence[RankedHit]) -> SearchAnswer:
        """Answer a question from hits, which the model is shown as numbered sources.

        A model whose configuration says that it was not trained on several images is shown the
        first hit only, and `note` says so.

        Args:
            question: in words.
            hits: the sources, best first.

        Raises:
            DataError: there are no hits, or an image is gone.
        """
        if not hits:
            raise DataError("there are no hits to answer from")
        if knows_one_image(self._model):
            text = str(self._model.generate(user(self._part(hits[0]), question)))
            return SearchAnswer(f"{text} [1]", [1], ONE_IMAGE)
        parts: list[Part] = []
        for number, one in enumerate(hits, 1):
            part = self._part(one)
            name = "Image" if isinstance(part, Image) else "Text"
            parts += [f"{name} [{number}]: ", part, "\n"]
        text = str(self._model.generate(user(*parts, _ASK.format(question=question))))
        shown = range(1, len(hits) + 1)
        named = sorted({int(n) for n in _NUMBER.findall(text)} & {*shown})
        if named:
            return SearchAnswer(text, named)
        return SearchAnswer(
            text, [*shown], "the answer names no source; these are what the model was given"
        )

    @property
    def _model(self) -> CAFe:
        if self.model is None:
            raise DataError(
                f"index {self.index.uri} was opened without a model; give a vector, or use "
                "Searcher.open"
            )
        return self.model

    def _embedded(self, query: Input, caption: bool, think: int | None) -> np.ndarray:
        """A query as a vector, read as the images of the index were."""
        if think is None:
            think = 0 if caption else self.think
        if (caption or think) and not isinstance(query, str):
            self.say_writer()
        return self._model.encode(query, caption=caption, think=think)

    @property
    def think(self) -> int:
        """The most tokens of the thoughts after which the index's images were read; 0: none."""
        return self.index.model.think or 0

    def say_writer(self) -> None:
        """Say once if another model wrote the captions or thoughts of the index's images."""
        writer = self.index.model.writer
        if writer is not None:
            _say_once(
                f"index {self.index.uri}: {writer} wrote the captions or thoughts of its images, "
                "and the model that searches writes those of queries"
            )

    def _part(self, one: RankedHit) -> str | Image:
        """What the model is shown of a hit. Raises DataError when its image cannot be opened."""
        if one.hit.metadata.get("kind") == "text":
            return str(one.hit.metadata.get("text", ""))
        if one.file is None:
            raise DataError(
                f"hit {one.id!r}: its image is not a file of an indexed folder, so the model "
                "cannot look at it again; index a folder of images"
            )
        if not Path(one.file).is_file():
            raise DataError(f"hit {one.id!r}: {one.file} is gone; update the index: cafe index")
        if one.page is None:
            return Image(one.file)
        origin = self.index.origin
        return hit_image(one.hit, Path(one.file), origin.page_pixels if origin else None)

    def _file(self, hit: Hit, walked: dict[Path, Path]) -> str | None:
        """Path of the hit's image; None when it is not a file of the index's own folder.

        walked   see `cafe.files.inside`
        """
        path: Any = hit.metadata.get("path")
        if path is None or self.root is None:
            return None
        try:  # an untrusted index may contain any path
            return None if inside(self.root, path, walked) is None else str(self.root / path)
        except ValueError:
            return None


def _words(query: Input | np.ndarray) -> str:
    """The words of a query. Raises DataError when it has none."""
    match query:
        case str():
            words = query
        case np.ndarray():
            words = ""
        case _:
            from cafe.model.rows.inputs import as_conversation  # late: it loads torch

            words = " ".join(message.text for message in as_conversation(query))
    if not words.strip():
        raise DataError("hybrid search needs words: search with a text, or without hybrid")
    return words


@functools.cache
def _say_once(text: str) -> None:
    logger.warning(text)


def knows_one_image(vlm: CAFe) -> bool:
    """Whether the model's configuration says that it answers from one image only.

    True of tiny and of models trained from it. One that was trained from tiny before its
    configuration said so lacks the key, and nothing else in it shows it: such a model is shown all
    hits, like any other, until the key is added to its config.json or it is trained again.
    """
    from cafe.model.tiny import ONE_IMAGE_KEY

    return getattr(vlm.model.config, ONE_IMAGE_KEY, False) is True
