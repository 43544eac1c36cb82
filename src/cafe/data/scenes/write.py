r"""Scenes → a folder: images, captions and questions as LLaVA JSON, and the exact truth.

images/000000.png
captions.json    [{"id": "000000", "image": "images/000000.png", "conversations": [
                     {"from": "human", "value": "<image>\nDescribe this image."},
                     {"from": "gpt", "value": "A big cat at the top left."}],
                   "negatives": ["A big cat at the top right."]}]      (if there are any)
questions.json   the same with several turns, id "000000-questions", and "kinds": the kind of each
                 question
truth.jsonl      {"id": "000000", "image": "images/000000.png", "seed": 0, "split": "train",
                  "background": "white", "objects": [{"kind": "cat", ...}], "caption": "..."}
"""

from __future__ import annotations

import copy
import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cafe.data.scenes.language import caption
from cafe.data.scenes.questions import near_miss, questions
from cafe.data.scenes.world import (
    Scene,
    SceneObject,
    Split,
    draw,
    random_stream,
    sample_scene,
    scene_seed,
)
from cafe.errors import DataError
from cafe.files import whole_directory
from cafe.types import CAPTION_REQUEST


@dataclass(frozen=True, slots=True)
class Truth:
    """One line of `truth.jsonl`. `image` is relative to the folder."""

    id: str
    image: str
    scene: Scene
    caption: str


_Written = tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]
"""The truth of a scene, the record of its caption, and that of its questions, if there are any."""

_SCENES_AT_ONCE = 50
"""Scenes that one process draws before it sends their records."""


def write_scenes(
    out: Path,
    count: int,
    seed: int,
    split: Split = "train",
    questions_per_scene: int = 6,
    progress: Callable[[int], None] | None = None,
    processes: int = 1,
    negatives_per_scene: int = 0,
) -> None:
    """Write scenes into the folder `out`, which appears only when complete.

    Args:
        out: A folder that is empty or does not exist yet.
        count: Number of scenes.
        seed: Seed of the data set; the same arguments write the same bytes.
        split: Which of the two splits the scenes belong to.
        questions_per_scene: At most this many questions about each scene.
        progress: Called after each scene with the number of scenes written.
        processes: Number of processes that draw; the bytes are the same. A script that asks for
            more than one needs `if __name__ == "__main__":`.
        negatives_per_scene: At most this many captions with one error each, as hard negatives.

    Raises:
        DataError: `out` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not an empty folder; name a new one or remove it")
    with whole_directory(out, sync=False) as unfinished:
        (unfinished / "images").mkdir()
        write = _SceneWriter(unfinished, seed, split, questions_per_scene, negatives_per_scene)
        _write_into(unfinished, count, write, processes, progress or (lambda _: None))


def read_truth(folder: Path) -> list[Truth]:
    """The truth of every image in a folder that `write_scenes` wrote, in order.

    Raises:
        DataError: the file is missing, or a line of it is not such a record.
    """
    path = folder / "truth.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); write scenes with `cafe data scenes`"
        ) from error
    return [
        _parse_truth(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _parse_truth(line: str, location: str) -> Truth:
    try:
        record = json.loads(line)
        objects = tuple(SceneObject(**item) for item in record["objects"])
        scene = Scene(record["seed"], record["split"], record["background"], objects)
        return Truth(record["id"], record["image"], scene, record["caption"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{location}: not the record of a scene ({error}); write the folder again"
        ) from error


def _write_into(
    folder: Path, count: int, write: _SceneWriter, processes: int, progress: Callable[[int], None]
) -> None:
    captions: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []
    with ExitStack() as stack:
        truth = stack.enter_context((folder / "truth.jsonl").open("w", encoding="utf-8"))
        each: Iterable[_Written] = map(write, range(count))
        if processes > 1:
            # A fork may copy locks that other threads hold.
            pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
            each = stack.enter_context(pool).map(write, range(count), chunksize=_SCENES_AT_ONCE)
        for done, (line, written, questions) in enumerate(each, 1):
            truth.write(json.dumps(line) + "\n")
            captions.append(written)
            asked += [] if questions is None else [questions]
            progress(done)
    for file, records in (("captions.json", captions), ("questions.json", asked)):
        (folder / file).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _SceneWriter:
    """Writes the image of a scene, and returns its records; each scene has a seed of its own."""

    folder: Path
    seed: int
    split: Split
    questions_per_scene: int
    negatives_per_scene: int

    def __call__(self, index: int) -> _Written:
        scene = sample_scene(scene_seed(self.seed, index), self.split)
        rng = random_stream(scene.seed, self.split, "language")
        wording = copy.deepcopy(rng)
        name, image, text = f"{index:06d}", f"images/{index:06d}.png", caption(scene, rng)
        draw(scene).save(self.folder / image, compress_level=1)  # noise hardly compresses
        turns = questions(scene, rng, self.questions_per_scene)
        asked = None
        if turns:
            record = _record(f"{name}-questions", image, [(q.text, q.answer) for q in turns])
            asked = {**record, "kinds": [q.kind for q in turns]}
        line = {"id": name, "image": image, **asdict(scene), "caption": text}
        record = _record(name, image, [(CAPTION_REQUEST, text)])
        if wrong := self._negatives(scene, text, wording):
            record["negatives"] = wrong
        return line, record, asked

    def _negatives(self, scene: Scene, text: str, wording: np.random.Generator) -> list[str]:
        """Captions in the same words as `text`, each with one error."""
        rng = random_stream(scene.seed, self.split, "negatives")
        wrong: dict[str, None] = {}
        for _ in range(4 * self.negatives_per_scene):
            if len(wrong) == self.negatives_per_scene:
                break
            wrong[caption(near_miss(scene, rng), copy.deepcopy(wording))] = None
            wrong.pop(text, None)
        return list(wrong)


def _record(name: str, image: str, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    conversations = []
    for prompt, answer in turns:
        placeholder = "" if conversations else "<image>\n"
        conversations.append({"from": "human", "value": placeholder + prompt})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": name, "image": image, "conversations": conversations}
