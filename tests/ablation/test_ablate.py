"""An ablation from end to end with a small random model: interrupted, resumed, reported."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import cafe.ablation.run as ablate_run
from cafe.ablation.arms import Run, arms, common_recipe, run_recipe
from cafe.ablation.run import run_ablation
from cafe.cli import main
from cafe.errors import DataError, RecipeError
from cafe.recipes import Ablation, load_ablation
from cafe.training.log import read_log
from cafe.training.stopping import Interrupted

TASKS = ["scenes-retrieval", "gap", "caption"]
RUNS = [f"{arm}/seed-{seed}" for seed in (0, 1) for arm in ("language", "contrastive", "joint")]
RUNS.insert(3, "joint-0.5/seed-0")


def ablation(model: Path, **changes: Any) -> Ablation:
    shipped = Path(__import__("cafe.recipes").recipes.__file__).parent / "ablate.yaml"
    keys = {
        "training.model": model,
        "training.schedule.steps": 2,
        "training.schedule.warmup": 0,
        "training.batch.examples": 8,
        "training.batch.chunk": 4,
        "training.batch.workers": 0,
        "training.precision": "fp32",
        # A larger vocabulary changes the language loss of a random model, in the arms that have it.
        "training.objective.latent_tokens": 0,
        "seeds": "[0, 1]",
        "sweep": "[0.5]",
        "train_scenes": 16,
        "train_questions": 2,
        "test_scenes": 8,
        "tasks": json.dumps(TASKS),
    }
    return load_ablation(shipped, [f"{key}={value}" for key, value in (keys | changes).items()])


def quiet() -> Console:
    return Console(quiet=True)


def done(out: Path) -> list[str]:
    """Runs that are evaluated."""
    found = {p.parent.parent.relative_to(out).as_posix() for p in out.glob("*/*/results/*.json")}
    return [run for run in RUNS if run in found]


@pytest.fixture(scope="module")
def finished(small_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an ablation that was stopped twice, while training and while evaluating."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    made = ablation(small_dir)
    train, run_tasks = ablate_run.train, ablate_run.run_tasks

    def stop_third(recipe: Any, **options: Any) -> Any:
        if recipe.output_dir == out / RUNS[2]:
            return train(recipe, on_step=lambda _: signal.raise_signal(signal.SIGINT), **options)
        return train(recipe, **options)

    def stop_fifth(load: Any, name: str, tasks: Any, options: Any) -> Any:
        for outcome in run_tasks(load, name, tasks, options):
            yield outcome
            if options.out == out / RUNS[4] / "results":
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate_run, "train", stop_third)
        with pytest.raises(Interrupted, match=r"interrupted while training joint/seed-0.*resumes"):
            run_ablation(made, out, console=quiet())
        assert done(out) == RUNS[:2]
        assert [r.step for r in read_log(out / RUNS[2] / "log.jsonl")] == [1]
        patch.setattr(ablate_run, "train", train)
        patch.setattr(ablate_run, "run_tasks", stop_fifth)
        with pytest.raises(KeyboardInterrupt):
            run_ablation(made, out, console=quiet())
    assert done(out) == RUNS[:5]
    assert len(list((out / RUNS[4] / "results").glob("*.json"))) == 1
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/*/results/*.json")}
    run_ablation(made, out, console=quiet())
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    return out


@pytest.fixture(scope="module")
def numbers(finished: Path) -> dict[str, Any]:
    return json.loads((finished / "results.json").read_text())


@pytest.mark.slow
def test_every_run_is_there_and_models_are_gone(finished):
    assert done(finished) == RUNS
    assert not list(finished.glob("*/*/model"))
    assert not list(finished.glob("*/*/checkpoints"))
    for run in RUNS:
        assert [r.step for r in read_log(finished / run / "log.jsonl")] == [1, 2]


@pytest.mark.slow
def test_all_arms_of_a_seed_see_the_same_batches(finished):
    """The losses of the first step, before anything has moved, are those of the joint arm."""
    first = {run: read_log(finished / run / "log.jsonl")[0] for run in RUNS}
    for seed in (0, 1):
        joint = first[f"joint/seed-{seed}"]
        assert first[f"language/seed-{seed}"].language == pytest.approx(joint.language, rel=1e-5)
        contrastive = first[f"contrastive/seed-{seed}"].contrastive
        assert contrastive == pytest.approx(joint.contrastive, rel=1e-5)
    assert first["language/seed-0"].language != first["language/seed-1"].language
    assert first["language/seed-0"].contrastive == first["contrastive/seed-0"].language == 0


@pytest.mark.slow
def test_a_stopped_run_ends_as_one_that_was_not(finished, small_dir, tmp_path):
    again = tmp_path / "again"
    run_ablation(ablation(small_dir, sweep="[]", seeds="[0]"), again, console=quiet())
    for task in TASKS:
        path = Path(RUNS[2]) / "results" / f"{task}.json"
        own, other = (json.loads((root / path).read_text()) for root in (again, finished))
        assert own["scores"] == pytest.approx(other["scores"], rel=1e-5)


@pytest.mark.slow
def test_means_and_differences_are_those_of_the_result_files(finished, numbers):
    def score(run: str) -> float:
        record = json.loads((finished / run / "results" / "caption.json").read_text())
        return record["scores"]["caption_loss"]

    runs = {run: score(run) for run in RUNS}
    for arm in ("language", "contrastive", "joint"):
        found = numbers["arms"][arm]["scores"]["caption/caption_loss"]
        own = [runs[f"{arm}/seed-{seed}"] for seed in (0, 1)]
        assert found["runs"] == pytest.approx(own)
        assert found["mean"] == pytest.approx(sum(own) / 2)
        assert found["interval"][0] < found["mean"] < found["interval"][1]
    wanted = sum(runs[f"joint/seed-{s}"] - runs[f"language/seed-{s}"] for s in (0, 1)) / 2
    estimate = numbers["differences"]["joint - language"]["caption/caption_loss"][0]
    assert estimate == pytest.approx(wanted)
    assert numbers["arms"]["joint-0.5"]["seeds"] == [0]
    assert all(s > 0 for s in numbers["arms"]["joint"]["training_seconds"])
    seconds = json.loads((finished / "seconds.json").read_text())
    assert numbers["seconds"] == pytest.approx(sum(seconds.values()), abs=0.1)


@pytest.mark.slow
def test_the_verb_resumes_and_writes_the_report_to_its_path(
    finished, small_dir, monkeypatch, tmp_path, capsys
):
    def nothing(*_: Any, **__: Any) -> None:
        raise AssertionError("everything exists already")

    monkeypatch.setattr(ablate_run, "train", nothing)
    monkeypatch.setattr(ablate_run, "run_tasks", nothing)
    monkeypatch.setenv("CAFE_DEBUG", "0")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps(ablation(small_dir).model_dump(mode="json")))
    words = ["cafe", "ablate", str(recipe), "seeds=[0, 1]", "--out", str(finished)]
    monkeypatch.setattr(sys, "argv", [*words, "--report", str(tmp_path / "r.md")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    text = (tmp_path / "r.md").read_text()
    assert "'seeds=[0, 1]' --report" in text
    assert str(finished) not in text
    assert re.search(r"\*\*\d+\. Does the modality gap close\?\*\*", text)
    assert len(list((tmp_path / "r").glob("*.png"))) == 4
    monkeypatch.setattr(sys, "argv", [*words[:2], "seedz=[1]", "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "did you mean seeds?" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"training.optimizer.learning_rate": 0.1},
            "belongs to another run: optimizer.learning_rate",
        ),
        ({"test_scenes": 9}, "is for 8 test scenes, not 9"),
    ],
)
def test_another_ablation_in_the_folder_is_an_error(finished, small_dir, changes, says):
    with pytest.raises(DataError, match=says):
        run_ablation(ablation(small_dir, **changes), finished, console=quiet())


def test_an_unknown_task_is_an_error_before_any_work(small_dir, tmp_path):
    made = ablation(small_dir, tasks='["pope"]')
    with pytest.raises(RecipeError, match="tasks: pope is not a task on scenes; choose from"):
        run_ablation(made, tmp_path / "out", console=quiet())
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- variants


@pytest.mark.slow
def test_variants_are_trained_and_compared_with_joint(small_dir, tmp_path):
    """Each changes keys of the joint run; the base writes the thoughts that one of them needs."""
    variants = {
        "matcher": {"objective": {"match_weight": 0.5}},
        "thought": {"objective": {"thought_weight": 0.5}, "data.0.thoughts": "thoughts.jsonl"},
        "late": {"objective": {"multi_vector_weight": 0.5, "multi_vector_dim": 8}},
    }
    made = ablation(
        _speaking(small_dir, tmp_path),
        seeds="[0]",
        sweep="[]",
        variants=json.dumps(variants),
        tasks='["scenes-retrieval", "scenes-tokens", "scenes-match"]',
    )
    out = tmp_path / "out"
    run_ablation(made, out, console=quiet())
    logs = {name: read_log(out / name / "seed-0" / "log.jsonl")[0] for name in ("joint", *variants)}
    assert [log.match is not None for log in logs.values()] == [False, True, False, False]
    assert [log.thought is not None for log in logs.values()] == [False, False, True, False]
    assert logs["matcher"].contrastive == pytest.approx(logs["joint"].contrastive, rel=1e-5)
    assert logs["thought"].language == pytest.approx(logs["joint"].language, rel=1e-5)
    found = json.loads((out / "results.json").read_text())
    assert {"matcher - joint", "thought - joint"} < set(found["differences"])
    by_tokens = "scenes-tokens/image_to_text_recall@1"  # only of models that have token vectors
    assert [name for name, arm in found["arms"].items() if by_tokens in arm["scores"]] == ["late"]
    text = (out / "results.md").read_text()
    assert "| joint | matcher | thought | late |" in text
    assert "| statements judged rightly (chance 50) |" in text
    assert "matcher − joint" in text
    assert re.search(r"\*\*\d+\. Does matcher find more than joint training alone\?", text)
    assert "| match question, near misses: better | matcher" in text


def _speaking(small_dir: Path, tmp_path: Path) -> Path:
    """A copy of the small model that says something, so that there are thoughts."""
    from cafe.model.tiny import tiny_model
    from cafe.model.vlm import CAFe
    from helpers.models import SMALL

    processor = CAFe.from_pretrained(small_dir, device="cpu").processor
    torch.manual_seed(2)
    inner = tiny_model(processor, **SMALL)
    inner.config.tie_word_embeddings = inner.config.text_config.tie_word_embeddings = False
    inner.lm_head.weight = torch.nn.Parameter(torch.randn_like(inner.lm_head.weight) / 4)
    CAFe(inner, processor).save_pretrained(tmp_path / "speaking")
    return tmp_path / "speaking"


@pytest.mark.parametrize("key", ["seed", "output_dir"])
def test_a_variant_changes_no_key_of_the_ablation_itself(key, small_dir):
    with pytest.raises(RecipeError, match=f"variants sets {key}"):
        ablation(small_dir, variants=json.dumps({"x": {key: 3}}))


def test_without_the_contrastive_loss_nothing_is_added_to_embeddings(small_dir, tmp_path):
    """Untrained latent tokens would stand in the embeddings of the language-only arm."""
    made = ablation(small_dir, **{"training.objective.latent_tokens": 2})
    common = common_recipe(made)
    assert common.objective.latent_tokens > 0, "or this shows nothing"
    for arm in arms(made, common.objective):
        recipe = run_recipe(common, Run(arm, 0), tmp_path, tmp_path)
        assert (recipe.objective.latent_tokens > 0) == (arm.contrastive_weight > 0)


@pytest.mark.parametrize("name", ["joint", "base", "Upper", "a b", "../x"])
def test_a_variant_needs_a_name_of_its_own(name, small_dir):
    with pytest.raises(RecipeError, match="cannot name a further arm"):
        ablation(small_dir, variants=json.dumps({name: {}}))


def test_a_variant_with_a_wrong_key_is_refused_before_any_work(small_dir, tmp_path):
    made = ablation(small_dir, variants='{"x": {"objective": {"match_wait": 1}}}')
    with pytest.raises(RecipeError, match="match_weight"):
        run_ablation(made, tmp_path / "out", console=quiet())
    assert not (tmp_path / "out").exists()
