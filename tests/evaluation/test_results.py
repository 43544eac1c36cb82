"""Result files and comparisons: what was stored suffices for every interval and difference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cafe.errors import DataError
from cafe.evaluation.compare import compare, compare_results, published, results_by_task
from cafe.evaluation.registry import TASKS
from cafe.evaluation.results import pack, read_result, result_record, unpack
from cafe.evaluation.scoring import Ratio, score_samples
from cafe.evaluation.task import TaskResult
from cafe.files import write_json
from cafe.metrics import paired_interval, throne_columns
from helpers.metric_reference import throne_scores

HITS = np.array([1, 0, 1, 1, 0, 1, 1, 1])


def make(hits: np.ndarray = HITS, ids: tuple[str, ...] = ("a", "b")) -> TaskResult:
    return TaskResult(
        len(hits),
        {"hit": hits, "one:hit": hits[:3], "other:hit": hits[3:], "asked": hits + 1},
        {
            "accuracy": Ratio("hit"),
            "share": Ratio("hit", "asked"),
            "one": Ratio("one:hit"),
            "other": Ratio("other:hit"),
        },
        {"mean": ("one", "other")},
        plain={"gap": 0.5},
        ids=ids,
    )


def store(path: Path, result: TaskResult, **fields: object) -> Path:
    record = {"task": "t", "version": 1, "model": "m", **result_record(result), **fields}
    write_json(path, record)
    return path


def test_scores_are_ratios_of_sums_and_means_of_scores():
    scores = make().scores
    assert scores["accuracy"] == 6 / 8
    assert scores["share"] == 6 / 14
    assert scores["mean"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert scores["gap"] == 0.5
    empty = TaskResult(1, {"a": np.zeros(1), "b": np.zeros(1)}, {"s": Ratio("a", "b")})
    assert empty.scores == {"s": 0.0}


def test_data_sets_are_resampled_each_by_itself_and_columns_of_one_together():
    names = ("one:hit", "one:copy", "other:hit")
    result = TaskResult(8, dict.fromkeys(names, HITS), {name: Ratio(name) for name in names})
    samples = {k: v[1:] for k, v in score_samples(result, resamples=400, seed=0).items()}
    np.testing.assert_array_equal(samples["one:hit"], samples["one:copy"])
    assert abs(np.corrcoef(samples["one:hit"], samples["other:hit"])[0, 1]) < 0.15


@pytest.mark.parametrize(
    "column",
    [
        np.array([0, 9, 3]),
        np.array([True, False]).astype(np.int64),
        np.array([[1, 0], [2, 9]]),
        np.array([10, 2]),
        np.array([-1, 2]),
        np.array([0.5, 1 / 3]),
        np.array([[0.5], [1.5]]),
    ],
    ids=str,
)
def test_columns_survive_packing(column):
    stored = json.loads(json.dumps(pack(column)))
    found = unpack(stored)
    np.testing.assert_array_equal(found, column)
    assert found.dtype == column.dtype


def test_small_numbers_are_digits():
    assert pack(np.array([1, 0, 9])) == "109"
    assert pack(np.array([[1, 0], [0, 3]])) == ["10", "03"]
    assert pack(np.array([True, False])) == "10"


def test_a_file_gives_back_what_differences_need(tmp_path):
    stored = read_result(store(tmp_path / "a.json", make()))
    for name, values in score_samples(make(), seed=4).items():
        np.testing.assert_array_equal(score_samples(stored, seed=4)[name], values)
    record = stored.record
    assert record["scores"] == make().scores
    low, high = record["intervals"]["accuracy"]
    assert low < 6 / 8 < high
    assert "gap" not in record["intervals"]


def test_throne_files_give_back_all_of_thrones_scores(tmp_path):
    rng = np.random.default_rng(0)
    votes, present = rng.choice([0, 9, 9, 5], size=(30, 6)), rng.random((30, 6)) < 0.5
    columns = throne_columns(votes, present)
    result = TaskResult(30, columns, derived="throne", ids=("x",))
    assert result.scores == pytest.approx(throne_scores(votes, present))
    stored = read_result(store(tmp_path / "a.json", result))
    samples = score_samples(stored, resamples=40, seed=1)
    draws = np.random.default_rng(1).integers(30, size=(40, 30))
    slow = [throne_scores(votes[d], present[d]) for d in draws]
    for name, values in samples.items():
        np.testing.assert_allclose(values[1:], [row[name] for row in slow], err_msg=name)


def test_differences_are_paired(tmp_path):
    rng = np.random.default_rng(0)
    easy = rng.random(300)
    a, b = (easy < 0.5).astype(int), (easy < 0.55).astype(int)
    results = [
        read_result(
            store(tmp_path / f"{n}.json", TaskResult(300, {"h": h}, {"s": Ratio("h")}), model=n)
        )
        for n, h in (("a", a), ("b", b))
    ]
    found = compare_results(results)
    (row,) = found.rows
    (difference,) = row.differences
    assert found.models == ["a", "b"]
    assert row.values == [a.mean(), b.mean()]
    expected = paired_interval(b, a, resamples=1000)
    assert difference == pytest.approx(expected)
    assert difference is not None
    assert difference.low > 0  # while the two intervals overlap by far
    own = [result.record["intervals"]["s"] for result in results]
    assert own[0][1] > own[1][0]


def test_results_of_other_samples_or_versions_are_not_compared(tmp_path):
    first = store(tmp_path / "a.json", make())
    other = store(tmp_path / "b.json", make(ids=("a", "c")))
    with pytest.raises(DataError, match=r"differ in samples; .*--limit"):
        compare_results([read_result(first), read_result(other)])
    newer = store(tmp_path / "c.json", make(), version=2)
    with pytest.raises(DataError, match="differ in version"):
        compare_results([read_result(first), read_result(newer)])
    plain = replace(make(), items={}, ratios={}, means={})
    (row,) = compare_results([read_result(store(tmp_path / f"{n}.json", plain)) for n in "de"]).rows
    assert row.differences == [None]


def test_folders_are_collected_by_task_and_what_is_no_result_is_told(tmp_path):
    for model in ("x", "y"):
        for task in ("s", "t"):
            store(tmp_path / model / f"{task}.json", make(), task=task, model=model)
        (tmp_path / model / "mmeb-report.json").write_text('{"metadata": {}}')
    found = results_by_task([tmp_path / "x", tmp_path / "y"])
    assert [[(r.task, r.model) for r in own] for own in found] == [
        [("s", "x"), ("s", "y")],
        [("t", "x"), ("t", "y")],
    ]
    with pytest.raises(DataError, match="cannot be read"):
        results_by_task([tmp_path / "nothing.json"])
    with pytest.raises(DataError, match="not a result of"):
        results_by_task([tmp_path / "x" / "mmeb-report.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no result of"):
        results_by_task([tmp_path / "empty"])


def test_compare_takes_paths_and_adds_what_is_published(tmp_path, capsys):
    for model in ("x", "y"):
        store(tmp_path / model / "coco-5k.json", make(), task="coco-5k", model=model)
    (comparison,) = compare([tmp_path / "x", str(tmp_path / "y" / "coco-5k.json")])
    assert (comparison.task, comparison.models) == ("coco-5k", ["x", "y"])
    (difference,) = comparison.rows[0].differences
    assert difference == (0, 0, 0)
    assert comparison.published
    assert {row.task for row in comparison.published} == {"coco-5k"}
    assert capsys.readouterr() == ("", "")


def test_published_rows_are_of_known_tasks_in_fractions_and_their_means_agree():
    rows = published()
    assert len(rows) > 20
    assert {row.task for row in rows} <= set(TASKS)
    assert all(0 < value < 1 for row in rows for value in row.scores.values())
    assert all(row.source for row in rows)
    sizes = {
        "mmeb": {"classification": 10, "vqa": 10, "retrieval": 12, "grounding": 4},
        "mmeb-video": {"classification": 5, "qa": 5, "retrieval": 5, "moment": 3},
        "mmeb-visdoc": {"vidore-v1": 10, "vidore-v2": 4, "visrag": 6, "ood": 4},
    }
    assert {row.task for row in rows} >= set(sizes)
    for row in rows:
        if row.task in sizes:
            own = sizes[row.task]
            mean = sum(size * row.scores[name] for name, size in own.items()) / sum(own.values())
            assert mean == pytest.approx(row.scores["all"], abs=0.0015), row.model
