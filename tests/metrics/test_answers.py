"""Short answers: what counts as the same, and the two accuracies built on it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.errors import DataError
from cafe.metrics import (
    CALIBRATION_BINS,
    answer_accuracy,
    calibration_columns,
    calibration_summary,
    consensus_accuracy,
    normalise_answer,
)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("Red", "red"),
        ("  a\tred \n mug. ", "red mug"),
        ("The T-shirt!", "t shirt"),
        ("don't", "dont"),
        ("dont", "dont"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("p.m.", "pm"),
        ("two, a red one", "2 red 1"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("10:30", "10:30"),
        ("50%", "50%"),
        ("yes/no", "yes no"),
        ("A", "a"),  # a choice, not an article
        ("the", "the"),
        ("", ""),
        ("...", ""),
    ],
)
def test_forms_by_hand(text: str, form: str) -> None:
    assert normalise_answer(text) == form


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="aAbtwoenhT 019.,'-!?", max_size=12))
def test_a_form_is_in_lower_case_with_single_spaces(text: str) -> None:
    form = normalise_answer(text)
    assert form == form.lower()
    assert form == " ".join(form.split())
    assert form == normalise_answer(text.upper()) == normalise_answer(f" {text}\n")


def test_one_of_several_accepted_answers_is_enough() -> None:
    accepted = [["couch", "sofa"], ["2"], ["red"], ["red"], ["red"]]
    given_ = ["A sofa.", "two", "blue", "", "it is red"]
    assert answer_accuracy(given_, accepted).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_consensus_of_ten_people(matches: int, accuracy: float) -> None:
    people = ["Red."] * matches + [f"colour {i}" for i in range(10 - matches)]
    assert consensus_accuracy(["red"], [people])[0] == pytest.approx(accuracy)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["red", "blue", "green"]), min_size=2, max_size=10))
def test_consensus_equals_its_definition(people: list[str]) -> None:
    subsets = itertools.combinations(people, len(people) - 1)
    expected = np.mean([min(1.0, subset.count("red") / 3) for subset in subsets])
    assert consensus_accuracy(["red"], [people])[0] == pytest.approx(expected)


def test_bad_answers_are_one_clear_error() -> None:
    for accuracy in (answer_accuracy, consensus_accuracy):
        with pytest.raises(DataError, match="question 1 has no answer"):
            accuracy(["a", "b"], [["a", "a"], []])
        with pytest.raises(DataError, match="question 0 has no answer, or an empty one"):
            accuracy([""], [["red", " . "]])
        with pytest.raises(ValueError, match="1 predictions for 2 questions"):
            accuracy(["a"], [["a", "a"], ["b", "b"]])
        with pytest.raises(ValueError, match="question 0 are one string"):
            accuracy(["r"], ["red"])
    with pytest.raises(DataError, match="question 0 has 1 answer"):
        consensus_accuracy(["red"], [["red"]])


# ---------------------------------------------------------------------- calibration


def test_calibration_error_by_hand():
    """Two statements at P = 3/4, of which one is true: |0.75 - 0.5| = 0.25 of both; two at 0.25."""
    odds = np.log(3.0) * np.array([[1, 1], [-1, -1]])
    right = np.array([[True, False], [False, False]])
    columns = calibration_columns(odds, right)
    assert columns.shape == (2, CALIBRATION_BINS)
    sums = {"calibration": columns.sum(axis=0), "judged": np.array(4)}
    assert calibration_summary(sums)["match_ece"] == pytest.approx((2 * 0.25 + 2 * 0.25) / 4)


def test_errors_of_one_bin_cancel_and_of_two_do_not():
    certain = calibration_columns(np.array([[0.0, 0.0]]), np.array([[True, False]]))
    assert calibration_summary({"calibration": certain[0], "judged": np.array(2)}) == {
        "match_ece": 0.0
    }
    wrong = calibration_columns(np.array([[50.0, -50.0]]), np.array([[False, True]]))
    found = calibration_summary({"calibration": wrong[0], "judged": np.array(2)})
    assert found["match_ece"] == pytest.approx(1.0)
