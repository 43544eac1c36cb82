"""Merging by image, and sets of several sources."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest

from cafe.data.dataset import ExampleSet, ExampleSource
from cafe.data.merge import merge_with_origin
from cafe.data.read import read_examples
from cafe.data.records import ReadOptions
from cafe.data.scenes import write_scenes
from cafe.errors import DataError
from cafe.types import Conversation, Example, Image, Message, Video, user


def dialogue(image: Image, question: str, answer: str) -> Conversation:
    return Message("user", (image, question)), Message("assistant", (answer,))


def caption(name: str, path: str, text: str) -> Example:
    image = Image(path)
    return Example(name, user(image), user(text), (), (dialogue(image, "Describe.", text),), text)


def chat(name: str, path: str, *answers: str) -> Example:
    image = Image(path)
    return Example(name, dialogues=tuple(dialogue(image, "Well?", a) for a in answers))


def images(example: Example) -> list[Image]:
    sides = (example.query or (), example.target or (), *example.negatives, *example.dialogues)
    parts = [part for message in chain.from_iterable(sides) for part in message.content]
    return [part for part in parts if isinstance(part, Image)]


def answers(example: Example) -> list[str]:
    return [conversation[-1].text for conversation in example.dialogues]


def merge_by_image(examples: Sequence[Example]) -> list[Example]:
    return [example for _, example in merge_with_origin(examples)]


def test_a_scenes_folder_gives_one_example_per_image(tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    write_scenes(folder, count=12, seed=3)
    captions = read_examples(
        folder / "captions.json", ReadOptions("llava", mode="caption")
    ).examples
    asked = read_examples(
        folder / "questions.json", ReadOptions("llava", mode="chat", turns="branches")
    ).examples
    merged = merge_by_image([*captions, *asked])
    assert [example.id for example in merged] == [example.id for example in captions]
    assert [len(example.dialogues) for example in merged] == [1 + 6] * 12
    for example, described in zip(merged, captions, strict=True):
        assert (example.target, example.target_id) == (described.target, described.target_id)
        assert len(images(example)) == 1 + 7
        assert len({id(image) for image in images(example)}) == 1
    # before, each file had its own Image of an image
    assert {id(p) for e in captions for p in images(e)}.isdisjoint(
        id(p) for e in asked for p in images(e)
    )


def test_a_merged_example_has_the_first_id_and_the_first_pair() -> None:
    (merged,) = merge_by_image(
        [chat("q", "a.png", "yes"), caption("c", "a.png", "A mug."), chat("r", "a.png", "no")]
    )
    assert merged.id == "q"
    assert merged.target == user("A mug.")
    assert merged.target_id == "A mug."
    assert answers(merged) == ["yes", "A mug.", "no"]


def test_dialogues_that_say_the_same_are_one() -> None:
    first, second = chat("q", "a.png", "yes", "no"), chat("r", "a.png", "no", "maybe", "yes")
    (merged,) = merge_by_image([first, second])
    assert answers(merged) == ["yes", "no", "maybe"]
    (repeated,) = merge_by_image([caption("c", "a.png", "A."), caption("d", "a.png", "A.")])
    assert repeated.id == "c"
    assert answers(repeated) == ["A."]
    assert repeated.target_id == "A."


def test_several_captions_of_a_image_stay_apart_and_are_no_negatives() -> None:
    first, second, other = merge_by_image(
        [
            caption("c", "a.png", "A mug."),
            caption("d", "a.png", "A red mug."),
            chat("q", "a.png", "yes"),
            caption("e", "b.png", "A cat."),
        ]
    )
    assert [first.id, second.id, other.id] == ["c", "d", "e"]
    assert [first.target, second.target] == [user("A mug."), user("A red mug.")]
    assert answers(first) == ["A mug.", "yes"]
    assert answers(second) == ["A red mug."]
    assert first.target_id == second.target_id == "A mug."
    assert other.target_id == "A cat."
    assert len({id(image) for image in images(first) + images(second)}) == 1


def test_what_does_not_show_exactly_one_image_stays_as_it_is() -> None:
    text = Example("t", dialogues=((Message("user", ("Hi",)), Message("assistant", ("Hey",))),))
    two = Example("2", user(Image("a.png"), Image("b.png")), user("Both."))
    film = Example("v", user(Image("a.png"), Video("a.mp4")), user("A film."))
    task = Example("o", user(Image("a.png")), user("A mug."), task="other")
    examples = [text, text, two, two, film, film, task, chat("q", "a.png", "yes")]
    merged = merge_by_image(examples)
    assert len(merged) == len(examples)
    assert all(after is before for after, before in zip(merged, examples, strict=True))


def test_images_without_a_path_merge_by_identity() -> None:
    data = b"the same bytes"
    shared = Image(data)
    examples = [Example(f"{n}", dialogues=(dialogue(shared, "?", f"{n}"),)) for n in range(2)]
    assert len(merge_by_image(examples)) == 1


def test_a_set_numbers_its_sources_through() -> None:
    captions = [caption(f"c{n}", f"{n}.png", f"Thing {n}.") for n in range(3)]
    asked = [chat(f"q{n}", f"{n}.png", "yes") for n in range(2, 4)]
    joined = ExampleSet.build(
        [ExampleSource("captions", captions), ExampleSource("questions", asked, 3.0)]
    )
    assert [joined[n].id for n in range(len(joined))] == ["c0", "c1", "c2", "q2", "q3"]
    assert [joined.source_of(n).name for n in (0, 2, 3, 4)] == [
        "captions",
        "captions",
        "questions",
        "questions",
    ]
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            joined[outside]
    plan = joined.plan(batch=2, seed=0)
    assert (plan.sizes, plan.weights) == ([3, 2], [1.0, 3.0])


def test_merging_a_set_moves_parts_to_the_first_source_that_shows_the_image() -> None:
    captions = [caption(f"c{n}", f"{n}.png", f"Thing {n}.") for n in range(3)]
    asked = [chat(f"q{n}", f"{n}.png", "yes") for n in range(2, 5)]
    sources = [ExampleSource("captions", captions), ExampleSource("questions", asked, 3.0)]
    joined = ExampleSet.build(sources, merge_by_image=True)
    assert [joined[n].id for n in range(len(joined))] == ["c0", "c1", "c2", "q3", "q4"]
    assert [(s.name, s.weight) for s in joined.sources] == [("captions", 1.0), ("questions", 3.0)]
    assert answers(joined[2]) == ["Thing 2.", "yes"]
    absorbed = ExampleSet.build(
        [sources[0], ExampleSource("questions", asked[:1])], merge_by_image=True
    )
    assert [source.name for source in absorbed.sources] == ["captions"]


def test_an_empty_source_is_an_error() -> None:
    with pytest.raises(DataError, match="questions: no record can be used"):
        ExampleSet.build(
            [
                ExampleSource("captions", [caption("c", "a.png", "A.")]),
                ExampleSource("questions", []),
            ]
        )
