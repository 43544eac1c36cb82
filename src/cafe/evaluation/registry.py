"""All tasks by name: where their data comes from, how they run, and the suites they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cafe.data.scenes import PRESENCE_QUESTION
from cafe.data.tables import HUB
from cafe.data.tables.tar import is_shards
from cafe.errors import DataError
from cafe.evaluation.datasets.captioned import CaptionedImage, read_captioned_images
from cafe.evaluation.datasets.rows import RowSource
from cafe.evaluation.harness import mteb_task
from cafe.evaluation.mmeb import tasks as mmeb
from cafe.evaluation.mmeb.groups import FRAMES
from cafe.evaluation.model_calls import UseOfCaptions, caption_settings
from cafe.evaluation.scenes import hallucination as scenes_hallucination
from cafe.evaluation.scenes import matching as scenes_matching
from cafe.evaluation.scenes import mmeb as scenes_mmeb
from cafe.evaluation.scenes import retrieval as scenes_retrieval
from cafe.evaluation.scenes import tokens as scenes_tokens
from cafe.evaluation.scenes.held_out import SceneItem, scene_images, scene_items
from cafe.evaluation.task import Task, TaskResult, TaskSetup
from cafe.evaluation.tasks import (
    caption,
    chair,
    gap,
    pope,
    presence,
    retrieval,
    throne,
    vqa,
)
from cafe.evaluation.tasks.judges import FLAN_T5, make_judge
from cafe.recipes import DataSource
from cafe.types import CAPTION_REQUEST, MATCH_QUESTION

Suite = Literal["quick", "paper", "all"]

QUICK_LIMIT = 250
"""Scenes of the suite `quick`: under three minutes for the base model that ships, on two cores."""

COCO_5K = "nlphuji/mscoco_2014_5k_test_image_text_retrieval"
FLICKR_1K = "nlphuji/flickr_1k_test_image_text_retrieval"


def images(setup: TaskSetup) -> Iterable[CaptionedImage]:
    """Generated scenes, a scenes folder, what `cafe train` reads, or rows of a data set.

    Raises:
        DataError: data that is missing, or has a record that cannot be used: scores on the rest
            would be those of another data set.
    """
    source = setup.data
    if source is None:
        return scene_images(setup.limit)
    if isinstance(source, DataSource) or _is_training_data(source):
        return _captioned(source, setup.limit)
    return retrieval.captioned_images(source, setup.limit)


def _is_training_data(source: RowSource) -> bool:
    """Whether data is read as in training; else it is rows in the layout of COCO-5K."""
    path = Path(source)
    if str(source).startswith(HUB) or is_shards(source) or path.is_file():
        return True
    if any((path / name).is_file() for name in ("truth.jsonl", "captions.json")):
        return True
    return path.is_dir() and not any(path.rglob("*.parquet"))


def _captioned(source: RowSource | DataSource, limit: int | None) -> Iterable[CaptionedImage]:
    read = read_captioned_images(source, limit)
    if read.skipped:
        raise DataError(
            f"{len(read.skipped)} records cannot be used; fix or remove them. "
            f"The first: {read.skipped[0]}"
        )
    return read.images


def _scenes(setup: TaskSetup) -> list[SceneItem]:
    data = _rows(setup)
    return scene_items(None if data is None else Path(data), setup.limit)


def _folder(setup: TaskSetup) -> Path:
    data = _rows(setup)
    if data is None or not Path(data).is_dir():
        raise DataError(
            f"{data or 'no --data'}: this task reads a local folder; name it with --data"
        )
    return Path(data)


def _rows(setup: TaskSetup) -> RowSource | None:
    """The data of a task that reads a layout of its own."""
    if isinstance(setup.data, DataSource):
        keys = ", ".join(sorted(setup.data.model_fields_set - {"path"})) or "a data source"
        raise DataError(
            f"{setup.data.path}: this task reads its own layout, which takes no keys of training "
            f"data ({keys}); name the folder alone"
        )
    return setup.data


def _gap(setup: TaskSetup) -> TaskResult:
    return gap.gap(setup.calls.encode, images(setup))


def _retrieval(setup: TaskSetup) -> TaskResult:
    return retrieval.retrieval(setup.calls.encode, images(setup))


def _caption(setup: TaskSetup) -> TaskResult:
    return caption.caption(setup.calls.score_examples, setup.calls.generate, list(images(setup)))


def _presence(setup: TaskSetup) -> TaskResult:
    return presence.presence(setup.calls.score_examples, setup.calls.generate, list(images(setup)))


def _scenes_match(setup: TaskSetup) -> TaskResult:
    calls = setup.calls
    return scenes_matching.scenes_match(
        calls.encode, calls.match_odds, calls.temperature, _scenes(setup)
    )


def _scenes_likelihood(setup: TaskSetup) -> TaskResult:
    calls = setup.calls
    return scenes_matching.scenes_likelihood(
        calls.encode, calls.log_likelihood, calls.temperature, _scenes(setup)
    )


def _scenes_retrieval(setup: TaskSetup, caption: UseOfCaptions | None = None) -> TaskResult:
    calls = setup.calls if caption is None else setup.calls.with_captions(caption)
    return scenes_retrieval.scenes_retrieval(calls.encode, _scenes(setup))


def _scenes_pope(setup: TaskSetup, every_kind: bool) -> TaskResult:
    asked = scenes_hallucination.scene_questions(_scenes(setup), every_kind=every_kind)
    return pope.pope(setup.calls.score_examples, setup.calls.generate, asked)


def _pope(setup: TaskSetup) -> TaskResult:
    asked = pope.read_pope(_rows(setup) or "", setup.limit)
    return pope.pope(setup.calls.score_examples, setup.calls.generate, asked)


def _chair(setup: TaskSetup) -> TaskResult:
    shown, mentions = chair.read_chair(_folder(setup), setup.limit)
    return chair.chair(setup.calls.generate, shown, mentions, journal=setup.journal)


def _throne(setup: TaskSetup) -> TaskResult:
    judges = [make_judge(name) for name in setup.judges or FLAN_T5]
    shown, classes = throne.read_throne(_folder(setup), setup.limit)
    return throne.throne(
        setup.calls.generate, judges, shown, classes, journal=setup.journal, rank=setup.rank
    )


def _mmeb(setup: TaskSetup, measure: Callable[..., TaskResult]) -> TaskResult:
    encode = setup.calls.with_prompt(mmeb.PROMPT).encode
    return measure(encode, _folder(setup), setup.limit, setup.journal)


def _captioning(setup: TaskSetup) -> TaskResult:
    shown = list(images(setup))
    return caption.captioning(setup.calls.generate, shown, journal=setup.journal)


def _mteb(setup: TaskSetup, task: Any) -> TaskResult:
    options = {"--data": setup.data != mteb_task.data_names(task), "--limit": bool(setup.limit)}
    option = next((name for name, used in options.items() if used), None)
    if option is not None:
        raise DataError(f"mteb:{task.metadata.name}: mteb has its own samples; leave out {option}")
    return mteb_task.run_mteb(setup.calls.encode, task)


def _vqa(setup: TaskSetup) -> TaskResult:
    questions = vqa.read_vqa(_rows(setup) or "", setup.limit)
    return vqa.vqa(setup.calls.score_examples, setup.calls.generate, questions)


_EMBED = {"embedding_prompt": "compress"}
_MMEB = {"embedding_prompt": mmeb.PROMPT}


def _greedy(prompt: str, max_new_tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "decoding": "greedy", "max_new_tokens": max_new_tokens}


_OWN_WORDS = _greedy("as the data set asks", caption.MAX_NEW_TOKENS)
_SCENE_CAPTION = _greedy(CAPTION_REQUEST, caption.MAX_NEW_TOKENS)
_SCENE_POPE = _greedy(PRESENCE_QUESTION, pope.MAX_NEW_TOKENS)

TASKS: dict[str, Task] = {
    "retrieval": Task(_retrieval, _EMBED),
    "caption": Task(_caption, _OWN_WORDS),
    "presence": Task(_presence, _greedy("as the data set asks", presence.MAX_NEW_TOKENS)),
    "gap": Task(_gap, _EMBED),
    "scenes-retrieval": Task(_scenes_retrieval, _EMBED),
    "scenes-captions": Task(
        partial(_scenes_retrieval, caption=True), _EMBED | caption_settings(True)
    ),
    "scenes-thoughts": Task(
        partial(_scenes_retrieval, caption="think"), _EMBED | caption_settings("think")
    ),
    "scenes-tokens": Task(
        lambda s: scenes_tokens.scenes_tokens(s.calls.encode_tokens, _scenes(s)), _EMBED
    ),
    "scenes-match": Task(_scenes_match, {"question": MATCH_QUESTION}),
    "scenes-likelihood": Task(_scenes_likelihood, {"prompt": CAPTION_REQUEST}),
    "scenes-mmeb": Task(lambda s: scenes_mmeb.scenes_mmeb(s.calls.encode, _scenes(s)), _EMBED),
    "scenes-pope": Task(partial(_scenes_pope, every_kind=False), _SCENE_POPE),
    "scenes-pope-all": Task(partial(_scenes_pope, every_kind=True), _SCENE_POPE),
    "scenes-chair": Task(
        lambda s: scenes_hallucination.scenes_chair(s.calls.generate, _scenes(s)), _SCENE_CAPTION
    ),
    "scenes-throne": Task(
        lambda s: scenes_hallucination.scenes_throne(s.calls.generate, _scenes(s)), _SCENE_CAPTION
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
        _greedy(caption.PROMPT, caption.MAX_NEW_TOKENS),
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
    "all": (
        *_QUICK,
        "scenes-captions",
        "scenes-match",
        "scenes-likelihood",
        "scenes-pope-all",
        *_PAPER,
        "captioning",
        "vqa",
        "mmeb-video",
        "mmeb-visdoc",
    ),
}


def task_names(name: str) -> tuple[str, ...]:
    """The tasks that `--task` names: one, or all of a benchmark of mteb.

    Raises:
        DataError: As in `find_task`.
    """
    if name.startswith(mteb_task.PREFIX):
        return mteb_task.task_names(name)
    find_task(name)
    return (name,)


def find_task(name: str) -> Task:
    """One of `TASKS`, or `mteb:TASK`.

    Raises:
        DataError: There is no such task.
    """
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


def suite_data(name: str, root: Path | None) -> RowSource | None:
    """The data of one task of a suite: its subfolder of `root`, else the hub's, else scenes.

    Raises:
        DataError: The task needs a folder, and there is none.
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
