"""The joint loss by hand, its gradients, and the shapes that the whole objective promises."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, Int, TypeCheckError, jaxtyped
from torch import Tensor

import cafe.objective
from cafe.objective import (
    clamped_temperature,
    info_nce,
    joint_loss,
    next_token_nll,
    sigmoid_loss,
)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


# --- the sum ----------------------------------------------------------------------------------


def test_weights_and_the_count_by_hand() -> None:
    loss = joint_loss(scalar(3.0), scalar(10.0), 4, contrastive_weight=0.5, language_weight=2.0)
    assert loss.item() == 0.5 * 3.0 + 2.0 * 10.0 / 4


@pytest.mark.parametrize(
    ("contrastive", "nll_sum", "expected"),
    [(3.0, None, 1.5), (None, 10.0, 5.0), (3.0, 10.0, 6.5)],
)
def test_a_missing_term_adds_nothing(
    contrastive: float | None, nll_sum: float | None, expected: float
) -> None:
    terms = [None if value is None else scalar(value) for value in (contrastive, nll_sum)]
    loss = joint_loss(*terms, 4, contrastive_weight=0.5, language_weight=2.0)
    assert loss.item() == expected


def test_the_parts_of_all_chunks_add_up_to_the_batch() -> None:
    sums, counts = [2.0, 0.0, 7.0], [3, 0, 5]
    parts = [
        joint_loss(None, scalar(nll), sum(counts), contrastive_weight=1.0, language_weight=0.7)
        for nll in sums
    ]
    whole = joint_loss(
        None, scalar(sum(sums)), sum(counts), contrastive_weight=1.0, language_weight=0.7
    )
    torch.testing.assert_close(torch.stack(parts).sum(), whole)
    mean_of_means = 0.7 * (2.0 / 3 + 7.0 / 5) / 2
    assert whole.item() != pytest.approx(mean_of_means, rel=0.01)


def test_no_tokens_leave_a_zero_that_backward_can_pass() -> None:
    contrastive, nll_sum = scalar(3.0), scalar(0.0)
    loss = joint_loss(contrastive, nll_sum, 0, contrastive_weight=1.0, language_weight=1.0)
    assert loss.item() == 3.0
    loss.backward()
    assert contrastive.grad is not None
    assert nll_sum.grad is not None
    assert (contrastive.grad.item(), nll_sum.grad.item()) == (1.0, 0.0)


def test_gradcheck() -> None:
    def loss(contrastive: Tensor, nll_sum: Tensor) -> Tensor:
        return joint_loss(contrastive, nll_sum, 7, contrastive_weight=0.3, language_weight=1.7)

    assert torch.autograd.gradcheck(loss, (scalar(2.0), scalar(5.0)))


def test_both_losses_reach_one_shared_parameter() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    head, labels = torch.randn(9, 4, generator=generator, dtype=torch.float64), torch.arange(6)

    def objective(shared: Tensor) -> Tensor:
        nll_sum, count = next_token_nll(shared, labels, head, chunk_tokens=4)
        contrastive = info_nce(shared, target, temperature=0.2)
        return joint_loss(contrastive, nll_sum, count, contrastive_weight=0.5, language_weight=1.5)

    assert torch.autograd.gradcheck(objective, (shared,))


def test_misuse_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="both None"):
        joint_loss(None, None, 1, contrastive_weight=1.0, language_weight=1.0)
    with pytest.raises(ValueError, match="token_count is -1"):
        joint_loss(None, scalar(1.0), -1, contrastive_weight=1.0, language_weight=1.0)


# --- the surface of the package ---------------------------------------------------------------


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of `function` whose annotations, shapes included, are checked at every call.

    The package imports jaxtyping for type checkers only, so its names are supplied here.
    """
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    names = {**function.__globals__, "Float": Float, "Int": Int}
    copy.__annotations__ = typing.get_type_hints(function, names)
    return jaxtyped(typechecker=beartype)(copy)


def test_what_the_package_exports_is_there_and_complete() -> None:
    objective = cafe.objective
    modules = (
        objective.contrastive,
        objective.joint,
        objective.language,
        objective.matching,
        objective.maxsim,
        objective.official,
        objective.soft_labels,
    )
    public = {name for module in modules for name in module.__all__}
    assert set(cafe.objective.__all__) == public
    assert all(hasattr(cafe.objective, name) for name in public)


def test_right_shapes_pass_and_a_scalar_comes_back() -> None:
    side, ids, negatives = torch.randn(3, 4), torch.arange(3), torch.randn(2, 4)
    learned = checked(clamped_temperature)(torch.tensor(-3.0))
    options = {"negatives": negatives, "target_ids": ids, "negative_ids": torch.arange(2)}
    contrastive = checked(info_nce)(side, side, temperature=learned, dims=(2, 4), **options)
    checked(sigmoid_loss)(side, side, temperature=0.1, bias=torch.tensor(-1.0), **options)
    nll_sum, count = checked(next_token_nll)(side, ids, torch.randn(9, 4), bias=torch.randn(9))
    joint = checked(joint_loss)(
        contrastive, nll_sum, count, contrastive_weight=1.0, language_weight=1.0
    )
    assert joint.shape == ()


@pytest.mark.parametrize(
    ("function", "shapes", "options", "culprit"),
    [
        (info_nce, ["3 4", "2 4"], {}, "target"),
        (info_nce, ["3 4", "3 4"], {"negatives": torch.zeros(2, 5)}, "negatives"),
        (info_nce, ["3 4", "3 4"], {"target_ids": torch.zeros(3)}, "target_ids"),
        (info_nce, ["3 4", "3 4"], {"temperature": torch.ones(3)}, "temperature"),
        (info_nce, ["3 4", "3 4"], {"directions": "sideways"}, "directions"),
        (sigmoid_loss, ["3 4", "3 4 1"], {"temperature": 0.1, "bias": 0.0}, "target"),
        (next_token_nll, ["3 4", "3", "9 4"], {}, "labels"),  # labels that are not integers
        (clamped_temperature, ["2"], {}, "log_temperature"),
        (joint_loss, ["", "2"], {"token_count": 1}, "nll_sum"),
    ],
)
def test_wrong_shapes_and_dtypes_are_named(
    function: Callable[..., Any], shapes: list[str], options: dict, culprit: str
) -> None:
    tensors = [torch.zeros([int(axis) for axis in shape.split()]) for shape in shapes]
    if function is joint_loss:
        options = options | {"contrastive_weight": 1.0, "language_weight": 1.0}
    with pytest.raises(TypeCheckError, match=f"parameter '{culprit}'"):
        checked(function)(*tensors, **options)
