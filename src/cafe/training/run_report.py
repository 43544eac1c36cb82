"""The report of runs and of results as one page: the job behind `cafe report`.

Everything is read from folders; nothing here imports torch. `run_folder` reads a run, and
`cafe.report.page` writes the page.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

from cafe.errors import DataError
from cafe.evaluation.compare import Comparison, compare_results, results_by_task
from cafe.evaluation.results import StoredResult
from cafe.files import replacing, writing
from cafe.report.page import (
    Curve,
    Page,
    PageSection,
    PageTable,
    chart,
    number,
    rendered,
    scatter_map,
)
from cafe.training.log import StepRecord
from cafe.training.run_folder import RunFolder, read_run
from cafe.training.watching import duration

_SPEED = ("examples_per_second", "tokens_per_second", "seconds", "data_wait_share", "padding")
_MEMORY = ("host_bytes", "device_bytes")
_NO_CURVES = ("step", "total", *_SPEED, *_MEMORY)


@dataclass(frozen=True, slots=True)
class WrittenReport:
    """What was written.

    path      the page
    notices   what could not be shown or compared, and why; the page says it, too
    """

    path: Path
    notices: tuple[str, ...]


def write_report(
    paths: Sequence[str | os.PathLike[str]], to: str | os.PathLike[str] = "report.html"
) -> WrittenReport:
    """Write runs and results as one self-contained page, as `cafe report` does.

    Args:
        paths: Runs (their `output_dir`, or log.jsonl) and results of `cafe evaluate` (folders, or
            files); a run may be one that goes on.
        to: The page, which is replaced if it is there.

    Returns:
        The page, and what it could not show.

    Raises:
        DataError: A path has neither a run nor a result, or the page cannot be written.

    Example:
        >>> write_report(["run"], "report.html").path
        PosixPath('report.html')
    """
    runs: list[RunFolder] = []
    results: list[Path] = []
    for path in map(Path, paths):
        is_run = (path / "log.jsonl").is_file() or path.suffix == ".jsonl"
        has_results = path.suffix == ".json" or any(_result_files(path))
        if is_run:
            runs.append(read_run(path))
        if has_results:
            results.append(path)
        if not is_run and not has_results:
            raise DataError(_nothing_in(path))
    names = _names([run.folder for run in runs])
    notices = [notice for run in runs for notice in run.notices]
    sections = [*_run_sections(runs, names)] if runs else []
    sections += _result_sections(results, notices)
    title = "cafe report: " + ", ".join(dict.fromkeys([*names, *(p.name for p in results)]))
    page = Path(to)
    with replacing(page) as unfinished, writing(page):
        text = rendered(Page(title, names, [s for s in sections if _is_filled(s)], notices))
        unfinished.write_text(text, encoding="utf-8")
    return WrittenReport(page, tuple(notices))


def _nothing_in(path: Path) -> str:
    if not path.exists():
        return f"{path}: no such folder; name the output_dir of a run, or a folder of results"
    below = sorted(log.parent for log in path.glob("*/log.jsonl"))
    fix = (
        f"name its runs: {' '.join(map(str, below))}"
        if below
        else (
            "name the output_dir of a run (it has log.jsonl), or a folder of `cafe evaluate --json`"
        )
    )
    return f"{path}: neither a run nor results; {fix}"


def _result_files(path: Path) -> Iterator[Path]:
    for file in sorted(path.glob("*.json")) if path.is_dir() else ():
        if file.name != "plan.json" and b'"samples"' in file.read_bytes():
            yield file


def _names(folders: Sequence[Path]) -> list[str]:
    """Their last parts, or the paths where these are not distinct."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _is_filled(section: PageSection) -> bool:
    parts = (getattr(section, f.name) for f in fields(section) if f.name not in ("title", "text"))
    return any(parts)


# ---------------------------------------------------------------------- runs


def _run_sections(runs: Sequence[RunFolder], names: Sequence[str]) -> Iterator[PageSection]:
    yield PageSection("Summary", tables=[("", _summary(runs, names))])
    quantities = [f.name for f in fields(StepRecord) if f.name not in _NO_CURVES]
    yield PageSection("Curves", "Values of each step.", _step_charts(runs, quantities))
    yield PageSection(
        "Evaluations", "On held-out data; step 0 is the base.", _evaluation_charts(runs)
    )
    yield PageSection("Samples", "The same held-out questions.", samples=[*_samples(runs, names)])
    yield PageSection(
        "Search",
        "The same held-out queries; right hits are ticked.",
        searches=[*_searches(runs, names)],
    )
    yield PageSection(
        "Map", "Embeddings on the two principal axes of both sides.", maps=[*_maps(runs, names)]
    )
    yield PageSection(
        "Speed and memory",
        "Memory is the most that the first process has held so far.",
        _step_charts(runs, (*_SPEED, *_MEMORY)),
        [("", _costs(runs, names))],
    )
    texts = [
        (name, run.recipe_text) for run, name in zip(runs, names, strict=True) if run.recipe_text
    ]
    different = _recipe_differences(runs, names)
    tables = [("Keys that differ", different)] if different.rows else []
    yield PageSection(
        "Recipes",
        "" if len(runs) == 1 or different.rows else "No key differs.",
        tables=tables,
        texts=texts,
    )


def _step_charts(runs: Sequence[RunFolder], quantities: Sequence[str]) -> list[dict[str, Any]]:
    charts = []
    for name in quantities:
        curves = []
        for number_, run in enumerate(runs):
            pairs = [
                (r.step, getattr(r, name)) for r in run.log.steps if getattr(r, name) is not None
            ]
            curves.append(Curve(number_, [x for x, _ in pairs], [y for _, y in pairs]))
        charts.append(chart(name.replace("_", " "), curves))
    return [one for one in charts if one is not None]


def _evaluation_charts(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    measures = dict.fromkeys(m for run in runs for r in run.log.evaluations for m in r.scores)
    charts = []
    for measure in measures:
        curves = []
        for number_, run in enumerate(runs):
            records = [r for r in run.log.evaluations if measure in r.scores]
            curves.append(
                Curve(number_, [r.step for r in records], [r.scores[measure] for r in records])
            )
        charts.append(chart(measure, curves))
    return [one for one in charts if one is not None]


def _summary(runs: Sequence[RunFolder], names: Sequence[str]) -> PageTable:
    rows = []
    for run, name in zip(runs, names, strict=True):
        steps = run.log.steps
        last = steps[-1] if steps else None
        total = None if last is None else last.total
        done = "0" if last is None else f"{last.step}" + (f" of {total}" if total else "")
        stopped = [text for step, text in run.log.stops if last is not None and step == last.step]
        spent = sum(r.seconds for r in (*steps, *run.log.evaluations))
        best = "" if run.best is None else str(run.best)
        loss = "" if last is None else number(last.loss)
        rows.append([name, done, loss, best, duration(spent), "; ".join(stopped)])
    warnings = [
        f"{name}: {text}"
        for run, name in zip(runs, names, strict=True)
        for _, text in run.log.warnings
    ]
    return PageTable(("run", "steps", "last loss", "best step", "time", "ended"), rows, warnings)


def _samples(runs: Sequence[RunFolder], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for run, name in zip(runs, names, strict=True):
        records = [record for record in run.log.evaluations if record.samples]
        images = run.views[-1].sample_images if run.views else ()
        for index, sample in enumerate(records[-1].samples if records else ()):
            ends = [records[0], records[-1]] if len(records) > 1 else records
            answers = [
                (_when(r.step), r.samples[index].answer) for r in ends if index < len(r.samples)
            ]
            image = images[index] if index < len(images) else None
            yield {
                "run": name,
                "prompt": sample.prompt,
                "reference": sample.reference,
                "answers": answers,
                "image": image,
            }


def _searches(runs: Sequence[RunFolder], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for run, name in zip(runs, names, strict=True):
        ends = _ends(run)
        for index, search in enumerate(ends[-1].searches if ends else ()):
            times = [(_when(v.step), v.searches[index]) for v in ends if index < len(v.searches)]
            yield {"run": name, "query": search.query, "times": times}


def _maps(runs: Sequence[RunFolder], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for run, name in zip(runs, names, strict=True):
        for view in _ends(run):
            if view.map:
                yield scatter_map(f"{name}, {_when(view.step)}", view.sides, view.map)


def _ends(run: RunFolder) -> list[Any]:
    """The first and the last view."""
    return [run.views[0], run.views[-1]] if len(run.views) > 1 else run.views


def _when(step: int) -> str:
    return "before training" if step == 0 else f"after step {step}"


def _costs(runs: Sequence[RunFolder], names: Sequence[str]) -> PageTable:
    rows = []
    for run, name in zip(runs, names, strict=True):
        if steps := run.log.steps:
            memory = [_memory(run, key) for key in _MEMORY]
            rates = [number(fmean(getattr(r, key) for r in steps)) for key in _SPEED[:2]]
            evaluating = duration(sum(r.seconds for r in run.log.evaluations))
            rows.append(
                [name, number(median(r.seconds for r in steps)), *rates, evaluating, *memory]
            )
    header = (
        "run",
        "seconds/step",
        "examples/s",
        "tokens/s",
        "evaluations",
        "host memory",
        "GPU memory",
    )
    return PageTable(header, rows)


def _memory(run: RunFolder, key: str) -> str:
    found = [value for r in run.log.steps if (value := getattr(r, key)) is not None]
    text = f"{max(found) / 2**30:.2f} GiB" if found else "not known"
    return f"{text} (plan: {run.plan[key] / 2**30:.2f})" if key in run.plan else text


def _recipe_differences(runs: Sequence[RunFolder], names: Sequence[str]) -> PageTable:
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    rows = [
        [key, *values]
        for key in keys
        if len(set(values := [str(run.recipe.get(key, "–")) for run in runs])) > 1
    ]
    return PageTable(("key", *names), rows)


# ---------------------------------------------------------------------- results


def _result_sections(paths: Sequence[Path], notices: list[str]) -> Iterator[PageSection]:
    if not paths:
        return
    tables, maps = [], []
    for results in results_by_task(paths):
        for group in _comparable(results, notices):
            tables.append((group[0].task, _comparison_table(compare_results(group), group)))
        for result in results:
            details = result.record.get("details", {})
            if "map/image" in details:
                points = [details["map/image"], details["map/text"]]
                maps.append(
                    scatter_map(f"{result.task}, {result.model}", ("image", "text"), points)
                )
    text = "95 % intervals; differences are paired, from the first model; *: 0 is outside of it."
    yield PageSection("Results", text, tables=tables, maps=maps)


def _comparable(
    results: Sequence[StoredResult], notices: list[str]
) -> Iterator[list[StoredResult]]:
    """Results of one task that can be compared; others are shown by themselves, and it is said."""
    groups: list[list[StoredResult]] = []
    for result in results:
        for group in groups:
            first = group[0].record
            if all(result.record.get(key) == first.get(key) for key in ("version", "samples")):
                group.append(result)
                break
        else:
            if groups:
                what = (
                    "version of the task"
                    if result.record.get("version") != groups[0][0].record.get("version")
                    else "samples"
                )
                notices.append(
                    f"{result.task}: {result.model} has another {what} than {groups[0][0].model}, "
                    "so the two are not compared"
                )
            groups.append([result])
    versions = {str(r.record.get("packages", {}).get("cafe-vlm", "?")) for r in results}
    if len(versions) > 1:
        notices.append(
            f"{results[0].task}: measured with several versions of cafe: "
            f"{', '.join(sorted(versions))}"
        )
    yield from groups


def _comparison_table(comparison: Comparison, results: Sequence[StoredResult]) -> PageTable:
    rows = []
    for row in comparison.rows:
        cells = [row.score]
        for index, value in enumerate(row.values):
            text = "–" if value is None else f"{value:.4f}"
            interval = results[index].record.get("intervals", {}).get(row.score)
            text += f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
            difference = row.differences[index - 1] if index else None
            if difference is not None:
                star = "*" if difference.low > 0 or difference.high < 0 else ""
                between = f"[{difference.low:+.3f}, {difference.high:+.3f}]"
                text += f"; {difference.estimate:+.4f} {between}{star}"
            cells.append(text)
        rows.append(cells)
    notes = []
    for known in comparison.published:
        scores = ", ".join(f"{name} {value:.3f}" for name, value in known.scores.items())
        notes.append(f"published: {known.model}: {scores} ({known.source})")
    return PageTable(("score", *comparison.models), rows, notes)
