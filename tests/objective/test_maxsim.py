"""MaxSim in blocks against the whole [n, n, t, t] tensor: values, gradients, and memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import cafe.model.torchvision_pair  # noqa: F401 - before anything imports torchvision
from cafe.objective import TokenVectors, max_sim, max_sim_info_nce

DIRECTIONS = ["both", "query_to_target", "target_to_query"]


def items(lengths: list[int], *, dim: int = 6, seed: int = 0, dtype: Any = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(sum(lengths), dim, generator=generator, dtype=dtype)
    return TokenVectors(vectors.requires_grad_(), torch.tensor(lengths))


def slow_scores(query: TokenVectors, target: TokenVectors) -> Tensor:
    """The definition, with all cosines of all pairs at once."""
    rows = query.vectors.split(query.lengths.tolist())
    columns = target.vectors.split(target.lengths.tolist())
    padded = [torch.nn.utils.rnn.pad_sequence(list(x), batch_first=True) for x in (rows, columns)]
    real = [
        torch.arange(p.shape[1]) < x.lengths[:, None]
        for p, x in zip(padded, (query, target), strict=True)
    ]
    cosines = torch.einsum("atd,bud->abtu", *padded)
    best = cosines.masked_fill(~real[1][None, :, None], -math.inf).amax(3)
    return (best * real[0][:, None]).sum(2) / query.lengths[:, None]


def unit(x: TokenVectors, width: int) -> TokenVectors:
    return x._replace(vectors=functional.normalize(x.vectors[:, :width], dim=1))


def slow_loss(
    query: TokenVectors,
    target: TokenVectors,
    negatives: TokenVectors | None = None,
    temperature: float = 0.02,
    directions: str = "both",
    dims: list[int] | None = None,
    ids: list[int] | None = None,
    negative_ids: list[int] | None = None,
) -> Tensor:
    """One exponential at a time."""
    n, losses = len(query.lengths), []
    ids = ids or [*range(n)]
    column_ids = ids + (negative_ids or [-1] * (0 if negatives is None else len(negatives.lengths)))
    for width in dims or [query.vectors.shape[1]]:
        q, t = unit(query, width), unit(target, width)
        forward, reverse = slow_scores(q, t), slow_scores(t, q)
        if negatives is not None:
            forward = torch.cat([forward, slow_scores(q, unit(negatives, width))], dim=1)
        for scores, name in ((forward, DIRECTIONS[1]), (reverse, DIRECTIONS[2])):
            if directions in (name, "both"):
                for i in range(n):
                    others = [
                        torch.exp(scores[i, j] / temperature)
                        for j in range(scores.shape[1])
                        if j == i or column_ids[j] != ids[i]
                    ]
                    own = torch.exp(scores[i, i] / temperature)
                    losses.append(-torch.log(own / torch.stack(others).sum()))
    return torch.stack(losses).mean()


def gradients(loss: Tensor, *sides: TokenVectors) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [side.vectors for side in sides]))


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("block", [1, 40, 10_000])
def test_the_loss_and_its_gradient_are_those_of_the_whole_tensor(
    directions: Any, block: int
) -> None:
    query, target, loose = (
        items([3, 1, 4, 2, 5]),
        items([7, 2, 9, 9, 1], seed=1),
        items([2, 6, 3], seed=2),
    )
    options: Any = {"temperature": 0.3, "directions": directions, "dims": [2, 5, 6]}
    ids, loose_ids = [0, 1, 0, 3, 4], [9, 3, 9]
    expected = slow_loss(query, target, loose, ids=ids, negative_ids=loose_ids, **options)
    found = max_sim_info_nce(
        query,
        target,
        negatives=loose,
        target_ids=torch.tensor(ids),
        negative_ids=torch.tensor(loose_ids),
        block_elements=block,
        **options,
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    sides = (query, target) if directions == "target_to_query" else (query, target, loose)
    for a, b in zip(gradients(found, *sides), gradients(expected, *sides), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_comparison_can_fail() -> None:
    query, target = items([3, 2]), items([4, 4], seed=1)
    a = max_sim_info_nce(query, target, temperature=0.3)
    b = slow_loss(query, target, temperature=0.31)
    assert (a - b).abs() > 1e-4
    one = max_sim_info_nce(query, target, temperature=0.3, directions="query_to_target")
    assert (a - one).abs() > 1e-4


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=7)


@settings(deadline=None, max_examples=40)
@given(a=lengths, b=lengths, block=st.integers(1, 200), seed=st.integers(0, 99))
def test_scores_of_any_lengths_in_any_blocks(
    a: list[int], b: list[int], block: int, seed: int
) -> None:
    query, target = unit(items(a, seed=seed), 6), unit(items(b, seed=seed + 100), 6)
    forward, reverse = max_sim(query, target, block_elements=block)
    assert forward is not None
    assert reverse is not None
    torch.testing.assert_close(forward, slow_scores(query, target), rtol=0, atol=1e-12)
    torch.testing.assert_close(reverse, slow_scores(target, query), rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    a, b = torch.tensor([2, 3]), torch.tensor([1, 4])

    def scores(x: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return max_sim(TokenVectors(x, a), TokenVectors(y, b), block_elements=9)

    inputs = items([2, 3]).vectors, items([1, 4], seed=1).vectors
    assert torch.autograd.gradcheck(scores, inputs)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, list | tuple) else [result]:
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return result


def peak(loss: Any, block: int | None = None) -> int:
    query, target = items([12] * 32, dtype=torch.float32), items([40] * 32, dtype=torch.float32)
    with Largest() as largest:
        loss(query, target, **({} if block is None else {"block_elements": block})).backward()
    return largest.elements


def test_no_tensor_is_larger_than_a_block() -> None:
    """Forward and backward. The vectors themselves are 32 * 40 * 6 = 7,680 numbers."""
    assert peak(slow_loss) >= 32 * 32 * 12 * 40
    assert peak(max_sim_info_nce, 10_000) <= 10_000
    assert peak(max_sim_info_nce, 60_000) > 20_000  # larger blocks are used where they are allowed


def test_half_precision_is_computed_in_float32() -> None:
    query, target = items([3, 2], dtype=torch.float32), items([4, 4], seed=1, dtype=torch.float32)
    expected = max_sim_info_nce(query, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(max_sim_info_nce(query, target), expected, rtol=0, atol=0)
    half = [x._replace(vectors=x.vectors.bfloat16()) for x in (query, target)]
    assert max_sim_info_nce(half[0], half[1]).dtype == torch.float32


def test_scores_are_those_of_sentence_transformers() -> None:
    from sentence_transformers.util.similarity import mean_maxsim

    query, target = unit(items([3, 1, 4]), 6), unit(items([7, 2], seed=1), 6)
    split = [[v.detach() for v in x.vectors.split(x.lengths.tolist())] for x in (query, target)]
    forward, _ = max_sim(query, target)
    torch.testing.assert_close(forward, mean_maxsim(*split))


def test_the_loss_is_that_of_sentence_transformers() -> None:
    """Its `MultiVectorMultipleNegativesRankingLoss` with MeanMaxSim, whose scale is 1 / T."""
    from functools import partial

    from sentence_transformers.multi_vector_encoder.losses import (
        MultiVectorMultipleNegativesRankingLoss,
    )
    from sentence_transformers.multi_vector_encoder.scoring import colbert_scores

    class Given(torch.nn.Module):
        """Stands where the library has its model: the "features" are token vectors already."""

        def forward(self, features: dict[str, Any], task: str | None = None) -> dict[str, Any]:
            return {**features, "attention_mask": features["mask"]}

    def side(x: TokenVectors) -> dict[str, Any]:
        padded = torch.nn.utils.rnn.pad_sequence(
            list(unit(x, 6).vectors.split(x.lengths.tolist())), batch_first=True
        )
        real = torch.arange(padded.shape[1]) < x.lengths[:, None]
        return {"token_embeddings": padded, "mask": real}

    query, target = items([3, 1, 4], dtype=torch.float32), items([7, 2, 5], seed=1)
    target = target._replace(vectors=target.vectors.detach().float().requires_grad_())
    scores = partial(colbert_scores, length_normalize=True)
    model: Any = Given()
    theirs = MultiVectorMultipleNegativesRankingLoss(model, scale=50.0, similarity_fct=scores)
    expected = theirs([side(query), side(target)])
    found = max_sim_info_nce(query, target, directions="query_to_target")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        gradients(found, query, target), gradients(expected, query, target), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: max_sim_info_nce(items([2]), items([2, 1])), "1 queries and 2 targets"),
        (lambda: max_sim_info_nce(items([]), items([])), "0 queries"),
        (lambda: max_sim_info_nce(items([2]), items([2]), dims=[9]), r"dims is \[9\]; use .* 6"),
        (lambda: max_sim(items([2, 0]), items([2])), "needs at least one"),
        (lambda: max_sim(items([2]), items([2]), block_elements=0), "block_elements is 0"),
    ],
)
def test_what_cannot_be_scored(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
