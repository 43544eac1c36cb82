"""The chunked next-token loss against the plain one on all logits, in value and every gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from cafe.objective.language import next_token_nll

P, D, V = 12, 5, 9  # positions, width, vocabulary
PRODUCTS = ("mm", "addmm", "addmm_")  # operations that multiply matrices


def make(
    p: int = P, d: int = D, v: int = V, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, labels, weight, bias; all but the labels require a gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((p, d), (v, d), (v,))
    )
    return hidden, torch.randint(0, v, (p,), generator=generator), weight, bias


def plain_nll(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The slow twin: all logits at once."""
    logits = functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, labels, reduction="sum")


class Seen(TorchDispatchMode):
    """Every operation's name with its operands' dtypes, and the shapes of every result."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, set[torch.dtype]]] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = {arg.dtype for arg in args if isinstance(arg, Tensor)}
        self.operations.append((func.overloadpacket.__name__, operands))
        outputs = result if isinstance(result, tuple | list) else [result]
        self.shapes += [tuple(x.shape) for x in outputs if isinstance(x, Tensor)]
        return result

    def products(self) -> int:
        return sum(name in PRODUCTS for name, _ in self.operations)


@contextmanager
def seen() -> Iterator[Seen]:
    with Seen() as mode:
        yield mode


# --- closed forms -----------------------------------------------------------------------------


def test_equal_logits_cost_log_v_per_token() -> None:
    hidden, labels, weight, _ = make()
    total, count = next_token_nll(hidden, labels, torch.zeros_like(weight))
    assert count == P
    assert total.item() == pytest.approx(P * math.log(V))


def test_two_words_by_hand() -> None:
    # logits (2, 0) with label 0, and (-1, 0) with label 1: log(1 + e^-2) + log(1 + e^-1)
    hidden, weight = torch.tensor([[2.0], [-1.0]]), torch.tensor([[1.0], [0.0]])
    total, count = next_token_nll(hidden, torch.tensor([0, 1]), weight)
    assert (total.item(), count) == (pytest.approx(0.1269280 + 0.3132617), 2)
    with_bias, _ = next_token_nll(
        hidden, torch.tensor([0, 1]), weight, bias=torch.tensor([-2.0, 0.0])
    )
    assert with_bias.item() == pytest.approx(math.log(2) + math.log(1 + math.exp(-3)))


def test_a_soft_cap_bounds_the_logits() -> None:
    hidden, weight = torch.tensor([[1e6]]), torch.tensor([[1.0], [-1.0]])
    total, _ = next_token_nll(hidden, torch.tensor([1]), weight, softcap=3.0)
    assert total.item() == pytest.approx(math.log(1 + math.exp(6)))  # logits 3 and -3


# --- the slow twin ----------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 5, 7, P, P + 1, 1000])
def test_value_and_gradients_equal_the_plain_loss(
    chunk_tokens: int, with_bias: bool, softcap: float | None
) -> None:
    hidden, labels, weight, bias = make()
    given_bias = bias if with_bias else None
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]
    total, count = next_token_nll(
        hidden, labels, weight, bias=given_bias, softcap=softcap, chunk_tokens=chunk_tokens
    )
    expected = plain_nll(hidden, labels, weight, given_bias, softcap)
    assert count == P
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=0.0)
    # an upstream factor that is not 1: forgetting it would show
    ours = torch.autograd.grad(0.37 * total, inputs)
    theirs = torch.autograd.grad(0.37 * expected, inputs)
    assert all(gradient.abs().max() > 0.01 for gradient in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_bias_and_soft_cap_change_the_loss() -> None:
    hidden, labels, weight, bias = make()
    losses = [
        next_token_nll(hidden, labels, weight, bias=b, softcap=c)[0].item()
        for b in (None, bias)
        for c in (None, 1.5)
    ]
    assert len({round(loss, 3) for loss in losses}) == 4


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_tokens", [2, 100])
def test_gradcheck(chunk_tokens: int, softcap: float | None) -> None:
    hidden, labels, weight, bias = make(5, 3, 7)
    labels[3] = -100

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return next_token_nll(
            hidden, labels, weight, bias=bias, softcap=softcap, chunk_tokens=chunk_tokens
        )[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))
    assert torch.autograd.gradcheck(loss, (hidden.detach(), weight, bias))
    assert torch.autograd.gradcheck(loss, (hidden, weight.detach(), bias.detach()))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, P), st.floats(-50, 50))
def test_order_chunks_and_a_common_shift_do_not_matter(seed: int, chunk: int, shift: float) -> None:
    hidden, labels, weight, bias = make()
    order = torch.randperm(P, generator=torch.Generator().manual_seed(seed))
    expected, _ = next_token_nll(hidden, labels, weight, bias=bias)
    total, _ = next_token_nll(
        hidden[order], labels[order], weight, bias=bias + shift, chunk_tokens=chunk
    )
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=0.0)


# --- labels that do not count -----------------------------------------------------------------


def test_ignored_labels_count_for_nothing() -> None:
    hidden, labels, weight, _ = make()
    kept = torch.arange(P) % 3 != 0
    ignoring = torch.where(kept, labels, -100)
    total, count = next_token_nll(hidden, ignoring, weight, chunk_tokens=3)
    expected, expected_count = next_token_nll(hidden[kept], labels[kept], weight)
    assert count == expected_count == int(kept.sum()) == 8
    torch.testing.assert_close(total, expected)
    ours = torch.autograd.grad(total, (hidden, weight))
    theirs = torch.autograd.grad(plain_nll(hidden, ignoring, weight), (hidden, weight))
    torch.testing.assert_close(ours, theirs)
    assert not ours[0][~kept].any()


def test_what_is_ignored_may_even_be_nan() -> None:
    hidden, labels, weight, _ = make()
    labels[4] = -100
    with torch.no_grad():
        hidden[4] = math.nan
    total, _ = next_token_nll(hidden, labels, weight)
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert torch.isfinite(total)
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("positions", [0, 4])
def test_nothing_to_predict_is_zero_with_zero_gradients(positions: int) -> None:
    hidden, _, weight, bias = make(positions)
    labels = torch.full((positions,), -100)
    total, count = next_token_nll(hidden, labels, weight, bias=bias)
    assert (total.item(), count) == (0.0, 0)
    total.backward()
    for tensor in (hidden, weight, bias):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


# --- frozen parts, no gradient, use more than once --------------------------------------------


@pytest.mark.parametrize(
    ("trained", "products"),
    [("hidden weight", 3), ("hidden", 2), ("weight", 2), ("bias", 1), ("", 1)],
)
def test_no_matrix_product_is_spent_on_what_is_frozen(trained: str, products: int) -> None:
    hidden, labels, weight, bias = make()
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, tensor in named.items():
        tensor.requires_grad_(name in trained)
    with seen() as mode:
        total, _ = next_token_nll(hidden, labels, weight, bias=bias, chunk_tokens=5)
    assert mode.products() == products * 3  # three chunks
    assert total.requires_grad == bool(trained)
    if trained:
        total.backward()
    torch.testing.assert_close(total, plain_nll(hidden, labels, weight, bias))
    for name, tensor in named.items():
        assert (tensor.grad is not None) == (name in trained)


def test_no_gradient_work_under_no_grad() -> None:
    hidden, labels, weight, _ = make()
    expected, _ = next_token_nll(hidden, labels, weight)
    with torch.no_grad(), seen() as mode:
        total, count = next_token_nll(hidden, labels, weight)
    assert mode.products() == 1
    assert not any(name.startswith("exp") for name, _ in mode.operations)  # nor any softmax
    assert not total.requires_grad
    assert count == P
    assert torch.equal(total, expected)


def test_the_sum_may_be_used_twice_and_the_graph_kept() -> None:
    hidden, labels, weight, _ = make()
    total, _ = next_token_nll(hidden, labels, weight, chunk_tokens=5)
    once = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    five = torch.autograd.grad(2 * total + 3 * total, (hidden, weight))
    for a, b, c in zip(once, again, five, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(5 * a, c)


def test_two_calls_on_one_weight_add_up() -> None:
    hidden, labels, weight, _ = make()
    first, _ = next_token_nll(hidden[:5], labels[:5], weight)
    second, _ = next_token_nll(hidden[5:], labels[5:], weight)
    (first + second).backward()
    expected = torch.autograd.grad(plain_nll(hidden, labels, weight), (hidden, weight))
    torch.testing.assert_close((hidden.grad, weight.grad), expected)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    hidden, labels, weight, _ = make()
    total, _ = next_token_nll(hidden, labels, weight)
    (gradient,) = torch.autograd.grad(total.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- dtypes -----------------------------------------------------------------------------------


def test_under_autocast_products_are_bfloat16_and_log_softmax_is_float32() -> None:
    hidden, labels, weight, bias = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), seen() as mode:
        total, _ = next_token_nll(hidden, labels, weight, bias=bias, chunk_tokens=5)
    products = [dtypes for name, dtypes in mode.operations if name in PRODUCTS]
    assert len(products) == 9
    assert all(dtypes == {torch.bfloat16} for dtypes in products)
    softmaxes = [dtypes for name, dtypes in mode.operations if name == "_log_softmax"]
    assert softmaxes == 3 * [{torch.float32}]
    assert total.dtype == torch.float32
    gradients = torch.autograd.grad(total, (hidden, weight, bias))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def relative_error(gradient: Tensor, truth: Tensor) -> float:
    return ((gradient.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_products_are_no_worse_than_in_the_plain_loss(dtype: torch.dtype) -> None:
    """float32 tensors under autocast, or bfloat16 tensors without, against the float64 truth."""
    hidden, labels, weight, _ = make(200, 32, 50, dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truths = torch.autograd.grad(plain_nll(exact[0], labels, exact[1]), exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        total, _ = next_token_nll(hidden, labels, weight, chunk_tokens=64)
        logits = functional.linear(hidden, weight)
    plain = functional.cross_entropy(logits.float(), labels, reduction="sum")
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(total, plain)  # the same rounded logits
    ours = torch.autograd.grad(total, (hidden, weight))
    theirs = torch.autograd.grad(plain, (hidden, weight))
    for mine, other, truth in zip(ours, theirs, truths, strict=True):
        assert mine.dtype == dtype
        assert 1e-5 < relative_error(mine, truth) < 1.2 * relative_error(other, truth) < 0.02


def test_the_weight_gradient_of_many_chunks_is_summed_in_float32() -> None:
    hidden, labels, weight, _ = make(512, 8, 11, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    (truth,) = torch.autograd.grad(plain_nll(exact[0], labels, exact[1]), exact[1:])
    total, _ = next_token_nll(hidden, labels, weight, chunk_tokens=1)
    (ours,) = torch.autograd.grad(total, weight)
    rounded = torch.zeros_like(weight)  # what a bfloat16 running sum would give
    for state, label in zip(hidden.split(1), labels.split(1), strict=True):
        one, _ = next_token_nll(state, label, weight)
        rounded += torch.autograd.grad(one, weight)[0]
    assert relative_error(ours, truth) < 0.005
    assert relative_error(rounded, truth) > 2 * relative_error(ours, truth)


def test_float32_without_autocast_is_float32_throughout() -> None:
    hidden, labels, weight, _ = make(200, 32, 50, torch.float32)
    total, _ = next_token_nll(hidden, labels, weight, chunk_tokens=64)
    plain = plain_nll(hidden, labels, weight)
    torch.testing.assert_close(total, plain, rtol=1e-6, atol=0.0)
    ours = torch.autograd.grad(total, (hidden, weight))
    theirs = torch.autograd.grad(plain, (hidden, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_float64_stays_float64_under_autocast() -> None:
    hidden, labels, weight, _ = make()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = next_token_nll(hidden, labels, weight)
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, plain_nll(hidden, labels, weight), rtol=1e-13, atol=0.0)


def test_labels_may_be_int32() -> None:
    hidden, labels, weight, _ = make()
    narrow, _ = next_token_nll(hidden, labels.int(), weight)
    assert torch.equal(narrow, next_token_nll(hidden, labels, weight)[0])


# --- what the chunks are for ------------------------------------------------------------------


def rows_of_vocabulary_width(mode: Seen, v: int) -> int:
    return max(math.prod(shape[:-1]) for shape in mode.shapes if shape and shape[-1] == v)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_more_than_a_chunk_of_logits_ever_exists(softcap: float | None) -> None:
    v = 101
    hidden, labels, weight, bias = make(64, 7, v)
    with seen() as mode:
        total, _ = next_token_nll(
            hidden, labels, weight, bias=bias, softcap=softcap, chunk_tokens=10
        )
        total.backward()
    assert rows_of_vocabulary_width(mode, v) == 10
    with seen() as mode:
        plain_nll(hidden, labels, weight, bias, softcap).backward()
    assert rows_of_vocabulary_width(mode, v) == 64  # the measure sees a loss that does


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"softcap": 0.0}, "use a positive number"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "must be"),
        ({"lm_head_weight": torch.zeros(V, D + 1)}, "must be"),
    ],
)
def test_misuse_is_one_clear_error(change: dict, words: str) -> None:
    hidden, labels, weight, _ = make()
    arguments = {"hidden": hidden, "labels": labels, "lm_head_weight": weight} | change
    with pytest.raises(ValueError, match=words):
        next_token_nll(**arguments)
