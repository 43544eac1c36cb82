"""The published scaling by processes, in the numbers that it had there."""

from __future__ import annotations

import math

import pytest
import torch

from cafe.objective import contrastive_share, joint_loss, language_count
from cafe.recipes import Objective
from cafe.training.contrastive import ContrastiveBatch, ContrastiveLoss


@pytest.mark.parametrize(("ranks", "share"), [(1, 1.0), (4, 0.25), (8, 0.125), (64, 0.015625)])
def test_the_contrastive_gradient_is_divided_by_the_ranks(ranks: int, share: float) -> None:
    assert contrastive_share("official", ranks) == share
    assert contrastive_share("none", ranks) == 1.0


def test_the_language_loss_is_the_mean_of_the_ranks_means() -> None:
    """Ranks with 10 and 30 labels of 2.0 and 4.0 nats each: (2 + 4) / 2, not 140 / 40."""
    sums, counts = [20.0, 120.0], [10, 30]

    def averaged(compat: str) -> float:
        losses = []
        for nll, own in zip(sums, counts, strict=True):
            count = language_count(compat, own, sum(counts), len(counts))  # type: ignore[arg-type]
            loss = joint_loss(
                None, torch.tensor(nll), count, contrastive_weight=1.0, language_weight=1.0
            )
            losses.append(float(loss) * len(counts))  # the step's factor, against the average
        return sum(losses) / len(losses)

    assert averaged("official") == pytest.approx(3.0)
    assert averaged("none") == pytest.approx(3.5)


def sides(ids: list[int]) -> ContrastiveBatch:
    ones, each = torch.ones(len(ids), 4), torch.arange(len(ids))
    none, no_ids = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    return ContrastiveBatch(ones, ones, none, torch.tensor(ids), no_ids, each, each + 100)


def test_equal_targets_are_negatives_of_each_other_there() -> None:
    """All cosines are 1: ln 3 when all three compete, ln 2 and 0 when equal ids do not."""
    ids = [7, 7, 9]
    official = ContrastiveLoss(Objective(compat="official"))(sides(ids))
    assert float(official) == pytest.approx(math.log(3), abs=1e-6)
    masked = ContrastiveLoss(Objective())(sides(ids))
    assert float(masked) == pytest.approx((2 * math.log(2) + math.log(3)) / 3, abs=1e-6)


def test_two_pairs_at_the_published_scale() -> None:
    """Cosines 1 and 0.9 against 0.9 and 1, scale 20: ln(1 + e^-2) in both directions."""
    angle = math.acos(0.9)
    rows = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
    none = torch.zeros(0, 2)
    ids, no_ids = torch.tensor([1, 2]), torch.zeros(0, dtype=torch.long)
    batch = ContrastiveBatch(rows, rows, none, ids, no_ids, ids + 10, ids)
    loss = ContrastiveLoss(Objective(compat="official"))(batch)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-5)
