"""How many tokens images take in a prompt, from their sizes alone.

Chunks of a number of tokens are formed before anything is decoded. A family's processor decides by
an image's size how many placeholders it gets, so an empty image of that size has the same ones. Few
sizes occur in most data; each is processed once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image

from cafe.media import image_size, open_video
from cafe.model.families import Family, ProcessedImages
from cafe.model.rows.images import (
    AUDIO,
    MULTIPLE,
    SINGLE,
    VIDEO,
    ImageInputs,
    Placeholder,
    distinct_media,
    heard,
    named,
    placeholders_of,
)
from cafe.types import Audio, Image, Media, Video

_REMEMBERED = 4096
"""Number of sizes, and of videos, whose placeholders are kept."""


@dataclass(slots=True)
class PlaceholderLengths:
    """Placeholders without pixels; the fields are those of `cafe.model.rows.collate.Collator`."""

    processor: Any
    family: Family
    max_frames: int
    _known: dict[Hashable, Placeholder] = field(default_factory=dict, init=False, repr=False)

    def images(self, prompts: Sequence[tuple[str, Sequence[Media]]]) -> ImageInputs:
        """`ImageInputs.of` without tensors.

        Only the header of an image is read. A video is decoded: its header may not know the number
        of its frames. So is a recording.

        Raises:
            ImageError: an image that cannot be used; the message names the prompt.
        """
        distinct = distinct_media(prompts, self.family)
        images = [
            named(name, self._image, image, kind)
            for kind in (SINGLE, MULTIPLE)
            for name, image in distinct[kind].values()
        ]
        videos = [named(name, self._video, video) for name, video in distinct[VIDEO].values()]
        recordings = [named(name, self._audio, audio) for name, audio in distinct[AUDIO].values()]
        return ImageInputs.assembled(
            {}, distinct, images, videos, recordings, self.processor, self.family
        )

    def _image(self, image: Image, kind: str) -> Placeholder:
        size = image_size(image)

        def processed() -> ProcessedImages:
            empty = PIL.Image.new("RGB", size)
            # In a group of two, an image is one of several of its prompt.
            group = [empty] if kind == SINGLE else [empty, empty]
            return self.family.process_images(self.processor, [group])

        token = self.family.placeholder_id(self.processor)
        return self._remembered((size, kind), processed, token)

    def _video(self, video: Video) -> Placeholder:
        def processed() -> ProcessedImages:
            clip = open_video(video, self.max_frames)
            return self.family.process_videos(self.processor, [clip])

        token = self.family.video_placeholder_id(self.processor)
        return self._remembered(video.key, processed, token)

    def _audio(self, audio: Audio) -> Placeholder:
        def processed() -> ProcessedImages:
            samples = heard(audio, self.processor, self.family)
            return self.family.process_audio(self.processor, [samples])

        token = self.family.audio_placeholder_id(self.processor)
        return self._remembered((AUDIO, audio.key), processed, token)

    def _remembered(
        self, key: Hashable, processed: Callable[[], ProcessedImages], token: int | None
    ) -> Placeholder:
        """The placeholder of the first of the processed images."""
        if key not in self._known:
            if len(self._known) >= _REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[key] = placeholders_of(processed(), token, self.processor)[0]
        return self._known[key]
