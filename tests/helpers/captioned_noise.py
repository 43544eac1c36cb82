"""Images of noise with captions, as the tests of mining read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from helpers.images import noise

WORDS = ["cat", "dog", "mug", "tree", "red", "blue", "big", "small", "top", "left", "yes", "no"]
COUNT = 14


def write_captioned_noise(folder: Path) -> Path:
    """Images of noise with captions; the last two records show the same image."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(COUNT):
        noise(i).save(folder / f"{i}.png")
        text = " ".join(rng.choice(WORDS, size=4)) + f" {i}"
        records.append(_record(i, f"{i}.png", text))
    records.append(_record(COUNT, f"{COUNT - 1}.png", "another text"))
    path = folder / "captions.json"
    path.write_text(json.dumps(records))
    return path


def _record(number: int, image: str, text: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nCaption?"}, {"from": "gpt", "value": text}]
    return {"id": str(number), "image": image, "conversations": turns}
