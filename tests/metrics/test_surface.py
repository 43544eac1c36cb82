"""What the package exports, the shapes it promises, and what it must not import."""

from __future__ import annotations

import subprocess
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from beartype import beartype
from jaxtyping import Bool, Float, Int, TypeCheckError, jaxtyped

import cafe.metrics
from cafe.metrics import answers, captions, geometry, hallucination, interval, ranking

MODULES = (answers, captions, geometry, hallucination, interval, ranking)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of `function` whose annotations, shapes included, are checked at every call.

    The package imports jaxtyping for type checkers only, so its names are supplied here.
    """
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    names = {**function.__globals__, "Bool": Bool, "Float": Float, "Int": Int}
    copy.__annotations__ = typing.get_type_hints(function, names)
    return jaxtyped(typechecker=beartype)(copy)


def test_what_the_package_exports_is_there_sorted_and_complete() -> None:
    public = {name for module in MODULES for name in module.__all__}
    assert set(cafe.metrics.__all__) == public
    assert all(hasattr(cafe.metrics, name) for name in public)


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = "import sys, cafe.metrics; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


SIDE, OTHER, VALUES = np.eye(3, 4), np.ones((3, 4)), np.linspace(0, 1, 3)
FLAGS, OWN = np.array([True, False, True]), [[0], [1], np.array([2])]
THRONE_SUMS = {
    name: column.sum(axis=0)[None]
    for name, column in hallucination.throne_columns(
        np.array([[0, 9]]), np.array([[True, False]])
    ).items()
}
BLEU_SUMS = {
    name: column.sum(axis=0)[None]
    for name, column in captions.bleu_columns([["a"]], [[["a"]]]).items()
}
CALLS: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
    (ranking.first_relevant_ranks, (SIDE, OTHER, OWN), {}),
    (ranking.two_way_ranks, (SIDE, OTHER, OWN), {}),
    (ranking.candidate_scores, (SIDE, OTHER, [[0], [1, 2], range(3)]), {}),
    (ranking.hit_at_1, ([VALUES],), {}),
    (ranking.rank_relevances, (VALUES, VALUES), {}),
    (ranking.reciprocal_rank_fusion, ([["a", "b"], ["b", "c"]],), {"k": 1}),
    (ranking.ndcg_at_k, (VALUES, 5), {"judged": VALUES[:1] + 1}),
    (hallucination.parse_yes_no, ("no",), {}),
    (hallucination.judge_says_yes, ("no",), {}),
    (hallucination.pope_columns, (np.array([0, 1, 1]), FLAGS, [True, True, False], 2), {}),
    (hallucination.chair_columns, ([["a"]], [{"a"}], [3]), {}),
    (hallucination.object_columns, ([["a"]], [{"a"}]), {}),
    (hallucination.throne_verdicts, (np.array([[0, 9]]),), {}),
    (hallucination.throne_columns, (np.array([[0, 9]]), np.array([[True, False]])), {}),
    (hallucination.throne_summary, (THRONE_SUMS,), {}),
    (answers.normalise_answer, ("A dog",), {}),
    (answers.answer_accuracy, (["a"], [["a"]]), {}),
    (answers.consensus_accuracy, (["a"], [["a", "b"]]), {}),
    (answers.calibration_columns, (SIDE, SIDE > 0), {}),
    (answers.calibration_summary, ({"calibration": VALUES, "judged": np.array(5.0)},), {}),
    (geometry.modality_gap, (SIDE, OTHER[:2]), {}),
    (geometry.alignment, (SIDE, OTHER), {}),
    (geometry.uniformity, (SIDE,), {}),
    (geometry.effective_rank, (SIDE,), {}),
    (geometry.modality_probe_accuracy, (SIDE, OTHER[:2]), {}),
    (geometry.project_2d, (SIDE, OTHER[:2]), {}),
    (interval.bootstrap_interval, (VALUES,), {"resamples": 9}),
    (interval.paired_interval, (FLAGS, VALUES), {"resamples": 9}),
    (interval.resampled_sums, ({"a": VALUES, "b": SIDE},), {"resamples": 9}),
    (interval.percentile_interval, (VALUES,), {}),
    (interval.interval_over_seeds, (SIDE,), {}),
    (captions.caption_words, ("A dog's ball.",), {}),
    (captions.cider_d, ([["a"]], [[["a"]]]), {}),
    (captions.bleu_columns, ([["a"]], [[["a"]]]), {}),
    (captions.bleu_summary, (BLEU_SUMS,), {}),
]


def test_every_public_function_is_called_here() -> None:
    functions = {name for name in cafe.metrics.__all__ if name.islower()}
    assert {call[0].__name__ for call in CALLS} == functions


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0].__name__)
def test_arguments_and_results_have_the_types_and_shapes_that_are_written(call) -> None:
    function, arguments, options = call
    checked(function)(*arguments, **options)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (ranking.first_relevant_ranks, (SIDE, OTHER[:, :2], OWN)),
        (ranking.rank_relevances, (VALUES, VALUES[:2])),
        (geometry.alignment, (SIDE, OTHER[:2])),
        (geometry.project_2d, (SIDE, OTHER[:, :2])),
        (interval.paired_interval, (VALUES, VALUES[:2])),
        (hallucination.throne_columns, (np.array([[0, 9]]), np.array([[True]]))),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_shapes_fail_the_check(function, arguments) -> None:
    with pytest.raises(TypeCheckError):
        checked(function)(*arguments)
