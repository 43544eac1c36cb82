"""The shape of the embedding space: how far apart pictures and texts lie, and how spread out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cafe.evaluate.data import Picture
from cafe.evaluate.retrieval import caption_indices, embed_sides
from cafe.evaluate.task import Encode, Result
from cafe.metrics import (
    alignment,
    effective_rank,
    modality_gap,
    modality_probe_accuracy,
    uniformity,
)

if TYPE_CHECKING:
    from jaxtyping import Float


def gap(encode: Encode, pictures: Sequence[Picture]) -> Result:
    """Embed all pictures and all captions, and measure both clouds. Scores: see `gap_scores`."""
    images, captions = embed_sides(encode, pictures)
    return gap_scores(images, captions, caption_indices(pictures))


def gap_scores(
    images: Float[np.ndarray, "n d"],
    captions: Float[np.ndarray, "m d"],
    captions_of: Sequence[range],
) -> Result:
    """Geometry of two clouds of embeddings (`cafe.metrics.geometry` says what each number is).

    Scores: `modality_gap`, `modality_probe_accuracy`, `alignment` (every picture with each of its
    captions), and `uniformity/…` and `effective_rank/…` of `image` and `text`.

    Raises:
        DataError, ValueError: as in `cafe.metrics.geometry`; fewer than two pictures or captions.
    """
    of_caption = np.repeat(np.arange(len(images)), [len(own) for own in captions_of])
    scores = {
        "modality_gap": modality_gap(images, captions),
        "modality_probe_accuracy": modality_probe_accuracy(images, captions),
        "alignment": alignment(images[of_caption], captions),
    }
    for side, embeddings in (("image", images), ("text", captions)):
        scores[f"uniformity/{side}"] = uniformity(embeddings)
        scores[f"effective_rank/{side}"] = effective_rank(embeddings)
    return Result(scores, len(images))
