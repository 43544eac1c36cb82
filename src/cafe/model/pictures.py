"""The distinct pictures of a chunk: decoded once, processed once, however many branches show them.

A picture's features may depend on its company (LLaVA-OneVision tiles a picture only when it is
alone in its prompt), so "distinct" means the picture and whether it is alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import PIL.Image
from torch import Tensor

from cafe.errors import DataError, ImageError
from cafe.media import open_image
from cafe.model.families import Family
from cafe.model.trie import IMAGE_STRIDE, image_keys, image_of_key
from cafe.types import Image


@dataclass(frozen=True, slots=True)
class Pictures:
    """inputs: the family's vision tensors. The other fields are private."""

    inputs: dict[str, Tensor]
    _index: dict[tuple[object, bool], int]
    _tokens: list[np.ndarray]
    _placeholder_id: int
    _marker: str
    _marker_id: int
    _differ: bool

    @classmethod
    def of(
        cls,
        prompts: Sequence[tuple[str, Sequence[Image]]],
        processor: Any,
        family: Family,
        dummy: bool,
    ) -> Self:
        """Decode and process the pictures of several prompts.

        prompts   for each prompt its name, for errors, and its pictures
        dummy     when there are none, process an empty one that no prompt shows
        Raises ImageError, naming the prompt, for a picture that cannot be used.
        """
        differ = family.alone_and_together_differ()
        alone: dict[object, tuple[str, Image]] = {}
        together: dict[object, tuple[str, Image]] = {}
        for name, images in prompts:
            group = together if differ and len(images) > 1 else alone
            for image in images:
                group.setdefault(image.key, (name, image))
        index = {(key, True): i for i, key in enumerate(alone)}
        index |= {(key, False): len(alone) + i for i, key in enumerate(together)}
        groups = [[_open(*named)] for named in alone.values()]
        if together:
            company = [_open(*named) for named in together.values()]
            # A group of one would be taken for a picture that is alone.
            groups.append(company if len(company) > 1 else company * 2)
        if not groups and dummy:
            groups = [[PIL.Image.new("RGB", (32, 32))]]
        processed = family.process_images(processor, groups) if groups else None
        tokenizer, marker = processor.tokenizer, family.marker(processor)
        return cls(
            inputs=processed.inputs if processed else {},
            _index=index,
            _tokens=_tokens(tokenizer, processed.placeholders) if processed else [],
            _placeholder_id=family.placeholder_id(processor),
            _marker=marker,
            _marker_id=tokenizer.convert_tokens_to_ids(marker),
            _differ=differ,
        )

    def _numbers(self, images: Sequence[Image]) -> list[int]:
        alone = len(images) == 1 or not self._differ
        return [self._index[image.key, alone] for image in images]

    def splice(
        self, tokens: np.ndarray, spans: np.ndarray, images: Sequence[Image]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Put the pictures' tokens where their markers stand in one prompt.

        tokens, spans   int64 [t] and [t, 2]: ids and character offsets of the rendered text
        Returns tokens, trie keys and offsets; a picture's tokens have the offsets (-1, -1).
        Raises DataError when the text has more or fewer markers than pictures.
        """
        at = np.flatnonzero(tokens == self._marker_id)
        if len(at) != len(images):
            raise DataError(
                f"{len(images)} pictures, but {len(at)} markers {self._marker!r} in the text; "
                "a text may not hold the marker itself"
            )
        if not images:
            return tokens, tokens, spans
        pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        begin = 0
        for place, number in zip(at, self._numbers(images), strict=True):
            text = tokens[begin:place]
            shown = self._tokens[number]
            keys = shown.copy()
            slots = np.flatnonzero(shown == self._placeholder_id)
            keys[slots] = image_keys(number, len(slots))
            pieces.append((text, text, spans[begin:place]))
            pieces.append((shown, keys, np.full((len(shown), 2), -1)))
            begin = place + 1
        pieces.append((tokens[begin:], tokens[begin:], spans[begin:]))
        merged = [np.concatenate(column) for column in zip(*pieces, strict=True)]
        return merged[0], merged[1], merged[2]

    def order(self, keys: np.ndarray) -> list[int]:
        """Which picture each run of placeholders shows, over rows of keys [rows, t]."""
        negative = keys[keys < 0]
        starts = [image_of_key(key) for key in negative[(-negative - 1) % IMAGE_STRIDE == 0]]
        return [picture for picture, _ in starts]


def _open(name: str, image: Image) -> PIL.Image.Image:
    try:
        return open_image(image)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error


def _tokens(tokenizer: Any, placeholders: Sequence[str]) -> list[np.ndarray]:
    """The tokens of each placeholder text; equal texts are tokenised once."""
    ids = {
        text: np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
        for text in set(placeholders)
    }
    return [ids[text] for text in placeholders]
