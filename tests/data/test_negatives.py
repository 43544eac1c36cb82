"""Which targets are right for which query, and the record that a pair becomes."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest

from cafe.data.negatives import collect_pairs, swift_record
from cafe.errors import DataError
from cafe.types import Example, Image, Message, Video, user


def pair(id: str, query: object, target: str, target_id: str | None = None) -> Example:
    return Example(id, query=user(query), target=user(target), target_id=target_id)  # type: ignore


def test_queries_and_targets_come_once_and_right_answers_are_known() -> None:
    examples = [
        pair("0", Image("a.jpg"), "a cat"),
        pair("1", Image("b.jpg"), "a dog"),
        pair("2", Image("a.jpg"), "a sleeping cat"),  # the same image as 0
        pair("3", Image("c.jpg"), "a dog"),  # the same text as 1
        Example("4", dialogues=((Message("user", ("hi",)), Message("assistant", ("ho",))),)),
    ]
    pairs = collect_pairs(examples)
    assert [e.id for e in pairs.examples] == ["0", "1", "2", "3"]
    assert pairs.query_of == [0, 1, 0, 2]
    assert [t[0].text for t in pairs.targets] == ["a cat", "a dog", "a sleeping cat"]
    assert pairs.relevant == [[0, 2], [1], [2, 0], [1]]


def test_targets_with_one_id_are_no_negatives_of_each_other() -> None:
    pairs = collect_pairs(
        [pair("0", "q", "cat", "k"), pair("1", "r", "Katze", "k"), pair("2", "s", "dog", "d")]
    )
    assert pairs.relevant == [[0, 1], [1, 0], [2]]


def test_without_pairs_there_is_nothing_to_mine() -> None:
    with pytest.raises(DataError, match="no example is a pair"):
        collect_pairs([])


def test_the_record_is_ms_swifts(tmp_path: Path) -> None:
    example = Example(
        "1",
        query=user(Image(tmp_path / "deep" / "q.jpg"), "what is it?"),
        target=(Message("system", ("Be brief.",)), *user("größer")),
    )
    negatives = [user("a mug"), user("see ", Image(str(tmp_path / "n.jpg")))]
    assert swift_record(example, negatives, tmp_path) == {
        "id": "1",
        "messages": [{"role": "user", "content": "<image>what is it?"}],
        "images": ["deep/q.jpg"],
        "positive_messages": [
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "größer"}]
        ],
        "positive_images": [[]],
        "negative_messages": [
            [{"role": "user", "content": "a mug"}],
            [{"role": "user", "content": "see <image>"}],
        ],
        "negative_images": [[], ["n.jpg"]],
    }


@pytest.mark.parametrize(
    ("query", "says"),
    [
        (Image(PIL.Image.new("RGB", (2, 2))), "not a file"),
        (Image("/elsewhere/x.jpg"), "outside"),
        (Video("v.mp4"), "video"),
        ("an <image> of words", "read as an image"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(query: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"example 'x'.*{says}"):
        swift_record(pair("x", query, "t"), [], tmp_path)
