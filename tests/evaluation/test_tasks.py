"""Each task against a table that a person can check, through models that are made up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import pytest

from cafe.data.scenes import SceneQuestion
from cafe.demo.measure import SCORES, evaluate_scenes
from cafe.errors import DataError
from cafe.evaluation.datasets.captioned import CaptionedImage
from cafe.evaluation.tasks.caption import caption, caption_loss_scores, caption_objects
from cafe.evaluation.tasks.gap import gap
from cafe.evaluation.tasks.presence import presence
from cafe.evaluation.tasks.retrieval import KS, ranges, retrieval, retrieval_scores
from cafe.model.teacher_forced import AnswerScore, TeacherForcedScores
from cafe.types import Conversation, Example, Image, Message, user
from helpers.metric_reference import recall_at_k


def make(
    name: str,
    captions: Sequence[str],
    questions: Sequence[SceneQuestion] = (),
    kinds: Sequence[str] | None = None,
) -> CaptionedImage:
    image = Image(PIL.Image.new("RGB", (8, 8)))
    return CaptionedImage(
        id=name,
        image=image,
        captions=tuple(captions),
        dialogues=tuple((*user(image, "Tell."), Message("assistant", (c,))) for c in captions),
        questions=tuple(questions),
        kinds=None if kinds is None else frozenset(kinds),
    )


class FakeModel:
    """Embeds as a table says and answers as a table says."""

    def __init__(self, embeddings: dict[object, list[float]], replies: dict[str, str]) -> None:
        self.embeddings, self.replies = embeddings, replies
        self.asked: list[str] = []

    def encode(self, inputs: Sequence[Any]) -> np.ndarray:
        keys = [i if isinstance(i, str) else i.key for i in inputs]
        rows = np.array([self.embeddings[key] for key in keys])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def generate(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        self.asked += [c[0].text for c in conversations]
        return [self.replies[c[0].text] for c in conversations]

    def read(self, examples: Sequence[Example]) -> list[TeacherForcedScores]:
        """n words: n² nats, 2n tokens; greedy where the table has exactly this answer."""

        def answer(dialogue: Conversation) -> AnswerScore:
            given = dialogue[-1].text
            words = len(given.split())
            return AnswerScore(
                float(words**2), 2 * words, self.replies.get(dialogue[0].text) == given
            )

        def side(conversation: Conversation | None) -> np.ndarray | None:
            if conversation is None:
                return None
            (part,) = conversation[0].content
            return self.encode([part])[0]  # type: ignore[list-item]

        return [
            TeacherForcedScores(side(e.query), side(e.target), tuple(map(answer, e.dialogues)))
            for e in examples
        ]


def test_recall_counts_any_caption_of_a_image_and_every_caption_by_itself():
    images = [make("a", ["a1", "a2"]), make("b", ["b1"]), make("c", ["c1"])]
    # Angles in degrees. Nearest caption of a: a1; of b: c1 (then b1); of c: c1.
    angles = {"a1": 0, "a2": 100, "b1": 50, "c1": 80}
    angles |= {p.image.key: angle for p, angle in zip(images, (5, 70, 85), strict=True)}
    model = FakeModel(
        {k: [np.cos(np.radians(v)), np.sin(np.radians(v))] for k, v in angles.items()}, {}
    )

    result = retrieval(model.encode, images)

    # Nearest image of a1: a; of a2: c (wrong, a is third); of b1: b; of c1: c.
    assert result.scores["image_to_text_recall@1"] == pytest.approx(2 / 3)
    assert result.scores["text_to_image_recall@1"] == pytest.approx(3 / 4)
    assert result.scores["text_to_image_recall@5"] == 1
    assert result.items["caption_hits@1"].tolist() == [1, 1, 1]  # of two, one and one
    assert result.items["captions"].tolist() == [2, 1, 1]
    assert result.count == 3


def test_recall_from_hits_per_image_is_recall_at_k():
    rng = np.random.default_rng(0)
    counts = [1, 2, 3, 4] * 3
    captions_of = ranges(counts)
    images = rng.standard_normal((12, 4))
    captions = np.repeat(images, counts, axis=0) + rng.standard_normal((30, 4))
    found = retrieval_scores(images, captions, captions_of).scores
    slow = recall_at_k(images, captions, captions_of, KS)
    names = {"image_to_text": "query_to_target", "text_to_image": "target_to_query"}
    expected = {f"{a}_recall@{k}": slow[f"{b}_recall@{k}"] for a, b in names.items() for k in KS}
    assert found == pytest.approx(expected)
    assert 0 < found["text_to_image_recall@1"] < found["text_to_image_recall@5"]


def test_a_constant_model_retrieves_nothing_and_has_no_gap():
    images = [make(str(i), [f"text {i}"]) for i in range(4)]
    keys: list[object] = [p.image.key for p in images] + [f"text {i}" for i in range(4)]
    model = FakeModel({key: [1.0, 2.0] for key in keys}, {})
    assert retrieval(model.encode, images).scores["image_to_text_recall@1"] == 0
    found = gap(model.encode, images).scores
    assert found["modality_gap"] == pytest.approx(0, abs=1e-12)
    assert found["modality_probe_accuracy"] == 0.5
    assert found["effective_rank/image"] == pytest.approx(1)


def test_the_gap_is_the_distance_of_the_two_centroids_and_alignment_that_of_pairs():
    first, second = make("a", ["a"]), make("b", ["b1", "b2"])
    east, north, west = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
    model = FakeModel(
        {first.image.key: east, second.image.key: north, "a": west, "b1": east, "b2": east}, {}
    )
    found = gap(model.encode, [first, second]).scores
    # Centroids: (1/2, 1/2) and (1/3, 0). Squared distances of pairs: 4, 2, 2.
    assert found["modality_gap"] == pytest.approx(np.hypot(1 / 6, 1 / 2))
    assert found["alignment"] == pytest.approx(8 / 3)


def test_the_caption_loss_weighs_tokens_not_captions():
    read = [[AnswerScore(2.0, 2, True), AnswerScore(1.0, 4, False)], [AnswerScore(9.0, 2, False)]]
    assert caption_loss_scores(read).scores == {"caption_loss": 1.5}  # 12 nats, 8 tokens


def test_objects_of_captions_are_counted_over_all_images():
    model = FakeModel({}, {"Tell.": "A big cat and two buses."})
    images = [
        make("a", ["x"], kinds=["cat", "bus"]),
        make("b", ["x"], kinds=["cat", "key", "egg"]),
    ]
    found = caption_objects(model.generate, images)
    # Named: cat and bus, twice. Right: cat, bus; cat. There: 5.
    assert found.scores["caption_object_precision"] == pytest.approx(3 / 4)
    assert found.scores["caption_object_recall"] == pytest.approx(3 / 5)
    assert found.scores["caption_object_f1"] == pytest.approx(6 / 9)
    assert found.items["objects_right"].tolist() == [2, 1]


def test_without_the_truth_a_caption_has_a_loss_only():
    model = FakeModel({}, {})
    found = caption(model.read, model.generate, [make("a", ["one two"]), make("b", ["three"])])
    assert found.scores == {"caption_loss": pytest.approx(5 / 6)}
    assert model.asked == []
    with pytest.raises(DataError, match=r"'a'.*no object annotations"):
        caption_objects(model.generate, [make("a", ["x"])])


QUESTIONS = (
    SceneQuestion("presence", "Is there a cat?", "yes"),
    SceneQuestion("presence", "Is there a bus?", "no"),
    SceneQuestion("object", "What is at the top?", "cat"),
    SceneQuestion("count", "How many?", "two"),
)
REPLIES = {
    "Is there a cat?": "yes",
    "Is there a bus?": "Yes.",
    "What is at the top?": "A cat!",
    "How many?": "two",
}


def test_only_questions_that_reading_does_not_settle_are_asked_and_compared_in_normal_form():
    model = FakeModel({}, dict(REPLIES))
    found = presence(model.read, model.generate, [make("a", ["x"], QUESTIONS), make("b", ["x"])])
    assert model.asked == ["Is there a bus?", "What is at the top?"]
    assert found.scores == {
        "question_accuracy": 0.75,
        "question_accuracy/presence": 0.5,
        "question_accuracy/object": 1.0,
        "question_accuracy/count": 1.0,
        "presence_accuracy": 0.5,
    }
    # The sample is an image; the second has no question.
    assert found.items["asked"].tolist() == [4]
    assert found.items["right"].tolist() == [3]
    assert found.count == 4


def test_both_answers_to_a_yes_no_question_are_read_so_a_plain_wrong_one_is_not_generated():
    model = FakeModel({}, REPLIES | {"Is there a bus?": "yes"})
    found = presence(model.read, model.generate, [make("a", ["x"], QUESTIONS[:2])])
    assert model.asked == []
    assert found.scores["presence_accuracy"] == 0.5


def test_no_question_at_all_is_an_error():
    model = FakeModel({}, {})
    with pytest.raises(DataError, match="no image has a question"):
        presence(model.read, model.generate, [make("a", ["x"])])


def test_all_tasks_in_one_go_find_what_each_finds_alone():
    images = [
        make("a", ["a big cat"], QUESTIONS[:3], ["cat"]),
        make("b", ["a bus"], QUESTIONS[3:], ["bus"]),
        make("c", ["a key"], (), ["key"]),
    ]
    rng = np.random.default_rng(0)
    keys: list[Any] = [p.image.key for p in images] + [c for p in images for c in p.captions]
    replies = REPLIES | {"Tell.": "a cat", "What is at the top?": "cat"}
    model = FakeModel({key: rng.normal(size=4).tolist() for key in keys}, replies)

    together = evaluate_scenes(model.read, model.generate, images)

    questions = presence(model.read, model.generate, images).scores
    alone = (
        retrieval(model.encode, images).scores
        | caption(model.read, model.generate, images).scores
        | questions
        | gap(model.encode, images).scores
    )
    assert tuple(together.scores) == SCORES
    assert together.scores == pytest.approx({name: alone[name] for name in SCORES})
    assert together.question_accuracy == {"presence": 0.5, "object": 1.0, "count": 1.0}
    np.testing.assert_allclose(together.images, model.encode([p.image for p in images]))


def test_all_tasks_in_one_go_need_scenes():
    model = FakeModel({}, {})
    with pytest.raises(DataError, match="scenes are needed"):
        evaluate_scenes(model.read, model.generate, [make("a", ["x"]), make("b", ["y"])])
