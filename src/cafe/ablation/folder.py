"""The folder of an ablation: finished work is kept and never repeated.

out/
  base.json                      name of the base and a digest of its weights
  scenes/<count>x<questions>-seed-<n>/   the scenes to train on
  base/<task>.json               results of `cafe evaluate`
  <arm>/seed-<n>/                recipe.yaml, log.jsonl, model/ (until it is evaluated)
  <arm>/seed-<n>/results/<task>.json
  seconds.json                   duration of each step, over all calls
  results.json                   every mean, difference and interval of the report
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from cafe.ablation.arms import Run, difference
from cafe.errors import DataError
from cafe.evaluation.registry import TASKS
from cafe.evaluation.results import StoredResult, read_result
from cafe.files import write_json
from cafe.model.checkpoint.locate import locate
from cafe.precision import resolved_precision
from cafe.recipes import Ablation, Recipe, load_recipe
from cafe.training.build import training_device

_BLOCK_BYTES = 1 << 20
_REMEDY = "choose another --out, or remove it"


@dataclass(frozen=True, slots=True)
class Folder:
    """The paths in it. Nothing is created before it is needed."""

    out: Path

    @property
    def base_results(self) -> Path:
        return self.out / "base"

    def scenes(self, ablation: Ablation) -> Path:
        """Named after the numbers that determine the scenes: others get another folder."""
        name = f"{ablation.train_scenes}x{ablation.train_questions}-seed-{ablation.scenes_seed}"
        return self.out / "scenes" / name

    def run(self, run: Run) -> Path:
        return self.out / run.name

    def model(self, run: Run) -> Path:
        return self.run(run) / "model"

    def results(self, run: Run) -> Path:
        return self.run(run) / "results"

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the duration of the block to `seconds.json`, even if it ends with an error."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.seconds()
            seconds[step] = round(seconds.get(step, 0.0) + time.perf_counter() - begin, 1)
            write_json(self.out / "seconds.json", seconds)

    def seconds(self) -> dict[str, float]:
        """Duration of each step so far."""
        path = self.out / "seconds.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); {_REMEDY}") from error


def check_base(folder: Folder, model: str) -> None:
    """Record the weights that the ablation starts from.

    Raises:
        DataError: the ablation in the folder started from other weights.
    """
    path = folder.out / "base.json"
    base = {"model": model, "weights": weights_digest(locate(model))}
    if not path.is_file():
        write_json(path, base)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); {_REMEDY}") from error
    if before != base:
        raise DataError(
            f"{folder.out} holds an ablation of another base ({before.get('model')!r}, whose "
            f"weights differ from those of {model!r} now); {_REMEDY}"
        )


def weights_digest(model: Path) -> str:
    """Digest of the contents of a model's weight files, in the order of their names."""
    digest = blake2b(digest_size=8)
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def check_run(folder: Folder, run: Run, recipe: Recipe) -> None:
    """Check that the run in the folder, finished or not, has the same recipe.

    Raises:
        DataError: it has another one.
    """
    path = folder.run(run) / "recipe.yaml"
    if path.is_file():
        other = difference(_with_precision(recipe), _with_precision(load_recipe(path)))
        if other is not None:
            raise DataError(f"{path} belongs to another run: {other}; {_REMEDY}")


def _with_precision(recipe: Recipe) -> Recipe:
    """The recipe with the precision that it means here; auto and that one are the same run."""
    precision = resolved_precision(recipe.precision, training_device())
    return recipe.model_copy(update={"precision": precision})


def kept_results(results: Path, tasks: Sequence[str], limit: int) -> dict[str, StoredResult]:
    """The existing results, by task.

    Raises:
        DataError: a result has another number of scenes, or another version of its task.
    """
    kept = {}
    for task in tasks:
        path = results / f"{task}.json"
        if not path.is_file():
            continue
        result = read_result(path)
        if result.record["settings"].get("limit") != limit:
            other = result.record["settings"].get("limit")
            raise DataError(f"{path} is for {other} test scenes, not {limit}; {_REMEDY}")
        if result.record["version"] != TASKS[task].version:
            raise DataError(f"{path} was written by another version of the task; {_REMEDY}")
        kept[task] = result
    return kept
