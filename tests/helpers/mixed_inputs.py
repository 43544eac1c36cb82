"""Inputs of every kind and length, some with equal beginnings, for tests of inference."""

from __future__ import annotations

from typing import Any

from helpers.images import noise

SQUARE, WIDE = noise(1), noise(2, 120, 50)
TEXTS = [
    "the red cat at the top left",
    "the red cat at the top",
    "the red cat and a dog",
    "a dog",
    "the red cat at the top left",
    "no",
]
INPUTS: list[Any] = [*TEXTS, SQUARE, WIDE, {"text": "what", "image": [SQUARE, WIDE]}, noise(3)]
