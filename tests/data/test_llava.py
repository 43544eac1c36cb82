"""LLaVA files: what a record means, and that no bad record goes unnamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from cafe.data.read import read_examples
from cafe.data.records import Reading, Records
from cafe.data.scenes import read_truth, write_scenes
from cafe.errors import DataError
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
    return read_examples(folder / "data.json", Reading("llava", mode=mode, **options))


def shown(conversation: Conversation) -> list[tuple[str, ...]]:
    """Role, then texts and names of pictures, of each turn."""
    return [
        (m.role, *(p if isinstance(p, str) else f"[{Path(str(p.source)).name}]" for p in m.content))
        for m in conversation
    ]


def only_reason(records: Records) -> str:
    assert records.examples == []
    (rejected,) = records.rejected
    return rejected.reason


# ---------------------------------------------------------------------- what a record means


def test_caption_mode_is_the_published_pair_and_the_conversation(folder: Path) -> None:
    texts = ("<image>\nDescribe.", " A mug. ", "More?", "It is red.")
    (example,) = read(folder, record(*texts), mode="caption").examples
    picture = (folder / "images/1.png").resolve()
    assert example.id == "7"
    assert example.query is not None
    (shown_picture,) = example.query[0].content
    assert isinstance(shown_picture, Image)
    assert shown_picture.source == picture
    assert example.query == user(shown_picture)
    assert example.target == user("A mug. It is red.")
    assert example.target_id == "A mug. It is red."
    assert example.dialogues == (
        (
            Message("user", (shown_picture, "Describe.")),
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
def test_a_marker_is_where_the_picture_stands(
    folder: Path, text: str, content: tuple[str, ...]
) -> None:
    (example,) = read(folder, record(text, "A mug.", "Sure?", "Yes.")).examples
    question, _, second, _ = shown(example.dialogues[0])
    assert question == ("user", *content)
    assert second == ("user", "Sure?")


def test_pictures_take_the_markers_in_their_order(folder: Path) -> None:
    both = ["images/2.png", "images/1.png"]
    texts = ("Left: <image>\nRight?", "Yes.", "<image>\n<image>\nAnd these?", "No.")
    for field in ("image", "images"):
        rec = {"conversations": turns(*texts), field: [*both, "images/2.png"]}
        (example,) = read(folder, rec).examples
        assert shown(example.dialogues[0])[::2] == [
            ("user", "Left: ", "[2.png]", "Right?"),
            ("user", "[1.png]", "[2.png]", "And these?"),
        ]
    pictures = [p for m in example.dialogues[0] for p in m.content if isinstance(p, Image)]
    assert pictures[0] is pictures[2]  # the same file is the same object


def test_branches_are_the_questions_each_with_the_picture_in_front(folder: Path) -> None:
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
    assert "no picture" in only_reason(read(folder, rec, mode="caption"))


def test_json_lines_and_a_json_list_read_alike_and_limit_counts_records(folder: Path) -> None:
    records = [record("<image>\nWhat?", f"A mug, the {n}.", id=f"{n}") for n in range(4)]
    whole = read(folder, *records)
    lines = folder / "data.jsonl"
    lines.write_text("\n\n".join(json.dumps(r) for r in records), encoding="utf-8-sig")
    by_line = read_examples(lines, Reading("llava", mode="chat"))
    assert [shown(e.dialogues[0]) for e in by_line.examples] == [
        shown(e.dialogues[0]) for e in whole.examples
    ]
    assert [e.id for e in by_line.examples] == ["0", "1", "2", "3"]
    for path in (lines, folder / "data.json"):
        assert [
            e.id for e in read_examples(path, Reading("llava", mode="chat", limit=2)).examples
        ] == ["0", "1"]


def test_a_record_without_an_id_is_named_by_its_place(folder: Path) -> None:
    first, second = record("A?", "B."), record("A?", "B.")
    del first["id"], second["id"]
    assert [e.id for e in read(folder, first, second).examples] == ["data-1", "data-2"]


def test_pictures_start_at_image_root(folder: Path) -> None:
    rec = record("What?", "A mug.", image="1.png")
    assert "no such file" in only_reason(read(folder, rec))
    assert len(read(folder, rec, image_root=folder / "images").examples) == 1


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
    "text that is none": (
        record(conversations=[{"from": "human", "value": ["x"]}]),
        "turn 1: value is a list, expected text",
    ),
    "an empty answer": (record("What?", " \n"), "turn 2: the answer is empty"),
    "an empty question": (record("", "A mug."), "turn 1: the question is empty"),
    "no answer": (record("What?"), "up to an answer, found user"),
    "two questions": (record("A?", "B.", "C?"), "found user, assistant, user"),
    "half a character": (record("What?", "\ud83d"), "turn 2: the text is not Unicode"),
    "more markers than pictures": (
        record("<image>\n<image>\nWhat?", "A mug."),
        "number of <image> markers is 2, number of pictures is 1",
    ),
    "fewer markers than pictures": (
        record("What?", "A mug.", image=["images/1.png", "images/2.png"]),
        "number of <image> markers is 0, number of pictures is 2",
    ),
    "a marker without a picture": (
        record("<image>\nWhat?", "A mug.", image=None),
        "number of <image> markers is 1, number of pictures is 0",
    ),
    "a marker in an answer": (record("What?", "<image> A mug."), "turn 2: <image> stands in a gpt"),
    "a video": (record("What?", "A mug.", video="a.mp4"), "video"),
    "a picture that is a number": (record("A?", "B.", image=[3]), "'image' holds a number"),
    "a missing picture": (record("A?", "B.", image="images/3.png"), "'images/3.png': no such file"),
    "a folder": (record("A?", "B.", image="images"), "'images': no such file"),
    "a path upward": (record("A?", "B.", image="../secret.png"), "'../secret.png' is outside"),
    "a null byte": (record("A?", "B.", image="a\0.png"), r"picture 'a\x00.png'"),
    "an endless name": (record("A?", "B.", image="a" * 5000), "picture 'aaa"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_rejected_by_name_and_reason(folder: Path, case: str) -> None:
    bad, reason = BAD[case]
    good = record("What?", "A mug.", id="good")
    records = read(folder, good, bad, good)
    assert [e.id for e in records.examples] == ["good", "good"]
    assert len(records) == 3
    (rejected,) = records.rejected
    assert rejected.source == str(folder / "data.json")
    assert rejected.record.startswith("record 2")
    assert reason in rejected.reason
    if isinstance(bad, dict):
        assert rejected.record == "record 2, id '7'"


def test_a_line_that_is_not_json_is_rejected_by_its_number(folder: Path) -> None:
    good = json.dumps(record("What?", "A mug.")).encode()
    lines = [good, b"", b'{"id": "8", "conv', b"\xff\xfe", b"[" * 100_000, good]
    (folder / "data.jsonl").write_bytes(b"\n".join(lines))
    records = read_examples(folder / "data.jsonl", Reading("llava", mode="chat"))
    assert len(records.examples) == 2
    assert [r.record for r in records.rejected] == ["line 3", "line 4", "line 5"]
    assert all(r.reason.startswith("not JSON") for r in records.rejected)


def test_no_path_leaves_image_root(folder: Path) -> None:
    secret = folder.parent / "secret.png"
    (folder / "images/link.png").symlink_to(secret)
    (folder / "elsewhere").symlink_to(folder.parent)
    (folder / "images/loop.png").symlink_to(folder / "images/loop.png")
    paths = [str(secret), "images/../../secret.png", "images/link.png", "elsewhere/secret.png"]
    for path in paths:
        assert (folder / path).is_file()  # there to be read, if the check were not
        assert "is outside" in only_reason(read(folder, record("A?", "B.", image=path)))
    assert read(folder, record("A?", "B.", image="images/loop.png")).rejected


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
        (b'{"data": []}', r"expected a list of records, found an object"),
    ],
)
def test_a_json_file_that_is_none_is_an_error_with_its_place(
    folder: Path, content: bytes, message: str
) -> None:
    (folder / "data.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_examples(folder / "data.json", Reading("llava", mode="chat"))


def test_a_file_or_root_that_cannot_be_read_is_an_error(folder: Path) -> None:
    for path in ("none.json", "nowhere/none.jsonl"):
        with pytest.raises(DataError, match=rf"{path}: no such file"):
            read_examples(folder / path, Reading("llava", mode="chat"))
    with pytest.raises(DataError, match=r"image_root .*nowhere': no such folder"):
        read(folder, image_root=folder / "nowhere")


# ---------------------------------------------------------------------- a real folder


def test_a_scenes_folder_is_read_completely(tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    write_scenes(folder, count=12, seed=3)
    truth = read_truth(folder)
    captions = read_examples(folder / "captions.json", Reading("llava", mode="caption"))
    asked = read_examples(
        folder / "questions.json", Reading("llava", mode="chat", turns="branches")
    )
    assert captions.rejected == asked.rejected == []
    assert [e.id for e in captions.examples] == [t.id for t in truth]
    assert [e.target_id for e in captions.examples] == [t.caption for t in truth]
    assert [len(e.dialogues) for e in asked.examples] == [6] * 12
    written = json.loads((folder / "questions.json").read_text())
    answers = [t["value"] for r in written for t in r["conversations"] if t["from"] == "gpt"]
    assert [d[-1].text for e in asked.examples for d in e.dialogues] == answers
