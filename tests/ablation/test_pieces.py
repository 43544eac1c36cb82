"""Arms, runs, and numbers from result files, by hand-checkable values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cafe.ablation.arms import arms, common_recipe, difference, run_recipe, runs
from cafe.ablation.claims import QUESTIONS, questions
from cafe.ablation.combine import difference_interval, mean_interval, run_samples
from cafe.ablation.folder import Folder, check_base, check_run, weights_digest
from cafe.errors import DataError, RecipeError
from cafe.evaluation.results import StoredResult, result_record
from cafe.evaluation.scoring import RESAMPLES, Ratio
from cafe.evaluation.task import TaskResult
from cafe.metrics import Interval
from cafe.recipes import Ablation, load_ablation, load_recipe

SHIPPED = Path(__import__("cafe.recipes").recipes.__file__).parent / "ablate.yaml"


def ablation(*overrides: str) -> Ablation:
    return load_ablation(SHIPPED, overrides)


# ---------------------------------------------------------------- the recipe


def test_the_shipped_ablation_is_the_demos_run_with_other_weights():
    made = ablation()
    common = common_recipe(made)
    demo = load_recipe(SHIPPED.with_name("demo.yaml"))
    assert common.optimizer == demo.optimizer
    assert common.batch == demo.batch
    assert common.schedule == demo.schedule
    assert common_recipe(ablation("training.schedule.steps=7")).schedule.steps == 7
    assert len(made.seeds) >= 3


def test_what_a_model_gains_by_its_own_words_is_a_shipped_ablation():
    made = load_ablation(SHIPPED.with_name("own-words.yaml"), [])
    plain = common_recipe(made)
    names = [arm.name for arm in arms(made, plain.objective)]
    assert names == ["language", "contrastive", "joint", *made.variants]
    losses = {"latent_tokens", "thought_weight", "match_weight", "multi_vector_weight"}
    assert not any(getattr(plain.objective, loss) for loss in losses)
    every = common_recipe(made, "all-together")
    assert all(getattr(every.objective, loss) for loss in losses)
    assert len(made.seeds) >= 3


def test_every_variant_has_the_same_claims_fixed_beforehand():
    found = questions(["one", "two"])
    assert found[: len(QUESTIONS)] == QUESTIONS
    added = found[len(QUESTIONS) :]
    assert [q.text.split()[1] for q in added] == ["one"] * 3 + ["two"] * 3
    by_variant = [[(c.score, c.baseline, c.sign, c.above) for c in q.claims] for q in added]
    assert by_variant[:3] == by_variant[3:]
    margins = {(c.score, c.other): (c.sign, c.above) for c in added[2].claims}
    assert margins[("presence/question_accuracy", "joint")] == (1, -0.02)
    assert margins[("caption/caption_loss", "joint")] == (-1, -0.02)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seedz=[1]", "override 'seedz=[1]': unknown recipe key seedz; did you mean seeds?"),
        ("seeds=[]", "override 'seeds=[]': seeds is [], List should have at least 1 item"),
        ("seeds=[1, 1]", "seeds has 1 twice; name each once"),
        ("sweep=[0]", "override 'sweep=[0]': sweep.0 is 0, expected greater than 0"),
        ("sweep_seeds=9", "sweep_seeds is 9, but there are 3 seeds"),
        ("test_scenes=501", "test_scenes is 501, expected less than or equal to 500"),
    ],
)
def test_a_wrong_key_or_value_is_one_sentence(override, says):
    with pytest.raises(RecipeError) as caught:
        ablation(override)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("recipe=demmo", "recipe is 'demmo', which does not ship with cafe"),
        ("recipe=nowhere.yaml", "nowhere.yaml: cannot be read"),
        ("training.schedule.stepz=3", "unknown recipe key schedule.stepz; did you mean"),
        ("training.objective.language_weight=0", "one of its losses has weight 0"),
    ],
)
def test_a_wrong_training_recipe_is_one_sentence(override, says):
    with pytest.raises(RecipeError) as caught:
        common_recipe(ablation(override))
    assert says in str(caught.value)


def test_a_recipe_file_is_relative_to_the_ablation(tmp_path):
    (tmp_path / "run.yaml").write_text((SHIPPED.with_name("demo.yaml")).read_text())
    file = tmp_path / "a.yaml"
    file.write_text("recipe: run.yaml\nseeds: [4]\ntasks: [gap]\n")
    assert common_recipe(load_ablation(file)).schedule.steps


def test_the_arms_are_each_loss_alone_both_and_the_sweep():
    weights = "training.objective={contrastive_weight: 1, language_weight: 2}"
    made = ablation(weights, "sweep=[0.1, 3]", "sweep_seeds=1", "seeds=[5, 6]")
    common = common_recipe(made)
    every = arms(made, common.objective)
    assert [(a.name, a.contrastive_weight, a.language_weight, a.seeds) for a in every] == [
        ("language", 0, 2, (5, 6)),
        ("contrastive", 1, 0, (5, 6)),
        ("joint", 1, 2, (5, 6)),
        ("joint-0.1", 0.1, 2, (5,)),
        ("joint-3", 3, 2, (5,)),
    ]
    assert [run.name for run in runs(every)] == [
        "language/seed-5", "contrastive/seed-5", "joint/seed-5", "joint-0.1/seed-5",
        "joint-3/seed-5", "language/seed-6", "contrastive/seed-6", "joint/seed-6",
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="sweep has 1, the recipe's own contrastive weight"):
        arms(ablation("sweep=[1]"), common.objective)


def test_runs_differ_in_weights_seed_and_folder_and_in_nothing_else():
    common = common_recipe(ablation())
    every = {run.name: run for run in runs(arms(ablation(), common.objective))}
    scenes = Path("/scenes")

    def recipe(name: str) -> Any:
        return run_recipe(common, every[name], scenes, Path(name))

    joint, language = recipe("joint/seed-1"), recipe("language/seed-1")
    assert (joint.seed, joint.output_dir) == (1, Path("joint/seed-1"))
    assert [s.path for s in joint.data] == ["/scenes/captions.json", "/scenes/questions.json"]
    assert difference(joint, joint) is None
    same = language.model_copy(update={"objective": joint.objective})
    assert difference(joint, same) is None
    assert difference(joint, language) == ("objective.contrastive_weight is 0.0 there and 1.0 here")
    # The questions have no pairs to contrast, so a run without the language loss omits them.
    contrastive = recipe("contrastive/seed-1")
    assert [Path(s.path).name for s in contrastive.data] == ["captions.json"]


def test_a_run_in_bf16_is_the_run_that_auto_means_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As an earlier version wrote it, whose recipes said bf16."""
    monkeypatch.setattr(
        "cafe.ablation.folder.resolved_precision", lambda asked, _: asked.replace("auto", "bf16")
    )
    common = common_recipe(ablation())
    run = runs(arms(ablation(), common.objective))[0]
    place = Folder(tmp_path)
    recipe = run_recipe(common, run, Path("/scenes"), place.run(run))
    assert recipe.precision == "auto"
    place.run(run).mkdir(parents=True)
    kept = place.run(run) / "recipe.yaml"
    recipe.model_copy(update={"precision": "bf16"}).save(kept)
    check_run(place, run, recipe)
    recipe.model_copy(update={"precision": "fp32"}).save(kept)
    with pytest.raises(DataError, match="precision is 'fp32' there and 'bf16' here"):
        check_run(place, run, recipe)


# ---------------------------------------------------------------- numbers


def stored(task: str, result: TaskResult) -> StoredResult:
    record = {"task": task, "version": 1, **result_record(result)}
    return StoredResult(record, result.items, result.ratios, result.means, result.derived)


def accuracy(hits: list[int]) -> StoredResult:
    ids = tuple(map(str, range(len(hits))))
    return stored(
        "t", TaskResult(len(hits), {"hit": np.array(hits)}, {"acc": Ratio("hit")}, ids=ids)
    )


def test_a_run_gives_a_row_per_score_that_starts_with_its_value():
    rows = run_samples([accuracy([1, 0, 1, 1])], "r")
    assert rows["t/acc"].shape == (1 + RESAMPLES,)
    assert rows["t/acc"][0] == 0.75
    assert set(np.unique(rows["t/acc"])) <= {0, 0.25, 0.5, 0.75, 1}


def test_scores_without_columns_vary_by_their_own_interval_run_by_run():
    gap = stored("gap", TaskResult(2, plain={"gap": 0.5, "rank": 3.0},
                               intervals={"gap": Interval(0.5, 0.4, 0.6)}))  # fmt: skip
    a, b = run_samples([gap], "a"), run_samples([gap], "b")
    assert a["gap/gap"][0] == 0.5
    assert a["gap/gap"][1:].std() == pytest.approx(0.1 / 1.96, rel=0.1)
    assert abs(np.corrcoef(a["gap/gap"][1:], b["gap/gap"][1:])[0, 1]) < 0.15
    assert (a["gap/rank"] == 3).all()
    assert (run_samples([gap], "a")["gap/gap"] == a["gap/gap"]).all()


def test_differences_are_paired_by_scene_and_seed():
    rng = np.random.default_rng(0)
    hits = rng.integers(2, size=(3, 200))
    better = hits.copy()
    better[:, :20] = 1  # the same scenes are right in addition, in every seed
    own = {seed: run_samples([accuracy(h.tolist())], f"b{seed}") for seed, h in enumerate(better)}
    other = {seed: run_samples([accuracy(h.tolist())], f"a{seed}") for seed, h in enumerate(hits)}
    paired = difference_interval(own, other, "t/acc")
    gained = (better - hits).mean()
    assert paired.estimate == pytest.approx(gained)
    alone = mean_interval(list(own.values()), "t/acc")
    assert alone.estimate == pytest.approx(better.mean())
    assert (paired.high - paired.low) < 0.7 * (alone.high - alone.low)
    # Against another seed's model, the same numbers are not paired.
    shifted = {seed: other[(seed + 1) % 3] for seed in own}
    unpaired = difference_interval(own, shifted, "t/acc")
    assert (unpaired.high - unpaired.low) > 1.5 * (paired.high - paired.low)


def test_a_difference_can_be_from_a_share_of_the_other_and_uses_common_seeds():
    rows = {seed: run_samples([accuracy([1] * seed + [0] * (10 - seed))], "r") for seed in (2, 4)}
    half = difference_interval(rows, {4: rows[4], 9: rows[2]}, "t/acc", scale=0.5)
    assert half.estimate == pytest.approx(0.4 - 0.2)
    with pytest.raises(ValueError, match="no seed in common"):
        difference_interval(rows, {9: rows[2]}, "t/acc")


# ---------------------------------------------------------------- the folder


def test_an_ablation_of_another_base_is_an_error(tmp_path, small_dir):
    folder = Folder(tmp_path)
    check_base(folder, str(small_dir))
    check_base(folder, str(small_dir))
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"weights")
    assert weights_digest(other) != weights_digest(small_dir)
    with pytest.raises(DataError, match="holds an ablation of another base"):
        check_base(folder, str(other))
