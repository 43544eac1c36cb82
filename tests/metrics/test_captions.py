"""CIDEr-D and BLEU against numbers that a person can work out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cafe.errors import DataError
from cafe.metrics import bleu_columns, bleu_summary, caption_words, cider_d


def bleu(candidates: list[str], references: list[list[str]]) -> dict[str, float]:
    columns = bleu_columns(
        [text.split() for text in candidates],
        [[text.split() for text in own] for own in references],
    )
    sums = {name: column.sum(axis=0) for name, column in columns.items()}
    return {name: float(value) for name, value in bleu_summary(sums).items()}


def cider(candidates: list[str], references: list[list[str]]) -> np.ndarray:
    return cider_d(
        [text.split() for text in candidates],
        [[text.split() for text in own] for own in references],
    )


def test_words_are_lower_case_without_punctuation_and_clitics_stand_apart():
    assert caption_words("A dog's ball, isn't it?") == ["a", "dog", "'s", "ball", "is", "n't", "it"]
    assert caption_words("T-shirt; 3.5 metres “high”.") == ["t-shirt", "3.5", "metres", "high"]
    assert caption_words(" ... ") == []


def test_bleu_clips_repetitions_and_takes_the_nearest_length():
    # The papers' example: seven times "the" against references with two and one.
    found = bleu(["the the the the the the the"], [["the cat is on the mat", "there is a cat"]])
    assert found["bleu1"] == pytest.approx(2 / 7)  # longer than the nearest reference, no penalty
    assert found["bleu2"] == 0
    # 3 of 3 words and 2 of 2 pairs, one word short of 4: exp(1 - 4/3).
    found = bleu(["a b c"], [["a b c d", "x y z v w u"]])
    assert found["bleu1"] == pytest.approx(math.exp(-1 / 3))
    assert found["bleu2"] == pytest.approx(math.exp(-1 / 3))
    assert found["bleu4"] == 0  # no run of four words


def test_bleu_counts_over_all_images_before_it_divides():
    # 4/4 and 0/4 words, 3/3 and 0/3 pairs: precision 1/2 each.
    found = bleu(["a b c d", "q r s t"], [["a b c d"], ["v w x y"]])
    assert found == {f"bleu{n}": pytest.approx(0.5) for n in (1, 2, 3, 4)}


def test_an_empty_caption_scores_nothing_and_breaks_nothing():
    assert bleu(["", "a b c d"], [["a b"], ["a b c d"]])["bleu1"] == pytest.approx(
        math.exp(1 - 6 / 4)
    )
    assert bleu([""], [["a b"]])["bleu4"] == 0
    assert cider(["", "a b c d e"], [["u v w x y"], ["a b c d e"]]).tolist() == [0, 10]


def test_a_caption_that_is_its_only_reference_scores_ten():
    found = cider(["a b c d e", "p q r s t"], [["a b c d e"], ["p q r s t"]])
    np.testing.assert_allclose(found, [10, 10])


def test_words_that_every_image_has_weigh_nothing():
    # "a" is in both images' references: log(2/2) = 0. Of the four lengths only that of one
    # word has anything in common; there the whole weight is on "cat": cosine 1.
    found = cider(["a cat", "a dog"], [["a big cat"], ["a dog"]])
    penalty = math.exp(-1 / 72)
    norm = math.sqrt(2)  # "big" and "cat" weigh alike
    assert found[0] == pytest.approx(10 * penalty * (1 / norm) / 4)
    # A pair of words besides: 2 of the 4 lengths agree fully.
    assert found[1] == pytest.approx(10 * 2 / 4)


def test_repeating_a_word_is_clipped_to_the_reference():
    # All runs are in one of two images, so they weigh alike, w. Words: cat 3w, u w against
    # cat w, u w: with 3w clipped to w the product is 2w², the norms √10 w and √2 w. Pairs: "cat
    # cat" 2w, "cat u" w against "cat u" w: w² of √5 w and w. Two words longer: exp(-4/72).
    found = cider(["cat cat cat u", "q"], [["cat u"], ["w"]])[0]
    assert found == pytest.approx(
        10 * math.exp(-4 / 72) * (2 / math.sqrt(20) + 1 / math.sqrt(5)) / 4
    )


def test_several_references_are_averaged_and_order_means_nothing():
    references = [["a b c d e", "f g h i j"], ["k l m n o"]]
    found = cider(["a b c d e", "k l m n o"], references)
    assert found[0] == pytest.approx(5)
    swapped = cider(["k l m n o", "a b c d e"], [references[1], references[0][::-1]])
    np.testing.assert_allclose(swapped, found[::-1])


def test_bad_input_is_told():
    with pytest.raises(DataError, match="image 1 has no reference"):
        cider(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="2 captions for 1 images"):
        bleu(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="0 captions"):
        cider_d([], [])
