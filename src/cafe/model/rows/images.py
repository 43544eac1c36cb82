"""The distinct images and videos of a chunk, each decoded and processed once.

An image's features may depend on the other images in the prompt (LLaVA-OneVision tiles an image
only when it is the single image of its prompt), so "distinct" means the image and whether it is
single.

An image's placeholder text is inserted before the prompt is tokenised, as processors do it, because
its ends may merge with the text around it (Gemma's line ends do). But each run of the repeated
token is inserted once and repeated after tokenisation, so that the tokenizer does not read
thousands of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from cafe.batching import prefetch_map
from cafe.errors import DataError
from cafe.media import open_image, open_video
from cafe.model.families import Family, Grid, ProcessedImages
from cafe.model.image_keys import image_keys, images_in_order
from cafe.types import Conversation, Image, Part, Video

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Int

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class PromptWithPlaceholders:
    """A prompt with its images' placeholders, ready for the tokenizer.

    text      the prompt, in which every run of a placeholder token appears once
    spans     int64 [images, 2]: the characters that belong to each image
    numbers   which images of the chunk they are
    """

    text: str
    spans: np.ndarray
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placeholder:
    """What stands for an image or a video in a prompt.

    text   with every run of the repeated token as one
    runs   how long each of these runs is
    grid   the layout of its features, if the family's positions need it
    """

    text: str
    runs: np.ndarray
    grid: Grid | None = None


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """The processed images and videos of a chunk.

    inputs   the family's vision tensors; the other fields are private

    _index   (key, kind) -> number; the numbers of videos come after those of images
    _placeholders   of each image, then of each video
    """

    inputs: dict[str, Tensor]
    _index: dict[tuple[object, str], int]
    _placeholders: list[Placeholder]
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
        """Decode and process the images and videos of several prompts.

        Args:
            prompts: for each prompt its name, for errors, and its images and videos.
            processor: the model's.
            family: the model's.
            dummy: if there are none, process an empty image that no prompt contains.
            max_frames: of a video; they are evenly spaced.

        Raises:
            ImageError: an image that cannot be used; the message names the prompt.
        """
        distinct = distinct_media(prompts, family)
        groups = [[image] for image in _opened(distinct[SINGLE].values())]
        if distinct[MULTIPLE]:
            others = _opened(distinct[MULTIPLE].values())
            # The family would treat a group of one as a single image.
            groups.append(others if len(others) > 1 else others * 2)
        clips = [named(n, open_video, video, max_frames) for n, video in distinct[VIDEO].values()]
        if not groups and not clips and dummy:
            groups = [[PIL.Image.new("RGB", (32, 32))]]
        nothing = ProcessedImages({}, [])
        images = family.process_images(processor, groups) if groups else nothing
        videos = family.process_videos(processor, clips) if clips else nothing
        return cls.assembled(
            _joined(images.inputs, videos.inputs),
            distinct,
            placeholders_of(images, family.placeholder_id(processor), processor),
            placeholders_of(videos, family.video_placeholder_id(processor), processor),
            processor,
            family,
        )

    @classmethod
    def assembled(
        cls,
        inputs: dict[str, Tensor],
        distinct: DistinctMedia,
        images: Sequence[Placeholder],
        videos: Sequence[Placeholder],
        processor: Any,
        family: Family,
    ) -> Self:
        """From the placeholders of the distinct images and videos, in order."""
        numbered = [(key, kind) for kind in (SINGLE, MULTIPLE) for key in distinct[kind]]
        index = {name: i for i, name in enumerate(numbered)}
        # `of` may process the last image twice, so `numbered` does not count them.
        index |= {(key, VIDEO): len(images) + i for i, key in enumerate(distinct[VIDEO])}
        return cls(
            inputs=inputs,
            _index=index,
            _placeholders=[*images, *videos],
            _family=family,
            _placeholder_ids=(
                family.placeholder_id(processor),
                family.video_placeholder_id(processor),
            ),
            _markers=(family.marker(processor), family.video_marker(processor)),
            _differ=family.features_depend_on_image_count(),
            _first_video=len(images),
        )

    def with_placeholders(
        self, text: str, media: Sequence[Image | Video]
    ) -> PromptWithPlaceholders:
        """Replace the markers of images and videos in one prompt by their placeholders.

        Raises:
            DataError: the markers in the text do not match the images and videos.
        """
        image, video = self._markers
        pieces = re.split("|".join(f"({re.escape(m)})" for m in (image, video) if m), text)
        step = 2 if video is None else 3  # split inserts each group's match between the pieces
        expected = [video if isinstance(part, Video) else image for part in media]
        if [m for m in pieces if m in (image, video)] != expected:
            count = text.count(image)
            raise DataError(
                f"{len(media)} images, but {count} markers {image!r} in the text; "
                "a text may not contain the marker itself"
            )
        kinds = _kinds(media, self._differ)
        numbers = tuple(self._index[p.key, k] for p, k in zip(media, kinds, strict=True))
        written, spans = pieces[0], []
        for number, piece in zip(numbers, pieces[step::step], strict=True):
            placeholder = self._placeholders[number].text
            spans.append((len(written), len(written) + len(placeholder)))
            written += placeholder + piece
        return PromptWithPlaceholders(
            written, np.array(spans, dtype=np.int64).reshape(-1, 2), numbers
        )

    def expand(
        self,
        prompt: PromptWithPlaceholders,
        tokens: Int[np.ndarray, " t"],
        spans: Int[np.ndarray, "t 2"],
    ) -> tuple[Int[np.ndarray, " u"], Int[np.ndarray, " u"], Int[np.ndarray, "u 2"]]:
        """Repeat the placeholders in the tokens of one prompt, once per image feature.

        Args:
            prompt: with placeholders.
            tokens: ids of `prompt.text`.
            spans: character offsets of each token in `prompt.text`.

        Returns:
            Tokens, trie keys and offsets; an image's tokens have the offsets (-1, -1).

        Raises:
            DataError: the tokenizer changed a placeholder.
        """
        if not prompt.numbers:
            return tokens, tokens, spans
        image, video = self._placeholder_ids
        is_placeholder = (tokens == image) | (tokens == video)
        at = np.flatnonzero(is_placeholder)
        runs = [self._placeholders[number].runs for number in prompt.numbers]
        if len(at) != sum(len(run) for run in runs):
            raise DataError(
                f"{len(at)} image tokens in the prompt, and its images need "
                f"{sum(len(run) for run in runs)}: tokenizer and processor do not match"
            )
        spans = spans.copy()
        for begin, end in prompt.spans:
            spans[(spans[:, 1] > begin) & (spans[:, 0] < end)] = -1
        repeats = np.ones(len(tokens), dtype=np.int64)
        repeats[at] = np.concatenate(runs)
        tokens, spans = np.repeat(tokens, repeats), np.repeat(spans, repeats, axis=0)
        keys = tokens.copy()
        keys[np.repeat(is_placeholder, repeats)] = np.concatenate(
            [image_keys(n, int(run.sum())) for n, run in zip(prompt.numbers, runs, strict=True)]
        )
        return tokens, keys, spans

    def positions(self, keys: Int[np.ndarray, " t"]) -> Int[np.ndarray, "axes t"] | None:
        """The positions of one sequence, where the family counts along several axes."""
        grids = [p.grid for p in self._placeholders if p.grid is not None]
        return self._family.positions(keys, grids)

    def orders(self, keys: Int[np.ndarray, "rows t"]) -> tuple[list[int], list[int]]:
        """Which image, and which video, each run of placeholders stands for, over rows [rows, t].

        Videos that use the images' placeholder token are among the images.
        """
        order = images_in_order(keys)
        if self._placeholder_ids[0] == self._placeholder_ids[1]:
            return order, []
        first = self._first_video
        return [n for n in order if n < first], [n for n in order if n >= first]


SINGLE, MULTIPLE, VIDEO = "single", "multiple", "video"

DistinctMedia = dict[str, dict[object, tuple[str, Any]]]
"""Kind -> key -> the name of the first prompt with it, and the image or video."""


def distinct_media(
    prompts: Sequence[tuple[str, Sequence[Image | Video]]], family: Family
) -> DistinctMedia:
    """The distinct images and videos of several prompts, in order (see `ImageInputs.of`)."""
    differ = family.features_depend_on_image_count()
    distinct: DistinctMedia = {SINGLE: {}, MULTIPLE: {}, VIDEO: {}}
    for name, media in prompts:
        for part, kind in zip(media, _kinds(media, differ), strict=True):
            distinct[kind].setdefault(part.key, (name, part))
    return distinct


def _opened(images: Collection[tuple[str, Image]]) -> list[PIL.Image.Image]:
    """Decoded, in threads where torch may use several cores: Pillow releases the interpreter."""
    threads = min(len(images), torch.get_num_threads())
    opened = prefetch_map(
        lambda image: named(image[0], open_image, image[1]),
        images,
        threads
        if threads > 1
        else 0,  # a data loader's worker has one core, and other workers use the rest
    )
    return list(opened)


def _kinds(media: Sequence[Image | Video], differ: bool) -> list[str]:
    images = sum(isinstance(part, Image) for part in media)
    kind = MULTIPLE if differ and images > 1 else SINGLE
    return [VIDEO if isinstance(part, Video) else kind for part in media]


def frames_as_images(conversation: Conversation, max_frames: int) -> Conversation:
    """Every video replaced by its frames as images, for a model that takes no videos."""

    def without_video(part: Part) -> tuple[Part, ...]:
        if not isinstance(part, Video):
            return (part,)
        return tuple(Image(frame) for frame in open_video(part, max_frames).frames)

    return tuple(
        replace(m, content=tuple(p for part in m.content for p in without_video(part)))
        for m in conversation
    )


def named(name: str, function: Callable[..., _T], *arguments: Any) -> _T:
    """The function's result; a data error is raised again with `name` in front."""
    try:
        return function(*arguments)
    except DataError as error:
        raise type(error)(f"{name}: {error}") from error


def _joined(images: dict[str, Tensor], videos: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vision tensors of both; tensors of one name are concatenated."""
    joined = {**images, **videos}
    for name in images.keys() & videos.keys():
        first, second = images[name], videos[name]
        if first.shape[1:] != second.shape[1:]:
            raise DataError(
                f"images are {tuple(first.shape[-2:])} pixels for this model and frames of "
                f"videos {tuple(second.shape[-2:])}; they cannot be in one batch: set equal sizes "
                "in processor_config.json"
            )
        joined[name] = torch.cat([first, second])
    return joined


def placeholders_of(processed: ProcessedImages, token_id: int, processor: Any) -> list[Placeholder]:
    """The placeholders of processed images, or videos, which repeat the token `token_id`."""
    token = processor.tokenizer.convert_ids_to_tokens(token_id)
    # Equal texts are processed once.
    shortened = {text: _shortened(text, token) for text in set(processed.placeholders)}
    grids = processed.grids or [None] * len(processed.placeholders)
    return [
        Placeholder(*shortened[text], grid)
        for text, grid in zip(processed.placeholders, grids, strict=True)
    ]


def _shortened(text: str, token: str) -> tuple[str, np.ndarray]:
    """A placeholder text with every run of `token` as one token, and the lengths of the runs."""
    run = re.compile(f"(?:{re.escape(token)})+")
    lengths = [len(match.group()) // len(token) for match in run.finditer(text)]
    # A function, because a token may contain a backslash.
    return run.sub(lambda _: token, text), np.array(lengths, dtype=np.int64)
