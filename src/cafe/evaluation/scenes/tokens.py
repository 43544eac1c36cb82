"""scenes-tokens: what `scenes-retrieval` asks, answered by the vectors of all tokens.

Late interaction compares each word of a caption with each patch of an image, so it could tell what
one vector cannot: which of two objects stands where. What its vectors cost to store stands beside
the scores, and so does what is left of them when one is kept for several tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cafe.evaluation.scenes.held_out import SceneItem, scene_ids
from cafe.evaluation.scenes.retrieval import hard_captions
from cafe.evaluation.scoring import Ratio
from cafe.evaluation.task import TaskResult
from cafe.metrics import TIE_TOLERANCE
from cafe.model.token_vectors import TokenEncoder, pooled
from cafe.types import Image

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

POOLS = (2, 4, 8)
"""For how many tokens of an image one vector is kept."""

EncodeTokens = Callable[[Sequence[Image | str]], list[np.ndarray]]


def scenes_tokens(encode_tokens: EncodeTokens, scenes: Sequence[SceneItem]) -> TaskResult:
    """Rank all captions and all images by MaxSim, then each image among captions nearly right.

    Scores: `image_to_text_recall@1`, `text_to_image_recall@1`, the latter also with images whose
    vectors are pooled (`…_pool_2`); `hard_word_accuracy`, the share of images for which the true
    caption, as a query, scores above the three with one wrong word (chance 1/4), and
    `hard_order_accuracy`, above the one in which two objects are swapped (chance 1/2);
    `vectors_per_image`. A tie is a miss.
    """
    images = encode_tokens([item.image for item in scenes])
    texts = encode_tokens([item.caption for item in scenes])
    items = {
        "image_hit": _first(TokenEncoder.max_sim(images, texts)),
        "text_hit": _first(TokenEncoder.max_sim(texts, images)),
        "vectors": np.array([len(vectors) for vectors in images]),
    }
    ratios = {
        "image_to_text_recall@1": Ratio("image_hit"),
        "text_to_image_recall@1": Ratio("text_hit"),
    }
    for pool in POOLS:
        fewer = [pooled(vectors, pool) for vectors in images]
        items[f"text_hit_pool_{pool}"] = _first(TokenEncoder.max_sim(texts, fewer))
        ratios[f"text_to_image_recall@1_pool_{pool}"] = Ratio(f"text_hit_pool_{pool}")
    hard = [hard_captions(item.scene, item.scene.seed) for item in scenes]
    true = encode_tokens([text for text, _, _ in hard])
    own = _own_scores(true, images)
    for name, lists in (
        ("word", [word for _, word, _ in hard]),
        ("order", [order for _, _, order in hard]),
    ):
        wrong = encode_tokens([text for texts_of in lists for text in texts_of])
        counts = [len(texts_of) for texts_of in lists]
        scores = _own_scores(wrong, [images[i] for i, n in enumerate(counts) for _ in range(n)])
        best = [part.max(initial=-np.inf) for part in np.split(scores, np.cumsum(counts)[:-1])]
        asked = np.array(counts) > 0
        items[f"{name}_hit"] = (own > np.array(best) + TIE_TOLERANCE) & asked
        items[f"{name}_asked"] = asked
        ratios[f"hard_{name}_accuracy"] = Ratio(f"{name}_hit", f"{name}_asked")
    return TaskResult(
        count=len(scenes),
        items={name: values.astype(np.int64) for name, values in items.items()},
        ratios=ratios | {"vectors_per_image": Ratio("vectors")},
        ids=scene_ids(scenes),
    )


def _first(scores: Float[np.ndarray, "n n"]) -> Bool[np.ndarray, " n"]:
    """Whether the own candidate of each query scores above all others."""
    others = scores.copy()
    np.fill_diagonal(others, -np.inf)
    return scores.diagonal() > others.max(axis=1) + TIE_TOLERANCE


def _own_scores(
    queries: Sequence[np.ndarray], documents: Sequence[np.ndarray]
) -> Float[np.ndarray, " n"]:
    """MaxSim of query i with document i."""
    pairs = zip(queries, documents, strict=True)
    return np.array([TokenEncoder.max_sim([query], [one])[0, 0] for query, one in pairs])
