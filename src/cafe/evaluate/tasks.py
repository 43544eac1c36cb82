"""The tasks by name: where their data comes from, how they run, and which suites have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cafe.data.scenes import PRESENCE_QUESTION, PROMPT_CAPTION
from cafe.errors import DataError
from cafe.evaluate import (
    caption,
    captioning,
    chair,
    gap,
    mmeb,
    pope,
    presence,
    retrieval,
    scenes_mmeb,
    scenes_pope,
    scenes_retrieval,
    scenes_words,
    throne,
    vqa,
)
from cafe.evaluate.calls import Calls
from cafe.evaluate.data import Picture, read_pictures
from cafe.evaluate.harness import mteb_task
from cafe.evaluate.journal import Journal
from cafe.evaluate.judges import FLAN_T5, make_judge
from cafe.evaluate.mmeb_tables import FRAMES
from cafe.evaluate.scene_set import SceneItem, scene_items, scene_pictures
from cafe.evaluate.sources import Source
from cafe.evaluate.spread import Rank
from cafe.evaluate.task import Result

Suite = Literal["quick", "paper", "all"]

QUICK_LIMIT = 250
"""Scenes of the suite `quick`: under three minutes for the base model that ships, on two cores."""

COCO_5K = "nlphuji/mscoco_2014_5k_test_image_text_retrieval"
FLICKR_1K = "nlphuji/flickr_1k_test_image_text_retrieval"


@dataclass(frozen=True, slots=True)
class Setup:
    """What a task runs on.

    data      a local folder in the data set's layout, a hub name, or None: generated scenes
    limit     use the first so many samples only
    judges    who reads for THRONE, as `make_judge` takes them; empty: the paper's
    journal   what is known already
    """

    calls: Calls
    data: Source | None = None
    limit: int | None = None
    judges: tuple[str, ...] = ()
    journal: Journal = field(default_factory=Journal)
    rank: Rank = field(default_factory=Rank)


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    run        measures
    settings   prompts and lengths, for the result file
    hub        the data set's name on the hub; None: scenes, or a local folder (`needs_folder`)
    folder     its subfolder in the folder of a suite's data; "": by the task's name
    version    grows when a number changes its meaning
    """

    run: Callable[[Setup], Result]
    settings: Mapping[str, Any]
    hub: str | None = None
    folder: str = ""
    needs_folder: bool = False
    version: int = 1


def pictures(setup: Setup) -> Iterable[Picture]:
    """Generated scenes, a scenes folder, captions in LLaVA's format, or rows of a data set.

    Raises:
        DataError: data that is not there, or has a record that cannot be used: scores on the rest
            would be those of another data set.
    """
    if setup.data is None:
        return scene_pictures(setup.limit)
    path = Path(setup.data)
    if path.is_file() or any((path / n).is_file() for n in ("truth.jsonl", "captions.json")):
        return _whole(path, setup.limit)
    if path.is_dir() and not any(path.rglob("*.parquet")):
        return _whole(path, setup.limit)  # says what is missing
    return retrieval.captioned_pictures(setup.data, setup.limit)


def _whole(path: Path, limit: int | None) -> Iterable[Picture]:
    found = read_pictures(path, limit)
    if found.rejected:
        raise DataError(
            f"{len(found.rejected)} records cannot be used; mend or remove them. "
            f"The first: {found.rejected[0]}"
        )
    return found.pictures


def _scenes(setup: Setup) -> list[SceneItem]:
    return scene_items(None if setup.data is None else Path(setup.data), setup.limit)


def _folder(setup: Setup) -> Path:
    if setup.data is None or not Path(setup.data).is_dir():
        raise DataError(
            f"{setup.data or 'no --data'}: this task reads a local folder; name it with --data"
        )
    return Path(setup.data)


def _gap(setup: Setup) -> Result:
    return gap.gap(setup.calls.encode, pictures(setup))


def _retrieval(setup: Setup) -> Result:
    return retrieval.retrieval(setup.calls.encode, pictures(setup))


def _caption(setup: Setup) -> Result:
    return caption.caption(setup.calls.read, setup.calls.generate, list(pictures(setup)))


def _presence(setup: Setup) -> Result:
    return presence.presence(setup.calls.read, setup.calls.generate, list(pictures(setup)))


def _scenes_pope(setup: Setup, every_kind: bool) -> Result:
    asked = scenes_pope.scene_questions(_scenes(setup), every_kind=every_kind)
    return pope.pope(setup.calls.read, setup.calls.generate, asked)


def _pope(setup: Setup) -> Result:
    asked = pope.read_pope(setup.data or "", setup.limit)
    return pope.pope(setup.calls.read, setup.calls.generate, asked)


def _chair(setup: Setup) -> Result:
    shown, mentions = chair.read_chair(_folder(setup), setup.limit)
    return chair.chair(setup.calls.generate, shown, mentions, journal=setup.journal)


def _throne(setup: Setup) -> Result:
    judges = [make_judge(name) for name in setup.judges or FLAN_T5]
    shown, classes = throne.read_throne(_folder(setup), setup.limit)
    return throne.throne(
        setup.calls.generate, judges, shown, classes, journal=setup.journal, rank=setup.rank
    )


def _mmeb(setup: Setup, measure: Callable[..., Result]) -> Result:
    encode = setup.calls.with_prompt(mmeb.PROMPT).encode
    return measure(encode, _folder(setup), setup.limit, setup.journal)


def _captioning(setup: Setup) -> Result:
    shown = list(pictures(setup))
    return captioning.captioning(setup.calls.generate, shown, journal=setup.journal)


def _mteb(setup: Setup, task: Any) -> Result:
    chosen = {"--data": setup.data != mteb_task.data_names(task), "--limit": bool(setup.limit)}
    option = next((name for name, given in chosen.items() if given), None)
    if option is not None:
        raise DataError(f"mteb:{task.metadata.name}: mteb has its own samples; leave out {option}")
    return mteb_task.run_mteb(setup.calls.encode, task)


def _vqa(setup: Setup) -> Result:
    questions = vqa.read_vqa(setup.data or "", setup.limit)
    return vqa.vqa(setup.calls.read, setup.calls.generate, questions)


_EMBED = {"embedding_prompt": "compress"}
_MMEB = {"embedding_prompt": mmeb.PROMPT}


def _greedy(prompt: str, max_new_tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "decoding": "greedy", "max_new_tokens": max_new_tokens}


_OWN_WORDS = _greedy("as the data set asks", caption.MAX_NEW_TOKENS)
_SCENE_CAPTION = _greedy(PROMPT_CAPTION, caption.MAX_NEW_TOKENS)
_SCENE_POPE = _greedy(PRESENCE_QUESTION, pope.MAX_NEW_TOKENS)

TASKS: dict[str, Task] = {
    "retrieval": Task(_retrieval, _EMBED),
    "caption": Task(_caption, _OWN_WORDS),
    "presence": Task(_presence, _greedy("as the data set asks", presence.MAX_NEW_TOKENS)),
    "gap": Task(_gap, _EMBED),
    "scenes-retrieval": Task(
        lambda s: scenes_retrieval.scenes_retrieval(s.calls.encode, _scenes(s)), _EMBED
    ),
    "scenes-mmeb": Task(lambda s: scenes_mmeb.scenes_mmeb(s.calls.encode, _scenes(s)), _EMBED),
    "scenes-pope": Task(partial(_scenes_pope, every_kind=False), _SCENE_POPE),
    "scenes-pope-all": Task(partial(_scenes_pope, every_kind=True), _SCENE_POPE),
    "scenes-chair": Task(
        lambda s: scenes_words.scenes_chair(s.calls.generate, _scenes(s)), _SCENE_CAPTION
    ),
    "scenes-throne": Task(
        lambda s: scenes_words.scenes_throne(s.calls.generate, _scenes(s)), _SCENE_CAPTION
    ),
    "coco-5k": Task(_retrieval, _EMBED, hub=COCO_5K),
    "flickr-1k": Task(_retrieval, _EMBED, hub=FLICKR_1K),
    "coco-gap": Task(_gap, _EMBED, hub=COCO_5K, folder="coco-5k"),
    "pope": Task(_pope, _greedy("POPE's questions", pope.MAX_NEW_TOKENS), hub="lmms-lab/POPE"),
    "chair": Task(_chair, _greedy(chair.PROMPT, chair.MAX_NEW_TOKENS), needs_folder=True),
    "throne": Task(_throne, _greedy(throne.PROMPT, throne.MAX_NEW_TOKENS), needs_folder=True),
    "mmeb": Task(partial(_mmeb, measure=mmeb.mmeb_images), _MMEB, needs_folder=True),
    "mmeb-video": Task(
        partial(_mmeb, measure=mmeb.mmeb_videos), _MMEB | {"frames": FRAMES}, needs_folder=True
    ),
    "mmeb-visdoc": Task(
        partial(_mmeb, measure=mmeb.mmeb_documents),
        _MMEB | {"query": mmeb.DOCUMENT_QUERY, "target": mmeb.DOCUMENT_TARGET},
        needs_folder=True,
    ),
    "captioning": Task(
        _captioning,
        _greedy(captioning.PROMPT, captioning.MAX_NEW_TOKENS),
        hub=COCO_5K,
        folder="coco-5k",
    ),
    "vqa": Task(
        _vqa, _greedy("the question" + vqa.INSTRUCTION, vqa.MAX_NEW_TOKENS), hub="lmms-lab/textvqa"
    ),
}

_QUICK = (
    "scenes-retrieval",
    "scenes-mmeb",
    "scenes-pope",
    "scenes-chair",
    "scenes-throne",
    "caption",
    "presence",
    "gap",
)
_PAPER = ("coco-5k", "flickr-1k", "coco-gap", "mmeb", "throne", "pope", "chair")
SUITES: dict[Suite, tuple[str, ...]] = {
    "quick": _QUICK,
    "paper": _PAPER,
    "all": (*_QUICK, "scenes-pope-all", *_PAPER, "captioning", "vqa", "mmeb-video", "mmeb-visdoc"),
}


def task_names(name: str) -> tuple[str, ...]:
    """What `--task` names: one task, or all those of a benchmark of mteb.

    Raises DataError as in `find_task`.
    """
    if name.startswith(mteb_task.PREFIX):
        return mteb_task.task_names(name)
    find_task(name)
    return (name,)


def find_task(name: str) -> Task:
    """One of `TASKS`, or `mteb:TASK`. Raises DataError when there is no such task."""
    if name.startswith(mteb_task.PREFIX):
        of_mteb = mteb_task.find_mteb_task(name)
        return Task(partial(_mteb, task=of_mteb), _EMBED, hub=mteb_task.data_names(of_mteb))
    if name not in TASKS:
        raise DataError(
            f"{name}: no such task; there are {', '.join(TASKS)}, and mteb:NAME for a task or a "
            "benchmark of mteb, such as mteb:MIEB(lite)"
        )
    return TASKS[name]


def is_scenes(name: str) -> bool:
    """Whether a task runs on generated scenes when no data is named."""
    task = find_task(name)
    return task.hub is None and not task.needs_folder


def suite_data(name: str, root: Path | None) -> Source | None:
    """The data of one task of a suite: its subfolder of `root`, else the hub's, else scenes.

    Raises DataError for a task that needs a folder when there is none.
    """
    task = find_task(name)
    folder = None if root is None else root / (task.folder or name)
    if folder is not None and folder.is_dir():
        return folder
    if task.needs_folder:
        missing = "it needs a folder" if folder is None else f"{folder} is not there"
        raise DataError(
            f"{name}: {missing}; download the data set in its published layout and name the folder "
            f"above {task.folder or name} with --data"
        )
    return task.hub
