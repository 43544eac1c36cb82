"""Recipes: what is valid, what every mistake says, and that a resolved recipe runs again."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import cafe.recipes
from cafe.errors import DataError, RecipeError
from cafe.recipes import Evaluate, Recipe, load_recipe
from cafe.recipes.base import parse_yaml

SMALLEST = """\
model: tiny
output_dir: out
data:
  - path: captions.json
batch:
  examples: 64
optimizer:
  learning_rate: 1e-3
schedule:
  steps: 10
"""
FOLDER = Path(cafe.recipes.__file__).parent
ABLATIONS = ("ablate", "own-words")
BUNDLED = sorted(path for path in FOLDER.glob("*.yaml") if path.stem not in ABLATIONS)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, list(overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_fill_what_the_file_leaves_out(recipe_file: Path):
    recipe = load_recipe(recipe_file)
    assert recipe.objective.temperature == 0.05
    assert recipe.batch.sharing == "trie"
    assert recipe.batch.chunk is None
    assert recipe.optimizer.betas == (0.9, 0.999)
    assert recipe.output_dir == Path("out")


def test_a_float_without_a_dot_is_a_number(recipe_file: Path):
    assert yaml.safe_load("1e-3") == "1e-3"  # the trap: PyYAML alone reads a string
    assert load_recipe(recipe_file).optimizer.learning_rate == 0.001
    assert load_recipe(recipe_file, ["optimizer.learning_rate=5E+0"]).optimizer.learning_rate == 5


def test_data_paths_start_at_the_recipes_folder(recipe_file: Path):
    recipe = load_recipe(recipe_file, ["data.0.image_root=images"])
    assert recipe.data[0].path == str(recipe_file.parent / "captions.json")
    # An override was typed in a shell, so it starts where the shell is.
    assert recipe.data[0].image_root == Path("images").absolute()


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.name)
def test_bundled_recipes_are_valid_and_survive_a_round_trip(path: Path, tmp_path: Path):
    assert_round_trip(load_recipe(path), tmp_path)


def test_there_are_bundled_recipes():
    assert "caption.yaml" in [path.name for path in BUNDLED]


def test_the_template_names_every_key():
    text = next(p for p in BUNDLED if p.name == "caption.yaml").read_text()
    template = yaml.safe_load(text)
    assert set(template) == set(Recipe.model_fields)
    example = text[text.index("evaluate: null") : text.index("\ncheckpoint:")]
    section = parse_yaml("\n".join(line[1:] for line in example.splitlines()[1:]))
    assert set(section) == set(Evaluate.model_fields)
    Evaluate.model_validate(section)
    for name in ("objective", "batch", "optimizer", "checkpoint", "log"):
        section = Recipe.model_fields[name].annotation
        assert set(template[name]) == set(section.model_fields)  # type: ignore[union-attr]


def test_every_key_is_described():
    def described(model: type) -> None:
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            assert field.description, f"{model.__name__}.{name}"

    for name in cafe.recipes.__all__:
        value = getattr(cafe.recipes, name)
        if isinstance(value, type):
            described(value)


def test_a_recipe_that_cannot_be_saved_leaves_the_earlier_one(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe, path = load_recipe(recipe_file), tmp_path / "saved.yaml"
    recipe.save(path)
    before = path.read_text()

    def full(path: Path, *_: object, **__: object) -> int:
        path.write_bytes(b"model")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match=r"saved\.yaml: cannot be written \(No space left on dev"):
        recipe.save(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir() if "unfinished" in file.name] == []


def test_a_saved_recipe_loads_from_another_folder(recipe_file: Path, tmp_path: Path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    assert_round_trip(load_recipe(recipe_file), folder)


def assert_round_trip(recipe: Recipe, folder: Path) -> None:
    path = folder / "recipe.yaml"
    recipe.save(path)
    assert load_recipe(path) == recipe
    assert load_recipe(path).dump() == recipe.dump()


@pytest.mark.slow
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rate=st.floats(1e-12, 1e3),
    temperature=st.floats(1e-6, 1e6),
    seed=st.integers(-(2**63), 2**63),
    model=st.text(min_size=1).filter(lambda text: text.isprintable()),
    dims=st.none() | st.lists(st.integers(1, 4096), min_size=1),
    warmup=st.integers(0, 10**6) | st.floats(0, 1, exclude_max=True),
    freeze=st.lists(st.sampled_from(["vision", "projector", "language"]), unique=True),
)
@example(
    rate=1e-5, temperature=0.05, seed=0, model="1e-3", dims=None, warmup=0, freeze=[]
)  # a string that must not come back as a number
def test_any_recipe_survives_a_round_trip(
    recipe_file: Path, rate, temperature, seed, model, dims, warmup, freeze
):
    base = load_recipe(recipe_file).model_dump()
    base["model"], base["seed"] = model, seed
    base["optimizer"] |= {"learning_rate": rate, "freeze": freeze}
    base["objective"] |= {"temperature": temperature, "matryoshka_dims": dims}
    base["schedule"] |= {"warmup": warmup}
    recipe = Recipe.model_validate(base)
    assert_round_trip(recipe, recipe_file.parent)
    assert type(recipe.schedule.warmup) is type(warmup)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=3", "seed", 3),
        ("optimizer.learning_rate=2e-5", "optimizer.learning_rate", 2e-5),
        ("optimizer.freeze=[vision, projector]", "optimizer.freeze", ["vision", "projector"]),
        ("objective.matryoshka_dims=[64, 128]", "objective.matryoshka_dims", [64, 128]),
        ("objective.learn_temperature=true", "objective.learn_temperature", True),
        ("batch.chunk=null", "batch.chunk", None),
        ("log.trackers=[tensorboard]", "log.trackers", ["tensorboard"]),
        ("checkpoint.every_steps=5", "checkpoint.every_steps", 5),
        ("output_dir=a b #1: c", "output_dir", Path("a b #1: c")),
        ('output_dir="2024"', "output_dir", Path("2024")),
        ("model=org/name=odd", "model", "org/name=odd"),
    ],
)
def test_overrides_reach_every_kind_of_value(recipe_file: Path, override, key, value):
    node = load_recipe(recipe_file, [override])
    for part in key.split("."):
        node = getattr(node, part)
    assert node == value


def test_the_last_override_wins_and_null_unsets(recipe_file: Path):
    recipe = load_recipe(
        recipe_file, ["seed=1", "seed=2", "schedule.steps=null", "schedule.epochs=2"]
    )
    assert recipe.seed == 2
    assert (recipe.schedule.steps, recipe.schedule.epochs) == (None, 2.0)


def test_a_section_with_every_key_commented_out_means_its_defaults(recipe_file: Path):
    recipe_file.write_text(SMALLEST + "log:\n  # trackers: [wandb]\n")
    assert load_recipe(recipe_file) == load_recipe(recipe_file, ["log.every_steps=1"])


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("optimizer.learning_rat=1e-3", "optimizer.learning_rate"),
        ("optimiser.learning_rate=1e-3", "optimizer"),
        ("learning_rate=1e-3", "optimizer.learning_rate"),
        ("data.0.pth=x", "data.0.path"),
        ("objective.temprature=1.0", "objective.temperature"),
        ("batch.chunks=4", "batch.chunk"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(recipe_file: Path, override, nearest):
    text = message(recipe_file, override)
    assert text.endswith(f"did you mean {nearest}?")
    assert override in text


def test_a_key_like_no_other_gets_no_wild_guess(recipe_file: Path):
    assert message(recipe_file, "zebra=1").endswith("unknown recipe key zebra")


def test_a_misspelt_required_key_is_called_misspelt_not_missing(recipe_file: Path):
    recipe_file.write_text(SMALLEST.replace("learning_rate", "learning_rte"))
    assert message(recipe_file) == (
        f"{recipe_file}: unknown recipe key optimizer.learning_rte; "
        "did you mean optimizer.learning_rate?"
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("examples: 64", "examples: many", "batch.examples is 'many', expected a valid integer"),
        ("examples: 64", 'examples: "64"', "batch.examples is '64', expected a valid integer"),
        ("examples: 64", "examples: 0", "batch.examples is 0, expected greater than or equal to 1"),
        ("examples: 64", "examples: true", "batch.examples is True, expected a valid integer"),
        ("  examples: 64\n", "", "batch.examples is missing"),
        ("model: tiny", "model: [tiny]", "model is ['tiny'], expected a valid string"),
        ("1e-3", "-1.0", "optimizer.learning_rate is -1.0, expected greater than 0"),
        ("1e-3", ".inf", "optimizer.learning_rate is inf, expected a finite number"),
        ("steps: 10", "steps: 10\n  epochs: 1", "schedule: set exactly one of steps and epochs"),
        ("steps: 10", "kind: linear", "schedule: set exactly one of steps and epochs"),
        ("steps: 10", "steps: 10\n  warmup: 1.5", "schedule.warmup is 1.5, expected a fraction"),
        ("steps: 10", "steps: 10\n  warmup: yes", "schedule.warmup is True, expected a fraction"),
        ("steps: 10", "steps: 10\n  kind: cosin", "schedule.kind is 'cosin', expected 'cosine'"),
        ("  - path: captions.json", "  path: x", "data is {'path': 'x'}, expected a valid list"),
        ("  - path: captions.json", "  []", "data is [], List should have at least 1 item"),
        ("batch:\n  examples: 64", "batch: 64", "batch is 64, expected a mapping of keys"),
    ],
)
def test_a_wrong_value_names_file_key_value_and_what_is_expected(
    recipe_file: Path, old, new, expected
):
    assert old in SMALLEST
    recipe_file.write_text(SMALLEST.replace(old, new))
    assert message(recipe_file).startswith(f"{recipe_file}: {expected}")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("seed.x=3", "seed is a value without keys"),
        ("data.7.limit=3", "data has 1 entries, expected a number below 1 instead of '7'"),
        ("data.path=x", "data has 1 entries, expected a number below 1 instead of 'path'"),
        ("optimizer.freeze=[vision", "expected ',' or ']'"),
        ("seed=x", "seed is 'x', expected a valid integer"),
    ],
)
def test_a_bad_override_is_named(recipe_file: Path, override, expected):
    recipe_file.write_text("seed: 0\n" + SMALLEST)
    text = message(recipe_file, override)
    assert text.startswith(f"override {override!r}: ")
    assert expected in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"- a\n- b\n", "a recipe is a mapping"),
        (b"", "a recipe is a mapping"),
        (b"model: [tiny\n", "not valid YAML (expected ',' or ']', but got"),
        (b"seed: 1\nseed: 2\n", "not valid YAML (key 'seed' is written twice, line 2)"),
        (b"model: \xff\n", "cannot be read (not UTF-8 text)"),
        (b"model: \x00\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_error(recipe_file: Path, content, expected):
    recipe_file.write_bytes(content)
    text = message(recipe_file)
    assert text.startswith(f"{recipe_file}: ")
    assert expected in text


def test_a_missing_file_is_one_error(tmp_path: Path):
    assert message(tmp_path / "no.yaml").endswith("cannot be read (No such file or directory)")


def test_a_recipe_cannot_be_changed(recipe_file: Path):
    recipe = load_recipe(recipe_file)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.optimizer.learning_rate = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("answers", "answers"), ("answers.jsonl", "{}/answers.jsonl"), ("t.jsonl", "{}/t.jsonl")],
)
def test_a_file_of_thoughts_is_relative_to_the_recipe(
    value: str, expected: str, tmp_path: Path
) -> None:
    """Also one whose name begins like the word that stands for the records' own answers."""
    (tmp_path / "r.yaml").write_text(
        f"model: tiny\noutput_dir: out\ndata: [{{path: x.json, thoughts: {value}}}]\n"
        "objective: {thought_weight: 1.0}\nbatch: {examples: 2}\n"
        "optimizer: {learning_rate: 1e-3}\nschedule: {steps: 1}\n"
    )
    assert load_recipe(tmp_path / "r.yaml").data[0].thoughts == expected.format(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["evaluate.held_out=0.1"],
            "exactly one of every_steps and every_minutes (null unsets); n",
        ),
        (["evaluate.every_steps=5"], "nothing to measure on; set held_out (e.g. 0.01), data, or"),
        (
            ["evaluate.every_steps=5", "evaluate.held_out=9", "evaluate.data.path=a.json"],
            "data and held_out are both set",
        ),
        (["evaluate.every_steps=5", "evaluate.held_out=1.5"], "a fraction of all examples below 1"),
        (
            ["evaluate.every_steps=5", "evaluate.data.path=a.json", "evaluate.data.weight=2.0"],
            "data.weight is for training",
        ),
        (
            ["evaluate.every_steps=5", "evaluate.held_out=9", "evaluate.tasks_limit=3"],
            "tasks_data and tasks_limit are for tasks, and none is named",
        ),
        (
            ["evaluate.every_steps=5", "evaluate.held_out=9", "evaluate.patience=3"],
            "name its measure in checkpoint.best",
        ),
        (["checkpoint.best=language_loss"], "which nothing measures; add a section evaluate"),
        (
            ["evaluate.every_steps=5", "evaluate.tasks=[retrieval]", "sharding=fsdp"],
            "evaluate.tasks need whole weights",
        ),
        (["evaluate.every_step=5"], "did you mean evaluate.every_steps?"),
    ],
)
def test_evaluations_that_make_no_sense_are_errors(
    recipe_file: Path, overrides: list[str], expected: str
):
    assert expected in message(recipe_file, *overrides)


def test_paths_of_evaluations_start_where_those_of_data_do(recipe_file: Path):
    recipe_file.write_text(
        SMALLEST + "evaluate: {every_steps: 5, data: {path: val.json}, tasks: [retrieval], "
        "tasks_data: sets}\n"
    )
    evaluate = load_recipe(recipe_file).evaluate
    assert evaluate is not None
    assert evaluate.data is not None
    assert evaluate.data.path == str(recipe_file.parent / "val.json")
    assert evaluate.tasks_data == recipe_file.parent / "sets"
    overrides = ["evaluate.every_minutes=2.5", "evaluate.every_steps=null"]
    changed = load_recipe(recipe_file, [*overrides, "evaluate.data.path=other.json"]).evaluate
    assert changed is not None
    assert changed.data is not None
    assert changed.data.path == str(Path("other.json").absolute())
    assert (changed.every_steps, changed.every_minutes) == (None, 2.5)
    assert_round_trip(load_recipe(recipe_file), recipe_file.parent)
