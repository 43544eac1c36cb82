"""InfoNCE against closed forms, its definition written out, and finite differences."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from cafe.model.quantization import quantized
from cafe.objective.contrastive import Rounding, info_nce, rounded
from cafe.recipes import Objective

ROUNDINGS: tuple[Rounding, ...] = ("float32", "binary")
DIRECTIONS = ["both", "query_to_target", "target_to_query"]


def normal(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def slow_info_nce(
    query: Tensor,
    target: Tensor,
    negatives: Tensor | None = None,
    target_ids: list[int] | None = None,
    negative_ids: list[int] | None = None,
    temperature: float | Tensor = 0.05,
    directions: str = "both",
    hardness: float = 0.0,
    stop: bool = True,
    false_negative_margin: float = math.inf,
    same_side: bool = False,
) -> Tensor:
    """The definition, one exponential at a time. `stop=False` forgets the stop-gradient."""
    ids = target_ids or list(range(len(query)))
    columns = list(target) + ([] if negatives is None else list(negatives))
    column_ids = ids + (negative_ids or [-1] * (len(columns) - len(ids)))

    def term(s: Tensor) -> Tensor:
        return torch.exp(hardness * (s.detach() if stop else s)) * torch.exp(s / temperature)

    def limit(i: int) -> float:
        return float(cosine(query[i], target[i]).detach())

    forward, backward = [], []
    for i in range(len(query)):
        positive = torch.exp(cosine(query[i], target[i]) / temperature)
        rows = [
            term(cosine(query[i], columns[j]))
            for j in range(len(columns))
            if j != i
            and column_ids[j] != ids[i]
            and cosine(query[i], columns[j]) <= limit(i) + false_negative_margin
        ]
        others = [
            term(cosine(query[j], target[i]))
            for j in range(len(query))
            if j != i
            and ids[j] != ids[i]
            and cosine(query[j], target[i]) <= limit(i) + false_negative_margin
        ]
        for j in range(len(query)) if same_side else ():
            if j == i or ids[j] == ids[i]:
                continue
            among = cosine(query[i], query[j])
            more = [torch.exp(cosine(target[i], target[j]) / temperature)]
            if among <= limit(i) + false_negative_margin:
                more.append(torch.exp(among / temperature))
            rows += more
            others += more
        forward.append(-torch.log(positive / (positive + sum(rows))))
        backward.append(-torch.log(positive / (positive + sum(others))))
    q2t, t2q = torch.stack(forward).mean(), torch.stack(backward).mean()
    return {"both": (q2t + t2q) / 2, "query_to_target": q2t, "target_to_query": t2q}[directions]


# --- closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_equal_scores_cost_log_n(n: int, directions: str) -> None:
    same = torch.ones(n, 3, dtype=torch.float64)
    assert info_nce(same, same, directions=directions).item() == pytest.approx(math.log(n))


def test_k_equal_hard_negatives_cost_log_n_plus_k_on_the_query_side_only() -> None:
    same, negatives = torch.ones(4, 3), torch.ones(6, 3)
    q2t = info_nce(same, same, negatives=negatives, directions="query_to_target")
    t2q = info_nce(same, same, negatives=negatives, directions="target_to_query")
    both = info_nce(same, same, negatives=negatives)
    assert q2t.item() == pytest.approx(math.log(10))
    assert t2q.item() == pytest.approx(math.log(4))
    assert both.item() == pytest.approx((math.log(10) + math.log(4)) / 2)


def test_two_pairs_by_hand() -> None:
    # cosines  1.0 0.6      rows: log(1 + e^-0.4) = 0.5130153, log(1 + e^-0.8) = 0.3711007
    #          0.0 0.8   columns: log(1 + e^-1.0) = 0.3132617, log(1 + e^-0.2) = 0.5981389
    query, target = torch.tensor([[5.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    for directions, expected in [
        ("query_to_target", 0.4420580),
        ("target_to_query", 0.4557003),
        ("both", 0.4488792),
    ]:
        loss = info_nce(query, target, temperature=1.0, directions=directions)
        assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_the_official_formula_is_reproduced() -> None:
    images, texts = normal(32, 24, seed=1).float(), normal(32, 24, seed=2).float()
    images = functional.normalize(images, dim=-1)
    texts = functional.normalize(0.7 * images + 0.1 * texts, dim=-1)
    scores, labels = 20 * images @ texts.T, torch.arange(32)
    rows, columns = (
        functional.cross_entropy(scores, labels),
        functional.cross_entropy(scores.T, labels),
    )
    assert rows.item() > 1e-3  # not solved: the comparison has something to compare
    assert rows.item() != pytest.approx(columns.item(), abs=1e-3)
    assert info_nce(images, texts).item() == pytest.approx(((rows + columns) / 2).item(), abs=1e-6)


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_a_batch_of_duplicates_costs_nothing(directions: str) -> None:
    query, target, ids = normal(5, 3), normal(5, 3, seed=1), torch.full((5,), 7)
    masked = info_nce(query, target, target_ids=ids, directions=directions)
    assert masked.item() == 0.0
    assert info_nce(query, target, directions=directions).item() > 0.1  # without the mask it costs


def test_what_is_right_for_an_equal_query_is_no_negative() -> None:
    """Images A A B B with captions 1 2 2 3, then the hard negatives 1 and 9; all cosines are 1.

    A has captions 1 and 2, B has 2 and 3. So for both pairs of A the candidates 1, 2, 2, 1 (the
    hard one) are right, and 3 and 9 remain beside the own target; for B 1, 1 (hard) and 9 remain.
    """
    ones, contents = torch.ones(4, 3), torch.tensor([1, 2, 2, 3])
    ids = {
        "target_ids": torch.tensor([11, 12, 13, 14]),  # one for each: they say nothing
        "query_ids": torch.tensor([20, 20, 21, 21]),
        "content_ids": contents,
        "negative_ids": torch.tensor([1, 9]),
    }

    def loss(directions: Any, **options: Tensor) -> float:
        return info_nce(ones, ones, negatives=ones[:2], directions=directions, **options).item()

    assert loss("query_to_target", **ids) == pytest.approx((math.log(3) + math.log(4)) / 2)
    # Caption 1 meets B twice, caption 2 (of A and of B) nobody, caption 3 meets A twice.
    assert loss("target_to_query", **ids) == pytest.approx(2 * math.log(3) / 4)
    assert loss("query_to_target") == pytest.approx(math.log(6))


def test_a_query_is_no_negative_of_itself() -> None:
    """Pairs (a, b) and (b, c): b is the target of the first and the query of the second."""
    ids = {"query_ids": torch.tensor([1, 2]), "content_ids": torch.tensor([2, 3])}
    loss = info_nce(
        torch.ones(2, 3), torch.ones(2, 3), target_ids=torch.arange(2), directions="both", **ids
    )
    assert loss.item() == pytest.approx(math.log(2) / 2)


def test_distinct_ids_mask_nothing() -> None:
    query, target = normal(5, 3), normal(5, 3, seed=1)
    assert torch.equal(info_nce(query, target, target_ids=torch.arange(5)), info_nce(query, target))


def test_weighted_equal_negatives_by_closed_form() -> None:
    # all cosines are 1, so every negative weighs e^hardness of a positive
    same, negatives = torch.ones(4, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    loss = info_nce(
        same, same, negatives=negatives, hardness=1.5, directions="query_to_target", temperature=0.3
    )
    assert loss.item() == pytest.approx(math.log(1 + 5 * math.exp(1.5)))


# --- the slow twin, values and gradients ------------------------------------------------------

OPTIONS = {
    "plain": {},
    "query_to_target": {"directions": "query_to_target"},
    "target_to_query": {"directions": "target_to_query"},
    "negatives": {"negatives": True},
    "duplicates": {"target_ids": [3, 8, 3, 5, 8]},
    "negative duplicates": {
        "negatives": True,
        "target_ids": [3, 8, 3, 5, 8],
        "negative_ids": [8, 1, 5],
    },
    "negatives without ids": {"negatives": True, "target_ids": [3, 8, 3, 5, 8]},
    "hardness": {"hardness": 2.0},
    "all": {
        "negatives": True,
        "target_ids": [3, 8, 3, 5, 8],
        "negative_ids": [8, 1, 5],
        "hardness": 9.0,
    },
}


def both_ways(options: dict, **slow: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Loss, gradients by query, target, temperature (, negatives): of the function, of the twin."""
    results = []
    for loss_of in (info_nce, slow_info_nce):
        query, target = normal(5, 4, seed=1, grad=True), normal(5, 4, seed=2, grad=True)
        temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        inputs, options_now = [query, target, temperature], dict(options)
        if "negatives" in options:
            options_now["negatives"] = normal(3, 4, seed=3, grad=True)
            inputs.append(options_now["negatives"])
        if loss_of is info_nce:
            for name in ("target_ids", "negative_ids"):
                if name in options:
                    options_now[name] = torch.tensor(options[name])
        else:
            options_now |= slow
        loss = loss_of(query, target, temperature=temperature, **options_now)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    return results[0], results[1]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_value_and_gradients_equal_the_definition(options: dict) -> None:
    fast, slow = both_ways(options)
    assert fast[0] > 0.1
    assert all(gradient.abs().max() > 1e-3 for gradient in fast[1:])
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_every_option_changes_the_loss() -> None:
    losses = [both_ways(options)[0][0].item() for options in OPTIONS.values()]
    assert len({round(loss, 6) for loss in losses}) == len(OPTIONS)


def test_hardness_weights_are_not_descended() -> None:
    fast, forgot = both_ways({"hardness": 2.0}, stop=False)
    torch.testing.assert_close(fast[0], forgot[0])  # sg leaves the value ...
    assert (fast[1] - forgot[1]).abs().max() > 0.05 * fast[1].abs().max()  # ... not the gradient


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_info_nce_passes_gradcheck(directions: str) -> None:
    ids, negative_ids = torch.tensor([1, 2, 1, 4]), torch.tensor([2, 9])

    def loss(query: Tensor, target: Tensor, negatives: Tensor, temperature: Tensor) -> Tensor:
        return info_nce(
            query,
            target,
            negatives=negatives,
            target_ids=ids,
            negative_ids=negative_ids,
            temperature=temperature,
            directions=directions,
            dims=(2, 3, 5),
        )

    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    tensors = [normal(rows, 5, seed=rows, grad=True) for rows in (4, 4, 2)]
    assert torch.autograd.gradcheck(loss, (*tensors, temperature))


def test_hardness_passes_gradcheck_with_its_weights_held_fixed() -> None:
    # Finite differences see through a stop-gradient, so the weights are constants of the check.
    query, target = normal(4, 3, seed=1, grad=True), normal(4, 3, seed=2, grad=True)

    def scores(query: Tensor, target: Tensor) -> Tensor:
        return functional.normalize(query, dim=1) @ functional.normalize(target, dim=1).T

    bonus = 3.0 * scores(query, target).detach() * (1 - torch.eye(4, dtype=torch.float64))

    def weighted(query: Tensor, target: Tensor) -> Tensor:
        logits, labels = scores(query, target) / 0.4 + bonus, torch.arange(4)
        rows, columns = (
            functional.cross_entropy(logits, labels),
            functional.cross_entropy(logits.T, labels),
        )
        return (rows + columns) / 2

    assert torch.autograd.gradcheck(weighted, (query, target))
    expected = torch.autograd.grad(weighted(query, target), (query, target))
    loss = info_nce(query, target, temperature=0.4, hardness=3.0)
    torch.testing.assert_close(torch.autograd.grad(loss, (query, target)), expected)


# --- Matryoshka widths ------------------------------------------------------------------------


def test_widths_are_averaged_and_normalised_anew() -> None:
    query, target = normal(6, 8), normal(6, 8, seed=1)
    separate = [info_nce(query[:, :width], target[:, :width]) for width in (2, 5, 8)]
    torch.testing.assert_close(info_nce(query, target, dims=(2, 5, 8)), sum(separate) / 3)
    assert torch.equal(info_nce(query, target, dims=[8]), info_nce(query, target))
    longer_tail = torch.cat([query[:, :5], 100 * query[:, 5:]], dim=1)
    assert torch.equal(
        info_nce(longer_tail, target, dims=(2, 5)), info_nce(query, target, dims=(2, 5))
    )
    assert info_nce(longer_tail, target).item() != pytest.approx(info_nce(query, target).item())


# --- properties -------------------------------------------------------------------------------

batches = st.tuples(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 5))
few = settings(max_examples=25, deadline=None, derandomize=True)


def drawn(batch: tuple[int, int, int]) -> tuple[Tensor, Tensor, dict]:
    seed, n, d = batch
    generator = torch.Generator().manual_seed(seed)
    options = {
        "target_ids": torch.randint(0, 4, (n,), generator=generator),
        "temperature": 0.1,
        "hardness": 2.0,
    }
    return normal(n, d, seed=seed), normal(n, d, seed=seed + 1), options


@few
@given(batches, st.sampled_from(DIRECTIONS))
def test_the_order_of_a_batch_does_not_matter(batch: tuple[int, int, int], directions: str) -> None:
    query, target, options = drawn(batch)
    order = torch.randperm(len(query), generator=torch.Generator().manual_seed(batch[0]))
    shuffled = options | {"target_ids": options["target_ids"][order]}
    torch.testing.assert_close(
        info_nce(query[order], target[order], directions=directions, **shuffled),
        info_nce(query, target, directions=directions, **options),
    )


@few
@given(batches)
def test_swapping_the_direction_is_swapping_the_sides(batch: tuple[int, int, int]) -> None:
    query, target, options = drawn(batch)
    torch.testing.assert_close(
        info_nce(query, target, directions="target_to_query", **options),
        info_nce(target, query, directions="query_to_target", **options),
    )
    torch.testing.assert_close(
        info_nce(query, target, **options), info_nce(target, query, **options)
    )


@few
@given(batches, st.floats(0.1, 1.0))
def test_scaling_scores_and_temperature_together_leaves_the_loss(
    batch: tuple[int, int, int], factor: float
) -> None:
    query, target, options = drawn(batch)
    # one more coordinate that targets do not have scales every cosine of the query by `factor`
    tail = torch.full((len(query), 1), math.sqrt(1 - factor**2), dtype=torch.float64)
    scaled = torch.cat([factor * functional.normalize(query, dim=1), tail], dim=1)
    padded = torch.cat([7 * target, torch.zeros_like(tail)], dim=1)  # nor does length matter
    changed = {"temperature": factor * 0.1, "hardness": 2.0 / factor}
    torch.testing.assert_close(
        info_nce(scaled, padded, **(options | changed)), info_nce(query, target, **options)
    )


# --- precision and memory ---------------------------------------------------------------------


def test_scores_are_float32_under_bfloat16_inputs_and_autocast() -> None:
    query, target = normal(16, 32, seed=1).bfloat16(), normal(16, 32, seed=2).bfloat16()
    wide = info_nce(query.float(), target.float())
    assert torch.equal(info_nce(query, target), wide)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(query, target), wide)
        assert torch.equal(info_nce(query.float(), target.float()), wide)
        left, right = functional.normalize(query.float()), functional.normalize(target.float())
        rounded = functional.cross_entropy((left @ right.T).float() / 0.05, torch.arange(16))
    exact = info_nce(query, target, directions="query_to_target")
    assert abs(rounded - exact) > 1e-4  # what autocast would have done
    assert wide.dtype == torch.float32
    assert info_nce(query.double(), target.double()).dtype == torch.float64


def test_gradients_come_back_in_the_dtype_of_the_embeddings() -> None:
    query = normal(4, 8).bfloat16().requires_grad_()
    target = normal(4, 8, seed=1).requires_grad_()
    info_nce(query, target).backward()
    assert query.grad is not None
    assert target.grad is not None
    assert (query.grad.dtype, target.grad.dtype) == (torch.bfloat16, torch.float64)


def test_an_embedding_of_zeros_gives_a_finite_loss() -> None:
    query = torch.zeros(3, 4)
    loss = info_nce(query, torch.ones(3, 4))
    assert loss.item() == pytest.approx(math.log(3))


@pytest.mark.parametrize(("learned", "matrices"), [(False, 1), (True, 2)])
def test_one_score_matrix_is_kept_for_backward_and_a_second_for_a_learned_temperature(
    learned: bool, matrices: int
) -> None:
    query, target = normal(50, 3, grad=True), normal(50, 3, seed=1, grad=True)
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=learned)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() == 50 * 50 and tensor.is_floating_point():
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.arange(50)
        info_nce(query, target, target_ids=ids, hardness=1.0, temperature=temperature)
    assert len(kept) == matrices


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"hardness": -1.0}, "hardness is -1.0"),
        ({"directions": "sideways"}, "directions is 'sideways'"),
        ({"dims": ()}, "dims is"),
        ({"dims": (0, 2)}, "dims is"),
        ({"dims": (2, 5)}, "between 1 and 4"),
        ({"negatives": torch.ones(2, 3)}, "as wide as query"),
        ({"target_ids": torch.arange(2)}, "one id per pair"),
        ({"negatives": torch.ones(2, 4), "negative_ids": torch.arange(2)}, "need target_ids"),
        ({"negative_ids": torch.arange(1), "target_ids": torch.arange(3)}, "one id per negative"),
    ],
)
def test_misuse_is_one_clear_error(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        info_nce(torch.ones(3, 4), torch.ones(3, 4), **options)


def test_sides_must_match_and_hold_a_pair() -> None:
    with pytest.raises(ValueError, match="one shape"):
        info_nce(torch.ones(3, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="at least one pair"):
        info_nce(torch.ones(0, 4), torch.ones(0, 4))


# --- false negatives, same side, rounding -------------------------------------------------------


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("margin", [None, 0.0, 0.1])
@pytest.mark.parametrize("same_side", [False, True])
def test_margin_and_same_side_are_their_definitions(
    directions: str, margin: float | None, same_side: bool
) -> None:
    sides = normal(6, 4, seed=1, grad=True), normal(6, 4, seed=2, grad=True)
    negatives = normal(3, 4, seed=3, grad=True)
    ids, negative_ids = [0, 1, 1, 3, 4, 5], [9, 4, 10]
    options: dict[str, Any] = {"directions": directions, "same_side": same_side}
    found = info_nce(
        *sides,
        negatives=negatives,
        target_ids=torch.tensor(ids),
        negative_ids=torch.tensor(negative_ids),
        temperature=0.2,
        false_negative_margin=margin,
        **options,
    )
    expected = slow_info_nce(
        *sides,
        negatives,
        ids,
        negative_ids,
        0.2,
        false_negative_margin=math.inf if margin is None else margin,
        **options,
    )
    torch.testing.assert_close(found, expected)
    inputs = (*sides, negatives)
    own = torch.autograd.grad(found, inputs, allow_unused=True)
    theirs = torch.autograd.grad(expected, inputs, allow_unused=True)
    for a, b in zip(own, theirs, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


def test_a_twin_of_the_target_is_no_negative() -> None:
    """Two pairs whose targets both fit both queries: each query likes the other's target better."""
    query = torch.tensor([[1.0, 0.1], [1.0, -0.1]])
    target = torch.tensor([[1.0, -0.3], [1.0, 0.3]])
    assert info_nce(query, target) > math.log(2)
    assert float(info_nce(query, target, false_negative_margin=0.0)) == 0.0
    assert info_nce(query, target, false_negative_margin=0.5) > math.log(2)


def test_equal_scores_on_both_sides_cost_log_of_all_of_them() -> None:
    """n targets, n - 1 other queries and n - 1 other targets: ln(3n - 2)."""
    same = torch.ones(5, 3, dtype=torch.float64)
    assert info_nce(same, same, same_side=True).item() == pytest.approx(math.log(13))


def test_queries_of_one_image_are_not_contrasted_with_each_other() -> None:
    same = torch.ones(4, 3)
    ids = {"target_ids": torch.arange(4), "query_ids": torch.tensor([0, 0, 1, 2])}
    # For the first two pairs: two other targets of their side, two other queries, two targets.
    expected = (2 * math.log(1 + 3 * 2) + 2 * math.log(1 + 3 * 3)) / 4
    found = info_nce(same, same, **ids, same_side=True, directions="query_to_target")
    assert found.item() == pytest.approx(expected)


def test_binary_embeddings_are_signs_and_the_gradient_passes() -> None:
    unit = functional.normalize(normal(3, 5, grad=True), dim=1)
    signs = rounded(unit, "binary")
    torch.testing.assert_close(signs, unit.detach().sign() / math.sqrt(5))
    signs.square().sum().backward()
    cosines = info_nce(unit.detach(), -unit.detach(), roundings=("binary",))
    exact = info_nce(unit.detach().sign(), -unit.detach().sign())
    torch.testing.assert_close(cosines, exact)


def test_int8_embeddings_are_those_of_the_index() -> None:
    """Each value is in the middle of the step that `quantized` stores (in float32)."""
    unit = functional.normalize(normal(50, 8), dim=1)
    found = rounded(unit, "int8")
    low, high = unit.amin(0), unit.amax(0)
    step = (high - low) / 255
    stored = torch.from_numpy(quantized(unit.numpy(), "uint8"))
    same = torch.isclose(found, low + (stored + 0.5) * step)
    assert same.double().mean() > 0.95, "but for values on the edge of a step"
    assert bool(((found - unit).abs() <= 0.500001 * step).all())
    assert bool((found != unit).any())


def test_the_loss_is_the_mean_over_roundings_and_widths() -> None:
    sides = normal(4, 6, seed=1), normal(4, 6, seed=2)
    both = info_nce(*sides, dims=(3, 6), roundings=ROUNDINGS)
    parts = [
        info_nce(*sides, dims=(width,), roundings=(rounding,))
        for width, rounding in product((3, 6), ROUNDINGS)
    ]
    torch.testing.assert_close(both, torch.stack(parts).mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contrastive": "sigmoid", "false_negative_margin": 0.0}, "is for info_nce"),
        ({"contrastive": "sigmoid", "same_side_negatives": True}, "is for info_nce"),
        ({"quantization_aware": ["int8", "int8"]}, "each value once"),
    ],
)
def test_options_of_a_recipe_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**options)


def test_an_unknown_rounding() -> None:
    with pytest.raises(ValueError, match="rounding is 'int4'"):
        rounded(normal(2, 2), "int4")  # type: ignore[arg-type]


def test_autocast_rounds_no_cosine_of_the_same_side() -> None:
    sides = normal(4, 64, seed=1).float(), normal(4, 64, seed=2).float()
    expected = info_nce(*sides, same_side=True, false_negative_margin=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert info_nce(*sides, same_side=True, false_negative_margin=0.1) == expected
