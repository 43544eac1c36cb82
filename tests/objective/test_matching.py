"""The match objective against closed forms: who is wrong, who is hardest, and the loss."""

from __future__ import annotations

import math

import pytest
import torch

from cafe.objective import hardest_wrong, known_right, log_odds, match_loss

X, O = True, False  # noqa: E741


def test_every_caption_of_an_image_is_right_for_it():
    """Images 1, 2; texts 10, 11 of image 1, 12 of image 2, and 13, a hard negative's."""
    right = known_right(
        torch.tensor([1, 1, 2]),
        torch.tensor([10, 11, 12, 13]),
        pair_images=torch.tensor([1, 1, 2]),
        pair_texts=torch.tensor([10, 11, 12]),
        pair_groups=torch.tensor([10, 11, 12]),
    )
    assert right.tolist() == [[X, X, O, O], [X, X, O, O], [O, O, X, O]]


def test_pairs_of_one_group_are_right_for_one_another():
    """Two photographs of one product share a target id, and so do their texts."""
    right = known_right(
        torch.tensor([1, 2, 3]),
        torch.tensor([10, 20, 30]),
        pair_images=torch.tensor([1, 2, 3]),
        pair_texts=torch.tensor([10, 20, 30]),
        pair_groups=torch.tensor([7, 7, 8]),
    )
    assert right.tolist() == [[X, X, O], [X, X, O], [O, O, X]]


def test_a_text_of_two_images_is_right_for_both():
    right = known_right(
        torch.tensor([1, 2]),
        torch.tensor([10, 10]),
        pair_images=torch.tensor([1, 2]),
        pair_texts=torch.tensor([10, 10]),
        pair_groups=torch.tensor([10, 10]),
    )
    assert right.all()


def angles(*degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def test_the_hardest_are_the_nearest_wrong_ones():
    """Images at 0, 40, 90 degrees; texts at 10, 55, 95, and a hard negative's at 5."""
    images, texts = angles(0, 40, 90) * 3, angles(10, 55, 95, 5)
    right = torch.eye(3, 4, dtype=torch.bool)
    # image 0: text 3 (5 degrees away); image 1: text 0 (30); image 2: text 1 (35)
    # text 0: image 1 (30); text 1: image 2 (35); text 2: image 1 (55); text 3 has no turn
    expected = [[0, 3], [1, 0], [1, 2], [2, 1]]
    assert hardest_wrong(images, texts, right, (3, 3)).tolist() == expected


def test_right_partners_are_never_chosen_however_near():
    images, texts = angles(0, 90), angles(1, 91)
    everything = torch.ones(2, 2, dtype=torch.bool)
    assert hardest_wrong(images, texts, everything, (2, 2)).tolist() == []
    assert hardest_wrong(images, texts, torch.eye(2, dtype=torch.bool), (2, 2)).tolist() == [
        [0, 1],
        [1, 0],
    ]


def test_a_popular_image_is_asked_about_its_nearest_texts_only():
    """All five texts like image 0 best (their own image is at 180 degrees); two may have it."""
    images = angles(0, 180, 181, 182, 183, 184)
    texts = angles(0, 50, 10, 40, 30, 20)
    wrong = hardest_wrong(images, texts, torch.eye(6, dtype=torch.bool), (6, 6), 2).tolist()
    assert [t for i, t in wrong if i == 0] == [2, 5]


def test_no_images_or_no_texts():
    none = torch.zeros(0, 2)
    assert hardest_wrong(none, none, torch.zeros(0, 0, dtype=torch.bool), (0, 0)).shape == (0, 2)


def test_log_odds_are_those_of_the_whole_softmax():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    head = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    bias = torch.randn(20, generator=generator, dtype=torch.float64)
    p = (states @ head.T + bias).softmax(-1)
    expected = (p[:, [3, 4]].sum(1) / p[:, [9]].sum(1)).log()
    found = log_odds(states, head[[3, 4]], head[[9]], biases=(bias[[3, 4]], bias[[9]]))
    torch.testing.assert_close(found, expected)
    capped = log_odds(states, head[[3]], head[[9]], softcap=2.0)
    raw = states @ head[[3, 9]].T
    torch.testing.assert_close(capped, 2 * ((raw[:, 0] / 2).tanh() - (raw[:, 1] / 2).tanh()))


def test_log_odds_are_not_rounded_to_bfloat16():
    states, rows = torch.full((4, 2), 3.0), torch.tensor([[3.0, 1.0], [3.001, 1.0]])
    states = states.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = log_odds(states, rows[1:], rows[:1])
    torch.testing.assert_close(found, torch.full((4,), 0.003), rtol=1e-2, atol=0)


def test_right_and_wrong_questions_weigh_the_same():
    """Odds of 3 to 1 on the right one, even odds on two wrong ones: (ln 4/3 + ln 2) / 2."""
    odds = torch.tensor([math.log(3), 0.0, 0.0])
    right = torch.tensor([X, O, O])
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert float(match_loss(odds, right, (1, 2))) == pytest.approx(expected)
    parts = match_loss(odds[:2], right[:2], (1, 2)) + match_loss(odds[2:], right[2:], (1, 2))
    assert float(parts) == pytest.approx(expected), "chunks add up"


def test_without_wrong_questions_nothing_is_learned():
    odds = torch.tensor([1.0], requires_grad=True)
    loss = match_loss(odds, torch.tensor([X]), (1, 0))
    loss.backward()
    assert float(loss.detach()) == float(odds.grad) == 0.0


def test_equal_images_and_texts_tie_and_the_first_is_chosen():
    """Image 2 is image 0 again, and text 3 is text 1, a rounding error nearer."""
    images, texts = angles(0, 90, 0.001), angles(91, 45, 1, 45.001)
    right = torch.zeros(3, 4, dtype=torch.bool)
    ids = torch.tensor([5, 8, 5]), torch.tensor([4, 9, 3, 9])
    every = hardest_wrong(images, texts, right, (3, 4)).tolist()
    assert {(2, 2), (1, 3)} <= {*map(tuple, every)}
    found = {*map(tuple, hardest_wrong(images, texts, right, (3, 4), ids=ids).tolist())}
    assert {(0, 2), (0, 1)} <= found
    assert (2, 1) not in found
