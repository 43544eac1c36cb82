"""The bundled world's own tasks: their questions are true, and their scores behave at the ends."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from cafe.data.scenes import CLASS_NAMES, CLASSES, mentioned_classes
from cafe.evaluation.scenes.hallucination import (
    SCENE_WORDS,
    scene_questions,
    scenes_chair,
    scenes_throne,
)
from cafe.evaluation.scenes.held_out import SceneItem, scene_items
from cafe.evaluation.scenes.matching import RERANKED, scenes_likelihood, scenes_match
from cafe.evaluation.scenes.mmeb import SETS, scenes_mmeb
from cafe.evaluation.scenes.retrieval import ONE_WORD, hard_captions, scenes_retrieval
from cafe.evaluation.scenes.tokens import scenes_tokens
from cafe.evaluation.tasks.pope import pope
from cafe.model.teacher_forced import AnswerScore, TeacherForcedScores
from cafe.types import Conversation, Example, content_key


@pytest.fixture(scope="module")
def scenes() -> list[SceneItem]:
    return scene_items(None, 40)


def random_unit(seed: int) -> Any:
    """Every distinct input has an embedding of its own, at random, and keeps it."""
    known: dict[Any, np.ndarray] = {}
    rng = np.random.default_rng(seed)

    def encode(inputs: Sequence[Any]) -> np.ndarray:
        rows = [known.setdefault(content_key(i), rng.standard_normal(32)) for i in inputs]
        return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)

    return encode


def constant(inputs: Sequence[Any]) -> np.ndarray:
    return np.full((len(inputs), 4), 0.5, dtype=np.float32)


# ---------------------------------------------------------------- token vectors


def word_vectors(scenes: Sequence[SceneItem], *, ordered: bool) -> Any:
    """A vector for each word of a text, or for each word at its place; of an image, its texts'."""
    known: dict[Any, np.ndarray] = {}
    rng = np.random.default_rng(0)
    shown = {
        content_key(i.image): [i.caption, hard_captions(i.scene, i.scene.seed)[0]] for i in scenes
    }

    def vectors(text: str) -> list[np.ndarray]:
        words = text.lower().rstrip(".").replace(",", "").split()
        keys = enumerate(words) if ordered else words
        return [known.setdefault(key, rng.standard_normal(64)) for key in keys]

    def encode(inputs: Sequence[Any]) -> list[np.ndarray]:
        texts = [[i] if isinstance(i, str) else shown[content_key(i)] for i in inputs]
        rows = [np.stack([v for text in own for v in vectors(text)]) for own in texts]
        return [(r / np.linalg.norm(r, axis=1, keepdims=True)).astype(np.float32) for r in rows]

    return encode


def test_late_interaction_that_sees_places_tells_what_stands_where(scenes):
    scores = scenes_tokens(word_vectors(scenes, ordered=True), scenes).scores
    # An image also has the words of its other caption, one of which may be the wrong one.
    assert min(scores["hard_order_accuracy"], scores["hard_word_accuracy"]) > 0.9
    assert scores["text_to_image_recall@1"] == 1
    assert 0.5 < scores["text_to_image_recall@1_pool_2"] <= 1
    assert scores["vectors_per_image"] > 10


def test_a_bag_of_words_ties_where_the_order_is_wrong(scenes):
    scores = scenes_tokens(word_vectors(scenes, ordered=False), scenes).scores
    assert scores["hard_order_accuracy"] == 0
    assert scores["hard_word_accuracy"] > 0.5

    def constant_tokens(inputs: Sequence[Any]) -> list[np.ndarray]:
        return [np.full((3, 4), 0.5, dtype=np.float32)] * len(inputs)

    found = scenes_tokens(constant_tokens, scenes).scores
    assert {v for name, v in found.items() if name != "vectors_per_image"} == {0.0}


# ---------------------------------------------------------------- hard captions


def facts(text: str) -> Counter[str]:
    return Counter(text.lower().rstrip(".").replace(",", "").split())


def test_hard_captions_differ_in_one_word_or_in_the_order_of_the_same_words(scenes):
    with_order = 0
    for item in scenes:
        true, word, order = hard_captions(item.scene, item.scene.seed)
        assert len(word) == ONE_WORD == len({*word, true}) - 1
        for text in word:
            pairs = zip(text.lower().split(), true.lower().split(), strict=True)
            assert sum(a != b for a, b in pairs) == 1
        for text in order:
            assert text != true
            assert facts(text) == facts(true)
        assert bool(order) == (len(item.scene.classes) > 1)
        assert mentioned_classes(true) == set(item.scene.classes)
        with_order += bool(order)
    assert 10 < with_order < 40


def test_hard_captions_are_the_same_every_time(scenes):
    first, again = (hard_captions(scenes[0].scene, 5) for _ in range(2))
    assert first == again
    assert hard_captions(scenes[0].scene, 6) != first


# ---------------------------------------------------------------- retrieval and MMEB


def test_a_constant_model_finds_nothing_and_a_random_one_is_at_chance(scenes):
    scores = scenes_retrieval(constant, scenes).scores
    assert set(scores.values()) == {0.0}
    found = [scenes_retrieval(random_unit(seed), scenes).scores for seed in range(20)]
    mean = {name: np.mean([scores[name] for scores in found]) for name in found[0]}
    assert mean["hard_word_accuracy"] == pytest.approx(1 / 4, abs=0.06)
    assert mean["hard_order_accuracy"] == pytest.approx(1 / 2, abs=0.08)
    assert mean["image_to_text_recall@10"] == pytest.approx(10 / 40, abs=0.06)


def test_a_model_that_knows_the_scene_gets_everything_right(scenes):
    directions = dict(zip([i.caption for i in scenes], np.eye(40, 41), strict=True))
    own = {content_key(i.image): directions[i.caption] for i in scenes}
    own |= {hard_captions(i.scene, i.scene.seed)[0]: directions[i.caption] for i in scenes}
    own |= directions

    def encode(inputs: Sequence[Any]) -> np.ndarray:
        return np.stack([own.get(content_key(i), np.eye(41)[40]) for i in inputs])

    scores = scenes_retrieval(encode, scenes).scores
    assert len(directions) == 40  # no two scenes say the same, else they would tie
    assert set(scores.values()) == {1.0}


@pytest.mark.slow
def test_mmeb_has_four_meta_tasks_in_two_halves_and_is_at_chance_for_a_random_model(scenes):
    result = scenes_mmeb(constant, scenes)
    chance = result.scores["chance"]
    assert {name: v for name, v in result.scores.items() if v} == {"chance": chance}
    assert {f"{name}/{half}" for name in SETS for half in ("ind", "ood")} < set(result.scores)
    assert {"classification", "vqa", "retrieval", "grounding", "ind", "ood", "all"} < set(
        result.scores
    )
    found = [scenes_mmeb(random_unit(seed), scenes).scores["all"] for seed in range(8)]
    assert np.mean(found) == pytest.approx(chance, abs=0.02)
    assert chance < 0.2


def test_mmeb_answers_are_among_the_candidates_once_and_the_halves_are_what_training_never_shows(
    scenes,
):
    from cafe.evaluation.scenes.mmeb import _queries, _World

    world = _World(scenes)
    unseen = {item.id for item in scenes if item.unseen}
    assert 5 < len(unseen) < 35
    for number, (name, (_, make)) in enumerate(SETS.items()):
        halves = [list(_queries(world, make, number, half)) for half in (False, True)]
        assert {q.id for q in halves[1]} <= unseen
        assert not {q.id for q in halves[0]} & unseen
        for query in [q for half in halves for q in half]:
            keys = [content_key(c) for c in query.candidates]
            assert len(set(keys)) == len(keys), name
            assert len(keys) >= 3, name


# ---------------------------------------------------------------- POPE


def test_scene_questions_are_balanced_true_and_share_their_present_half(scenes):
    asked = scene_questions(scenes)
    truth = {item.id: set(item.scene.classes) for item in scenes}
    by_setting = {s: [q for q in asked if q.setting == s] for s in ("random", "popular")}
    by_setting["adversarial"] = [q for q in asked if q.setting == "adversarial"]
    present = [{(q.image_name, q.text) for q in own if q.label} for own in by_setting.values()]
    assert present[0] == present[1] == present[2]
    for own in by_setting.values():
        assert sum(q.label for q in own) * 2 == len(own)
        assert len({(q.image_name, q.text) for q in own}) == len(own)
        for question in own:
            (kind,) = mentioned_classes(question.text)
            assert (kind in truth[question.image_name]) == question.label


def test_adversarial_kinds_look_like_what_is_there(scenes):
    def alike(setting: str) -> float:
        asked = [q for q in scene_questions(scenes) if q.setting == setting]
        pairs = zip(asked[::2], asked[1::2], strict=True)  # what is there, what is not
        kinds = [[mentioned_classes(q.text).pop() for q in pair] for pair in pairs]
        return float(np.mean([CLASSES[a].category == CLASSES[b].category for a, b in kinds]))

    assert alike("adversarial") > 0.9
    assert alike("random") < 0.4


def test_all_kinds_are_asked_once_per_image(scenes):
    asked = scene_questions(scenes[:3], every_kind=True)
    assert len(asked) == 3 * len(CLASS_NAMES)
    assert sum(q.label for q in asked) == sum(len(i.scene.classes) for i in scenes[:3])


class Oracle:
    """Says of every thing whether `sees` it; reads as it would write."""

    def __init__(self, scenes: Sequence[SceneItem], reply: Any) -> None:
        self.truth = {content_key(i.image): set(i.scene.classes) for i in scenes}
        self.reply = reply
        self.generated = 0

    def answer(self, conversation: Conversation) -> str:
        image, question = conversation[0].content
        (kind,) = mentioned_classes(str(question))
        return self.reply(kind in self.truth[content_key(image)])

    def read(self, examples: Sequence[Example]) -> list[TeacherForcedScores]:
        return [
            TeacherForcedScores(
                None,
                None,
                tuple(AnswerScore(0.0, 1, d[-1].text == self.answer(d)) for d in e.dialogues),
            )
            for e in examples
        ]

    def generate(self, conversations: Sequence[Conversation], _: int) -> list[str]:
        self.generated += len(conversations)
        return [self.answer(c) for c in conversations]


@pytest.mark.parametrize(
    ("reply", "accuracy", "yes_ratio", "generates"),
    [
        (lambda there: "yes" if there else "no", 1.0, 0.5, False),
        (lambda there: "no" if there else "yes", 0.0, 0.5, False),
        (lambda there: "Yes, I see it." if there else "No, it is not there.", 1.0, 0.5, True),
        (lambda there: "", 0.5, 1.0, True),  # nothing said is a yes, by the official parser
    ],
)
def test_pope_of_the_scenes(scenes, reply, accuracy, yes_ratio, generates):
    oracle = Oracle(scenes, reply)
    result = pope(oracle.read, oracle.generate, scene_questions(scenes))
    for setting in ("random", "popular", "adversarial", "mean"):
        assert result.scores[f"{setting}/accuracy"] == accuracy
        assert result.scores[f"{setting}/yes_ratio"] == yes_ratio
    assert (oracle.generated > 0) == generates
    assert result.details["empty_replies"] == (result.count if not reply(True) else 0)


# ---------------------------------------------------------------- CHAIR and THRONE


def test_words_of_scenes_count_repetitions_and_plurals():
    text = "A big cat and two buses; the cat is under a palm tree. Teddy bears, a maple leaf."
    assert SCENE_WORDS.mentions(text) == [
        "cat", "bus", "cat", "palm tree", "teddy bear", "maple leaf",
    ]  # fmt: skip
    assert set(SCENE_WORDS.mentions(text)) == mentioned_classes(text)


def test_true_captions_invent_nothing_and_find_everything(scenes):
    captions = {content_key(i.image): i.caption for i in scenes}

    def generate(conversations: Sequence[Conversation], _: int) -> list[str]:
        return [captions[content_key(c[0].content[0])] for c in conversations]

    found = scenes_chair(generate, scenes).scores
    assert (found["chair_i"], found["chair_s"], found["recall"]) == (0, 0, 1)
    votes = scenes_throne(generate, scenes)
    scores = votes.scores
    assert scores["classwise_f0.5"] == scores["overall_mean_f1"] == scores["overall_f1"] == 1
    assert scores["disqualified"] == scores["evasive"] == 0
    assert votes.items["hits"].shape == (40, len(CLASS_NAMES))


def test_a_silent_model_invents_nothing_and_finds_nothing(scenes):
    def generate(conversations: Sequence[Conversation], _: int) -> list[str]:
        return ["" for _ in conversations]

    found = scenes_chair(generate, scenes)
    assert found.scores["chair_i"] == found.scores["recall"] == 0
    assert found.details["empty_replies"] == 40
    assert scenes_throne(generate, scenes).scores["overall_f1"] == 0


# ---------------------------------------------------------------- match question


def test_a_judge_that_knows_every_caption_repairs_a_random_order(scenes):
    """Its gain is what is left to gain among the candidates; unsure odds are calibrated."""
    own = {item.image.key: item.caption for item in scenes}

    def odds(pairs: Sequence[tuple[Any, str]]) -> np.ndarray:
        return np.array([9.0 if own[i.key] == text else -9.0 for i, text in pairs], np.float32)

    result = scenes_match(random_unit(0), odds, 0.05, scenes)
    scores = result.scores
    assert scores["match_accuracy"] == 1
    assert scores["match_ece"] < 2e-4
    for way in ("image_to_text", "text_to_image"):
        found = scores[f"{way}_recall@1"]
        reranked = scores[f"{way}_reranked@1"]
        assert scores[f"{way}_gain@1"] == pytest.approx(reranked - found)
        assert reranked > found
    assert len(scenes) > RERANKED, "or every candidate would be asked about"


def test_a_judge_without_an_opinion_changes_no_order(scenes):
    def odds(pairs: Sequence[tuple[Any, str]]) -> np.ndarray:
        return np.zeros(len(pairs), np.float32)

    scores = scenes_match(random_unit(1), odds, 0.05, scenes).scores
    assert scores["match_accuracy"] == 0.5  # odds of 1 are a "no"
    assert scores["match_ece"] == 0  # P = 1/2, and half of the statements are true
    assert scores["match_word_accuracy"] == scores["match_order_accuracy"] == 0
    assert scores["image_to_text_gain@1"] == scores["text_to_image_gain@1"] == 0


@pytest.mark.parametrize("knows", [True, False])
def test_a_judge_by_likelihood_finds_what_it_prefers(scenes, knows: bool):
    """By word counts, nothing but a wrong word shows: order is a tie, and a tie is a miss."""
    own = {item.image.key: item.caption.lower().split() for item in scenes}

    def log_p(pairs: Sequence[tuple[Any, str]]) -> np.ndarray:
        if not knows:
            return np.zeros(len(pairs), np.float32)
        right = [set(own[i.key]) >= set(text.lower().split()) for i, text in pairs]
        return np.where(right, -1.0, -99.0).astype(np.float32)

    scores = scenes_likelihood(random_unit(1), log_p, 0.05, scenes).scores
    assert scores["likelihood_order_accuracy"] <= scores["likelihood_word_accuracy"]
    assert (scores["likelihood_accuracy"] > 0.5) == knows
    for way in ("image_to_text", "text_to_image"):
        assert (scores[f"{way}_gain@1"] > 0) == knows
    if not knows:
        assert scores["likelihood_word_accuracy"] == scores["likelihood_accuracy"] == 0
    assert "match_ece" not in scores


def test_each_question_is_asked_once_and_those_about_an_image_together(scenes):
    asked: list[tuple[Any, str]] = []

    def odds(pairs: Sequence[tuple[Any, str]]) -> np.ndarray:
        asked.extend((image.key, text) for image, text in pairs)
        return np.zeros(len(pairs), np.float32)

    scenes_match(random_unit(1), odds, 0.05, scenes)
    assert len(set(asked)) == len(asked)
    images = [image for image, _ in asked]
    assert len(set(images)) == 1 + sum(a != b for a, b in itertools.pairwise(images))
