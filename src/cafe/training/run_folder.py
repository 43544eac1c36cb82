"""A run's folder as a report needs it: its log, recipe, and what is kept of its evaluations.

Everything may be missing or broken but the log; what is wrong is said, and the rest is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cafe.errors import DataError
from cafe.report.views import EvaluationView, read_views
from cafe.training.log import LogContent, parsed_line


@dataclass(frozen=True, slots=True)
class RunFolder:
    """What a run has left so far.

    folder    its output_dir
    log       the log; of several runs in one folder the last
    recipe    its recipe by dotted keys; empty: there is none
    views     what is kept of its evaluations that the log has, in their order
    best      step of the model in best/; None: there is none
    plan      bytes that `plan.json` expects: `host_bytes`, `device_bytes`; may be empty
    notices   what is wrong with it
    """

    folder: Path
    log: LogContent
    recipe: dict[str, Any]
    recipe_text: str
    views: list[EvaluationView]
    best: int | None
    plan: dict[str, float]
    notices: tuple[str, ...]


def read_run(path: Path) -> RunFolder:
    """Read a run's folder, or the folder of a log.

    Raises:
        DataError: There is no log, or no line in it.
    """
    folder = path if path.is_dir() else path.parent
    log = folder / "log.jsonl" if path.is_dir() else path
    runs, notices = read_runs(log)
    if not runs:
        raise DataError(f"{log}: no line of a run's log; start the run first")
    content = runs[-1]
    views, problems = read_views(folder)
    known = {record.step for record in content.evaluations}
    text = _text(folder / "recipe.yaml")
    plan = _object(_text(folder / "plan.json"))
    best = _object(_text(folder / "best" / "evaluation.json")).get("step")
    return RunFolder(
        folder=folder,
        log=content,
        recipe=dict(_dotted(_tree(text))),
        recipe_text=text,
        views=[view for view in views if view.step in known],
        best=best if isinstance(best, int) else None,
        plan={k: v for k, v in plan.items() if k.endswith("_bytes") and isinstance(v, int | float)},
        notices=(*notices, *problems),
    )


def read_runs(log: Path) -> tuple[list[LogContent], list[str]]:
    """The runs that a log holds, and what is wrong with it.

    A run's own log never goes back: a resumed run first removes what it repeats.

    Raises:
        DataError: It cannot be read.
    """
    try:
        lines = log.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"{log}: cannot be read ({error.strerror})") from error
    runs: list[LogContent] = []
    notices: list[str] = []
    last = 0
    for number, line in enumerate(lines, 1):
        one = LogContent.empty()
        if not line.endswith(b"\n") or (values := parsed_line(line, one)) is None:
            rest = len(lines) - number
            after = f", nor are the {rest} lines after it" if rest else ""
            notices.append(f"{log}: line {number} is not complete, and is not read{after}")
            break
        step = values["step"]
        if not runs or step < last or (one.steps and step == last and runs[-1].steps):
            if runs:
                notices.append(
                    f"{log}: holds more than one run: after step {last}, line {number} is of step "
                    f"{step}; only what follows is shown. Give each run an output_dir of its own"
                )
            runs.append(LogContent.empty())
        last = step
        runs[-1].steps.extend(one.steps)
        runs[-1].evaluations.extend(one.evaluations)
        runs[-1].warnings.extend(one.warnings)
        runs[-1].stops.extend(one.stops)
    return runs, notices


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _tree(text: str) -> Any:
    """A recipe of any version, so it is not checked."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _dotted(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if tree else ()
    for key, value in items if isinstance(tree, dict | list) else ():
        full = f"{name}.{key}" if name else str(key)
        if isinstance(value, dict | list) and value:
            yield from _dotted(value, full)
        else:
            yield full, value
