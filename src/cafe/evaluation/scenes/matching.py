"""scenes-match: what the match question is worth, as a judge of statements and as a reranker.

It is asked about each image's own caption and about captions that are nearly right, and about the
candidates that the embeddings find first. The same numbers of the same model: so the difference
between the two orders of one search is the question's worth alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cafe.data.scenes import caption
from cafe.data.scenes.questions import near_miss
from cafe.evaluation.scenes.held_out import SceneItem, item_stream, scene_ids
from cafe.evaluation.scenes.retrieval import hard_captions
from cafe.evaluation.scoring import Ratio
from cafe.evaluation.task import Encode, MatchOdds, TaskResult
from cafe.metrics import calibration_columns
from cafe.model.rerank import reranked
from cafe.types import Image

RERANKED = 10
"""Number of candidates, the best by cosine, that are asked about."""

_NEAR_MISS = 7
"""The purpose of the random stream of near misses (`item_stream`)."""


def scenes_match(
    encode: Encode, match_odds: MatchOdds, temperature: float, scenes: Sequence[SceneItem]
) -> TaskResult:
    """Ask the match question about right and nearly right captions, and about search results.

    Scores, in shares of the scenes:

    `match_accuracy`   statements judged rightly, half of which are true (at odds of 1)
    `match_ece`        expected calibration error of P("yes") on these, in ten bins
    `match_word_accuracy`   the true caption has higher odds than the three with one wrong word
    `match_order_accuracy`  than the one in which two objects are swapped
    `…_recall@1`       of the candidates by cosine, and `…_reranked@1` of the `RERANKED` best of
                       them by `CAFe.rerank`'s posterior; `…_gain@1`, the difference

    Args:
        encode: images and captions -> unit embeddings.
        match_odds: (image, text) pairs -> log-odds of "yes".
        temperature: of the contrastive training (`cafe.model.rerank`).
        scenes: held-out ones.
    """
    hard = [hard_captions(item.scene, item.scene.seed) for item in scenes]
    wrong = [_near_miss(item) for item in scenes]
    vectors = encode([*(item.image for item in scenes), *(item.caption for item in scenes)])
    cosines = vectors[: len(scenes)] @ vectors[len(scenes) :].T
    best = {
        "image_to_text": np.argsort(-cosines, axis=1, kind="stable")[:, :RERANKED],
        "text_to_image": np.argsort(-cosines.T, axis=1, kind="stable")[:, :RERANKED],
    }
    judge = _Judge(match_odds, scenes)
    for i, (true, word, order) in enumerate(hard):
        judge.ask(i, scenes[i].caption, wrong[i], true, *word, *order)
        judge.ask(i, *(scenes[j].caption for j in best["image_to_text"][i]))
        for j in best["text_to_image"][i]:
            judge.ask(int(j), scenes[i].caption)
    judge.answer()
    own = np.array([judge.odds(i, item.caption) for i, item in enumerate(scenes)])
    other = np.array([judge.odds(i, text) for i, text in enumerate(wrong)])
    items = {
        "judged_right": (own > 0).astype(int) + (other <= 0),
        "judged": np.full(len(scenes), 2),
        "calibration": calibration_columns(
            np.stack([own, other], axis=1), np.tile([True, False], (len(scenes), 1))
        ),
        "word_hit": judge.hits([(true, word) for true, word, _ in hard]),
        "word_asked": np.array([bool(word) for _, word, _ in hard]),
        "order_hit": judge.hits([(true, order) for true, _, order in hard]),
        "order_asked": np.array([bool(order) for _, _, order in hard]),
    }
    ratios = {
        "match_accuracy": Ratio("judged_right", "judged"),
        "match_word_accuracy": Ratio("word_hit", "word_asked"),
        "match_order_accuracy": Ratio("order_hit", "order_asked"),
    }
    for way, candidates in best.items():
        first, reranked = _first_hits(judge, cosines, temperature, way, candidates)
        columns = {"recall": first, "reranked": reranked, "gain": reranked.astype(int) - first}
        items |= {f"{way}_{name}": column for name, column in columns.items()}
        ratios |= {f"{way}_{name}@1": Ratio(f"{way}_{name}") for name in columns}
    return TaskResult(
        count=len(scenes),
        items={name: np.asarray(values).astype(_number(values)) for name, values in items.items()},
        ratios=ratios,
        derived="calibration",
        ids=scene_ids(scenes),
    )


def _number(values: np.ndarray) -> type:
    return float if np.asarray(values).dtype.kind == "f" else np.int64


def _near_miss(item: SceneItem) -> str:
    """A caption with one error, in words of its own."""
    rng = item_stream(item, _NEAR_MISS)
    text = item.caption
    while text == item.caption:
        text = caption(near_miss(item.scene, rng), rng)
    return text


def _first_hits(
    judge: _Judge, cosines: np.ndarray, temperature: float, way: str, candidates: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each query's own partner comes first by cosine, and by the posterior."""
    queries = np.arange(len(candidates))
    forward = way == "image_to_text"
    odds = np.array(
        [
            [judge.of_caption(q, j) if forward else judge.of_caption(j, q) for j in row]
            for q, row in enumerate(candidates)
        ]
    )
    similarity = np.take_along_axis(cosines if forward else cosines.T, candidates, axis=1)
    first = [
        reranked(similar, own, temperature).posterior.argmax()
        for similar, own in zip(similarity, odds, strict=True)
    ]
    chosen = candidates[queries, first]
    return candidates[:, 0] == queries, chosen == queries


class _Judge:
    """Collects questions, asks each once, and knows the answers."""

    def __init__(self, match_odds: MatchOdds, scenes: Sequence[SceneItem]) -> None:
        self._match_odds, self._scenes = match_odds, scenes
        self._known: dict[tuple[int, str], float] = {}

    def ask(self, scene: int, *texts: str) -> None:
        self._known |= {(scene, text): np.nan for text in texts}

    def answer(self) -> None:
        """Ask everything; questions about one image one after the other, so that they share it."""
        asked = sorted(self._known)
        pairs: list[tuple[Image, str]] = [(self._scenes[i].image, text) for i, text in asked]
        self._known = dict(zip(asked, self._match_odds(pairs).tolist(), strict=True))

    def odds(self, scene: int, text: str) -> float:
        return self._known[scene, text]

    def of_caption(self, scene: int, other: int) -> float:
        """The odds of one scene's image with another one's caption."""
        return self.odds(int(scene), self._scenes[int(other)].caption)

    def hits(self, lists: Sequence[tuple[str, Sequence[str]]]) -> np.ndarray:
        """Whether the true text of each scene has higher odds than all wrong ones; a tie is none.

        False where there is no wrong one.
        """
        return np.array(
            [
                bool(wrong) and self.odds(i, true) > max(self.odds(i, text) for text in wrong)
                for i, (true, wrong) in enumerate(lists)
            ]
        )
