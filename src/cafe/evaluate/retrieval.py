"""Retrieval between pictures and texts, as CLIP is measured: recall at 1, 5 and 10, both ways.

A picture may have several captions. Finding any of them is a hit; each caption searches on its own.
A tie counts against the model (`cafe.metrics.ranking`), so equal captions of two pictures do too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cafe.evaluate.data import Picture
from cafe.evaluate.task import Encode, Result
from cafe.metrics import two_way_ranks

if TYPE_CHECKING:
    from jaxtyping import Float

KS = (1, 5, 10)


def retrieval(encode: Encode, pictures: Sequence[Picture]) -> Result:
    """Embed all pictures and all captions, and rank them. Scores: see `retrieval_scores`."""
    images, captions = embed_sides(encode, pictures)
    return retrieval_scores(images, captions, caption_indices(pictures))


def embed_sides(
    encode: Encode, pictures: Sequence[Picture]
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]]:
    """Unit embeddings of the n pictures, and of all their m captions, picture by picture."""
    captions = [caption for picture in pictures for caption in picture.captions]
    return encode([picture.image for picture in pictures]), encode(captions)


def caption_indices(pictures: Sequence[Picture]) -> list[range]:
    """For each picture, where its captions stand among the captions of all."""
    ends = np.cumsum([len(picture.captions) for picture in pictures]).tolist()
    starts = [0, *ends[:-1]]
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


def retrieval_scores(
    images: Float[np.ndarray, "n d"],
    captions: Float[np.ndarray, "m d"],
    captions_of: Sequence[range],
) -> Result:
    """Recall from unit embeddings; caption j belongs to picture i if j is in `captions_of[i]`.

    Scores: `image_to_text_recall@k` (over pictures) and `text_to_image_recall@k` (over captions).

    Raises:
        DataError, ValueError: as in `cafe.metrics.two_way_ranks`.
    """
    of_image, of_caption = two_way_ranks(images, captions, captions_of)
    items = {
        f"{direction}_recall@{k}": (ranks <= k).astype(np.float64)
        for direction, ranks in (("image_to_text", of_image), ("text_to_image", of_caption))
        for k in KS
    }
    return Result({name: float(hits.mean()) for name, hits in items.items()}, len(images), items)
