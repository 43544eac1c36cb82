"""Suites are resumed, failures stop nothing, ranks share the work, and the verbs say it all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch.multiprocessing as multiprocessing

import cafe.evaluation.registry as tasks
from cafe.errors import CheckpointError, DataError
from cafe.evaluation.journal import Journal
from cafe.evaluation.model_calls import CachedCalls
from cafe.evaluation.registry import SUITES, TASKS, suite_data
from cafe.evaluation.run import Options, Outcome, evaluate, run_tasks
from cafe.evaluation.scoring import Ratio
from cafe.evaluation.task import Task, TaskResult, TaskSetup
from cafe.model.captions import CAPTION_WEIGHT
from cafe.ranks import Rank
from cafe.types import Conversation, Image, user
from helpers.processes import free_port
from helpers.rank_worker import worker

QUICK = SUITES["quick"]


def run(model: Any, names: Sequence[str], options: Options, **more: Any) -> list[Outcome]:
    return list(run_tasks(lambda: model, "m", names, options, **more))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[TaskSetup]:
    """Two made-up tasks; the second fails as long as "broken" is in its data's name."""
    calls: list[TaskSetup] = []

    def measure(setup: TaskSetup) -> TaskResult:
        calls.append(setup)
        if "broken" in str(setup.data):
            raise DataError("half of it is missing")
        return TaskResult(
            3, {"hit": np.array([1, 0, 1])}, {"accuracy": Ratio("hit")}, ids=("a", "b")
        )

    for name in ("one", "two"):
        monkeypatch.setitem(tasks.TASKS, name, Task(measure, {}, hub=f"hub/{name}"))
    return calls


def test_a_result_that_cannot_be_written_is_shown_before_the_error(small_model, tmp_path, counted):
    (tmp_path / "out").write_text("a file where the folder should be")
    outcomes = run_tasks(lambda: small_model, "m", ["one"], Options(out=tmp_path / "out"))
    shown = next(outcomes)
    assert shown.record is not None
    assert shown.record["scores"]["accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(DataError, match=r"out/one\.json: cannot be written"):
        next(outcomes)


@pytest.mark.slow
def test_every_task_of_the_quick_suite_runs_a_real_model(small_model, tmp_path):
    found = run(small_model, QUICK, Options(limit=6, out=tmp_path), suite="quick")
    assert [(o.task, o.state, o.reason) for o in found] == [(n, "measured", "") for n in QUICK]
    for outcome in found:
        record = json.loads((tmp_path / f"{outcome.task}.json").read_text())
        assert record == json.loads(json.dumps(outcome.record))
        assert record["scores"]
        assert {"version", "count", "settings", "packages", "seed", "samples"} <= set(record)
        intervals = {k: v for k, v in record["intervals"].items() if k in record["items"]}
        assert all(low <= high for low, high in intervals.values())
    assert not (tmp_path / ".unfinished").exists()


def test_a_finished_task_is_kept_and_force_measures_it_again(small_model, tmp_path, counted):
    first = run(small_model, ["one"], Options(out=tmp_path))
    never_loaded: Any = None
    again = list(run_tasks(lambda: never_loaded, "m", ["one"], Options(out=tmp_path)))
    assert [o.state for o in again] == ["kept"]
    assert again[0].record == json.loads(json.dumps(first[0].record))
    forced = run(small_model, ["one"], Options(out=tmp_path, force=True))
    assert [o.state for o in forced] == ["measured"]
    assert len(counted) == 2


def test_a_result_of_another_model_or_limit_is_in_the_way(small_model, tmp_path, counted):
    run(small_model, ["one"], Options(out=tmp_path))
    with pytest.raises(DataError, match=r"one\.json is the result of another limit.*--force"):
        run(small_model, ["one"], Options(out=tmp_path, limit=2))
    with pytest.raises(DataError, match="the result of another model "):
        list(run_tasks(lambda: small_model, "other", ["one"], Options(out=tmp_path)))


def test_a_task_that_fails_stops_no_other(small_model, tmp_path, counted):
    (tmp_path / "broken" / "one").mkdir(parents=True)
    options = Options(data=tmp_path / "broken", out=tmp_path / "out")
    found = run(small_model, ["one", "two"], options, suite="paper")
    assert [(o.task, o.state) for o in found] == [("one", "failed"), ("two", "measured")]
    assert found[0].reason == "half of it is missing"
    assert [str(s.data) for s in counted] == [str(tmp_path / "broken" / "one"), "hub/two"]


def test_a_model_that_cannot_be_loaded_is_one_error_not_one_of_each_task(tmp_path, counted):
    def load() -> Any:
        raise CheckpointError("model 'nope': no such directory")

    tasks = run_tasks(load, "tiny", ["one", "two"], Options(out=tmp_path / "out"))
    with pytest.raises(CheckpointError, match="no such directory"):
        next(tasks)
    assert not counted


def test_a_suite_finds_each_tasks_folder_or_says_which_is_missing(tmp_path):
    (tmp_path / "coco-5k").mkdir()
    assert suite_data("captioning", tmp_path) == tmp_path / "coco-5k"
    assert suite_data("pope", tmp_path) == "lmms-lab/POPE"
    assert suite_data("scenes-pope", None) is None
    with pytest.raises(DataError, match=r"mmeb: .*mmeb is not there; download"):
        suite_data("mmeb", tmp_path)
    with pytest.raises(DataError, match=r"mmeb: it needs a folder; download .* above mmeb with"):
        suite_data("mmeb", None)
    assert {name for own in SUITES.values() for name in own} <= set(TASKS)


def test_a_journal_survives_a_cut_line_and_reads_all_writers(tmp_path):
    first, second = Journal(tmp_path / "j", 0), Journal(tmp_path / "j", 1)
    first.put(("a", 1), "x")
    second.put("b", [1, 2])
    first.close(), second.close()
    with (tmp_path / "j" / "0.jsonl").open("a") as file:
        file.write('["half')
    third = Journal(tmp_path / "j", 0)
    assert third.loaded == 2
    assert (third["a", 1], third["b"]) == ("x", [1, 2])
    third.put("c", None)
    third.close()
    assert Journal(tmp_path / "j").loaded == 3
    assert ("a", 2) not in third
    Journal().put("kept in memory only", 1)


def test_what_was_asked_before_is_not_asked_again():
    class Calls:
        inputs = 0

        def with_prompt(self, prompt: str) -> Any:
            return self

        def encode(self, inputs: Sequence[Any]) -> np.ndarray:
            self.inputs += len(inputs)
            return np.arange(len(inputs), dtype=np.float32)[:, None] + self.inputs

        def generate(self, conversations: Sequence[Conversation], n: int) -> list[str]:
            self.inputs += len(conversations)
            return [f"{c[0].text} {n}" for c in conversations]

        def score_examples(self, examples: Sequence[Any]) -> list[Any]:
            return []

    image = Image(b"1")
    calls: Any = Calls()
    remembering = CachedCalls(calls, "p")
    first = remembering.encode([image, "a", user("a"), image])
    assert calls.inputs == 2
    np.testing.assert_array_equal(first[0], first[3])
    np.testing.assert_array_equal(remembering.encode(["a", image]), first[[1, 0]])
    assert calls.inputs == 2
    remembering.with_prompt("q").encode(["a"])
    assert calls.inputs == 3
    assert remembering.generate([user("x"), user("x")], 5) == ["x 5", "x 5"]
    remembering.generate([user("x")], 6)
    assert calls.inputs == 5


def test_one_process_is_a_world_of_one():
    assert Rank().share([3, 1], sorted) == [1, 3]


@pytest.mark.slow
def test_ranks_share_every_call_and_an_error_reaches_all_of_them(tmp_path):

    port = free_port()
    multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0]["result"] == found[1]["result"] == [[0, 10, 20, 30, 40], ["a!", "b!", "c!"]]
    assert [f["own"] for f in found] == [[[0, 2, 4], ["a", "c"]], [[1, 3], ["b"]]]
    assert [f["error"] for f in found] == ["rank 1 has no memory"] * 2


# ---------------------------------------------------------------- the verbs


@pytest.fixture
def cafe(monkeypatch, command_line, small_model):
    import cafe.model.vlm

    def load(name: str, **_: Any) -> Any:
        return small_model

    monkeypatch.setattr(cafe.model.vlm.CAFe, "from_pretrained", load)
    return command_line


def test_evaluate_and_compare_from_the_command_line(cafe, tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    one = ("--task", "scenes-retrieval", "--limit", "5")
    code, out, err = cafe("evaluate", "m1", *one, "--json", a)
    assert (code, err) == (0, "")
    assert "scenes-retrieval  5 samples" in out
    assert "image_to_text_recall@1" in out
    assert "(kept)" in cafe("evaluate", "m1", *one, "--json", a)[1]
    cafe("evaluate", "m2", *one, "--json", b)
    code, out, err = cafe("compare", a, b)
    assert (code, err) == (0, "")
    assert "A  m1" in out
    assert "B  m2" in out
    assert "(+0.0000 [+0.0000, +0.0000] )" in out


def test_a_result_with_a_map_has_a_image_of_it_beside(cafe, tmp_path):
    one = ("evaluate", "m", "--task", "gap", "--limit", "5")
    code, out, err = cafe(*one, "--json", str(tmp_path))
    assert (code, err) == (0, "")
    assert f"  map: {tmp_path / 'gap.png'}\n" in out
    with PIL.Image.open(tmp_path / "gap.png") as image:
        assert (image.format, image.size) == ("PNG", (780, 720))
    assert "map:" not in cafe(*one)[1]


def test_what_a_result_cannot_tell_by_numbers_is_said(cafe, monkeypatch):
    details = {"empty_replies": 2, "evasive_replies": 7, "missing": ["K700", "MSVD"]}
    told = TaskResult(3, {"hit": np.array([1, 0, 1])}, {"accuracy": Ratio("hit")}, details=details)
    monkeypatch.setitem(tasks.TASKS, "one", Task(lambda _: told, {}))
    assert cafe("evaluate", "m", "--task", "one")[1].splitlines()[-3:] == [
        "  2 of the model's replies were empty",
        "  7 judges' replies were neither yes nor no and cast no vote",
        "  not found, so not measured: K700, MSVD",
    ]


def test_published_rows_stand_beside(cafe, tmp_path):
    record = {"task": "coco-5k", "version": 1, "model": "m", "scores": {"r": 0.5}, "samples": "x",
              "items": {}, "ratios": {}, "means": {}, "derived": None, "format": 1}  # fmt: skip
    (tmp_path / "coco-5k.json").write_text(json.dumps(record))
    out = cafe("compare", str(tmp_path / "coco-5k.json"))[1]
    assert "published: UniME LLaVA-OV-7B: text_to_image_recall@1 0.548" in out


def test_mistakes_on_the_command_line_are_one_line(cafe, tmp_path):
    code, _, err = cafe("evaluate", "m", "--task", "chess")
    assert code == 2
    assert err.startswith("error: chess: no such task; there are retrieval, caption")
    code, _, err = cafe("evaluate", "m", "--task", "pope", "--suite", "quick")
    assert (code, err) == (2, "error: name a --task or a --suite, not both\n")
    code, out, err = cafe("evaluate", "m", "--task", "mmeb", "--json", str(tmp_path))
    assert code == 2
    assert "mmeb  could not be run: no --data: this task reads a local folder" in out
    assert err == "error: 1 of 1 tasks could not be run: mmeb\n"


# ---------------------------------------------------------------------- the model's own captions


@pytest.mark.slow
def test_images_are_embedded_alone_with_captions_or_after_them(tmp_path):
    """Three ways to embed, three results; none is taken for another when a folder is reused."""
    found = {}
    for use in (False, True, "think"):
        out = tmp_path / str(use)
        records = evaluate("tiny", ["retrieval"], limit=6, caption=use, out=out)
        found[use] = records["retrieval"]
    assert "caption" not in found[False]["settings"]
    assert found[True]["settings"]["caption_weight"] == CAPTION_WEIGHT
    assert found["think"]["settings"]["caption"] == "think"
    assert "caption_weight" not in found["think"]["settings"]
    alone, together, after = (record["items"] for record in found.values())
    assert alone != together != after != alone
    with pytest.raises(DataError, match="another caption"):
        evaluate("tiny", ["retrieval"], limit=6, caption=True, out=tmp_path / "think")


def test_two_ways_to_use_captions_at_once(command_line):
    code, _, said = command_line("evaluate", "tiny", "--task", "gap", "--caption", "--think")
    assert code == 2
    assert "--caption and --think are two ways" in said
