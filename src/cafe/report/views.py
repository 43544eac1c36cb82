"""What a run keeps of an evaluation for people: a map of embeddings, searches, images of samples.

One file for each, `output_dir/evaluations/step-000200.json`; images are small JPEGs in it:

    {"step": 200, "sides": ["image", "text"], "map": [[[0.12, -0.3], …], [[0.4, 0.1], …]],
     "searches": [{"query": {"text": "a red mug", "image": null}, "rank": 1, "hits":
       [{"text": "", "image": "data:image/jpeg;base64,…", "score": 0.81, "right": true}, …]}, …],
     "sample_images": ["data:image/jpeg;base64,…", null]}

The numbers of an evaluation are in the log, and do not need these files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cafe.files import replacing, writing

FOLDER = "evaluations"
_NAME = re.compile(r"step-(\d+)\.json")


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True)


class ShownSide(_Shown):
    """A query, or what was found: its text, cut to a few lines, and its first image as a data URI.

    Of a video only the word is in the text.
    """

    text: str
    image: str | None = None


class ShownHit(ShownSide):
    """One hit with its cosine similarity; `right`: some example pairs it with the query."""

    score: float
    right: bool


class ShownSearch(_Shown):
    """A held-out query among all targets, or the other way round.

    rank   of the first right one; a tie counts against the model
    hits   the nearest, best first
    """

    query: ShownSide
    rank: int
    hits: tuple[ShownHit, ...]


class EvaluationView(_Shown):
    """What is kept of one evaluation.

    step           number of steps that were done; 0: the base
    sides          what the two sides of a pair are called
    map            points of each side on the two principal axes of both; empty without pairs
    searches       the same queries at every evaluation
    sample_images  the first image of each of the log's samples, in their order; None: it has none
    """

    step: int
    sides: tuple[str, str] = ("query", "target")
    map: tuple[list[tuple[float, float]], ...] = ()
    searches: tuple[ShownSearch, ...] = ()
    sample_images: tuple[str | None, ...] = ()


def write_view(run: Path, view: EvaluationView, keep: Iterable[int]) -> None:
    """Write a view into a run's folder, and delete those of other steps, except `keep`.

    Raises:
        DataError: It cannot be written.
    """
    folder = run / FOLDER
    path = folder / f"step-{view.step:06d}.json"
    with replacing(path) as unfinished, writing(path):
        unfinished.write_text(view.model_dump_json() + "\n", encoding="utf-8")
    for step, other in _files(run).items():
        if step not in {view.step, *keep}:
            other.unlink(missing_ok=True)


def read_views(run: Path) -> tuple[list[EvaluationView], list[str]]:
    """The views of a run in the order of their steps, and what is wrong with those left out."""
    views: list[EvaluationView] = []
    problems: list[str] = []
    for _, path in sorted(_files(run).items()):
        try:
            views.append(EvaluationView.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            problems.append(f"{path}: cannot be read and is left out ({reason})")
    return views, problems


def _files(run: Path) -> dict[int, Path]:
    found = ((_NAME.fullmatch(path.name), path) for path in (run / FOLDER).glob("step-*.json"))
    return {int(match[1]): path for match, path in found if match}
