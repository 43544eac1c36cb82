"""Retrieval between pictures and texts, as CLIP is measured: recall at 1, 5 and 10, both ways.

The protocol of COCO-5K and Flickr-1K: all captions, about five a picture. Finding any caption of
a picture is a hit; each caption searches on its own. A tie counts against the model
(`cafe.metrics.ranking`), so equal captions of two pictures do too. Pictures are read and embedded
a block at a time, and scores exist block by block: memory holds the embeddings and little else.

Columns of the hub's `nlphuji/mscoco_2014_5k_test_image_text_retrieval` and
`nlphuji/flickr_1k_test_image_text_retrieval`, split "test": image, caption (a list), and one of
filename, cocoid, imgid, img_id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from cafe.errors import DataError
from cafe.evaluate.data import Picture
from cafe.evaluate.scoring import Ratio
from cafe.evaluate.sources import RowIds, Source, check_unique, column, read_rows, row_image
from cafe.evaluate.task import Encode, Result
from cafe.metrics import two_way_ranks

if TYPE_CHECKING:
    from jaxtyping import Float

KS = (1, 5, 10)
PICTURES_AT_ONCE = 256
_ID_COLUMNS = ("filename", "cocoid", "imgid", "img_id")


def retrieval(encode: Encode, pictures: Iterable[Picture]) -> Result:
    """Embed all pictures and all captions, and rank them. Scores: see `retrieval_scores`.

    Raises:
        DataError: two pictures with one id, and as in `retrieval_scores`.
    """
    sides = embed_sides(encode, pictures)
    return retrieval_scores(sides.images, sides.captions, sides.captions_of, sides.ids)


def captioned_pictures(source: Source, limit: int | None = None) -> Iterator[Picture]:
    """Pictures with all their captions, from rows in the layout above.

    Raises:
        DataError: as in `cafe.evaluate.sources`; a picture without a caption, two with one id.
    """
    ids = RowIds(source)
    for number, row in enumerate(read_rows(source, "test", limit)):
        named_by = next((n for n in _ID_COLUMNS if row.get(n) is not None), "")
        name = str(row.get(named_by, number))
        ids.add(name, named_by, number)
        captions = column(row, ("caption", "captions", "sentences", "raw"), source)
        texts = (captions,) if isinstance(captions, str) else tuple(captions)
        if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise DataError(f"{source}: picture {name!r} has no caption, or an empty one")
        image = row_image(column(row, ("image",), source), source, f"row {name!r}")
        yield Picture(id=name, image=image, captions=texts, dialogues=())


class Sides:
    """Both clouds of embeddings; caption j belongs to picture i if j is in `captions_of[i]`."""

    def __init__(self, ids: Sequence[str], counts: Sequence[int]) -> None:
        self.ids = tuple(ids)
        self.captions_of = ranges(counts)
        self.images: Float[np.ndarray, "n d"] = np.empty((0, 0), np.float32)
        self.captions: Float[np.ndarray, "m d"] = np.empty((0, 0), np.float32)


def embed_sides(encode: Encode, pictures: Iterable[Picture]) -> Sides:
    """Unit embeddings of the n pictures, and of all their m captions, picture by picture."""
    ids: list[str] = []
    counts: list[int] = []
    images, captions = [], []
    remaining = iter(pictures)
    while block := list(islice(remaining, PICTURES_AT_ONCE)):
        ids += [picture.id for picture in block]
        counts += [len(picture.captions) for picture in block]
        images.append(encode([picture.image for picture in block]))
        captions.append(encode([text for picture in block for text in picture.captions]))
    if not ids:
        raise DataError("there are no pictures to search")
    check_unique(ids, "retrieval")
    sides = Sides(ids, counts)
    sides.images, sides.captions = np.concatenate(images), np.concatenate(captions)
    return sides


def caption_indices(pictures: Sequence[Picture]) -> list[range]:
    """For each picture, where its captions stand among the captions of all."""
    return ranges([len(picture.captions) for picture in pictures])


def ranges(counts: Sequence[int]) -> list[range]:
    """Consecutive ranges of these lengths."""
    ends = np.cumsum(counts).tolist()
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def retrieval_scores(
    images: Float[np.ndarray, "n d"],
    captions: Float[np.ndarray, "m d"],
    captions_of: Sequence[range],
    ids: Sequence[str] = (),
) -> Result:
    """Recall from unit embeddings; caption j belongs to picture i if j is in `captions_of[i]`.

    Scores: `image_to_text_recall@k` (over pictures) and `text_to_image_recall@k` (over captions).
    A sample is a picture with all its captions.

    Raises:
        DataError, ValueError: as in `cafe.metrics.two_way_ranks`.
    """
    of_image, of_caption = two_way_ranks(images, captions, captions_of)
    items = {"captions": np.array([len(own) for own in captions_of])}
    ratios = {}
    for k in KS:
        items[f"image_hit@{k}"] = (of_image <= k).astype(np.int64)
        found = of_caption <= k
        items[f"caption_hits@{k}"] = np.array([int(found[list(own)].sum()) for own in captions_of])
        ratios[f"image_to_text_recall@{k}"] = Ratio(f"image_hit@{k}")
    for k in KS:
        ratios[f"text_to_image_recall@{k}"] = Ratio(f"caption_hits@{k}", "captions")
    return Result(len(images), items, ratios, ids=tuple(ids))
