"""The distinct images, videos and recordings of a chunk, each decoded and processed once.

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

from cafe.audio import open_audio
from cafe.batching import prefetch_map
from cafe.errors import DataError
from cafe.media import open_image, open_video
from cafe.model.families import Family, Grid, ProcessedImages
from cafe.model.image_keys import MediaOrders, image_keys, images_in_order
from cafe.types import Audio, Conversation, Image, Media, Part, Video

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
    """What stands for an image, a video or a recording in a prompt.

    text   with every run of the repeated token as one
    runs   how long each of these runs is
    grid   the layout of its features, if the family's positions need it
    """

    text: str
    runs: np.ndarray
    grid: Grid | None = None


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """The processed images, videos and recordings of a chunk.

    inputs   the tensors of the family's towers; the other fields are private

    _index   (key, kind) -> number; the numbers of videos come after those of images, and those of
             recordings after both
    _placeholders   of each image, then of each video, then of each recording
    _placeholder_ids, _markers   of an image, a video and a recording; None: the family takes none
    """

    inputs: dict[str, Tensor]
    _index: dict[tuple[object, str], int]
    _placeholders: list[Placeholder]
    _family: Family
    _placeholder_ids: tuple[int, int, int | None]
    _markers: tuple[str, str | None, str | None]
    _differ: bool
    _first_video: int
    _first_audio: int

    @classmethod
    def of(
        cls,
        prompts: Sequence[tuple[str, Sequence[Media]]],
        processor: Any,
        family: Family,
        dummy: bool,
        max_frames: int,
    ) -> Self:
        """Decode and process the images, videos and recordings of several prompts.

        Args:
            prompts: for each prompt its name, for errors, and its images, videos and recordings.
            processor: the model's.
            family: the model's.
            dummy: if there are none, process an empty image that no prompt contains; and silence,
                if the family hears and there is no recording.
            max_frames: of a video; they are evenly spaced.

        Raises:
            ImageError: an image that cannot be used; the message names the prompt.
            AudioError: the same of a recording.
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
        sounds = [
            named(n, heard, audio, processor, family) for n, audio in distinct[AUDIO].values()
        ]
        if not sounds and dummy and family.audio_marker(processor) is not None:
            sounds = [np.zeros(family.audio_rate(processor) // 10, dtype=np.float32)]
        nothing = ProcessedImages({}, [])
        images = family.process_images(processor, groups) if groups else nothing
        videos = family.process_videos(processor, clips) if clips else nothing
        recordings = family.process_audio(processor, sounds) if sounds else nothing
        return cls.assembled(
            _joined(images.inputs, videos.inputs) | recordings.inputs,
            distinct,
            placeholders_of(images, family.placeholder_id(processor), processor),
            placeholders_of(videos, family.video_placeholder_id(processor), processor),
            placeholders_of(recordings, family.audio_placeholder_id(processor), processor),
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
        recordings: Sequence[Placeholder],
        processor: Any,
        family: Family,
    ) -> Self:
        """From the placeholders of the distinct images, videos and recordings, in order."""
        numbered = [(key, kind) for kind in (SINGLE, MULTIPLE) for key in distinct[kind]]
        index = {name: i for i, name in enumerate(numbered)}
        # `of` may process the last image twice, so `numbered` does not count them.
        index |= {(key, VIDEO): len(images) + i for i, key in enumerate(distinct[VIDEO])}
        seen = len(images) + len(videos)
        index |= {(key, AUDIO): seen + i for i, key in enumerate(distinct[AUDIO])}
        return cls(
            inputs=inputs,
            _index=index,
            _placeholders=[*images, *videos, *recordings],
            _family=family,
            _placeholder_ids=(
                family.placeholder_id(processor),
                family.video_placeholder_id(processor),
                family.audio_placeholder_id(processor),
            ),
            _markers=(
                family.marker(processor),
                family.video_marker(processor),
                family.audio_marker(processor),
            ),
            _differ=family.features_depend_on_image_count(),
            _first_video=len(images),
            _first_audio=seen,
        )

    def with_placeholders(self, text: str, media: Sequence[Media]) -> PromptWithPlaceholders:
        """Replace the markers of images, videos and recordings in one prompt by placeholders.

        Raises:
            DataError: the markers in the text do not match what it shows.
        """
        image, video, audio = self._markers
        markers = [marker for marker in self._markers if marker is not None]
        pieces = re.split("(" + "|".join(map(re.escape, markers)) + ")", text)
        expected = [
            audio if isinstance(part, Audio) else video if isinstance(part, Video) else image
            for part in media
        ]
        if pieces[1::2] != expected:
            count = sum(text.count(marker) for marker in markers)
            raise DataError(
                f"{len(media)} images, but {count} markers {' or '.join(map(repr, markers))} in "
                "the text; a text may not contain the marker itself"
            )
        kinds = _kinds(media, self._differ)
        numbers = tuple(self._index[p.key, k] for p, k in zip(media, kinds, strict=True))
        written, spans = pieces[0], []
        for number, piece in zip(numbers, pieces[2::2], strict=True):
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
        ids = [number for number in self._placeholder_ids if number is not None]
        is_placeholder = np.isin(tokens, ids)
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
        return self._family.positions(keys, [p.grid for p in self._placeholders])

    def orders(self, keys: Int[np.ndarray, "rows t"]) -> MediaOrders:
        """Which image, video and recording each run of placeholders stands for, over [rows, t].

        Videos that use the images' placeholder token are among the images.
        """
        order = images_in_order(keys)
        same = self._placeholder_ids[0] == self._placeholder_ids[1]
        video, audio = self._first_audio if same else self._first_video, self._first_audio
        return (
            [n for n in order if n < video],
            [n for n in order if video <= n < audio],
            [n for n in order if n >= audio],
        )


SINGLE, MULTIPLE, VIDEO, AUDIO = "single", "multiple", "video", "audio"

DistinctMedia = dict[str, dict[object, tuple[str, Any]]]
"""Kind -> key -> the name of the first prompt with it, and the image, video or recording."""


def distinct_media(prompts: Sequence[tuple[str, Sequence[Media]]], family: Family) -> DistinctMedia:
    """What several prompts show and let hear, each once, in order (see `ImageInputs.of`)."""
    differ = family.features_depend_on_image_count()
    distinct: DistinctMedia = {SINGLE: {}, MULTIPLE: {}, VIDEO: {}, AUDIO: {}}
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


def heard(audio: Audio, processor: Any, family: Family) -> np.ndarray:
    """The samples of a recording, as the family's processor takes them."""
    return open_audio(audio, family.audio_rate(processor), family.max_seconds(processor))


def _kinds(media: Sequence[Media], differ: bool) -> list[str]:
    images = sum(isinstance(part, Image) for part in media)
    kind = MULTIPLE if differ and images > 1 else SINGLE
    return [
        VIDEO if isinstance(part, Video) else AUDIO if isinstance(part, Audio) else kind
        for part in media
    ]


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


def placeholders_of(
    processed: ProcessedImages, token_id: int | None, processor: Any
) -> list[Placeholder]:
    """The placeholders of what was processed, which repeat the token `token_id`."""
    if not processed.placeholders:
        return []
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
