"""Run tasks on a model: `evaluate`, the job behind `cafe evaluate`.

Results contain what they were computed from and how, and finished ones are not measured again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cafe.errors import CafeError, DataError
from cafe.evaluation.datasets.rows import RowSource
from cafe.evaluation.journal import Journal
from cafe.evaluation.mmeb.leaderboard import write_report
from cafe.evaluation.model_calls import (
    CachedCalls,
    Calls,
    DistributedCalls,
    ModelCalls,
    UseOfCaptions,
    caption_settings,
)
from cafe.evaluation.registry import (
    QUICK_LIMIT,
    SUITES,
    Suite,
    find_task,
    is_scenes,
    suite_data,
    task_names,
)
from cafe.evaluation.results import (
    draw_stored_map,
    model_identity,
    package_versions,
    read_result,
    result_record,
)
from cafe.evaluation.scenes.held_out import HELD_OUT_SEED
from cafe.evaluation.task import TaskResult, TaskSetup
from cafe.files import write_json
from cafe.model.rows.prompts import DEFAULT_PROMPT, PROMPTS
from cafe.progress import progress_bar
from cafe.ranks import Rank, process_group
from cafe.recipes import DataSource, load_source

if TYPE_CHECKING:
    from cafe.model.vlm import CAFe

IN_MEMORY = "in memory"
"""The name of a model that was not loaded by name, in its records."""

TaskRecord = dict[str, Any]
"""The content of a result file."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """How tasks are run.

    data      the folder above the data sets of a suite, or a single task's data
    limit     use the first N samples of each task only
    out       folder of the result files; None: nothing is kept
    force     measure again what is there
    judges    the judges of THRONE
    caption   images are embedded with the model's own captions, or "think": after them
    seed      of the bootstrap
    """

    data: RowSource | DataSource | None = None
    limit: int | None = None
    out: Path | None = None
    force: bool = False
    judges: tuple[str, ...] = ()
    caption: UseOfCaptions = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One task of a run.

    record   the content of its result file; None if it failed
    state    kept: the result of an earlier run was there
    reason   why it failed
    map      the map of embeddings that was drawn next to the result file, if any
    """

    task: str
    record: TaskRecord | None
    state: Literal["measured", "kept", "failed"]
    reason: str = ""
    map: Path | None = None


class TasksFailedError(DataError):
    """Some tasks could not be run; all others were.

    records   task -> what was measured, as `evaluate` returns it
    reasons   task -> why it failed
    """

    def __init__(self, records: dict[str, TaskRecord], reasons: dict[str, str]) -> None:
        count = len(records) + len(reasons)
        why = "; ".join(f"{task}: {reason}" for task, reason in reasons.items())
        super().__init__(f"{len(reasons)} of {count} tasks could not be run: {why}")
        self.records = records
        self.reasons = reasons


def evaluate(
    model: CAFe | str | Path,
    tasks: str | Sequence[str] | None = None,
    *,
    suite: Suite | None = None,
    data: RowSource | DataSource | Mapping[str, Any] | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    judges: Sequence[str] = (),
    caption: UseOfCaptions = False,
    force: bool = False,
    show_progress_bar: bool = False,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> dict[str, TaskRecord]:
    """Measure a model on tasks, as `cafe evaluate` does.

        >>> records = evaluate("tiny", ["retrieval", "gap"], limit=50)
        >>> records["retrieval"]["settings"]["data"], records["retrieval"]["count"]
        ('scenes:test?seed=20000', 50)
        >>> records["retrieval"]["scores"]["text_to_image_recall@10"]
        0.3
        >>> records["retrieval"]["intervals"]["text_to_image_recall@10"]
        [0.18, 0.44]

    Args:
        model: A directory, a hub id or "tiny"; or a `CAFe`, as its weights are now.
        tasks: Names of tasks (`cafe.evaluation.registry.TASKS`), or "mteb:NAME".
        suite: Instead of tasks: "quick" (the default; no data needed), "paper" or "all".
        data: The data of the tasks, a folder or a hub name; with `suite`, the folder above the
            folders of its data sets. Tasks on images with captions (retrieval, gap, caption,
            captioning) read whatever trains: name a file, or give the keys of a recipe's data
            source: {"path": "captions.txt", "image_root": "Images"}.
        limit: Use the first N samples of each task only.
        out: Folder that keeps one result file per task. Tasks with a result there are not run
            again, and an interrupted one resumes; not so with a `CAFe`, whose weights may have
            changed since: a result that is there is an error.
        judges: The judges of THRONE: FLAN-T5 folders or hub names, or "http://HOST/v1#MODEL".
        caption: Embed images with the model's own captions (`CAFe.encode`), or "think": after them.
        force: Run tasks again that have a result in `out`.
        show_progress_bar: Draw a bar over the tasks on stderr.
        on_outcome: Called after each task, under torchrun on rank 0 only; None: logs a line.

    Returns:
        Task -> its record, the content of a result file (`cafe.evaluation.results`).

    Raises:
        TasksFailedError: A task failed. The others were run; the error has their records.
        DataError: No such task, or a result in `out` of another model or of other settings.
        CafeError: The model cannot be loaded.
    """
    if tasks is not None and suite is not None:
        raise DataError("name tasks or a suite, not both")
    if tasks is None:
        suite = suite or "quick"
    listed = [tasks] if isinstance(tasks, str) else tasks or ()
    names = SUITES[suite] if suite else [name for one in listed for name in task_names(one)]
    if isinstance(data, Mapping):
        data = load_source(data)
    if suite and isinstance(data, DataSource):
        raise DataError(f"{data.path}: keys of a data source are for a task, not for a suite")
    options = Options(
        data, limit, None if out is None else Path(out), force, tuple(judges), caption
    )
    with process_group() as rank:
        outcomes = _outcomes(model, names, options, suite, rank)
        return _records(outcomes, len(names), rank, show_progress_bar, on_outcome)


def _outcomes(
    model: CAFe | str | Path,
    names: Sequence[str],
    options: Options,
    suite: Suite | None,
    rank: Rank,
) -> Iterator[Outcome]:
    def load() -> CAFe:
        if not isinstance(model, str | Path):
            return model
        from cafe.model.vlm import CAFe  # transformers takes long to import

        return CAFe.from_pretrained(model, device=rank.device)

    name = str(model) if isinstance(model, str | Path) else None
    for outcome in run_tasks(load, name, names, options, suite=suite, rank=rank):
        if rank.index == 0 and options.out is not None and outcome.record is not None:
            path = result_file(options.out, outcome.task).with_suffix(".png")
            outcome = replace(outcome, map=draw_stored_map(outcome.record, path))
        yield outcome


def _records(
    outcomes: Iterable[Outcome],
    count: int,
    rank: Rank,
    show_progress_bar: bool,
    on_outcome: Callable[[Outcome], None] | None,
) -> dict[str, TaskRecord]:
    """Run all tasks, and report each on rank 0."""
    records: dict[str, TaskRecord] = {}
    reasons: dict[str, str] = {}
    with progress_bar("tasks", count, show=show_progress_bar and rank.index == 0) as bar:
        for outcome in outcomes:
            if outcome.record is None:
                reasons[outcome.task] = outcome.reason
            else:
                records[outcome.task] = outcome.record
            if rank.index == 0:
                (on_outcome or _log_outcome)(outcome)
            bar.more(1)
    if reasons:
        raise TasksFailedError(records, reasons)
    return records


def _log_outcome(outcome: Outcome) -> None:
    _log.info("%s: %s %s", outcome.task, outcome.state, outcome.reason)


def run_tasks(
    load: Callable[[], CAFe],
    name: str | None,
    tasks: Sequence[str],
    options: Options,
    *,
    suite: Suite | None = None,
    rank: Rank | None = None,
) -> Iterator[Outcome]:
    """Measure a model on several tasks, one outcome each; a task that fails does not stop others.

    Args:
        load: Returns the model; not called if all results are there.
        name: The model's name as the user wrote it: a directory, a hub id, or "tiny". None: it
            is in memory, and may differ from any earlier one.
        tasks: Names of tasks.
        options: How to run them.
        suite: Its data sets are subfolders of `options.data`; None: that is the tasks' own.
        rank: This process among those that share the work.

    Raises:
        DataError: `options.out` has a result of another model or of other settings.
        CafeError: The model cannot be loaded.
    """
    rank = rank or Rank()
    about = {"model": name or IN_MEMORY, "model_files": model_identity(name) if name else ""}
    loaded: list[tuple[CAFe, Calls, Calls]] = []
    for task in tasks:
        limit = options.limit
        if limit is None and suite == "quick" and is_scenes(task):
            limit = QUICK_LIMIT
        wanted = about | {"limit": limit, "caption": options.caption}
        if (kept := _kept(task, options, wanted)) is not None:
            yield Outcome(task, kept, "kept")
            continue
        try:
            data = _data_of(task, options, suite)
        except CafeError as error:
            yield Outcome(task, None, "failed", str(error))
            continue
        if not loaded:  # without it no task can be measured
            loaded.append(_loaded(load(), rank, options.caption))
        model, plain, cached = loaded[0]
        # Generated scenes are few and shared by tasks; a data set may not fit in memory.
        calls: Calls = cached if data is None else plain
        unfinished = None if name is None else _journal_folder(options, task, wanted)
        journal = Journal(unfinished, rank.index)
        try:
            setup = TaskSetup(calls, data, limit, options.judges, journal, rank)
            record = about | _measure(model, task, setup, options)
        except CafeError as error:
            yield Outcome(task, None, "failed", str(error))
            continue
        finally:
            journal.close()
        if options.out is not None and rank.index == 0:
            try:
                write_json(result_file(options.out, task), record)
            except DataError:  # hours of work are shown, at least
                yield Outcome(task, record, "measured")
                raise
            write_report(options.out, about["model"], model)
            _forget(unfinished)
        yield Outcome(task, record, "measured")


def _loaded(model: CAFe, rank: Rank, caption: UseOfCaptions) -> tuple[CAFe, Calls, Calls]:
    """The model, its calls, and the same calls cached."""
    plain: Calls = ModelCalls(model, caption=caption)
    plain = plain if rank.size == 1 else DistributedCalls(plain, rank)
    return model, plain, CachedCalls(plain, "compress")


def result_file(out: Path, task: str) -> Path:
    """Where the result of a task is kept. Not every file system allows a colon in a name."""
    return out / f"{task.replace(':', '-')}.json"


def _measure(model: CAFe, task: str, setup: TaskSetup, options: Options) -> TaskRecord:
    result: TaskResult = find_task(task).run(setup)
    return {
        "task": task,
        "version": find_task(task).version,
        **result_record(result, seed=options.seed),
        "settings": {
            "data": _data_name(setup.data),
            "limit": setup.limit,
            **caption_settings(options.caption),
            **_prompts(task, model),
            "dtype": str(model.model.dtype).removeprefix("torch."),
            "processes": setup.rank.size,
        },
        "packages": package_versions(),
    }


def _prompts(task: str, model: CAFe) -> dict[str, Any]:
    """The task's settings, with embedding prompts written out."""
    settings = dict(find_task(task).settings)
    if settings.get("embedding_prompt") == DEFAULT_PROMPT:
        settings["embedding_prompt"] = model.collator.own_prompt
    if "embedding_prompt" in settings:
        settings["protocol"] = model.collator.protocol.name
        prompt = PROMPTS[settings["embedding_prompt"]]
        settings["prompts"] = {"image": prompt.image, "text": prompt.text, "both": prompt.both}
    return settings


def _data_name(data: RowSource | DataSource | None) -> str:
    if isinstance(data, DataSource):
        keys = data.model_dump(mode="json", include=data.model_fields_set - {"path"})
        return " ".join([data.path, *(f"{key}={value}" for key, value in keys.items())])
    return f"scenes:test?seed={HELD_OUT_SEED}" if data is None else str(data)


def _data_of(task: str, options: Options, suite: Suite | None) -> RowSource | DataSource | None:
    data = options.data
    if suite is None or isinstance(data, DataSource):
        return data or find_task(task).hub
    return suite_data(task, None if data is None else Path(data))


def _kept(task: str, options: Options, wanted: dict[str, Any]) -> TaskRecord | None:
    """The record of a finished task, unless it is to be measured again."""
    if options.out is None or options.force:
        return None
    path = result_file(options.out, task)
    if not path.is_file():
        return None
    if wanted["model"] == IN_MEMORY:
        raise DataError(
            f"{path} is there, and may be the result of other weights than those in memory; name "
            "another folder, or use force=True"
        )
    record = read_result(path).record
    stored = {
        "model": record.get("model"),
        "model_files": record.get("model_files"),
        "limit": record["settings"].get("limit"),
        "caption": record["settings"].get("caption", False),
    }
    if stored != wanted or record["version"] != find_task(task).version:
        other = next((k for k in wanted if stored[k] != wanted[k]), "version")
        raise DataError(
            f"{path} is the result of another {other.replace('_', ' ')} "
            f"({stored.get(other, record['version'])}); name another --json folder, or use --force"
        )
    return record


def _journal_folder(options: Options, task: str, wanted: dict[str, Any]) -> Path | None:
    if options.out is None:
        return None
    # Without captions the name is that of earlier versions, whose journals are still used.
    settings = {k: v for k, v in wanted.items() if k != "caption" or v}
    digest = blake2b(repr(sorted(settings.items())).encode(), digest_size=6).hexdigest()
    return options.out / ".unfinished" / f"{result_file(options.out, task).stem}-{digest}"


def _forget(folder: Path | None) -> None:
    """Delete a journal: the result is written, so its parts are no longer needed."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.parent.is_dir() and not any(folder.parent.iterdir()):
            folder.parent.rmdir()
