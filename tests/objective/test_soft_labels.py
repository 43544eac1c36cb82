"""Soft labels against closed forms, torch's KL divergence and Sentence Transformers' loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cafe.objective import soft_label_loss

RANDOM = torch.Generator().manual_seed(0)
EMBEDDINGS = torch.randn(9, 6, generator=RANDOM, dtype=torch.float64)
CELLS = torch.tensor([[0, 3], [1, 4], [0, 5], [2, 6], [1, 0], [0, 4], [1, 7], [8, 2]])
SCORES = torch.tensor([2.0, -1.0, 0.5, 3.0, 0.2, -4.0, 9.0, 1.0], dtype=torch.float64)


def angles(*degrees: float) -> Tensor:
    return torch.tensor(
        [[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees],
        dtype=torch.float64,
    )


def by_loops(embeddings: Tensor, temperature: float | Tensor, teacher: float) -> Tensor:
    losses = []
    for anchor in range(len(embeddings)):
        own = [i for i, (a, _) in enumerate(CELLS.tolist()) if a == anchor]
        if len(own) < 2:
            continue
        near = [
            functional.cosine_similarity(embeddings[anchor], embeddings[CELLS[i, 1]], dim=0)
            for i in own
        ]
        student = torch.log_softmax(torch.stack(near) / temperature, 0)
        target = torch.softmax(SCORES[own] / teacher, 0)
        losses.append(functional.kl_div(student, target, reduction="sum"))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("temperature", "teacher"), [(0.05, 1.0), (0.3, 0.2), (1.0, 4.0)])
def test_values_and_gradients_are_those_of_torchs_divergence(
    temperature: float, teacher: float
) -> None:
    ours, theirs = (EMBEDDINGS.clone().requires_grad_() for _ in range(2))
    learned = [torch.tensor(temperature, dtype=torch.float64, requires_grad=True) for _ in "ab"]
    found = soft_label_loss(
        ours, CELLS, SCORES, temperature=learned[0], teacher_temperature=teacher
    )
    expected = by_loops(theirs, learned[1], teacher)
    assert expected > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(learned[0].grad, learned[1].grad, rtol=1e-10, atol=1e-12)
    assert ours.grad is not None
    assert (ours.grad.norm(dim=1) > 0).tolist() == [True] * 2 + [False] + [True] * 3 + [
        False, True, False,
    ]  # fmt: skip


def test_it_is_sentence_transformers_loss_without_its_scale() -> None:
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
    from sentence_transformers.util import pairwise_cos_sim

    columns = [torch.randn(4, 6, generator=RANDOM, dtype=torch.float64) for _ in range(4)]
    scores = torch.randn(4, 3, generator=RANDOM, dtype=torch.float64)
    theirs = DistillKLDivLoss(
        None,  # type: ignore[arg-type]
        similarity_fct=pairwise_cos_sim,
        student_temperature=0.2,
        teacher_temperature=0.7,
    ).compute_loss_from_embeddings(columns, scores)
    cells = torch.tensor([[i, 4 * (1 + j) + i] for i in range(4) for j in range(3)])
    ours = soft_label_loss(
        torch.cat(columns), cells, scores.flatten(), temperature=0.2, teacher_temperature=0.7
    )
    torch.testing.assert_close(0.2**2 * ours, theirs, rtol=1e-12, atol=0)


def test_closed_forms() -> None:
    """Candidates at 60 and 90 degrees, cosines 1/2 and 0: odds of exp(1/2T)."""
    embeddings, cells = angles(0, 60, 90) * 7, torch.tensor([[0, 1], [0, 2]])
    agreeing = torch.tensor([0.5, 0.0]) / 0.25 + 3
    assert soft_label_loss(embeddings, cells, agreeing, temperature=0.25) < 1e-14
    undecided = soft_label_loss(embeddings, cells, torch.zeros(2), temperature=0.5)
    q = math.exp(1) / (1 + math.exp(1))
    assert float(undecided) == pytest.approx(-math.log(4 * q * (1 - q)) / 2)
    certain = soft_label_loss(embeddings, cells, torch.tensor([1e4, -1e4]), temperature=0.5)
    assert float(certain) == pytest.approx(-math.log(q))


def test_nothing_to_compare_is_zero_with_zero_gradient() -> None:
    embeddings = EMBEDDINGS.clone().requires_grad_()
    for cells in (torch.zeros(0, 2, dtype=torch.long), torch.tensor([[0, 1], [1, 2]])):
        loss = soft_label_loss(embeddings, cells, torch.ones(len(cells)), temperature=0.1)
        loss.backward()
        assert float(loss.detach()) == 0
    assert embeddings.grad is not None
    assert not embeddings.grad.any()


def test_widths_are_averaged_and_bfloat16_is_not_rounded() -> None:
    narrow = [soft_label_loss(EMBEDDINGS[:, :w], CELLS, SCORES, temperature=0.2) for w in (2, 6)]
    both = soft_label_loss(EMBEDDINGS, CELLS, SCORES, temperature=0.2, dims=[2, 6])
    torch.testing.assert_close(both, sum(narrow) / 2)
    half = EMBEDDINGS.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = soft_label_loss(half, CELLS, SCORES, temperature=0.05)
    assert found.dtype == torch.float32
    expected = soft_label_loss(half.double(), CELLS, SCORES, temperature=0.05)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_the_order_of_cells_means_nothing() -> None:
    order = torch.randperm(len(CELLS), generator=RANDOM)
    a = soft_label_loss(EMBEDDINGS, CELLS, SCORES, temperature=0.1)
    b = soft_label_loss(EMBEDDINGS, CELLS[order], SCORES[order], temperature=0.1)
    torch.testing.assert_close(a, b)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="as many as scores"):
        soft_label_loss(EMBEDDINGS, CELLS, SCORES[:2], temperature=0.1)
    with pytest.raises(ValueError, match="teacher_temperature is 0"):
        soft_label_loss(EMBEDDINGS, CELLS, SCORES, temperature=0.1, teacher_temperature=0)
