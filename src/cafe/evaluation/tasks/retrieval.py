"""Image-text retrieval, as CLIP is measured: recall at 1, 5 and 10 in both directions.

The protocol of COCO-5K and Flickr-1K: all captions, about five an image. Finding any caption of
an image is a hit; each caption is a query of its own. A tie counts against the model
(`cafe.metrics.ranking`), so equal captions of two images do too. Images are read and embedded
in blocks, and scores are computed in blocks, so memory holds the embeddings and little else.

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
from cafe.evaluation.datasets.captioned import CaptionedImage
from cafe.evaluation.datasets.rows import (
    RowIds,
    RowSource,
    check_unique,
    column,
    read_rows,
    row_image,
)
from cafe.evaluation.scoring import Ratio
from cafe.evaluation.task import Encode, TaskResult
from cafe.metrics import two_way_ranks

if TYPE_CHECKING:
    from jaxtyping import Float

KS = (1, 5, 10)
IMAGES_PER_BLOCK = 256
_ID_COLUMNS = ("filename", "cocoid", "imgid", "img_id")


def retrieval(encode: Encode, images: Iterable[CaptionedImage]) -> TaskResult:
    """Embed all images and all captions, and rank them. Scores: see `retrieval_scores`.

    Raises:
        DataError: two images with one id, and as in `retrieval_scores`.
    """
    sides = embed_sides(encode, images)
    return retrieval_scores(sides.images, sides.captions, sides.captions_of, sides.ids)


def captioned_images(source: RowSource, limit: int | None = None) -> Iterator[CaptionedImage]:
    """Images with all their captions, from rows in the layout above.

    Raises:
        DataError: as in `cafe.evaluation.datasets.rows`; an image without a caption, two with one
        id.
    """
    ids = RowIds(source)
    for number, row in enumerate(read_rows(source, "test", limit)):
        named_by = next((n for n in _ID_COLUMNS if row.get(n) is not None), "")
        name = str(row.get(named_by, number))
        ids.add(name, named_by, number)
        captions = column(row, ("caption", "captions", "sentences", "raw"), source)
        texts = (captions,) if isinstance(captions, str) else tuple(captions)
        if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise DataError(f"{source}: image {name!r} has no caption, or an empty one")
        image = row_image(column(row, ("image",), source), source, f"row {name!r}")
        yield CaptionedImage(id=name, image=image, captions=texts, dialogues=())


class PairEmbeddings:
    """Embeddings of both sides; caption j belongs to image i if j is in `captions_of[i]`."""

    def __init__(self, ids: Sequence[str], counts: Sequence[int]) -> None:
        self.ids = tuple(ids)
        self.captions_of = ranges(counts)
        self.images: Float[np.ndarray, "n d"] = np.empty((0, 0), np.float32)
        self.captions: Float[np.ndarray, "m d"] = np.empty((0, 0), np.float32)


def embed_sides(encode: Encode, captioned: Iterable[CaptionedImage]) -> PairEmbeddings:
    """Unit embeddings of the n images, and of all their m captions, image by image."""
    ids: list[str] = []
    counts: list[int] = []
    images, captions = [], []
    remaining = iter(captioned)
    while block := list(islice(remaining, IMAGES_PER_BLOCK)):
        ids += [image.id for image in block]
        counts += [len(image.captions) for image in block]
        images.append(encode([image.image for image in block]))
        captions.append(encode([text for image in block for text in image.captions]))
    if not ids:
        raise DataError("there are no images to search")
    check_unique(ids, "retrieval")
    sides = PairEmbeddings(ids, counts)
    sides.images, sides.captions = np.concatenate(images), np.concatenate(captions)
    return sides


def caption_indices(images: Sequence[CaptionedImage]) -> list[range]:
    """For each image, the indices of its captions among the captions of all images."""
    return ranges([len(image.captions) for image in images])


def ranges(counts: Sequence[int]) -> list[range]:
    """Consecutive ranges of these lengths."""
    ends = np.cumsum(counts).tolist()
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def retrieval_scores(
    images: Float[np.ndarray, "n d"],
    captions: Float[np.ndarray, "m d"],
    captions_of: Sequence[range],
    ids: Sequence[str] = (),
) -> TaskResult:
    """Recall from unit embeddings; caption j belongs to image i if j is in `captions_of[i]`.

    Scores: `image_to_text_recall@k` (over images) and `text_to_image_recall@k` (over captions).
    A sample is an image with all its captions.

    Raises:
        DataError, ValueError: as in `cafe.metrics.two_way_ranks`.
    """
    of_image, of_caption = two_way_ranks(images, captions, captions_of)
    items = {"captions": np.array([len(own) for own in captions_of])}
    ratios = {}
    for k in KS:
        items[f"image_hit@{k}"] = (of_image <= k).astype(np.int64)
        hits = of_caption <= k
        items[f"caption_hits@{k}"] = np.array([int(hits[list(own)].sum()) for own in captions_of])
        ratios[f"image_to_text_recall@{k}"] = Ratio(f"image_hit@{k}")
    for k in KS:
        ratios[f"text_to_image_recall@{k}"] = Ratio(f"caption_hits@{k}", "captions")
    return TaskResult(len(images), items, ratios, ids=tuple(ids))
