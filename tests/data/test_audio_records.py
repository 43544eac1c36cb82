"""Recordings in every format of records, and in every kind of table."""

from __future__ import annotations

import base64
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from cafe.audio import open_audio
from cafe.data.read import read_examples
from cafe.data.records import ReadOptions
from cafe.types import AUDIO_CAPTION_REQUEST, Audio, Example, Image
from helpers.images import noise
from helpers.tones import RATE, pitch, tone, write_audio


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two recordings, of 440 and 880 Hz, and an image."""
    write_audio(tmp_path / "a.wav", tone(440))
    write_audio(tmp_path / "b.flac", tone(880))
    noise(1).save(tmp_path / "c.png")
    return tmp_path


def read(folder: Path, *records: Any, **options: Any) -> list[Example]:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = read_examples(path, ReadOptions(**options))
    assert found.skipped == []
    return found.examples


def shape(conversation: Any) -> list[Any]:
    """Its parts: texts, "image", and the frequency of each recording in hundreds of Hz."""
    return [
        part
        if isinstance(part, str)
        else "image"
        if isinstance(part, Image)
        else round(pitch(open_audio(part, RATE)) / 100)
        for message in conversation
        for part in message.content
    ]


def dialogue(example: Example) -> list[Any]:
    return shape(example.dialogues[0])


def test_llava_records_have_audio_and_its_markers(folder: Path) -> None:
    turns = [
        {"from": "human", "value": "<audio>\nIs it as high as <audio>, and <image>?"},
        {"from": "gpt", "value": "No, <audio> is text."},
    ]
    record = {"audios": ["a.wav", "b.flac"], "image": "c.png", "conversations": turns}
    (example,) = read(folder, record, mode="chat")
    assert dialogue(example) == [
        4,
        "Is it as high as ",
        9,
        ", and ",
        "image",
        "?",
        turns[1]["value"],
    ]
    one = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A tone."}]
    (example,) = read(folder, {"audio": "a.wav", "conversations": one})
    assert shape(example.query) == [4]
    assert shape(example.target) == ["A tone."]
    assert dialogue(example) == [4, "What is it?", "A tone."]


def test_without_a_recording_the_marker_is_a_tag_of_html(folder: Path) -> None:
    turns = [{"from": "human", "value": "What does <audio> do?"}, {"from": "gpt", "value": "Play."}]
    (example,) = read(folder, {"conversations": turns}, mode="chat")
    assert dialogue(example) == ["What does <audio> do?", "Play."]


def test_messages_have_parts_of_audio(folder: Path) -> None:
    data = base64.b64encode((folder / "b.flac").read_bytes()).decode()
    parts = [
        {"type": "audio", "audio": "a.wav"},
        {"type": "text", "text": "and"},
        {"type": "input_audio", "input_audio": {"data": data, "format": "flac"}},
        {"type": "audio"},
    ]
    answer = {"role": "assistant", "content": "Two tones."}
    record = {"messages": [{"role": "user", "content": parts}, answer], "audios": ["b.flac"]}
    (example,) = read(folder, record, mode="chat")
    assert dialogue(example) == [4, "and", 9, 9, "Two tones."]


def test_pairs_of_recordings(folder: Path) -> None:
    (first, second) = read(
        folder,
        {"anchor": "a low tone", "positive": "a.wav", "negative": "b.flac"},
        {"anchor": {"text": "an octave up", "audio": "a.wav"}, "positive": "b.flac"},
    )
    assert (shape(first.query), shape(first.target)) == (["a low tone"], [4])
    assert [shape(negative) for negative in first.negatives] == [[9]]
    assert (shape(second.query), shape(second.target)) == ([4, "an octave up"], [9])
    (third,) = read(folder, {"query_audio": "a.wav", "positive_image": "c.png"})
    assert (shape(third.query), shape(third.target)) == ([4], ["image"])


def test_a_folder_with_metadata_or_with_texts_beside_its_recordings(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "a.wav", "text": "A low tone."}\n')
    (example,) = read_examples(folder, ReadOptions()).examples
    assert (shape(example.query), shape(example.target)) == ([4], ["A low tone."])
    assert dialogue(example) == [4, AUDIO_CAPTION_REQUEST, "A low tone."]
    (folder / "metadata.jsonl").unlink()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"This is {name}.")
    examples = read_examples(folder, ReadOptions()).examples
    assert [shape(e.query) for e in examples] == [[4], [9], ["image"]]


def test_webdataset_shards(folder: Path, tmp_path: Path) -> None:
    (folder / "a.txt").write_text("A low tone.")
    with tarfile.open(tmp_path / "shard-000.tar", "w") as archive:
        archive.add(folder / "a.wav", "0001.wav")
        archive.add(folder / "a.txt", "0001.txt")
    (example,) = read_examples(tmp_path / "shard-000.tar", ReadOptions()).examples
    assert (shape(example.query), shape(example.target)) == ([4], ["A low tone."])


def test_parquet_as_the_datasets_library_stores_audio(folder: Path, tmp_path: Path) -> None:
    cell = {"bytes": (folder / "b.flac").read_bytes(), "path": "b.flac"}
    table = datasets.Dataset.from_dict({"audio": [cell], "caption": ["A high tone."]})
    table.to_parquet(tmp_path / "table.parquet")
    (example,) = read_examples(tmp_path / "table.parquet", ReadOptions()).examples
    assert (shape(example.query), shape(example.target)) == ([9], ["A high tone."])


def test_samples_with_a_rate_and_a_longest_length(folder: Path) -> None:
    samples = {"array": tone(440).tolist(), "sampling_rate": RATE}
    record = {"audio": samples, "caption": "A tone."}
    (example,) = read(folder, record, max_seconds=0.25)
    (part,) = example.query[0].content  # type: ignore[index]
    assert isinstance(part, Audio)
    np.testing.assert_array_equal(open_audio(part, RATE), tone(440, 0.25))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"audio": "none.wav", "caption": "x"}, "audio file 'none.wav'"),
        ({"audio": "../a.wav", "caption": "x"}, "outside"),
        (
            {"audio": 3, "caption": "x"},
            "'audio' holds a number, expected the path of an",
        ),
        ({"audio": "data:audio/wav,x", "caption": "x"}, "not a data URL"),
        (
            {
                "audio": ["a.wav", "b.flac"],
                "conversations": [
                    {"from": "human", "value": "<audio> Is it?"},
                    {"from": "gpt", "value": "x"},
                ],
            },
            "number of <audio> markers is 1, number of recordings is 2",
        ),
    ],
)
def test_a_record_that_cannot_be_used_is_skipped_with_a_reason(
    folder: Path, record: Any, reason: str
) -> None:
    path = folder / "records.jsonl"
    path.write_text(json.dumps(record) + "\n")
    found = read_examples(path, ReadOptions())
    assert found.examples == []
    assert re.search(reason, found.skipped[0].reason), found.skipped[0].reason
