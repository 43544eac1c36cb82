"""A scene → its picture."""

from __future__ import annotations

import numpy as np
from PIL import Image

from cafe.data.scenes.glyphs import sprite
from cafe.data.scenes.world import BACKGROUNDS, PICTURE_PIXELS, Scene, random_stream

_NOISE_SIGMA = 6.0  # of 255: enough that no two pictures share their flat areas


def draw(scene: Scene) -> Image.Image:
    """The picture of `scene`: RGB, 96 × 96 pixels, with a little noise drawn from its seed."""
    picture = Image.new("RGB", (PICTURE_PIXELS, PICTURE_PIXELS), BACKGROUNDS[scene.background])
    for item in scene.objects:
        small = sprite(item.kind, item.pixels, item.angle_degrees)
        picture.paste(small, item.sprite_box, small)
    values = np.asarray(picture, dtype=np.float32)
    rng = random_stream(scene.seed, scene.split, "noise")
    noise = rng.standard_normal(values.shape, dtype=np.float32) * _NOISE_SIGMA
    return Image.fromarray(np.clip(np.rint(values + noise), 0, 255).astype(np.uint8))
