"""POPE, CHAIR, THRONE and object F1 on written examples whose numbers a person can check."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.errors import DataError
from cafe.metrics import (
    ABSENT,
    DISQUALIFIED,
    PRESENT,
    chair_columns,
    judge_says_yes,
    object_columns,
    parse_yes_no,
    pope_columns,
    throne_columns,
    throne_verdicts,
)
from helpers.metric_reference import chair_scores, object_f1, pope_scores, throne_scores


def quotients(columns: dict[str, np.ndarray], parts: dict[str, tuple[str, str]]) -> dict:
    """Sums of one column over those of another; a fraction of nothing is 0."""
    sums = {name: int(column.sum()) for name, column in columns.items()}
    return {
        name: sums[part] / sums[whole] if sums[whole] else 0.0
        for name, (part, whole) in parts.items()
    }


# --- POPE -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "yes"),
    [
        ("Yes", True),
        ("yes, there is a dog.", True),
        ("No", False),
        ("No, there is no dog in the image.", False),
        ("no.", False),
        ("There is not a dog", False),
        ("I see a cat, not, a dog", False),
        # What the official rule does with the rest, sensible or not:
        ("", True),
        ("A red bus.", True),
        ("NO", True),
        ("Not that I can see", True),
        ("no\nthere is none", True),
        ("None", True),
        ("Yes. No.", True),
        ("Nothing. There is no dog.", True),
    ],
)
def test_replies_are_read_by_the_official_rule(reply: str, yes: bool) -> None:
    assert parse_yes_no(reply) is yes


def test_pope_by_hand() -> None:
    #          3 hits            1 missed  2 false alarms  4 rejected
    labels = [True, True, True, True, False, False, False, False, False, False]
    answers = [True, True, True, False, True, True, False, False, False, False]
    assert pope_scores(np.array(answers), np.array(labels)) == {
        "accuracy": 7 / 10,
        "precision": 3 / 5,
        "recall": 3 / 4,
        "f1": pytest.approx(2 / (5 / 3 + 4 / 3)),  # the harmonic mean of 3/5 and 3/4
        "yes_ratio": 5 / 10,
    }


def test_who_always_says_yes_has_half_the_accuracy_and_all_the_recall() -> None:
    labels = [True, False] * 50
    always = pope_scores([True] * 100, labels)
    never = pope_scores([False] * 100, labels)
    assert always == {
        "accuracy": 0.5,
        "precision": 0.5,
        "recall": 1.0,
        "f1": pytest.approx(2 / 3),
        "yes_ratio": 1.0,
    }
    assert never == {
        "accuracy": 0.5, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0,
    }  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_f1_is_the_harmonic_mean_and_order_is_nothing(pairs: list[tuple[bool, bool]]) -> None:
    scores = pope_scores(*zip(*pairs, strict=True))
    p, r = scores["precision"], scores["recall"]
    assert scores["f1"] == pytest.approx(2 * p * r / (p + r) if p + r else 0.0)
    assert scores == pope_scores(*zip(*reversed(pairs), strict=True))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), min_size=1, max_size=20)
)
def test_pope_from_counts_per_image_is_pope(asked: list[tuple[int, bool, bool]]) -> None:
    images, predicted, labels = zip(*asked, strict=True)
    columns = pope_columns(np.array(images), predicted, labels, 4)
    parts = {
        "accuracy": ("right", "asked"),
        "precision": ("hits", "yes"),
        "recall": ("hits", "there"),
        "f1": ("hits_twice", "yes_and_there"),
        "yes_ratio": ("yes", "asked"),
    }
    assert quotients(columns, parts) == pope_scores(predicted, labels)
    assert columns["asked"].tolist() == [images.count(i) for i in range(4)]


def test_words_are_no_labels() -> None:
    both = np.array([0, 1])
    with pytest.raises(ValueError, match="labels is <U3; it must be booleans"):
        pope_columns(both, np.array([True, True]), np.array(["yes", "no"]), 2)
    with pytest.raises(ValueError, match="predicted is int64"):
        pope_columns(both, np.array([1, 0]), np.array([True, True]), 2)
    with pytest.raises(ValueError, match="2 answers and 1 labels"):
        pope_columns(both, [True, True], [True], 2)


# --- CHAIR and object F1 ----------------------------------------------------------------------

# "A dog and another dog chase a cat past a bench."   image: dog, cat
# "A man on a bench beside a dog."                    image: person, bench, bicycle
# "A blue sky."                                       image: kite
MENTIONED = [["dog", "dog", "cat", "bench"], ["person", "bench", "dog"], []]
PRESENT_OBJECTS = [{"dog", "cat"}, {"person", "bench", "bicycle"}, {"kite"}]
LENGTHS = [10, 8, 3]


def test_chair_on_a_written_example() -> None:
    assert chair_scores(MENTIONED, PRESENT_OBJECTS, lengths_words=LENGTHS) == {
        "chair_i": 2 / 7,  # bench; dog, among seven mentions
        "chair_s": 2 / 3,
        "recall": 4 / 6,  # dog, cat; person, bench, of six
        "mean_mentions": 7 / 3,
        "mean_length_words": 21 / 3,
    }


def test_a_repeated_invention_counts_again_in_chair_i_only() -> None:
    once = chair_scores([["dog", "cat"]], [{"dog"}])
    thrice = chair_scores([["dog", "cat", "cat", "cat"]], [{"dog"}])
    assert (once["chair_i"], thrice["chair_i"]) == (1 / 2, 3 / 4)
    assert once["chair_s"] == thrice["chair_s"] == 1.0


def test_silence_invents_nothing_and_finds_nothing() -> None:
    scores = chair_scores([[], []], [{"dog"}, set()])
    assert scores == {"chair_i": 0.0, "chair_s": 0.0, "recall": 0.0, "mean_mentions": 0.0}


def test_object_f1_on_the_same_example() -> None:
    # named {dog, cat, bench}, {person, bench, dog}: 6, of which 4 are there; there are 6
    expected = {"precision": 4 / 6, "recall": 4 / 6, "f1": 4 / 6}
    assert object_f1(MENTIONED, PRESENT_OBJECTS) == expected
    one_sided = object_f1([{"dog", "cat", "bus"}], [{"dog"}])
    assert one_sided == {"precision": 1 / 3, "recall": 1.0, "f1": 0.5}


def test_counts_are_summed_over_images_before_dividing() -> None:
    scores = object_f1([{"a"}, {"b", "c", "d"}], [{"a"}, {"x"}])
    assert scores["precision"] == 1 / 4  # the mean of the two precisions would be 1/2
    assert scores["recall"] == 1 / 2


THINGS = st.sampled_from(["dog", "cat", "bus", "kite"])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(THINGS, max_size=6), st.sets(THINGS), st.integers(0, 9)), min_size=1
    )
)
def test_chair_and_object_f1_from_counts_per_image_are_themselves(captions: list) -> None:
    mentioned, present, lengths = zip(*captions, strict=True)
    columns = chair_columns(mentioned, present, lengths)
    columns["captions"] = np.ones(len(captions), dtype=int)
    parts = {
        "chair_i": ("invented", "mentions"),
        "chair_s": ("any_invented", "captions"),
        "recall": ("found", "there"),
        "mean_mentions": ("mentions", "captions"),
        "mean_length_words": ("words", "captions"),
    }
    expected = chair_scores(mentioned, present, lengths_words=lengths)
    assert quotients(columns, parts) == expected
    parts = {
        "precision": ("objects_right", "objects_named"),
        "recall": ("objects_right", "objects_shown"),
        "f1": ("objects_right_twice", "objects_named_and_shown"),
    }
    found = quotients(object_columns(mentioned, present), parts)
    assert found == object_f1(mentioned, present)


def test_bad_collections_are_one_clear_error() -> None:
    with pytest.raises(ValueError, match="entry 1 is the string 'dog'"):
        object_columns([{"dog"}, "dog"], [{"dog"}, {"dog"}])
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        chair_columns([["dog"]], [{"dog"}, {"dog"}], [1])
    with pytest.raises(ValueError, match="0 captions"):
        object_columns([], [])
    with pytest.raises(ValueError, match="2 lengths for 1 captions"):
        chair_columns([["dog"]], [{"dog"}], [3, 4])


# --- THRONE -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "yes"),
    [
        ("yes", True),
        (" Yes\n", True),
        ("YES", True),
        ("yes.", False),
        ("Yes, it is", False),
        ("no", False),
        ("", False),
        ("perhaps", False),
    ],
)
def test_a_judge_says_yes_by_that_word_alone(reply: str, yes: bool) -> None:
    assert judge_says_yes(reply) is yes


def test_only_a_unanimous_vote_is_a_verdict() -> None:
    verdicts = throne_verdicts(np.array([[0, 1, 5, 8, 9]]))
    assert verdicts.tolist() == [[ABSENT, DISQUALIFIED, DISQUALIFIED, DISQUALIFIED, PRESENT]]
    assert throne_verdicts(np.array([[0, 1]]), votes=1).tolist() == [[ABSENT, PRESENT]]


# Classes: dog, cat, bus, kite.     +: said    .: not said    ?: the judges differ
#
#   image 1   votes  9 9 0 4      said dog, cat         there: dog, bus, (kite)
#               P = 1/2, R = 1/2 (kite is taken out)      F1 = 1/2    F0.5 = 1/2
#   image 2   votes  0 9 9 9      said cat, bus, kite   there: cat
#               P = 1/3, R = 1                            F1 = 1/2    F0.5 = 5/13
#   image 3   votes  0 0 0 0      said nothing          there: dog
#               P = 0, R = 0                              F drops out
#
#   class       hits said there    P    R    F1    F0.5
#   dog          1    1    2       1   1/2   2/3   5/6
#   cat          1    2    1      1/2   1    2/3   5/9
#   bus          0    1    1       0    0    drops out
#   kite         0    1    0       0   none  drops out
SCRIPTED_VOTES = np.array([[9, 9, 0, 4], [0, 9, 9, 9], [0, 0, 0, 0]])
TRUTH = np.array([[1, 0, 1, 1], [0, 1, 0, 0], [1, 0, 0, 0]], dtype=bool)


def f(precision: float, recall: float, beta: float) -> float:
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def test_throne_with_scripted_votes() -> None:
    overall = (1 / 2 + 1 / 3 + 0) / 3, (1 / 2 + 1 + 0) / 3
    classwise = (1 + 1 / 2 + 0 + 0) / 4, (1 / 2 + 1 + 0) / 3
    assert throne_scores(SCRIPTED_VOTES, TRUTH) == pytest.approx(
        {
            "overall_precision": overall[0],
            "overall_recall": overall[1],
            "overall_f1": f(*overall, 1),
            "overall_mean_f1": (1 / 2 + 1 / 2) / 2,
            "overall_f0.5": f(*overall, 0.5),
            "overall_mean_f0.5": (1 / 2 + 5 / 13) / 2,
            "classwise_precision": classwise[0],
            "classwise_recall": classwise[1],
            "classwise_f1": f(*classwise, 1),
            "classwise_mean_f1": 2 / 3,
            "classwise_f0.5": f(*classwise, 0.5),
            "classwise_mean_f0.5": (5 / 6 + 5 / 9) / 2,
            "disqualified": 1 / 12,
        }
    )


def test_the_two_ways_to_f_differ_as_in_the_published_table() -> None:
    """The averaged F is higher, because what is all wrong drops out of it."""
    scores = throne_scores(SCRIPTED_VOTES, TRUTH)
    for name in ("overall", "classwise"):
        assert scores[f"{name}_mean_f1"] > scores[f"{name}_f1"] + 0.05


def test_a_disputed_class_counts_for_nothing() -> None:
    votes, truth = np.array([[9, 3], [0, 9]]), np.array([[True, True], [False, True]])
    flipped = truth.copy()
    flipped[0, 1] = False
    assert throne_scores(votes, truth) == throne_scores(votes, flipped)
    settled = np.array([[9, 9], [0, 9]])
    assert throne_scores(settled, truth) != throne_scores(settled, flipped)


def test_a_perfect_describer_scores_one_and_a_silent_one_nothing() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((20, 6)) < 0.5
    truth[:, 0] = True
    perfect = throne_scores(truth * 9, truth)
    assert perfect.pop("disqualified") == 0.0
    assert set(perfect.values()) == {1.0}
    assert set(throne_scores(np.zeros((20, 6), dtype=int), truth).values()) == {0.0}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_images_and_classes_is_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    votes, truth = rng.choice([0, 0, 3, 9, 9], (6, 4)), rng.random((6, 4)) < 0.5
    row, column = rng.permutation(6), rng.permutation(4)
    moved = throne_scores(votes[row][:, column], truth[row][:, column])
    assert moved == pytest.approx(throne_scores(votes, truth))
    assert all(0 <= value <= 1 for value in moved.values())


def test_bad_votes_are_one_clear_error() -> None:
    truth = np.ones((1, 2), dtype=bool)
    with pytest.raises(DataError, match=r"range over 0 \.\. 10; expected 0 \.\. 9"):
        throne_columns(np.array([[0, 10]]), truth)
    with pytest.raises(DataError, match="range over -1"):
        throne_columns(np.array([[-1, 9]]), truth)
    with pytest.raises(ValueError, match=r"must both be \[n, c\]"):
        throne_columns(np.array([[9, 9, 9]]), truth)
    with pytest.raises(ValueError, match="present is int64"):
        throne_columns(np.array([[9, 9]]), np.array([[1, 0]]))
    with pytest.raises(ValueError, match="at least one judge"):
        throne_verdicts(np.array([[0]]), votes=0)
