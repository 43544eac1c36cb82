"""The shape of the embedding space: how far apart pictures and texts lie, and how spread out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cafe.evaluate.data import Picture
from cafe.evaluate.retrieval import embed_sides
from cafe.evaluate.scoring import RESAMPLES, Ratio
from cafe.evaluate.task import Encode, Result
from cafe.metrics import (
    Interval,
    alignment,
    effective_rank,
    modality_gap,
    modality_probe_accuracy,
    percentile_interval,
    project_2d,
    resampled_sums,
    uniformity,
)

if TYPE_CHECKING:
    from jaxtyping import Float

MAP_POINTS = 500
"""Of each kind, at most, on the map that a result keeps."""


def gap(encode: Encode, pictures: Iterable[Picture]) -> Result:
    """Embed all pictures and all captions, and measure both clouds. Scores: see `gap_scores`.

    The result's details hold a map: `map/image` and `map/text`, points on the two principal axes.
    The gap has an interval (pictures and captions resampled, each kind by itself), alignment too;
    the other numbers have none.
    """
    sides = embed_sides(encode, pictures)
    result = gap_scores(sides.images, sides.captions, sides.captions_of)
    low, high = _gap_interval(sides.images, sides.captions)
    shown = project_2d(sides.images[:MAP_POINTS], sides.captions[:MAP_POINTS])
    distances, pairs = _pair_distances(sides.images, sides.captions, sides.captions_of)
    return replace(
        result,
        items={"squared_distances": distances, "pairs": pairs},
        ratios={"alignment": Ratio("squared_distances", "pairs")},
        plain={name: value for name, value in result.plain.items() if name != "alignment"},
        intervals={"modality_gap": Interval(result.plain["modality_gap"], low, high)},
        ids=sides.ids,
        details={
            f"map/{kind}": np.round(points, 3).tolist()
            for kind, points in zip(("image", "text"), shown, strict=True)
        },
    )


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
    return Result(len(images), plain=scores)


def _gap_interval(
    images: Float[np.ndarray, "n d"], captions: Float[np.ndarray, "m d"]
) -> tuple[float, float]:
    centroids = [
        resampled_sums({"x": side}, resamples=RESAMPLES, seed=seed)["x"] / len(side)
        for seed, side in enumerate((images, captions))
    ]
    interval = percentile_interval(np.linalg.norm(centroids[0] - centroids[1], axis=1))
    return interval.low, interval.high


def _pair_distances(
    images: Float[np.ndarray, "n d"],
    captions: Float[np.ndarray, "m d"],
    captions_of: Sequence[range],
) -> tuple[Float[np.ndarray, " n"], np.ndarray]:
    """Per picture the squared distances to its captions, summed, and how many those are."""
    sums = [
        float(np.square(image.astype(np.float64) - captions[list(own)]).sum())
        for image, own in zip(images, captions_of, strict=True)
    ]
    return np.array(sums), np.array([len(own) for own in captions_of])
