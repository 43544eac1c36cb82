"""The fingerprint of a source: other examples are told apart, the same ones elsewhere are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cafe.data.fingerprint import fingerprint
from cafe.types import Example, Image, Message, Video, user


def examples(folder: Path, count: int = 6) -> list[Example]:
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for i in range(count):
        (folder / f"{i}.png").write_bytes(b"x" * (i + 1))
        image = Image(folder / f"{i}.png")
        dialogue = (Message("user", (image, "what?")), Message("assistant", (f"a {i}",)))
        found.append(
            Example(f"id {i}", query=user(image), target=user(f"t {i}"), dialogues=(dialogue,))
        )
    return found


def test_what_moved_or_got_another_id_is_the_same(tmp_path: Path) -> None:
    one, other = examples(tmp_path / "one"), examples(tmp_path / "other")
    assert fingerprint(one) == fingerprint(other)
    assert fingerprint(one) == fingerprint([replace(e, id=f"new {e.id}") for e in one])


def test_every_change_is_seen(tmp_path: Path) -> None:
    one = examples(tmp_path / "one")
    first = one[0]
    question, answer = first.dialogues[0]
    changed = [
        one[::-1],
        one[:-1],
        [replace(first, target=user("t  0")), *one[1:]],
        [replace(first, query=user(Image("another.png"))), *one[1:]],
        [replace(first, negatives=(user("t 1"),)), *one[1:]],
        [replace(first, dialogues=()), *one[1:]],
        [replace(first, dialogues=((question, replace(answer, content=("b",))),)), *one[1:]],
        [replace(first, query=user(Image(b"bytes"))), *one[1:]],
        [replace(first, query=user(Video("a.mp4"))), *one[1:]],
    ]
    prints = {fingerprint(one), *map(fingerprint, changed)}
    assert len(prints) == 1 + len(changed)


def test_where_one_text_ends_counts(tmp_path: Path) -> None:
    split, other = user("ab", "c"), user("a", "bc")
    assert fingerprint([Example("1", query=split, target=split)]) != fingerprint(
        [Example("1", query=other, target=other)]
    )


def test_a_image_of_another_size_is_another(tmp_path: Path) -> None:
    one = examples(tmp_path / "one")
    before = fingerprint(one)
    (tmp_path / "one" / "3.png").write_bytes(b"another image")
    assert fingerprint(one) != before


def test_half_a_surrogate_pair_and_a_missing_image_have_one_too() -> None:
    odd = Example("1", query=user(Image("no/where.png")), target=user("\ud800"))
    assert fingerprint([odd]) == fingerprint([odd])


@pytest.mark.slow
@pytest.mark.parametrize("count", [10_000, 25_000])
def test_of_many_examples_it_is_taken_from_some(count: int) -> None:
    many = [Example(str(i), query=user(str(i)), target=user("t")) for i in range(count)]
    assert fingerprint(many) == fingerprint(many)
    assert fingerprint(many) != fingerprint(many[:-1])
    assert fingerprint(many) != fingerprint(many[1:] + many[:1])
