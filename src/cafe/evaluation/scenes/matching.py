"""What a model's judgement is worth, of statements and as a reranker, in two ways of judging.

scenes-match asks the match question, scenes-likelihood takes log P(caption | image). Judged are
each image's own caption, captions that are nearly right, and the candidates that the embeddings
find first. The same numbers of the same model: so the difference between the two orders of one
search is the judgement's worth alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cafe.data.scenes import caption
from cafe.data.scenes.questions import near_miss
from cafe.evaluation.scenes.held_out import SceneItem, item_stream, scene_ids
from cafe.evaluation.scenes.retrieval import hard_captions
from cafe.evaluation.scoring import Derivation, Ratio
from cafe.evaluation.task import Encode, JudgePairs, TaskResult
from cafe.metrics import calibration_columns
from cafe.model.rerank import RerankBy, reranked
from cafe.types import Image

RERANKED = 10
"""Number of candidates, the best by cosine, that are asked about."""

_PARTS = ("recall", "reranked", "gain")

_NEAR_MISS = 7
"""The purpose of the random stream of near misses (`item_stream`)."""


def scenes_match(
    encode: Encode, match_odds: JudgePairs, temperature: float, scenes: Sequence[SceneItem]
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
    judged = _judge_all(encode, match_odds, temperature, scenes, "question")
    own, other = judged.own, judged.near_miss
    items = {
        "judged_right": (own > 0).astype(int) + (other <= 0),
        "judged": np.full(len(scenes), 2),
        "calibration": calibration_columns(
            np.stack([own, other], axis=1), np.tile([True, False], (len(scenes), 1))
        ),
    }
    return _result("match", scenes, judged, items, Ratio("judged_right", "judged"), "calibration")


def scenes_likelihood(
    encode: Encode, log_likelihood: JudgePairs, temperature: float, scenes: Sequence[SceneItem]
) -> TaskResult:
    """Compare right and nearly right captions, and search results, by log P(caption | image).

    Scores: those of `scenes_match` under names that begin with `likelihood`, without a calibration
    error, and with another meaning of `likelihood_accuracy`: the share of scenes whose own caption
    is more likely than the nearly right one, in words of its own (chance 1/2).

    Args:
        encode: as in `scenes_match`, and so are `temperature` and `scenes`.
        log_likelihood: (image, text) pairs -> nats.
        temperature: see above.
        scenes: see above.
    """
    judged = _judge_all(encode, log_likelihood, temperature, scenes, "likelihood")
    items = {"judged_right": (judged.own > judged.near_miss).astype(int)}
    return _result("likelihood", scenes, judged, items, Ratio("judged_right"), None)


@dataclass(frozen=True, slots=True)
class _Judged:
    """What a judge says of each scene's captions and of the search results.

    own, near_miss   [n]: its caption, and a nearly right one
    columns          whether the true caption wins, and each query's partner is found
    """

    own: np.ndarray
    near_miss: np.ndarray
    columns: dict[str, np.ndarray]


def _judge_all(
    encode: Encode,
    function: JudgePairs,
    temperature: float,
    scenes: Sequence[SceneItem],
    by: RerankBy,
) -> _Judged:
    hard = [hard_captions(item.scene, item.scene.seed) for item in scenes]
    wrong = [_near_miss(item) for item in scenes]
    vectors = encode([*(item.image for item in scenes), *(item.caption for item in scenes)])
    cosines = vectors[: len(scenes)] @ vectors[len(scenes) :].T
    best = {
        "image_to_text": np.argsort(-cosines, axis=1, kind="stable")[:, :RERANKED],
        "text_to_image": np.argsort(-cosines.T, axis=1, kind="stable")[:, :RERANKED],
    }
    judge = _Pairs(function, scenes)
    for i, (true, word, order) in enumerate(hard):
        judge.ask(i, scenes[i].caption, wrong[i], true, *word, *order)
        judge.ask(i, *(scenes[j].caption for j in best["image_to_text"][i]))
        for j in best["text_to_image"][i]:
            judge.ask(int(j), scenes[i].caption)
    judge.answer()
    columns = {
        "word_hit": judge.hits([(true, word) for true, word, _ in hard]),
        "word_asked": np.array([bool(word) for _, word, _ in hard]),
        "order_hit": judge.hits([(true, order) for true, _, order in hard]),
        "order_asked": np.array([bool(order) for _, _, order in hard]),
    }
    for way, candidates in best.items():
        first, second = _first_hits(judge, cosines, temperature, way, candidates, by)
        hits = {"recall": first, "reranked": second, "gain": second.astype(int) - first}
        columns |= {f"{way}_{name}": column for name, column in hits.items()}
    return _Judged(
        np.array([judge.score(i, item.caption) for i, item in enumerate(scenes)]),
        np.array([judge.score(i, text) for i, text in enumerate(wrong)]),
        columns,
    )


def _result(
    name: str,
    scenes: Sequence[SceneItem],
    judged: _Judged,
    items: dict[str, np.ndarray],
    accuracy: Ratio,
    derived: Derivation | None,
) -> TaskResult:
    ratios = {
        f"{name}_accuracy": accuracy,
        f"{name}_word_accuracy": Ratio("word_hit", "word_asked"),
        f"{name}_order_accuracy": Ratio("order_hit", "order_asked"),
    }
    for way in ("image_to_text", "text_to_image"):
        ratios |= {f"{way}_{part}@1": Ratio(f"{way}_{part}") for part in _PARTS}
    return TaskResult(
        count=len(scenes),
        items={
            column: np.asarray(values).astype(_number(values))
            for column, values in (items | judged.columns).items()
        },
        ratios=ratios,
        derived=derived,
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
    judge: _Pairs,
    cosines: np.ndarray,
    temperature: float,
    way: str,
    candidates: np.ndarray,
    by: RerankBy,
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each query's own partner comes first by cosine, and by the posterior."""
    queries = np.arange(len(candidates))
    forward = way == "image_to_text"
    scores = np.array(
        [
            [judge.of_caption(q, j) if forward else judge.of_caption(j, q) for j in row]
            for q, row in enumerate(candidates)
        ]
    )
    similarity = np.take_along_axis(cosines if forward else cosines.T, candidates, axis=1)
    first = [
        reranked(similar, own, temperature, by).posterior.argmax()
        for similar, own in zip(similarity, scores, strict=True)
    ]
    chosen = candidates[queries, first]
    return candidates[:, 0] == queries, chosen == queries


class _Pairs:
    """Collects pairs, judges each once, and knows the scores."""

    def __init__(self, judge: JudgePairs, scenes: Sequence[SceneItem]) -> None:
        self._judge, self._scenes = judge, scenes
        self._known: dict[tuple[int, str], float] = {}

    def ask(self, scene: int, *texts: str) -> None:
        self._known |= {(scene, text): np.nan for text in texts}

    def answer(self) -> None:
        """JudgePairs everything; pairs of one image one after the other, so that they share it."""
        asked = sorted(self._known)
        pairs: list[tuple[Image, str]] = [(self._scenes[i].image, text) for i, text in asked]
        self._known = dict(zip(asked, self._judge(pairs).tolist(), strict=True))

    def score(self, scene: int, text: str) -> float:
        return self._known[scene, text]

    def of_caption(self, scene: int, other: int) -> float:
        """The score of one scene's image with another one's caption."""
        return self.score(int(scene), self._scenes[int(other)].caption)

    def hits(self, lists: Sequence[tuple[str, Sequence[str]]]) -> np.ndarray:
        """Whether the true text of each scene scores above all wrong ones; a tie is a miss.

        False where there is no wrong one.
        """
        return np.array(
            [
                bool(wrong) and self.score(i, true) > max(self.score(i, text) for text in wrong)
                for i, (true, wrong) in enumerate(lists)
            ]
        )
