"""MMEB-V2's videos: frames in folders, and rows in the columns of each data set's own authors.

The archives of TIGER-Lab/MMEB-V2, unpacked in its folder `video-tasks`:

    folder/frames/video_cls/HMDB51/VIDEO/frame_0001.jpg             a folder per video
    folder/frames/video_ret/MSR-VTT/VIDEO/…
    folder/frames/video_qa/MVBench/SUBSET/VIDEO/…
    folder/frames/video_mret/QVHighlight/VIDEO/{query,positive…,negative…}/…
    folder/frames/video_mret/MomentSeeker/video_frames/CLIP/…       and query_IMAGE.jpg

Rows are a data set on the hub each (`VIDEO_SETS`). A local copy is read from:

    folder/data/hmdb51.jsonl            or .json, .parquet; MVBench: data/mvbench/SUBSET.json

The class names of video classification are in the benchmark's code, not in its data. They are taken
from the rows where these contain all of them, and else from a file:

    folder/labels/K700.txt              one a line, as the rows spell them

This reader has not been run on the published files: its columns and folders are those that the
benchmark's own loaders read (TIGER-AI-Lab/VLM2Vec, src/data/eval_dataset), tested on files made in
the same layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from cafe.data.formats.mmeb import Ranked
from cafe.data.records import Record, kind
from cafe.data.tables import HUB, Table, open_table
from cafe.errors import DataError
from cafe.evaluation.datasets.rows import inside, local_image
from cafe.evaluation.mmeb import video_rows as rows_of
from cafe.evaluation.mmeb.groups import FRAMES
from cafe.files import is_system_file
from cafe.types import Conversation, Image, Video, content_key, user

_IMAGES = frozenset({".jpg", ".jpeg", ".png"})
_NUMBER = re.compile(r"(\d+)")
_MVBENCH = (
    "action_antonym action_count action_localization action_prediction action_sequence "
    "character_order counterfactual_inference egocentric_navigation episodic_reasoning "
    "fine_grained_action fine_grained_pose moving_attribute moving_count moving_direction "
    "object_existence object_interaction object_shuffle scene_transition state_change "
    "unexpected_action"
)


class NoFramesError(DataError):
    """A video without a single frame."""


@dataclass(frozen=True, slots=True)
class VideoSet:
    """One data set.

    frames    its folder below `frames`
    rows      its file below `data`, without the ending
    read      a row -> a query with its candidates
    shared    the candidates of all rows are every query's
    classes   how many there are, where candidates are class names; 0: they are something else
    patchy    the benchmark skips rows with missing frames
    limit     the benchmark uses the first N rows
    hub       where the rows are on the hub; "": VLM2Vec/ and the name
    subsets   configurations on the hub, and files in the folder `rows`
    """

    frames: str
    rows: str
    read: Callable[[str, Record, Frames], Ranked]
    shared: bool = False
    classes: int = 0
    patchy: bool = False
    limit: int | None = None
    hub: str = ""
    split: str = "test"
    subsets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of one data set, in a folder per video."""

    root: Path

    def video(self, name: str) -> Video:
        """`FRAMES` of its frames, in order and evenly spaced, including the first and the last; all
        if there are fewer. Raises NoFramesError when there is none.
        """
        return Video(_sampled(self._files(inside(self.root, name, "video"))))

    def clips(self, name: str) -> list[str]:
        """The folders inside the folder of a video, by name."""
        folder = inside(self.root, name, "video")
        if not folder.is_dir():
            raise NoFramesError(_missing(folder))
        return sorted(path.name for path in folder.iterdir() if path.is_dir())

    def image(self, name: str) -> Image:
        return local_image(self.root, name, "the image of a query")

    def _files(self, folder: Path) -> list[Path]:
        files = folder.iterdir() if folder.is_dir() else ()
        frames = [
            path for path in files if path.suffix.lower() in _IMAGES and not is_system_file(path)
        ]
        if not frames:
            raise NoFramesError(_missing(folder))
        return sorted(frames, key=_natural)


@dataclass(frozen=True, slots=True)
class VideoQueries:
    """`skipped`: rows without frames, where the benchmark leaves these out too."""

    queries: Iterator[Ranked]
    skipped: int


def _labelled(name: str, classes: int, instruction: str, hub: str = "") -> VideoSet:
    read = rows_of.labelled(instruction)
    return VideoSet(f"video_cls/{name}", name.lower(), read, shared=True, classes=classes, hub=hub)


VIDEO_SETS: dict[str, VideoSet] = {
    "K700": _labelled("K700", 700, rows_of.K700, "VLM2Vec/Kinetics-700"),
    "SmthSmthV2": VideoSet("video_cls/SSv2", "ssv2", rows_of.ssv2, limit=1000),
    "HMDB51": _labelled("HMDB51", 51, rows_of.HMDB51),
    "UCF101": _labelled("UCF101", 101, rows_of.UCF101),
    "Breakfast": _labelled("Breakfast", 10, rows_of.BREAKFAST),
    "MVBench": VideoSet(
        "video_qa/MVBench", "mvbench", rows_of.mvbench, split="train",
        subsets=tuple(_MVBENCH.split()),
    ),
    "Video-MME": VideoSet("video_qa/Video-MME", "video-mme", rows_of.video_mme),
    "NExTQA": VideoSet("video_qa/NExTQA", "nextqa", rows_of.nextqa, hub="VLM2Vec/NExTQA:MC"),
    "EgoSchema": VideoSet(
        "video_qa/EgoSchema", "egoschema", rows_of.egoschema, hub="VLM2Vec/EgoSchema:Subset"
    ),
    "ActivityNetQA": VideoSet("video_qa/ActivityNetQA", "activitynetqa", rows_of.activitynetqa),
    "DiDeMo": VideoSet("video_ret/DiDeMo", "didemo", rows_of.didemo, shared=True),
    "MSR-VTT": VideoSet(
        "video_ret/MSR-VTT", "msr-vtt", rows_of.msr_vtt, shared=True, hub="VLM2Vec/MSR-VTT:test_1k"
    ),
    "MSVD": VideoSet("video_ret/MSVD", "msvd", rows_of.msvd, shared=True, patchy=True),
    "VATEX": VideoSet("video_ret/VATEX", "vatex", rows_of.vatex, shared=True),
    "YouCook2": VideoSet(
        "video_ret/YouCook2", "youcook2-val", rows_of.youcook2, shared=True, patchy=True,
        hub="lmms-lab/YouCook2", split="val",
    ),
    "QVHighlight": VideoSet("video_mret/QVHighlight", "qvhighlight", rows_of.moment),
    "Charades-STA": VideoSet("video_mret/Charades_STA", "charades_sta", rows_of.moment),
    "MomentSeeker": VideoSet("video_mret/MomentSeeker", "momentseeker_1k6", rows_of.momentseeker),
}  # fmt: skip


def frames_folder(folder: Path, name: str) -> Path:
    """The folder with the frames of a data set; the data set is present if it exists."""
    return folder / "frames" / VIDEO_SETS[name].frames


def video_queries(folder: Path, name: str, limit: int | None) -> VideoQueries:
    """The queries of one data set; `limit` makes fewer of them, and leaves candidates as they are.

    Raises:
        DataError: rows that are not there or cannot be used, missing frames, class names that are
            not all known.
    """
    data_set = VIDEO_SETS[name]
    frames = Frames(frames_folder(folder, name))
    queries: list[Ranked] = []
    skipped = 0
    for location, record in islice(_rows(folder, name), data_set.limit):
        try:
            queries.append(data_set.read(str(len(queries) + skipped), record, frames))
        except NoFramesError as error:
            if not data_set.patchy:
                raise DataError(f"{location}: {error}") from error
            skipped += 1
        except DataError as error:
            raise DataError(f"{location}: {error}") from error
        if len(queries) == limit and not data_set.shared:
            break
    if not queries:
        raise DataError(f"{frames.root}: {skipped} rows, and frames of none of their videos")
    if not data_set.shared:
        return VideoQueries(iter(queries), skipped)
    more = _labels(folder, name, queries) if data_set.classes else ()
    return VideoQueries(islice(_among_all(queries, more), limit), skipped)


def _rows(folder: Path, name: str) -> Iterator[tuple[str, Record]]:
    """Rows with their locations, for messages; MVBench's with their `subset`."""
    data_set = VIDEO_SETS[name]
    stem = folder / "data" / data_set.rows
    hub = data_set.hub or f"VLM2Vec/{name}"
    for subset in data_set.subsets or (None,):
        table = _table(
            stem if subset is None else stem / subset,
            f"{HUB}{hub}" if subset is None else f"{HUB}{hub}:{subset}",
            data_set.split,
        )
        for raw in table.rows():
            location = f"{table.name}, {raw.location}"
            if isinstance(raw.content, DataError):
                raise DataError(f"{location}: {raw.content}")
            if not isinstance(raw.content, dict):
                raise DataError(f"{location}: expected an object, found {kind(raw.content)}")
            yield location, raw.content if subset is None else raw.content | {"subset": subset}


def _table(stem: Path, hub: str, split: str) -> Table:
    """The local rows if there are any, else the hub's."""
    here = [stem.with_name(stem.name + ending) for ending in (".jsonl", ".json", ".parquet")]
    for file in here:
        if file.is_file():
            return open_table(file)
    try:
        return open_table(hub, split=split)
    except DataError as error:
        raise DataError(f"{error}; download the rows and put them into {here[0]}") from error


def _labels(folder: Path, name: str, queries: Sequence[Ranked]) -> tuple[Conversation, ...]:
    """Class names from the file, in addition to those of the rows."""
    file = folder / "labels" / f"{name}.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else ()
    listed = [line.strip() for line in lines if line.strip()]
    known = {query.candidates[0][0].text for query in queries}
    if listed and (other := sorted(known - set(listed))):
        raise DataError(f"{file}: the rows name class {other[0]!r}, which is not in it")
    count, wanted = len(known | set(listed)), VIDEO_SETS[name].classes
    if count != wanted:
        raise DataError(
            f"{file}: {name} has {wanted} classes, and {count} are known; list all of them there, "
            "one a line, as the rows spell them (the benchmark's code has them)"
        )
    return tuple(user(text) for text in listed)


def _among_all(queries: Sequence[Ranked], more: Sequence[Conversation]) -> Iterator[Ranked]:
    """Each query with the distinct candidates of all queries."""
    distinct = {content_key(c): c for query in queries for c in query.candidates}
    distinct |= {content_key(c): c for c in more}
    number = {key: i for i, key in enumerate(distinct)}
    pool = tuple(distinct.values())
    for query in queries:
        own = tuple(number[content_key(query.candidates[i])] for i in query.positives)
        yield Ranked(query.id, query.query, pool, own)


def _sampled(files: Sequence[Path]) -> tuple[Path, ...]:
    if len(files) < FRAMES:
        return tuple(files)
    return tuple(files[i] for i in np.linspace(0, len(files) - 1, FRAMES, dtype=int))


def _natural(path: Path) -> list[str | int]:
    """frame_9 before frame_10."""
    pieces = _NUMBER.split(path.name.lower())
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)]


def _missing(folder: Path) -> str:
    return f"{folder}: no frames of this video; unpack the frames of TIGER-Lab/MMEB-V2"
