"""The length of a row is known before its images are decoded, for every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import PIL.Image
import pytest

from cafe.errors import DataError
from cafe.model.vlm import CAFe
from cafe.types import Example, Image, Video, user
from helpers.family_examples import EXAMPLES, A, turn
from helpers.images import noise

SEVERAL_SIZES = Example(
    "several sizes",
    query=user(Image(noise(5, 300, 200), pixel_budget=10_000)),
    target=user(Image(noise(6, 41, 97)), "and", Image(noise(7, 97, 41))),
    dialogues=(turn(A, "It?", "no"),),
)
CLIP = Example(
    "a video",
    query=user(Video(tuple(noise(i, 64, 48) for i in range(4)))),  # type: ignore[misc]
    target=user("a cat"),
)


@pytest.mark.parametrize("sharing", ["trie", "none"])
def test_lengths_are_those_of_the_collated_rows(
    family_model: CAFe, sharing: Literal["trie", "none"]
) -> None:
    collator = replace(family_model.collator, sharing=sharing)
    for example in (*EXAMPLES, SEVERAL_SIZES, CLIP):
        rows = collator([example]).rows
        lengths = collator.row_lengths(example)
        assert (len(lengths), max(lengths)) == tuple(rows.input_ids.shape), example.id
        assert sum(lengths) == rows.tokens, example.id


def test_no_image_is_decoded(family_model: CAFe, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = family_model.collator.row_lengths(SEVERAL_SIZES)
    monkeypatch.setattr(PIL.Image.Image, "load", forbidden)
    assert family_model.collator.row_lengths(SEVERAL_SIZES) == expected


def test_an_image_without_a_header_is_an_error_that_names_the_example(
    family_model: CAFe,
) -> None:
    with pytest.raises(DataError, match=r"example 'x': .*not an image"):
        family_model.collator.row_lengths(Example("x", user(Image(b"text")), user("a cat")))


def forbidden(*_: Any) -> None:
    raise AssertionError("decoded")
