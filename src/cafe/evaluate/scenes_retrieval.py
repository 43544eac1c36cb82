"""scenes-retrieval: single captions as in `retrieval`, and hard ones that are nearly right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cafe.evaluate.hard_captions import hard_captions
from cafe.evaluate.retrieval import ranges, retrieval_scores
from cafe.evaluate.scene_set import SceneItem, scene_ids
from cafe.evaluate.scoring import Ratio
from cafe.evaluate.task import Encode, Result
from cafe.metrics import candidate_scores, hit_at_1


def scenes_retrieval(encode: Encode, scenes: Sequence[SceneItem]) -> Result:
    """Rank all captions and all pictures, then each picture's caption among wrong ones.

    Scores: those of `cafe.evaluate.retrieval`; `hard_word_accuracy`, the share of pictures whose
    true caption scores above its three with one wrong word (chance 1/4); `hard_order_accuracy`,
    above the one in which two objects trade places (chance 1/2); `hard_accuracy`, above all of
    them. A tie is a miss.

    Raises:
        DataError, ValueError: as in `cafe.metrics.two_way_ranks`.
    """
    images = encode([item.image for item in scenes])
    captions = encode([item.caption for item in scenes])
    single = retrieval_scores(images, captions, ranges([1] * len(scenes)), scene_ids(scenes))
    told = [hard_captions(item.scene, item.scene.seed) for item in scenes]
    texts = list(dict.fromkeys(t for true, word, order in told for t in (true, *word, *order)))
    place = {text: i for i, text in enumerate(texts)}
    embedded = encode(texts)

    def hits(lists: list[list[str]]) -> np.ndarray:
        """Whether the first of each picture's texts scores best; False where it is alone."""
        indices = [[place[text] for text in own] for own in lists]
        alone = np.array([len(own) < 2 for own in lists])
        return hit_at_1(candidate_scores(images, embedded, indices)) & ~alone

    with_order = np.array([bool(order) for _, _, order in told])
    with_word = np.array([bool(word) for _, word, _ in told])
    items = {
        "word_hit": hits([[true, *word] for true, word, _ in told]),
        "word_asked": with_word,
        "order_hit": hits([[true, *order] for true, _, order in told]),
        "order_asked": with_order,
        "hard_hit": hits([[true, *word, *order] for true, word, order in told]),
        "hard_asked": with_word | with_order,
    }
    ratios = {
        "hard_word_accuracy": Ratio("word_hit", "word_asked"),
        "hard_order_accuracy": Ratio("order_hit", "order_asked"),
        "hard_accuracy": Ratio("hard_hit", "hard_asked"),
    }
    return replace(
        single,
        items=single.items | {name: values.astype(np.int64) for name, values in items.items()},
        ratios=single.ratios | ratios,
    )
