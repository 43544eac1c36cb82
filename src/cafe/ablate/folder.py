"""The folder of an ablation: what is done is kept, and is never done again.

out/
  base.json                      the base's name and a digest of its weights
  scenes/<count>x<questions>-seed-<n>/   the scenes to train on
  base/<task>.json               results of `cafe evaluate`
  <arm>/seed-<n>/                recipe.yaml, log.jsonl, model/ (until it is measured)
  <arm>/seed-<n>/results/<task>.json
  seconds.json                   what took how long, over all calls
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

from cafe.ablate.arms import Run, difference
from cafe.errors import DataError
from cafe.evaluate.results import StoredResult, read_result, write_json
from cafe.evaluate.tasks import TASKS
from cafe.model.location import locate
from cafe.recipes import Ablation, Recipe, load_recipe

_BLOCK_BYTES = 1 << 20
_MEND = "name another --out, or remove it"


@dataclass(frozen=True, slots=True)
class Folder:
    """Where things are. Nothing is made before it is needed."""

    out: Path

    @property
    def base_results(self) -> Path:
        return self.out / "base"

    def scenes(self, ablation: Ablation) -> Path:
        """Its name has the numbers that decide its content, so other numbers are other scenes."""
        name = f"{ablation.train_scenes}x{ablation.train_questions}-seed-{ablation.scenes_seed}"
        return self.out / "scenes" / name

    def run(self, run: Run) -> Path:
        return self.out / run.name

    def model(self, run: Run) -> Path:
        return self.run(run) / "model"

    def results(self, run: Run) -> Path:
        return self.run(run) / "results"

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the block's time to `seconds.json`, also when the block ends by an error."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.seconds()
            seconds[what] = round(seconds.get(what, 0.0) + time.perf_counter() - begin, 1)
            write_json(self.out / "seconds.json", seconds)

    def seconds(self) -> dict[str, float]:
        """What took how long so far."""
        path = self.out / "seconds.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); {_MEND}") from error


def check_base(folder: Folder, model: str) -> None:
    """Note which weights the ablation starts from; raise DataError if they were others before."""
    path = folder.out / "base.json"
    found = {"model": model, "weights": weights_digest(locate(model))}
    if not path.is_file():
        write_json(path, found)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); {_MEND}") from error
    if before != found:
        raise DataError(
            f"{folder.out} holds an ablation of another base ({before.get('model')!r} with other "
            f"weights than {model!r} has now); {_MEND}"
        )


def weights_digest(model: Path) -> str:
    """Of the content of a model's weight files, in the order of their names."""
    digest = blake2b(digest_size=8)
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def check_run(folder: Folder, run: Run, recipe: Recipe) -> None:
    """Raise DataError if this arm and seed were trained, or begun, by another recipe."""
    path = folder.run(run) / "recipe.yaml"
    if path.is_file():
        other = difference(recipe, load_recipe(path))
        if other is not None:
            raise DataError(f"{path} is of another run: {other}; {_MEND}")


def kept_results(results: Path, tasks: Sequence[str], limit: int) -> dict[str, StoredResult]:
    """Task -> its result, of those that are there.

    Raises:
        DataError: one of another number of scenes, or of another version of its task.
    """
    found = {}
    for task in tasks:
        path = results / f"{task}.json"
        if not path.is_file():
            continue
        result = read_result(path)
        if result.record["settings"].get("limit") != limit:
            other = result.record["settings"].get("limit")
            raise DataError(f"{path} is of {other} test scenes, not {limit}; {_MEND}")
        if result.record["version"] != TASKS[task].version:
            raise DataError(f"{path} is of another version of the task; {_MEND}")
        found[task] = result
    return found
