"""mteb's tasks as tasks of `cafe evaluate`: `mteb:Flickr30kT2IRetrieval`, `mteb:MIEB(lite)`.

mteb downloads its own data and keeps no per-sample columns, so these results have one number per
split and subset, and no intervals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cafe.errors import DataError
from cafe.evaluation.harness.mteb_encoder import MODALITIES, MtebEncoder, model_meta, require_mteb
from cafe.evaluation.task import Encode, TaskResult

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.results import TaskResult as MtebResult

PREFIX = "mteb:"


def task_names(name: str) -> tuple[str, ...]:
    """`mteb:BENCHMARK` -> its tasks; `mteb:TASK` -> itself alone.

    Raises:
        DataError: mteb is not installed, or knows no such task and no such benchmark.
    """
    require_mteb()
    import mteb

    own = name.removeprefix(PREFIX)
    if own in {benchmark.name for benchmark in mteb.get_benchmarks()}:
        return tuple(PREFIX + task.metadata.name for task in mteb.get_benchmark(own).tasks)
    find_mteb_task(name)
    return (name,)


def find_mteb_task(name: str) -> AbsTask:
    """The task that `mteb:TASK` names.

    Raises:
        DataError: mteb is not installed, there is no such task, or one side of it is neither text
            nor image.
    """
    require_mteb()
    import mteb

    try:
        task = mteb.get_task(name.removeprefix(PREFIX))
    except KeyError as error:
        raise DataError(f"{name}: mteb has no such task or benchmark ({error.args[0]})") from error
    other = sorted(set(task.metadata.modalities) - set(MODALITIES))
    if other:
        raise DataError(f"{name}: a task with {' and '.join(other)}; cafe reads text and images")
    return task


def data_names(task: AbsTask) -> str:
    """The hub's names of a task's data sets."""
    return ", ".join(dict.fromkeys(str(part.metadata.dataset["path"]) for part in _parts(task)))


def run_mteb(encode: Encode, task: AbsTask) -> TaskResult:
    """Measure with mteb. Scores: the task's main measure under its own name, and where there are
    several splits or subsets `<measure>/<split>/<subset>`, of which the first is the mean.

    The result's details hold all that mteb reports, in the form of its own result files.

    Raises:
        DataError: the data cannot be loaded.
    """
    import mteb

    name = task.metadata.name
    for part in _parts(task):
        try:
            part.load_data()
        except Exception as error:  # the hub client raises whatever its libraries do
            raise DataError(
                f"{PREFIX}{name}: its data set cannot be loaded ({error}); load it once where "
                "there is a network, mteb then finds it in the hub's cache"
            ) from error
    encoder: Any = MtebEncoder(encode, model_meta("cafe/model"))
    result = mteb.evaluate(
        encoder,
        task,
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
    ).task_results[0]
    return TaskResult(
        _count(task, result),
        plain=_scores(task.metadata.main_score, result),
        ids=tuple(f"{part.metadata.name}@{part.metadata.revision}" for part in _parts(task)),
        details={"mteb": result.model_dump(mode="json")},
    )


def _scores(measure: str, result: MtebResult) -> dict[str, float]:
    parts = {
        f"{measure}/{split}/{scores['hf_subset']}": float(scores["main_score"])
        for split, of_split in result.scores.items()
        for scores in of_split
    }
    return {measure: float(result.get_score())} | (parts if len(parts) > 1 else {})


def _count(task: AbsTask, result: MtebResult) -> int:
    """Number of samples of the measured splits, as far as mteb knows it."""
    counts: list[dict[str, Any]] = [part.metadata.n_samples or {} for part in _parts(task)]
    return sum(own.get(split, 0) for own in counts for split in result.scores)


def _parts(task: Any) -> list[AbsTask]:
    """The tasks of which a task is the mean; itself for a plain one."""
    return list(task.tasks) if task.is_aggregate else [task]
