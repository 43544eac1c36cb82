"""Small whole runs: 32 written scenes, a random model of 0.2M parameters, a few steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cafe.data.scenes import write_scenes
from cafe.recipes import Recipe, load_recipe
from cafe.training.log import StepRecord
from helpers.models import build_small_model

SCENES = 32
STEPS = 8  # one pass over the scenes in batches of 4

RECIPE = """\
model: {world}/model
output_dir: {out}
data: [{{path: {world}/scenes/captions.json}}]
batch: {{examples: 4, chunk: 2, workers: 0}}
optimizer: {{learning_rate: 1e-3}}
schedule: {{steps: {steps}}}
precision: fp32
checkpoint: {{every_steps: 2}}
"""


def make_world(folder: Path, **sizes: Any) -> Path:
    """Scenes and a model to start from. `sizes` are those of `build_small_model`."""
    write_scenes(folder / "scenes", SCENES, seed=0, questions_per_scene=2)
    build_small_model(**sizes).save_pretrained(folder / "model")
    return folder


def recipe_file(world: Path, out: Path) -> Path:
    """A recipe that writes to `out`, as a file beside it."""
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(RECIPE.format(world=world, out=out, steps=STEPS))
    return path


def recipe(world: Path, out: Path, *overrides: str) -> Recipe:
    return load_recipe(recipe_file(world, out), list(overrides))


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The final model of a run, or the base with `out / "model"`'s parent as the world."""
    return load_file(out / "model" / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def moved(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], prefix: str) -> float:
    """The largest change of a weight whose name begins so."""
    names = [name for name in a if name.startswith(prefix)]
    assert names, prefix
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in names)


def without_times(out: Path) -> list[dict[str, float]]:
    """The log's lines, less what the clock and the machine's memory decide.

    An evaluation's scores are keys of its line.
    """
    clock = {"seconds", "data_wait_share", "examples_per_second", "tokens_per_second"}
    clock |= {"host_bytes", "device_bytes"}
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines = [line.pop("evaluation", {}) | line for line in lines]
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


class Killed(Exception):
    """Stands for the end of the process: nothing of the run gets to act on it."""


def die_after(step: int) -> Any:
    """An `on_step` that ends the run after `step`, before that step's checkpoint."""

    def on_step(record: StepRecord) -> None:
        if record.step == step:
            raise Killed

    return on_step


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums of as many terms in the same order as in a process with OMP_NUM_THREADS=1."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
