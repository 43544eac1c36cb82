"""Rows of MMEB-V2's video data sets -> queries with candidates, in the words of the benchmark.

A query shows its video before its text, as the benchmark does. Where all videos, or all class
names, are candidates of all queries, a row contributes only its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, Protocol

from cafe.data.formats.mmeb import Ranked
from cafe.data.records import Record, kind
from cafe.errors import DataError, quoted
from cafe.types import Conversation, Image, Video, user

K700 = "Recognize the category of the video content."
HMDB51 = "What actions or objects interactions are the person in the video doing?"
UCF101 = "What activities or sports are being performed by the person in the video?"
BREAKFAST = "Recognize the breakfast type that the person is cooking in the video."
SSV2 = "What actions or object interactions are being performed by the person in the video?"
QUESTION = (
    "Given a video and a question, select the most accurate answer from the provided candidates. "
    "Return only the exact text of your chosen answer. Question:"
)
MOMENT = "Find the clip that corresponds to the described scene in the given video:"
SEEK_BY_TEXT = "Find the clip that corresponds to the given text:"
SEEK_BY_IMAGE = "Select the video clip that aligns with the given text and image:"
SEEK_BY_VIDEO = "Find the clip that corresponds to the given sentence and video segment:"
VIDEO_TARGET = "Understand the content of the provided video."
CLIP_TARGET = "Understand the content of the provided video clip."


class FrameStore(Protocol):
    """The frames of one data set (`cafe.evaluation.mmeb.video.Frames`)."""

    def video(self, name: str) -> Video: ...
    def clips(self, name: str) -> list[str]: ...
    def image(self, name: str) -> Image: ...


ReadRecord = Callable[[str, Record, FrameStore], Ranked]


# ---------------------------------------------------------------------- classification


def labelled(instruction: str) -> ReadRecord:
    """{"video_id": "v_1", "pos_text": "clap"}."""

    def read(id: str, row: Record, frames: FrameStore) -> Ranked:
        video = frames.video(_text(row, "video_id"))
        return Ranked(id, user(video, instruction), (user(_text(row, "pos_text")),), (0,))

    return read


def ssv2(id: str, row: Record, frames: FrameStore) -> Ranked:
    """{"video_id": 7, "pos_text": "Folding something", "neg_text": [all candidates, this too]}."""
    candidates = _texts(row, "neg_text")
    right = _index(candidates, _text(row, "pos_text"), "neg_text")
    video = frames.video(_text(row, "video_id"))
    return Ranked(id, user(video, SSV2), tuple(map(user, candidates)), (right,))


# ---------------------------------------------------------------------- questions


def mvbench(id: str, row: Record, frames: FrameStore) -> Ranked:
    """{"subset": …, "video": "a.mp4", "question": …, "candidates": […], "answer": one of them}."""
    options = _texts(row, "candidates")
    right = _index(options, _text(row, "answer"), "candidates")
    video = frames.video(f"{row['subset']}/{_text(row, 'video')}")
    asked = _with_letters(_text(row, "question"), options)
    return _asked(id, video, asked, _lettered(options), right)


def video_mme(id: str, row: Record, frames: FrameStore) -> Ranked:
    """{"videoID": …, "question": …, "options": ["A. a dog", …], "answer": "A"}."""
    options = _texts(row, "options")
    right = _index(_letters(options), _text(row, "answer"), "options")
    asked = "\n".join([_text(row, "question"), *options])
    return _asked(id, frames.video(_text(row, "videoID")), asked, _bare(options), right)


def nextqa(id: str, row: Record, frames: FrameStore) -> Ranked:
    """{"video": 47, "question": …, "a0": …, …, "a4": …, "answer": 2}."""
    options = [_text(row, f"a{i}") for i in range(5)]
    video = frames.video(_text(row, "video"))
    asked = _with_letters(_text(row, "question"), options)
    return _asked(id, video, asked, options, _number(row, "answer", len(options)))


def egoschema(id: str, row: Record, frames: FrameStore) -> Ranked:
    """{"video_idx": …, "question": …, "option": ["A. …", …], "answer": "2"}."""
    options = _texts(row, "option")
    asked = _text(row, "question") + " ".join(options)
    right = _number(row, "answer", len(options))
    return _asked(id, frames.video(_text(row, "video_idx")), asked, _bare(options), right)


def activitynetqa(id: str, row: Record, frames: FrameStore) -> Ranked:
    """{"video_name": "1QIUV7WYKXg", "question": "is the man alone", "answer": "yes"}."""
    right = _index(("yes", "no"), _text(row, "answer"), "answer")
    asked = f"{_text(row, 'question')}? (A) yes; (B) no."
    video = frames.video(f"v_{_text(row, 'video_name')}")
    return _asked(id, video, asked, ("yes", "no"), right)


# ---------------------------------------------------------------------- retrieval


def didemo(id: str, row: Record, frames: FrameStore) -> Ranked:
    """{"video": "folder/a.mp4", "caption": …}."""
    instruction = "Find a video that includes the following described scenes:"
    name = PurePosixPath(_text(row, "video")).stem
    return _described(id, instruction, _text(row, "caption"), frames.video(name))


def msr_vtt(id: str, row: Record, frames: FrameStore) -> Ranked:
    """{"video_id": "video7020", "caption": …}."""
    instruction = "Find a video that contains the following visual content:"
    video = frames.video(_text(row, "video_id"))
    return _described(id, instruction, _text(row, "caption"), video)


def msvd(id: str, row: Record, frames: FrameStore) -> Ranked:
    """{"video_id": …, "caption": [the first is used, …]}."""
    instruction = "Find the video snippet that corresponds to the given summary:"
    video = frames.video(_text(row, "video_id"))
    return _described(id, instruction, _texts(row, "caption")[0], video)


def vatex(id: str, row: Record, frames: FrameStore) -> Ranked:
    """{"videoID": …, "enCap": [the first is used, …]}."""
    instruction = "Select a video that fits the description provided:"
    video = frames.video(_text(row, "videoID"))
    return _described(id, instruction, _texts(row, "enCap")[0], video)


def youcook2(id: str, row: Record, frames: FrameStore) -> Ranked:
    """{"id": …, "sentence": …}."""
    instruction = "Find a video that demonstrates the following action while making a recipe:"
    return _described(id, instruction, _text(row, "sentence"), frames.video(_text(row, "id")))


# ---------------------------------------------------------------------- moments


def moment(id: str, row: Record, frames: FrameStore) -> Ranked:
    """{"query": …, "video_path": "a.mp4"}: clips are the sibling folders of `query`."""
    name = PurePosixPath(_text(row, "video_path")).stem
    clips = [clip for clip in frames.clips(name) if clip != "query"]
    query = user(frames.video(f"{name}/query"), f"{MOMENT} {_text(row, 'query')}")
    candidates = tuple(user(frames.video(f"{name}/{clip}"), VIDEO_TARGET) for clip in clips)
    right = tuple(i for i, clip in enumerate(clips) if clip.startswith("positive"))
    if not right:
        raise DataError(f"video {name!r} has no clip whose folder begins with 'positive'")
    return Ranked(id, query, candidates, right)


def momentseeker(id: str, row: Record, frames: FrameStore) -> Ranked:
    """{"query": …, "input_frames": "a/b.mp4", "c.jpg" or "", "positive_frames": [{"output_path":
    "a/1.mp4"}], "negative_frames": […]}.
    """
    right, wrong = (_clips(row, name) for name in ("positive_frames", "negative_frames"))
    if not right:
        raise DataError("'positive_frames' is empty; every query needs its clip")
    candidates = tuple(
        user(frames.video(_frames_of(clip)), CLIP_TARGET) for clip in (*right, *wrong)
    )
    return Ranked(id, _sought(row, frames), candidates, tuple(range(len(right))))


def _sought(row: Record, frames: FrameStore) -> Conversation:
    text, context = _text(row, "query"), row.get("input_frames") or ""
    if context.endswith(".mp4"):
        return user(frames.video(_frames_of(context)), f"{SEEK_BY_VIDEO} {text}")
    if context.endswith(".jpg"):
        return user(frames.image(f"query_{context}"), f"{SEEK_BY_IMAGE} {text}")
    return user(f"{SEEK_BY_TEXT} {text}")


def _clips(row: Record, name: str) -> list[str]:
    clips = row.get(name)
    if not isinstance(clips, list) or not all(isinstance(c, dict) for c in clips):
        raise DataError(f"{name!r} is {kind(clips)}, expected a list of objects with output_path")
    return [_text(clip, "output_path") for clip in clips]


def _frames_of(clip: str) -> str:
    return "video_frames/" + clip.replace("/", "_").split(".mp4")[0]


# ---------------------------------------------------------------------- parts


def _asked(id: str, video: Video, question: str, options: Sequence[str], right: int) -> Ranked:
    return Ranked(id, user(video, f"{QUESTION} {question}"), tuple(map(user, options)), (right,))


def _described(id: str, instruction: str, text: str, video: Video) -> Ranked:
    return Ranked(id, user(f"{instruction} {text}"), (user(video, VIDEO_TARGET),), (0,))


def _letters(options: Sequence[str]) -> list[str]:
    return [chr(ord("A") + i) for i in range(len(options))]


def _lettered(options: Sequence[str]) -> list[str]:
    pairs = zip(_letters(options), options, strict=True)
    return [f"({letter}) {option}" for letter, option in pairs]


def _with_letters(question: str, options: Sequence[str]) -> str:
    return "\n".join([question, "Options:", *_lettered(options)])


def _bare(options: Sequence[str]) -> list[str]:
    """Without "A. " before and a full stop behind."""
    return [(option.partition(". ")[2] or option).strip(". ") for option in options]


def _text(row: Record, name: str) -> str:
    value: Any = row.get(name)
    if not isinstance(value, str | int) or value == "":
        columns = ", ".join(sorted(row))
        raise DataError(f"{name!r} is {kind(value)}, expected text; the columns are {columns}")
    return str(value)


def _texts(row: Record, name: str) -> list[str]:
    value: Any = row.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise DataError(f"{name!r} is {kind(value)}, expected a list of texts, none missing")
    return value


def _index(options: Sequence[str], answer: str, name: str) -> int:
    if answer not in options:
        raise DataError(
            f"the right one, {quoted(answer)}, is not among the {len(options)} of {name!r}; add "
            "it, or remove the row"
        )
    return options.index(answer)


def _number(row: Record, name: str, count: int) -> int:
    value = _text(row, name)
    if not value.isdigit() or int(value) >= count:
        raise DataError(f"{name!r} is {quoted(value)}, expected a number below {count}")
    return int(value)
