"""The distinct pictures and videos of a chunk: decoded and processed once, however often shown.

A picture's features may depend on its company (LLaVA-OneVision tiles a picture only when it is
alone in its prompt), so "distinct" means the picture and whether it is alone.

A picture's placeholder text is put into the prompt before the prompt is tokenised, as processors
do it, because its ends may join with the words around it (Gemma's line ends do). But each run of
the repeated token is put there once, and repeated in the tokens: the tokenizer need not read
thousands of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from cafe.errors import DataError
from cafe.media import open_image, open_video
from cafe.model.ahead import ahead
from cafe.model.families import Family, Grid, ProcessedImages
from cafe.model.trie import IMAGE_STRIDE, image_keys, image_of_key
from cafe.types import Conversation, Image, Message, Part, Video

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Shown:
    """A prompt with its pictures' placeholders, ready for the tokenizer.

    text      the prompt; every run of a placeholder token stands there once
    spans     int64 [pictures, 2]: the characters that belong to each picture
    numbers   which pictures of the chunk they are
    """

    text: str
    spans: np.ndarray
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pictures:
    """inputs: the family's vision tensors. The other fields are private.

    _index   (key, kind) -> number; the numbers of videos come after those of pictures
    _texts   each picture's placeholder text, with runs of the token as one
    _runs    how long each of these runs is
    """

    inputs: dict[str, Tensor]
    _index: dict[tuple[object, str], int]
    _texts: list[str]
    _runs: list[np.ndarray]
    _grids: list[Grid]
    _family: Family
    _placeholder_ids: tuple[int, int]
    _markers: tuple[str, str | None]
    _differ: bool
    _first_video: int

    @classmethod
    def of(
        cls,
        prompts: Sequence[tuple[str, Sequence[Image | Video]]],
        processor: Any,
        family: Family,
        dummy: bool,
        max_frames: int,
    ) -> Self:
        """Decode and process the pictures and videos of several prompts.

        prompts      for each prompt its name, for errors, and its pictures and videos
        dummy        when there are none, process an empty one that no prompt shows
        max_frames   of a video; they are evenly spaced
        Raises ImageError, naming the prompt, for a picture that cannot be used.
        """
        differ = family.alone_and_together_differ()
        found: dict[str, dict[object, tuple[str, Any]]] = {_ALONE: {}, _TOGETHER: {}, _VIDEO: {}}
        for name, shown in prompts:
            for part, kind in zip(shown, _kinds(shown, differ), strict=True):
                found[kind].setdefault(part.key, (name, part))
        groups = [[picture] for picture in _opened(found[_ALONE].values())]
        if found[_TOGETHER]:
            company = _opened(found[_TOGETHER].values())
            # A group of one would be taken for a picture that is alone.
            groups.append(company if len(company) > 1 else company * 2)
        clips = [named(n, open_video, video, max_frames) for n, video in found[_VIDEO].values()]
        if not groups and not clips and dummy:
            groups = [[PIL.Image.new("RGB", (32, 32))]]
        nothing = ProcessedImages({}, [])
        pictures = family.process_images(processor, groups) if groups else nothing
        videos = family.process_videos(processor, clips) if clips else nothing

        first_video = len(pictures.placeholders)
        numbered = [(key, kind) for kind in (_ALONE, _TOGETHER) for key in found[kind]]
        index = {name: i for i, name in enumerate(numbered)}
        index |= {(key, _VIDEO): first_video + i for i, key in enumerate(found[_VIDEO])}
        ids = family.placeholder_id(processor), family.video_placeholder_id(processor)
        tokens = processor.tokenizer.convert_ids_to_tokens(ids)
        shortened = [
            *_all_shortened(pictures.placeholders, tokens[0]),
            *_all_shortened(videos.placeholders, tokens[1]),
        ]
        return cls(
            inputs=_joined(pictures.inputs, videos.inputs),
            _index=index,
            _texts=[text for text, _ in shortened],
            _runs=[runs for _, runs in shortened],
            _grids=[*pictures.grids, *videos.grids],
            _family=family,
            _placeholder_ids=ids,
            _markers=(family.marker(processor), family.video_marker(processor)),
            _differ=differ,
            _first_video=first_video,
        )

    def show(self, text: str, shown: Sequence[Image | Video]) -> Shown:
        """Put the placeholders of pictures and videos where their markers stand in one prompt.

        Raises DataError when the text has other markers than it shows pictures and videos.
        """
        picture, video = self._markers
        pieces = re.split("|".join(f"({re.escape(m)})" for m in (picture, video) if m), text)
        step = 2 if video is None else 3  # split puts what each group found between the pieces
        expected = [video if isinstance(part, Video) else picture for part in shown]
        if [m for m in pieces if m in (picture, video)] != expected:
            count = text.count(picture)
            raise DataError(
                f"{len(shown)} pictures, but {count} markers {picture!r} in the text; "
                "a text may not hold the marker itself"
            )
        kinds = _kinds(shown, self._differ)
        numbers = tuple(self._index[p.key, k] for p, k in zip(shown, kinds, strict=True))
        written, spans = pieces[0], []
        for number, piece in zip(numbers, pieces[step::step], strict=True):
            placeholder = self._texts[number]
            spans.append((len(written), len(written) + len(placeholder)))
            written += placeholder + piece
        return Shown(written, np.array(spans, dtype=np.int64).reshape(-1, 2), numbers)

    def fill(
        self, shown: Shown, tokens: np.ndarray, spans: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Repeat the placeholders in the tokens of one prompt, as often as there are features.

        tokens, spans   int64 [t] and [t, 2]: ids and character offsets of `shown.text`
        Returns tokens, trie keys and offsets; a picture's tokens have the offsets (-1, -1).
        Raises DataError when the tokenizer has lost a placeholder.
        """
        if not shown.numbers:
            return tokens, tokens, spans
        picture, video = self._placeholder_ids
        stands = (tokens == picture) | (tokens == video)
        at = np.flatnonzero(stands)
        runs = [self._runs[number] for number in shown.numbers]
        if len(at) != sum(len(run) for run in runs):
            raise DataError(
                f"{len(at)} picture tokens in the prompt, and its pictures need "
                f"{sum(len(run) for run in runs)}: tokenizer and processor do not fit"
            )
        spans = spans.copy()
        for begin, end in shown.spans:
            spans[(spans[:, 1] > begin) & (spans[:, 0] < end)] = -1
        repeats = np.ones(len(tokens), dtype=np.int64)
        repeats[at] = np.concatenate(runs)
        tokens, spans = np.repeat(tokens, repeats), np.repeat(spans, repeats, axis=0)
        keys = tokens.copy()
        keys[np.repeat(stands, repeats)] = np.concatenate(
            [image_keys(n, int(run.sum())) for n, run in zip(shown.numbers, runs, strict=True)]
        )
        return tokens, keys, spans

    def positions(self, keys: np.ndarray) -> np.ndarray | None:
        """The positions of one sequence, where the family counts along several axes."""
        return self._family.positions(keys, self._grids)

    def orders(self, keys: np.ndarray) -> tuple[list[int], list[int]]:
        """Which picture, and which video, each run of placeholders shows, over rows [rows, t].

        Videos whose features stand at the pictures' own token are among the pictures.
        """
        negative = keys[keys < 0]
        starts = [image_of_key(key) for key in negative[(-negative - 1) % IMAGE_STRIDE == 0]]
        shown = [number for number, _ in starts]
        if self._placeholder_ids[0] == self._placeholder_ids[1]:
            return shown, []
        first = self._first_video
        return [n for n in shown if n < first], [n for n in shown if n >= first]


_ALONE, _TOGETHER, _VIDEO = "alone", "together", "video"


def _opened(images: Collection[tuple[str, Image]]) -> list[PIL.Image.Image]:
    """Decoded, several at once where torch may use several cores: Pillow lets others run."""
    threads = min(len(images), torch.get_num_threads())
    opened = ahead(
        lambda image: named(image[0], open_image, image[1]),
        [*images],
        threads if threads > 1 else 0,  # a loader's worker has one, and others beside it
    )
    return list(opened)


def _kinds(shown: Sequence[Image | Video], differ: bool) -> list[str]:
    pictures = sum(isinstance(part, Image) for part in shown)
    kind = _TOGETHER if differ and pictures > 1 else _ALONE
    return [_VIDEO if isinstance(part, Video) else kind for part in shown]


def frames_as_pictures(conversation: Conversation, max_frames: int) -> Conversation:
    """Every video as its frames, picture after picture, for a model that takes no videos."""

    def shown(part: Part) -> tuple[Part, ...]:
        if not isinstance(part, Video):
            return (part,)
        return tuple(Image(frame) for frame in open_video(part, max_frames).frames)

    return tuple(
        Message(m.role, tuple(p for part in m.content for p in shown(part))) for m in conversation
    )


def named(name: str, function: Callable[..., _T], *arguments: Any) -> _T:
    """The function's result; an error about data names the example or input it comes from."""
    try:
        return function(*arguments)
    except DataError as error:
        raise type(error)(f"{name}: {error}") from error


def _joined(pictures: dict[str, Tensor], videos: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vision tensors of both; those of one name are one after the other."""
    joined = {**pictures, **videos}
    for name in pictures.keys() & videos.keys():
        first, second = pictures[name], videos[name]
        if first.shape[1:] != second.shape[1:]:
            raise DataError(
                f"pictures are {tuple(first.shape[-2:])} pixels for this model and frames of "
                f"videos {tuple(second.shape[-2:])}; they cannot be in one batch: give equal sizes "
                "in processor_config.json"
            )
        joined[name] = torch.cat([first, second])
    return joined


def _all_shortened(texts: Sequence[str], token: str) -> list[tuple[str, np.ndarray]]:
    """`_shortened` of each text; equal texts are read once."""
    shortened = {text: _shortened(text, token) for text in set(texts)}
    return [shortened[text] for text in texts]


def _shortened(text: str, token: str) -> tuple[str, np.ndarray]:
    """A placeholder text with every run of `token` as one token, and the lengths of the runs."""
    run = re.compile(f"(?:{re.escape(token)})+")
    lengths = [len(match.group()) // len(token) for match in run.finditer(text)]
    # A function, for a token is no template.
    return run.sub(lambda _: token, text), np.array(lengths, dtype=np.int64)
