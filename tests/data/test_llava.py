"""LLaVA files: what a record means, and that no bad record goes unnamed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from cafe.data.read import read_examples
from cafe.data.records import ReadOptions, Records
from cafe.data.scenes import read_truth, write_scenes
from cafe.errors import DataError
from cafe.media import open_image
from cafe.types import Conversation, Image, Message, user


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """data/images/{1,2}.png, and secret.png beside the folder."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    for path in (root / "images/1.png", root / "images/2.png", tmp_path / "secret.png"):
        PIL.Image.new("RGB", (4, 4), "red").save(path)
    return root


def turns(*texts: str) -> list[dict[str, str]]:
    return [
        {"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)
    ]


def record(*texts: str, **fields: Any) -> dict[str, Any]:
    return {"id": "7", "image": "images/1.png", "conversations": turns(*texts), **fields}


def read(folder: Path, *records: object, mode: Any = "chat", **options: Any) -> Records:
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return read_examples(folder / "data.json", ReadOptions("llava", mode=mode, **options))


def shown(conversation: Conversation) -> list[tuple[str, ...]]:
    """Role, then texts and names of images, of each turn."""
    return [
        (m.role, *(p if isinstance(p, str) else f"[{Path(str(p.source)).name}]" for p in m.content))
        for m in conversation
    ]


def only_reason(records: Records) -> str:
    assert records.examples == []
    (rejected,) = records.skipped
    return rejected.reason


# ---------------------------------------------------------------------- what a record means


def test_caption_mode_is_the_published_pair_and_the_conversation(folder: Path) -> None:
    texts = ("<image>\nDescribe.", " A mug. ", "More?", "It is red.")
    (example,) = read(folder, record(*texts), mode="caption").examples
    image = (folder / "images/1.png").resolve()
    assert example.id == "7"
    assert example.query is not None
    (shown_image,) = example.query[0].content
    assert isinstance(shown_image, Image)
    assert shown_image.source == image
    assert example.query == user(shown_image)
    assert example.target == user("A mug. It is red.")
    assert example.target_id == "A mug. It is red."
    assert example.dialogues == (
        (
            Message("user", (shown_image, "Describe.")),
            Message("assistant", ("A mug.",)),
            Message("user", ("More?",)),
            Message("assistant", ("It is red.",)),
        ),
    )


def test_chat_mode_has_no_pair(folder: Path) -> None:
    (example,) = read(folder, record("<image>\nDescribe.", "A mug.")).examples
    assert example.query is example.target is example.target_id is None
    assert shown(example.dialogues[0]) == [
        ("user", "[1.png]", "Describe."),
        ("assistant", "A mug."),
    ]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<image>\nWhat?", ("[1.png]", "What?")),
        ("What?\n<image>", ("What?", "[1.png]")),
        ("<image>\r\nWhat?", ("[1.png]", "What?")),
        ("<image>What?", ("[1.png]", "What?")),
        ("Look: <image>\nWhat?", ("Look: ", "[1.png]", "What?")),
        ("Look:\n<image>\nWhat?\nWhere?", ("Look:", "[1.png]", "What?\nWhere?")),
        ("<image>", ("[1.png]",)),
        ("What?", ("[1.png]", "What?")),  # no marker: in front of the first question
    ],
)
def test_a_marker_is_where_the_image_stands(
    folder: Path, text: str, content: tuple[str, ...]
) -> None:
    (example,) = read(folder, record(text, "A mug.", "Sure?", "Yes.")).examples
    question, _, second, _ = shown(example.dialogues[0])
    assert question == ("user", *content)
    assert second == ("user", "Sure?")


def test_images_take_the_markers_in_their_order(folder: Path) -> None:
    both = ["images/2.png", "images/1.png"]
    texts = ("Left: <image>\nRight?", "Yes.", "<image>\n<image>\nAnd these?", "No.")
    for field in ("image", "images"):
        rec = {"conversations": turns(*texts), field: [*both, "images/2.png"]}
        (example,) = read(folder, rec).examples
        assert shown(example.dialogues[0])[::2] == [
            ("user", "Left: ", "[2.png]", "Right?"),
            ("user", "[1.png]", "[2.png]", "And these?"),
        ]
    images = [p for m in example.dialogues[0] for p in m.content if isinstance(p, Image)]
    assert images[0] is images[2]  # the same file is the same object


def test_branches_are_the_questions_each_with_the_image_in_front(folder: Path) -> None:
    rec = record("What?\n<image>", "A mug.", "Which colour?", "Red.")
    rec["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    (example,) = read(folder, rec, mode="caption", turns="branches").examples
    assert [shown(dialogue) for dialogue in example.dialogues] == [
        [("system", "Be brief."), ("user", "[1.png]", "What?"), ("assistant", "A mug.")],
        [("system", "Be brief."), ("user", "[1.png]", "Which colour?"), ("assistant", "Red.")],
    ]
    assert example.target == user("A mug. Red.")
    (whole,) = read(folder, rec, mode="caption").examples
    assert len(whole.dialogues) == 1
    assert whole.target == example.target


def test_both_spellings_of_a_turn_and_all_roles_mean_the_same(folder: Path) -> None:
    spelt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "A mug."},
    ]
    other = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A mug."},
    ]
    first, second = read(folder, record(conversations=spelt), record(conversations=other)).examples
    assert first.dialogues == second.dialogues
    assert [m.role for m in first.dialogues[0]] == ["system", "user", "assistant"]


def test_a_text_only_conversation_is_read_in_chat_mode_only(folder: Path) -> None:
    rec = {"id": 3, "conversations": turns("Two and two?", "Four.")}
    (example,) = read(folder, rec, {**rec, "image": None}).examples[:1]
    assert example.id == "3"
    assert shown(example.dialogues[0]) == [("user", "Two and two?"), ("assistant", "Four.")]
    assert "no image" in only_reason(read(folder, rec, mode="caption"))


def test_json_lines_and_a_json_list_read_alike_and_limit_counts_records(folder: Path) -> None:
    records = [record("<image>\nWhat?", f"A mug, the {n}.", id=f"{n}") for n in range(4)]
    whole = read(folder, *records)
    lines = folder / "data.jsonl"
    lines.write_text("\n\n".join(json.dumps(r) for r in records), encoding="utf-8-sig")
    by_line = read_examples(lines, ReadOptions("llava", mode="chat"))
    assert [shown(e.dialogues[0]) for e in by_line.examples] == [
        shown(e.dialogues[0]) for e in whole.examples
    ]
    assert [e.id for e in by_line.examples] == ["0", "1", "2", "3"]
    for path in (lines, folder / "data.json"):
        assert [
            e.id for e in read_examples(path, ReadOptions("llava", mode="chat", limit=2)).examples
        ] == ["0", "1"]


def test_a_record_without_an_id_is_named_by_its_place(folder: Path) -> None:
    first, second = record("A?", "B."), record("A?", "B.")
    del first["id"], second["id"]
    assert [e.id for e in read(folder, first, second).examples] == ["data-1", "data-2"]


@pytest.mark.parametrize("question", ["<image>\nWhat?", "What?"])
def test_a_marker_in_an_answer_is_text(folder: Path, question: str) -> None:
    answer = "As Markdown: ![fig](<image>)"
    (example,) = read(folder, record(question, answer), mode="caption").examples
    assert shown(example.dialogues[0])[-1] == ("assistant", answer)
    assert sum(not isinstance(p, str) for m in example.dialogues[0] for p in m.content) == 1


def test_images_start_at_image_root(folder: Path) -> None:
    shutil.copytree(folder / "images", folder / "elsewhere" / "deep")
    rec = record("What?", "A mug.", image="deep/1.png")
    assert "no such file" in only_reason(read(folder, rec))
    assert len(read(folder, rec, image_root=folder / "elsewhere").examples) == 1


# ---------------------------------------------------------------------- what is rejected


BAD = {
    "no conversations": ({"id": "7"}, "'conversations' must be a list of turns, found nothing"),
    "not an object": ("text", "expected an object, found a string"),
    "no turns": (record(conversations=[]), "found an empty list"),
    "a turn without text": (record(conversations=[{"from": "human"}]), "turn 1: has neither"),
    "an unknown role": (
        record(conversations=[{"from": "bot", "value": "x"}]),
        "turn 1: from is 'bot', expected human or gpt",
    ),
    "a tool that is all": (
        record(conversations=[{"from": "observation", "value": "3"}]),
        "up to an answer, found tool",
    ),
    "text that is none": (
        record(conversations=[{"from": "human", "value": ["x"]}]),
        "turn 1: value is a list, expected text",
    ),
    "an empty answer": (record("What?", " \n"), "turn 2: the answer is empty"),
    "an empty question": (record("", "A mug."), "turn 1: the question is empty"),
    "no answer": (record("What?"), "up to an answer, found user"),
    "half a character": (record("What?", "\ud83d"), "turn 2: the text is not Unicode"),
    "more markers than images": (
        record("<image>\n<image>\nWhat?", "A mug."),
        "number of <image> markers is 2, number of images is 1",
    ),
    "fewer markers than images": (
        record("What?", "A mug.", image=["images/1.png", "images/2.png"]),
        "number of <image> markers is 0, number of images is 2",
    ),
    "a marker without an image": (
        record("<image>\nWhat?", "A mug.", image=None),
        "number of <image> markers is 1, number of images is 0",
    ),
    "a video": (record("What?", "A mug.", video="a.mp4"), "video"),
    "an image that is a number": (record("A?", "B.", image=[3]), "'image' holds a number"),
    "a missing image": (record("A?", "B.", image="images/3.png"), "'images/3.png': no such file"),
    "a folder": (record("A?", "B.", image="images"), "'images': no such file"),
    "a path upward": (record("A?", "B.", image="../secret.png"), "'../secret.png' is outside"),
    "a null byte": (record("A?", "B.", image="a\0.png"), r"image 'a\x00.png'"),
    "an endless name": (record("A?", "B.", image="a" * 5000), "image 'aaa"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_rejected_by_name_and_reason(folder: Path, case: str) -> None:
    bad, reason = BAD[case]
    good = record("What?", "A mug.", id="good")
    records = read(folder, good, bad, good)
    assert [e.id for e in records.examples] == ["good", "good"]
    assert len(records) == 3
    (rejected,) = records.skipped
    assert rejected.source == str(folder / "data.json")
    assert rejected.record.startswith("record 2")
    assert reason in rejected.reason
    if isinstance(bad, dict):
        assert rejected.record == "record 2, id '7'"


def said_by(*said: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in said]}


ODD = {
    "an answer first": (
        said_by(("gpt", "How can I help?"), ("human", "Hello"), ("gpt", "hi")),
        [("user", "Hello"), ("assistant", "hi")],
        "answers before the first question, dropped",
    ),
    "a question last": (
        said_by(("human", "Hello"), ("gpt", "hi"), ("human", "and?")),
        [("user", "Hello"), ("assistant", "hi")],
        "last questions without an answer, dropped",
    ),
    "a system turn within": (
        said_by(("system", "1"), ("human", "Hello"), ("system", "2"), ("gpt", "hi")),
        [("system", "1"), ("user", "Hello\n2"), ("assistant", "hi")],
        "system turns within a conversation, read as the user's",
    ),
    "two questions": (
        said_by(("human", "Hello"), ("human", "again"), ("gpt", "hi")),
        [("user", "Hello\nagain"), ("assistant", "hi")],
        "neighbouring turns of one role, joined",
    ),
    "two answers": (
        said_by(("human", "Hello"), ("gpt", "hi"), ("gpt", "there")),
        [("user", "Hello"), ("assistant", "hi\nthere")],
        "neighbouring turns of one role, joined",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_turns_that_do_not_alternate_are_read_as_published_loaders_do(
    folder: Path, case: str
) -> None:
    odd, expected, change = ODD[case]
    records = read(folder, odd, record("What?", "A mug."), mode="chat")
    assert records.skipped == []
    (dialogue,) = records.examples[0].dialogues
    assert [(m.role, m.text) for m in dialogue] == expected
    assert records.changes[change] == 1


def test_dropped_and_joined_turns_keep_their_images_and_their_text_as_written(
    folder: Path,
) -> None:
    odd = said_by(
        ("human", " <image>\nLook. "), ("human", "What? "), ("gpt", "A mug."), ("human", "?")
    )
    records = read(folder, odd | {"image": "images/1.png"}, mode="caption")
    (example,) = records.examples
    (dialogue,) = example.dialogues
    image = dialogue[0].content[0]
    assert isinstance(image, Image)
    assert dialogue[0].content == (image, "Look. \nWhat? ")
    assert dialogue[0].written == (" ", image, "\nLook. \nWhat? ")
    assert records.changes.total() == 2


def test_a_line_that_is_not_json_is_rejected_by_its_number(folder: Path) -> None:
    good = json.dumps(record("What?", "A mug.")).encode()
    lines = [good, b"", b'{"id": "8", "conv', b"\xff\xfe", b"[" * 100_000, good]
    (folder / "data.jsonl").write_bytes(b"\n".join(lines))
    records = read_examples(folder / "data.jsonl", ReadOptions("llava", mode="chat"))
    assert len(records.examples) == 2
    assert [r.record for r in records.skipped] == ["line 3", "line 4", "line 5"]
    assert all(r.reason.startswith("not JSON") for r in records.skipped)


def test_no_path_leaves_image_root(folder: Path) -> None:
    secret = folder.parent / "secret.png"
    (folder / "images/link.png").symlink_to(secret)
    (folder / "elsewhere").symlink_to(folder.parent)
    (folder / "images/loop.png").symlink_to(folder / "images/loop.png")
    paths = [str(secret), "images/../../secret.png", "elsewhere/data/../secret.png"]
    for path in paths:
        assert (folder / path).is_file()  # there to be read, if the check were not
        assert "is outside" in only_reason(read(folder, record("A?", "B.", image=path)))
    assert read(folder, record("A?", "B.", image="images/loop.png")).skipped


def test_links_in_the_folder_are_followed(folder: Path) -> None:
    """As in a cache of the hub: snapshots/REVISION/1.png leads to ../../blobs/HASH."""
    blobs = folder.parent / "blobs"
    (folder / "images").rename(blobs)
    (folder / "images").mkdir()
    (folder / "images/1.png").symlink_to("../../blobs/1.png")
    (folder / "all").symlink_to(blobs)
    for path in ("images/1.png", "all/1.png"):
        records = read(folder, record("A?", "B.", image=path))
        (image,) = (part for part in records.examples[0].dialogues[0][0].content if part != "A?")
        assert isinstance(image, Image)
        assert open_image(image).size == (4, 4)


def test_paths_and_links_that_stay_inside_are_fine(folder: Path) -> None:
    (folder / "images/link.png").symlink_to(folder / "images/1.png")
    (folder.parent / "other").symlink_to(folder)
    inside = ["images/link.png", "images/../images/1.png", str(folder / "images/1.png")]
    for root in (folder, folder.parent / "other"):
        records = [record("A?", "B.", image=path) for path in inside]
        examples = read(folder, *records, mode="caption", image_root=root).examples
        keys = {p.key for e in examples for p in (e.query or ())[0].content if isinstance(p, Image)}
        assert len(examples) == 3
        assert keys == {str((folder / "images/1.png").resolve())}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n {"id": 1},\n {"id" 2}\n]', r"data\.json, line 3, column 8: not JSON"),
        (b'{"id": 1}\n{"id": 2}', r"line 2, column 1: not JSON.*named \.jsonl"),
        (b"", r"line 1, column 1: not JSON"),
        (b"[" * 100_000, r"data\.json: not JSON"),
        (b'["\xff"]', r"data\.json: not JSON"),
        (b'{"data": []}', r"expected a list of records, .*found an object of data"),
    ],
)
def test_a_json_file_that_is_none_is_an_error_with_its_place(
    folder: Path, content: bytes, message: str
) -> None:
    (folder / "data.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_examples(folder / "data.json", ReadOptions("llava", mode="chat"))


def test_a_file_or_root_that_cannot_be_read_is_an_error(folder: Path) -> None:
    for path in ("none.json", "nowhere/none.jsonl"):
        with pytest.raises(DataError, match=rf"{path}: no such file"):
            read_examples(folder / path, ReadOptions("llava", mode="chat"))
    with pytest.raises(DataError, match=r"image_root .*nowhere': no such folder"):
        read(folder, image_root=folder / "nowhere")


# ---------------------------------------------------------------------- a real folder


def test_a_scenes_folder_is_read_completely(tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    write_scenes(folder, count=12, seed=3)
    truth = read_truth(folder)
    captions = read_examples(folder / "captions.json", ReadOptions("llava", mode="caption"))
    asked = read_examples(
        folder / "questions.json", ReadOptions("llava", mode="chat", turns="branches")
    )
    assert captions.skipped == asked.skipped == []
    assert [e.id for e in captions.examples] == [t.id for t in truth]
    assert [e.target_id for e in captions.examples] == [t.caption for t in truth]
    assert [len(e.dialogues) for e in asked.examples] == [6] * 12
    written = json.loads((folder / "questions.json").read_text())
    answers = [t["value"] for r in written for t in r["conversations"] if t["from"] == "gpt"]
    assert [d[-1].text for e in asked.examples for d in e.dialogues] == answers
