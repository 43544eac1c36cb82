"""What further objectives cost a training step of the demo, in one run.

    python benchmarks/own_words.py [--repeats 7] [--chunk N] [--precision auto]

Each side is the demo's recipe with one key more, on the same examples, from the same weights, which
are not updated; thoughts are the true captions, whose length is that of a model's own. Sides
alternate. A step with match questions reads its chunks twice, as every step of several chunks does
(GradCache): `--chunk 20`, where the plain step does so too, is the fair ratio for large batches.
The last lines are `ratio SIDE: X`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from cafe.data.quarantine import Quarantine
from cafe.data.scenes import write_scenes
from cafe.memory import keep_memory
from cafe.precision import resolved_precision
from cafe.recipes import Recipe, load_recipe
from cafe.training.build import build_collator
from cafe.training.contrastive import ContrastiveLoss
from cafe.training.data import load_data
from cafe.training.loader import Steps
from cafe.training.matching import Matcher
from cafe.training.optim import freeze, parts_of
from cafe.training.step import TrainingStep
from cafe.training.tuning import load_model

THOUGHTS = ("objective.thought_weight=1", "data.0.thoughts=answers")
SIDES = {
    "joint": (),
    "latent tokens": ("objective.latent_tokens=8",),
    "thoughts": THOUGHTS,
    "match questions": ("objective.match_weight=1",),
    "token vectors": ("objective.multi_vector_weight=1",),
    "the first three": (*THOUGHTS, "objective.match_weight=1", "objective.latent_tokens=8"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--chunk", type=int, default=None, help="examples per forward pass")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    given = parser.parse_args()
    keep_memory()
    precision = resolved_precision(given.precision, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder, "scenes"), 80, 0)
        recipes = {name: recipe_of(Path(folder), keys, given.chunk) for name, keys in SIDES.items()}
        steps = {name: prepared(recipe, precision == "bf16") for name, recipe in recipes.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(given.repeats + 1):
            for name, (step, chunks) in steps.items():
                step.unwrapped.zero_grad()
                begin = time.perf_counter()
                numbers = step(chunks)
                if number:  # the first is the warm-up
                    seconds[name].append(time.perf_counter() - begin)
                else:
                    print(f"{name:16}{numbers.row_tokens:8,} tokens with gradient")
    batch = recipes["joint"].batch
    print(
        f"{batch.examples} examples, {given.chunk or 'all'} at a time, {precision}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:16}{median:8.3f} s a step")
    for name, median in medians.items():
        print(f"ratio {name}: {median / medians['joint']:.2f}")


def recipe_of(folder: Path, keys: tuple[str, ...], chunk: int | None) -> Recipe:
    overrides = [
        f"data.0.path={folder / 'scenes' / 'captions.json'}",
        f"data.1.path={folder / 'scenes' / 'questions.json'}",
        f"output_dir={folder / 'run'}",
        "batch.chunk=" + ("null" if chunk is None else str(chunk)),
        *keys,
    ]
    with as_file(files("cafe.recipes") / "demo.yaml") as path:
        return load_recipe(path, overrides)


def prepared(recipe: Recipe, bf16: bool) -> tuple[TrainingStep, list[Any]]:
    """The step of a recipe, and the chunks of its first batch."""
    torch.manual_seed(0)
    vlm = load_model(recipe, torch.device("cpu")).train()
    freeze(parts_of(vlm), recipe.optimizer.freeze)
    data = load_data(recipe, Quarantine(None, recipe.max_rejected))
    chunks = list(Steps.of(recipe.batch, data, build_collator(recipe, vlm))[0].chunks)
    objective = recipe.objective
    step = TrainingStep(
        vlm,
        vlm,
        ContrastiveLoss(objective),
        objective,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext(),
        matcher=Matcher.of(vlm) if objective.match_weight > 0 else None,
    )
    return step, chunks


if __name__ == "__main__":
    main()
