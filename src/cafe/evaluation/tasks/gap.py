"""The geometry of the embedding space: the gap between images and texts, and how they spread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cafe.evaluation.datasets.captioned import CaptionedImage
from cafe.evaluation.scoring import RESAMPLES, Ratio
from cafe.evaluation.task import Encode, TaskResult
from cafe.evaluation.tasks.retrieval import embed_sides
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
"""Maximum number of points of each kind on the map that a result keeps."""


def gap(encode: Encode, images: Iterable[CaptionedImage]) -> TaskResult:
    """Embed all images and all captions, and measure both sets. Scores: see `gap_scores`.

    The result's details hold a map: `map/image` and `map/text`, points on the two principal axes.
    The gap has an interval (images and captions are resampled separately), and so has alignment;
    the other scores have none.
    """
    sides = embed_sides(encode, images)
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
) -> TaskResult:
    """Geometry of two sets of embeddings (`cafe.metrics.geometry` defines each number).

    Scores: `modality_gap`, `modality_probe_accuracy`, `alignment` (every image with each of its
    captions), and `uniformity/…` and `effective_rank/…` of `image` and `text`.

    Raises:
        DataError, ValueError: as in `cafe.metrics.geometry`; fewer than two images or captions.
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
    return TaskResult(len(images), plain=scores)


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
    """Per image, the sum of squared distances to its captions, and the number of captions."""
    sums = [
        float(np.square(image.astype(np.float64) - captions[list(own)]).sum())
        for image, own in zip(images, captions_of, strict=True)
    ]
    return np.array(sums), np.array([len(own) for own in captions_of])
