"""The bundled world's held-out images with exact ground truth: drawn from a seed, or a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cafe.data.scenes import (
    Scene,
    caption,
    draw,
    questions,
    read_truth,
    sample_scene,
)
from cafe.data.scenes.world import has_held_out_pair, random_stream, scene_seed
from cafe.errors import DataError
from cafe.evaluation.datasets.captioned import CaptionedImage
from cafe.types import CAPTION_REQUEST, Image, Message, user

HELD_OUT_SEED = 20_000
HELD_OUT_COUNT = 500
"""The held-out scenes that are evaluated when no folder is named; they are always the same."""


@dataclass(frozen=True, slots=True)
class SceneItem:
    """One image, its caption, and its scene. `unseen`: it has a pair of kinds that training images
    never show together, which makes it one of the out-of-distribution half.
    """

    id: str
    image: Image
    scene: Scene
    caption: str

    @property
    def unseen(self) -> bool:
        return has_held_out_pair(self.scene.classes)


def scene_items(data: Path | None, limit: int | None, seed: int = HELD_OUT_SEED) -> list[SceneItem]:
    """The scenes of a folder that `cafe data scenes` wrote, or held-out ones drawn by `seed`.

    Raises:
        DataError: not such a folder, or fewer than two scenes.
    """
    if data is not None:
        items = [
            SceneItem(truth.id, Image(data / truth.image), truth.scene, truth.caption)
            for truth in read_truth(data)
        ][:limit]
        missing = next((i for i in items if not Path(str(i.image.source)).is_file()), None)
        if missing is not None:
            raise DataError(f"{missing.image.source}: no such image; write the folder again")
    else:
        items = list(_drawn_items(min(limit or HELD_OUT_COUNT, HELD_OUT_COUNT), seed))
    if len(items) < 2:
        raise DataError("at least two scenes are needed; raise --limit")
    return items


def scene_ids(items: Sequence[SceneItem]) -> tuple[str, ...]:
    return tuple(f"{item.id}:{item.caption}" for item in items)


def item_stream(item: SceneItem, purpose: int) -> np.random.Generator:
    """A random stream for one image and one purpose, independent of other images."""
    return np.random.default_rng([purpose, item.scene.seed])


def scene_images(limit: int | None, questions_per_scene: int = 6) -> list[CaptionedImage]:
    """The held-out scenes with captions as dialogues and questions, as a scenes folder has them."""
    return [_image(item, questions_per_scene) for item in scene_items(None, limit)]


@cache
def _drawn_items(count: int, seed: int) -> tuple[SceneItem, ...]:
    """Cached, because tasks use the same scenes and share the model's answers about each."""
    return tuple(_drawn(scene_seed(seed, index), f"{index:06d}") for index in range(count))


def _drawn(seed: int, name: str) -> SceneItem:
    """The item that `write_scenes` would write for this seed."""
    scene = sample_scene(seed, "test")
    text = caption(scene, random_stream(seed, "test", "language"))
    return SceneItem(name, Image(draw(scene)), scene, text)


def _image(item: SceneItem, questions_per_scene: int) -> CaptionedImage:
    rng = random_stream(item.scene.seed, "test", "language")
    caption(item.scene, rng)  # `write_scenes` draws the caption first, and then the questions
    return CaptionedImage(
        id=item.id,
        image=item.image,
        captions=(item.caption,),
        dialogues=((*user(item.image, CAPTION_REQUEST), Message("assistant", (item.caption,))),),
        questions=tuple(questions(item.scene, rng, questions_per_scene)),
        kinds=frozenset(item.scene.classes),
    )
