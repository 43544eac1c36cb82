"""`mine_hard_negatives`: from pairs to negatives, with embeddings that a person can check."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cafe.data.read import read_examples
from cafe.errors import DataError
from cafe.model.vlm import CAFe
from cafe.retrieval.mining import mine_hard_negatives
from cafe.types import Conversation
from helpers.captioned_noise import COUNT, write_captioned_noise

ANGLES = {"q": 0, "near": 10, "middle": 30, "far": 60, "other": 90, "opposite": 180}
"""Degrees at which the embeddings of these texts lie, so that scores are cosines of differences."""


def encode(conversations: Sequence[Conversation], prompt_name: str) -> np.ndarray:
    texts = [conversation[0].text for conversation in conversations]
    if "broken" in texts:
        raise DataError("it cannot be read")
    angles = np.deg2rad([ANGLES[text] for text in texts])
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def never(name: str) -> CAFe:
    raise AssertionError(f"{name} was loaded")


def write_pairs(path: Path, *pairs: tuple[str, str]) -> Path:
    lines = [
        json.dumps({"id": str(i), "query": q, "positive": p}) for i, (q, p) in enumerate(pairs)
    ]
    path.write_text("\n".join(lines))
    return path


def negatives(report: Any) -> list[list[str]]:
    return [[one[0].text for one in example.negatives] for example in report.examples]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(
        tmp_path / "pairs.jsonl",
        ("q", "near"),
        ("other", "far"),
        ("middle", "middle"),
        ("opposite", "opposite"),
    )


def test_the_negatives_are_the_nearest_targets_below_the_positive(pairs: Path) -> None:
    options: dict[str, Any] = {"encode": encode, "load": never, "rank_range": (0, 3)}
    report = mine_hard_negatives("x", pairs, count=3, max_share=1.0, **options)
    assert negatives(report) == [
        ["middle", "far", "opposite"],
        ["middle", "near", "opposite"],
        ["near", "far", "opposite"],
        ["far", "middle", "near"],
    ]
    cosine = np.cos(np.deg2rad(30)), np.cos(np.deg2rad(60)), -1.0
    np.testing.assert_allclose(report.found.scores[0], cosine, atol=1e-6)
    assert report.found.own_scores[0] == pytest.approx(np.cos(np.deg2rad(10)))
    assert report.skipped == []
    one = mine_hard_negatives("x", pairs, count=1, **options)
    assert negatives(one)[0] == ["middle"], "cos 30 is less than 0.95 of cos 10"
    second = mine_hard_negatives("x", pairs, count=1, max_share=0.6, **options)
    assert negatives(second)[0] == ["far"], "cos 30 is more than 0.6 of cos 10"
    third = mine_hard_negatives("x", pairs, count=1, margin=1.5, max_share=None, **options)
    assert negatives(third)[0] == ["opposite"]


def test_what_is_written_is_what_is_returned(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "mined.jsonl"
    report = mine_hard_negatives("x", pairs, out=out, rank_range=(0, 2), count=2, encode=encode)
    back = read_examples(out).examples
    assert [[n[0].text for n in example.negatives] for example in back] == negatives(report)
    assert report.image_root == tmp_path


def test_a_pair_survives_a_broken_one_with_the_same_query(tmp_path: Path) -> None:
    data = write_pairs(
        tmp_path / "pairs.jsonl", ("q", "broken"), ("q", "near"), ("other", "far"), ("broken", "q")
    )
    lines: list[str] = []
    report = mine_hard_negatives(
        "x", data, rank_range=(0, 2), count=2, encode=encode, on_skipped=lines.append
    )
    assert [example.id for example in report.examples] == ["1", "2"]
    assert negatives(report) == [["far"], ["near"]]
    assert lines == report.skipped
    assert lines == [f"example {id!r}: it cannot be read" for id in ("0", "3")]


def test_records_that_cannot_be_used_are_logged_where_nothing_listens(
    pairs: Path, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    pairs.write_text(pairs.read_text() + "\n{not json")
    report = mine_hard_negatives("x", pairs, rank_range=(0, 2), count=2, encode=encode)
    (record,) = caplog.records
    assert record.getMessage() == f"skipped {report.skipped[0]}"
    assert "line 5" in report.skipped[0]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_range": (50, 10)}, "no room for 7"),
        ({"rank_range": (1, 2)}, "no room for 7"),
        ({"margin": -1.0}, "margin is -1.0"),
        ({"max_share": 0.0}, "share is 0.0"),
    ],
)
def test_limits_that_cannot_be_are_refused_before_anything_is_read(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mine_hard_negatives("no-such-model", "no-such-file", load=never, **options)


def test_data_and_output_are_checked_before_the_model_loads(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        mine_hard_negatives("x", tmp_path / "none.json", load=never)
    with pytest.raises(DataError, match="is a folder; name a file"):
        mine_hard_negatives("x", pairs, out=tmp_path, load=never)
    assert not list(tmp_path.glob(".*")), "nothing unfinished stays"


# ---------------------------------------------------------------------- the small model


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    return write_captioned_noise(tmp_path)


def test_the_negatives_are_those_of_the_models_own_scores(
    captions: Path, small_model: CAFe
) -> None:
    report = mine_hard_negatives(
        small_model, captions, rank_range=(1, 6), count=3, max_share=1.0, batch_size=5
    )
    assert len(report.examples) == COUNT + 1
    captioned = [example.target[0].text for example in report.examples if example.target]
    images = small_model.encode(
        [captions.parent / f"{min(i, COUNT - 1)}.png" for i in range(COUNT + 1)]
    )
    scores = images @ small_model.encode(captioned).T
    for i, found in enumerate(negatives(report)):
        own = {i} | ({COUNT - 1, COUNT} if i >= COUNT - 1 else set())
        order = [j for j in np.argsort(-scores[i], kind="stable") if j not in own][1:6]
        assert found == [captioned[j] for j in order if scores[i, j] <= scores[i, i]][:3]
    assert sum(map(len, negatives(report))) > 10, "the random model ranks some below the positive"


def test_a_broken_image_is_named_and_left_out(captions: Path, small_model: CAFe) -> None:
    (captions.parent / "3.png").write_bytes(b"not an image")
    report = mine_hard_negatives(small_model, captions, rank_range=(0, 9), count=2)
    assert [example.id for example in report.examples] == [
        str(i) for i in range(COUNT + 1) if i != 3
    ]
    (line,) = report.skipped
    assert line.startswith("example '3': ")
