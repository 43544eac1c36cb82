"""Images without meaning."""

from __future__ import annotations

import numpy as np
import PIL.Image


def noise(seed: int, width: int = 96, height: int = 96) -> PIL.Image.Image:
    """Random pixels, different for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def sample_image(seed: int) -> PIL.Image.Image:
    """Sixteen patches of colour: as unlike as noise, but also when it is seen small."""
    return noise(seed, 4, 4).resize((96, 96))


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
"""What Git has in place of a large file until it is pulled."""
