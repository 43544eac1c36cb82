"""The sigmoid loss and the learned temperature against closed forms and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from cafe.objective.contrastive import clamped_temperature, info_nce, sigmoid_loss


def normal(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


# --- the sigmoid loss -------------------------------------------------------------------------


def test_sigmoid_loss_at_zero_scores_is_n_log_2() -> None:
    sides = torch.eye(8, dtype=torch.float64)
    query, target, negatives = sides[:3], sides[3:6], sides[6:]
    loss = sigmoid_loss(query, target, temperature=0.1, bias=0.0)
    assert loss.item() == pytest.approx(3 * math.log(2))
    more = sigmoid_loss(query, target, negatives=negatives, temperature=0.1, bias=0.0)
    assert more.item() == pytest.approx(5 * math.log(2))
    ids, negative_ids = torch.zeros(3, dtype=torch.long), torch.tensor([0, 1])
    masked = sigmoid_loss(
        query,
        target,
        negatives=negatives,
        target_ids=ids,
        negative_ids=negative_ids,
        temperature=0.1,
        bias=0.0,
    )
    assert masked.item() == pytest.approx(2 * math.log(2))  # the positive and one true negative


def test_sigmoid_loss_equals_its_definition() -> None:
    query, target, ids = normal(4, 3, seed=1), normal(4, 3, seed=2), [5, 6, 5, 7]
    total = 0.0
    for i in range(4):
        for j in range(4):
            if i != j and ids[i] == ids[j]:
                continue
            logit = functional.cosine_similarity(query[i], target[j], dim=0).item() / 0.2 - 1.5
            total += math.log1p(math.exp(-logit if i == j else logit))
    loss = sigmoid_loss(query, target, temperature=0.2, bias=-1.5, target_ids=torch.tensor(ids))
    assert loss.item() == pytest.approx(total / 4)
    unmasked = sigmoid_loss(query, target, temperature=0.2, bias=-1.5)
    assert unmasked.item() > loss.item() + 1e-3


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0.1, 1.0))
def test_batch_order_sides_and_common_scale_do_not_matter(seed: int, n: int, factor: float) -> None:
    query, target, ids = normal(n, 3, seed=seed), normal(n, 3, seed=seed + 1), torch.arange(n) // 2
    loss = sigmoid_loss(query, target, temperature=0.1, bias=-2.0, target_ids=ids)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shuffled = sigmoid_loss(
        query[order], target[order], temperature=0.1, bias=-2.0, target_ids=ids[order]
    )
    torch.testing.assert_close(shuffled, loss)
    swapped = sigmoid_loss(target, query, temperature=0.1, bias=-2.0, target_ids=ids)
    torch.testing.assert_close(swapped, loss)
    # one more coordinate that targets do not have scales every cosine of the query by `factor`
    tail = torch.full((n, 1), math.sqrt(1 - factor**2), dtype=torch.float64)
    scaled = torch.cat([factor * functional.normalize(query, dim=1), tail], dim=1)
    padded = torch.cat([target, torch.zeros_like(tail)], dim=1)
    both = sigmoid_loss(scaled, padded, temperature=0.1 * factor, bias=-2.0, target_ids=ids)
    torch.testing.assert_close(both, loss)


def test_sigmoid_loss_passes_gradcheck() -> None:
    ids, negative_ids = torch.tensor([1, 2, 1, 4]), torch.tensor([2, 9])

    def loss(q: Tensor, t: Tensor, negatives: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
        return sigmoid_loss(
            q,
            t,
            negatives=negatives,
            target_ids=ids,
            negative_ids=negative_ids,
            temperature=temperature,
            bias=bias,
            dims=(2, 5),
        )

    scalars = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.2, -1.0)]
    tensors = [normal(rows, 5, seed=rows, grad=True) for rows in (4, 4, 2)]
    assert torch.autograd.gradcheck(loss, (*tensors, *scalars))


def test_sigmoid_loss_keeps_the_gradient_of_a_nearly_solved_pair() -> None:
    # logit 30: 1 - sigmoid is 9.4e-14, which float32 loses if it is taken as a difference from 1
    side = torch.tensor([[1.0, 0.0]])
    bias = torch.tensor(0.0, requires_grad=True)
    sigmoid_loss(side, side, temperature=1 / 30, bias=bias).backward()
    assert bias.grad is not None
    assert bias.grad.item() == pytest.approx(-math.exp(-30), rel=1e-4)


# --- the learned temperature ------------------------------------------------------------------


def log_parameter(temperature: float) -> Tensor:
    return torch.tensor(math.log(temperature), dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("raw", "clamped"), [(0.001, 0.01), (0.01, 0.01), (0.05, 0.05), (1.0, 1.0), (5.0, 1.0)]
)
def test_a_learned_temperature_stays_in_its_bounds(raw: float, clamped: float) -> None:
    assert clamped_temperature(log_parameter(raw)).item() == pytest.approx(clamped)


@pytest.mark.parametrize(
    ("raw", "upstream", "expected"),
    [
        (0.05, 2.0, 0.1),  # inside: upstream * d exp = 2 * 0.05
        (0.05, -2.0, -0.1),
        (0.001, -2.0, -0.02),  # too low, and descent would raise it: exp's slope at the bound
        (0.001, 2.0, 0.0),  # too low, and descent would lower it further
        (5.0, 2.0, 2.0),
        (5.0, -2.0, 0.0),
    ],
)
def test_a_gradient_passes_a_bound_only_inwards(
    raw: float, upstream: float, expected: float
) -> None:
    parameter = log_parameter(raw)
    (upstream * clamped_temperature(parameter)).backward()
    assert parameter.grad is not None
    assert parameter.grad.item() == pytest.approx(expected)


def test_the_learned_temperature_passes_gradcheck_inside() -> None:
    assert torch.autograd.gradcheck(clamped_temperature, (log_parameter(0.3),))


@pytest.mark.parametrize("start", [1e-4, 50.0])
def test_a_temperature_that_overshot_comes_back(start: float) -> None:
    def descend(temperature_of: Callable[[Tensor], Tensor]) -> float:
        parameter = log_parameter(start)
        for _ in range(3000):
            loss = (temperature_of(parameter) - 0.5).square()
            (gradient,) = torch.autograd.grad(loss, parameter)
            parameter = (parameter - 0.5 * gradient).detach().requires_grad_()
        return temperature_of(parameter).item()

    assert descend(clamped_temperature) == pytest.approx(0.5, abs=1e-3)
    stuck = descend(lambda x: x.clamp(math.log(0.01), math.log(1.0)).exp())
    assert stuck in (pytest.approx(0.01), pytest.approx(1.0))  # what a plain clamp does


def test_a_steady_push_does_not_wind_the_parameter_up() -> None:
    parameter = log_parameter(0.02)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(100 * clamped_temperature(parameter), parameter)
        parameter = (parameter - 0.1 * gradient).detach().requires_grad_()
    assert math.log(0.01) - 0.25 < parameter.item() < math.log(0.01)  # at most one step beyond


def test_a_learned_temperature_learns() -> None:
    query = normal(8, 4)
    target = query + 0.1 * normal(8, 4, seed=1)
    parameter = log_parameter(0.5)
    info_nce(query, target, temperature=clamped_temperature(parameter)).backward()
    assert parameter.grad is not None
    assert parameter.grad.item() > 0.01  # well-matched pairs ask for a lower temperature


# --- errors -----------------------------------------------------------------------------------


def test_misuse_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        sigmoid_loss(torch.ones(0, 4), torch.ones(0, 4), temperature=0.1, bias=0.0)
    with pytest.raises(ValueError, match="use a positive number"):
        sigmoid_loss(torch.ones(2, 4), torch.ones(2, 4), temperature=0.0, bias=0.0)
    with pytest.raises(ValueError, match="0 < minimum < maximum"):
        clamped_temperature(torch.tensor(0.0), minimum=1.0, maximum=0.5)
