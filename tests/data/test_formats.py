"""What each published layout means, example by example, and how it is recognised."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest

from cafe.data.formats import FORMATS, detect_format
from cafe.data.formats.mixture import chosen
from cafe.data.formats.mmeb import RankedReader
from cafe.data.media_paths import MediaResolver
from cafe.data.read import read_examples
from cafe.data.records import ReadOptions, Records
from cafe.data.tables import open_table
from cafe.errors import DataError
from cafe.media import open_image
from cafe.types import Conversation, Example, Image, StoredFile
from helpers import layouts
from helpers.layouts import (
    LAYOUTS,
    QUESTION,
    REQUEST,
    TEXTS,
    llava_records,
    write_images,
    write_json,
)

Plain = tuple[Any, ...]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def colour(image: Image) -> str:
    """The images are told apart by what they show, wherever they are stored."""
    red, green, blue = open_image(image).getpixel((5, 5))  # type: ignore[misc]
    names = {(1, 0, 0): "0", (0, 1, 0): "1", (0, 0, 1): "2", (1, 1, 0): "3"}
    return f"[{names[red > 99, green > 99, blue > 99]}]"


def plain(conversation: Conversation | None) -> Plain | None:
    """("role", parts, …); images are [0] to [3]; a single user turn is its parts alone."""
    if conversation is None:
        return None
    turns = [
        (m.role, *(colour(p) if isinstance(p, Image) else p for p in m.content))
        for m in conversation
    ]
    return turns[0][1:] if len(turns) == 1 and turns[0][0] == "user" else tuple(turns)


def told(example: Example) -> tuple[Any, ...]:
    """query, target, negatives, dialogues."""
    return (
        plain(example.query),
        plain(example.target),
        [plain(negative) for negative in example.negatives],
        [plain(dialogue) for dialogue in example.dialogues],
    )


def read(tmp_path: Path, layout: str, **how: Any) -> Records:
    records = read_examples(LAYOUTS[layout][0](tmp_path / layout), ReadOptions(**how))
    assert records.skipped == []
    return records


def caption_told(n: int, request: str = QUESTION, *before: Plain) -> tuple[Any, ...]:
    """What example number n of a captioned layout is."""
    dialogue = (*before, ("user", f"[{n}]", request), ("assistant", TEXTS[n]))
    return ((f"[{n}]",), (TEXTS[n],), [], [dialogue])


# ---------------------------------------------------------------------- detection


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_recognised(tmp_path: Path, layout: str) -> None:
    write, name = LAYOUTS[layout]
    assert read_examples(write(tmp_path / layout)).format == name


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"messages", "conversations"}, r"fit llava and messages; set format"),
        ({"title", "photo"}, r"the columns \(photo, title\) fit no format; map them.*llava: conv"),
        (set(), r"the columns \(none\) fit no format"),
        ({"qry_text", "qry_img_path", "tgt_text", "tgt_img_path"}, "for evaluation"),
    ],
)
def test_what_fits_no_format_or_several_is_one_error_that_lists_them(
    columns: set[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        detect_format(columns)


def test_every_format_fits_the_columns_that_it_names_first() -> None:
    for format in FORMATS.values():
        first = {name.split(" ")[0] for name in format.layout.split(", ")} & format.columns
        assert detect_format(first) is format


def test_the_first_record_that_has_a_format_decides(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data")
    path = write_json(folder / "data.jsonl", ["text", {"id": 3}, *llava_records()])
    records = read_examples(path)
    assert records.format == "llava"
    assert len(records.skipped) == 2


# ---------------------------------------------------------------------- conversations


@pytest.mark.parametrize("layout", ["llava", "openai", "trl"])
def test_conversations_are_captions_unless_a_mode_says_otherwise(
    tmp_path: Path, layout: str
) -> None:
    examples = read(tmp_path, layout).examples
    assert [told(e) for e in examples] == [caption_told(n) for n in range(4)]
    assert {e.embedding_prompt for e in examples} == {"compress"}
    assert [e.target_id for e in examples] == list(TEXTS)


def test_sharegpt_is_the_same_with_a_list_of_images(tmp_path: Path) -> None:
    examples = read(tmp_path, "sharegpt").examples
    system = ("system", "Be brief.")
    assert [told(e) for e in examples] == [caption_told(n, QUESTION, system) for n in range(4)]
    assert [e.id for e in examples] == ["data-1", "data-2", "data-3", "data-4"]


@pytest.mark.parametrize("layout", ["llava", "openai"])
def test_chat_mode_and_pair_mode_of_conversations(tmp_path: Path, layout: str) -> None:
    path = LAYOUTS[layout][0](tmp_path / layout)
    dialogue = (("user", "[0]", QUESTION), ("assistant", TEXTS[0]))
    chat = read_examples(path, ReadOptions(mode="chat")).examples[0]
    assert told(chat) == (None, None, [], [dialogue])
    pair = read_examples(path, ReadOptions(mode="pair")).examples[0]
    assert told(pair) == (("[0]", QUESTION), (TEXTS[0],), [], [dialogue])
    assert pair.embedding_prompt == "none"
    silent = read_examples(path, ReadOptions(mode="pair", language_loss=False)).examples[0]
    assert told(silent) == (("[0]", QUESTION), (TEXTS[0],), [], [])


def test_in_pair_mode_an_answer_may_show_a_image(tmp_path: Path) -> None:
    """As the published code writes MMEB: images = [query image, target image]."""
    turns = [{"from": "human", "value": "<image>\nIn blue."}, {"from": "gpt", "value": "<image>"}]
    record = {"images": ["images/0.png", "images/2.png"], "conversations": turns}
    path = write_json(write_images(tmp_path / "data") / "data.json", [record])
    (example,) = read_examples(path, ReadOptions(mode="pair")).examples
    assert told(example) == (("[0]", "In blue."), ("[2]",), [], [])
    assert "<image> in a gpt turn" in read_examples(path).skipped[0].reason


def test_parts_and_markers_of_messages_mix(tmp_path: Path) -> None:
    """A string's <image> takes the next listed image, a part may bring its own; text is text."""
    url = "data:image/png;base64," + base64.b64encode(layouts.image_bytes(3)).decode()
    record = {
        "images": ["images/1.png"],
        "messages": [
            {"role": "user", "content": "<image>\nOne?"},
            {"role": "assistant", "content": "Yes."},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": "Is <image> a tag?"},
                    {"type": "image", "image": f"file://{tmp_path}/data/images/2.png"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": " It is. "}]},
        ],
    }
    path = write_json(write_images(tmp_path / "data") / "data.jsonl", [record])
    (example,) = read_examples(path, ReadOptions(mode="chat")).examples
    assert plain(example.dialogues[0]) == (
        ("user", "[1]", "One?"),
        ("assistant", "Yes."),
        ("user", "[3]", "Is <image> a tag?", "[2]"),
        ("assistant", "It is."),
    )


def test_a_video_stands_where_its_marker_does(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data")
    (folder / "a.mp4").write_bytes(b"film")
    answer = {"from": "gpt", "value": "A cat."}
    records = [
        {
            "video": "a.mp4",
            "conversations": [{"from": "human", "value": f"{marker}\nWhat?"}, answer],
        }
        for marker in ("<video>", "<image>")
    ]
    records[1]["video"] = ["a.mp4"]
    tag = {"conversations": [{"from": "human", "value": "What does <video> do?"}, answer]}
    parts = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]
    path = write_json(folder / "data.json", [*records, tag])
    first, second, text = read_examples(path, ReadOptions(mode="chat")).examples
    for example in (first, second):
        film, question = example.dialogues[0][0].content
        assert film.source == folder / "a.mp4"  # type: ignore[union-attr]
        assert question == "What?"
    assert text.dialogues[0][0].text == "What does <video> do?"
    message = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    path = write_json(folder / "more.json", [{"messages": message}])
    (third,) = read_examples(path).examples
    assert third.query is not None
    assert third.query[0].content[0].source == folder / "a.mp4"  # type: ignore[union-attr]


def test_a_mixture_takes_what_its_strategies_say(tmp_path: Path) -> None:
    records = read(tmp_path, "mixture")
    assert [e.id for e in records.examples] == [f"llava-{n}" for n in (0, 1, 1, 2, 3)]
    again = read_examples(tmp_path / "mixture/mixture.yaml", ReadOptions(limit=3))
    assert [e.id for e in again.examples] == [f"llava-{n}" for n in (0, 1, 1)]


def test_strategies_by_hand() -> None:
    assert list(chosen("all", 4, 0)) == [0, 1, 2, 3]
    assert list(chosen("first:2", 4, 0)) == [0, 1]
    assert list(chosen("first:30%", 4, 0)) == [0, 1]  # rounded up, as LLaVA-NeXT does
    assert list(chosen("end:1", 4, 0)) == [3]
    assert list(chosen("end:9", 4, 0)) == [0, 1, 2, 3]
    some = chosen("random:50", 100, 0)
    assert some == chosen("random:50", 100, 0) != chosen("random:50", 100, 1)
    assert len(set(some)) == 50
    assert some != list(range(50))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: []", "a mixture lists its files under datasets"),
        ("- a", "a mixture lists its files"),
        ("datasets: [{path: x}]", "entry 1: json_path is missing"),
        (
            "datasets: [{json_path: x, sampling_strategy: 'last:3'}]",
            "'last:3', expected all, first",
        ),
        ("datasets: [{json_path: missing.json}]", r"missing\.json: no such file"),
        ("datasets: [", "not valid YAML"),
    ],
)
def test_a_bad_mixture_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        read_examples(tmp_path / "mix.yaml")


# ---------------------------------------------------------------------- pairs


def test_ms_swift_by_hand(tmp_path: Path) -> None:
    examples = read(tmp_path, "swift").examples
    answer = (("user", "[1]", REQUEST), ("assistant", TEXTS[1]))
    assert told(examples[1]) == (("[1]", REQUEST), (TEXTS[1],), [("[2]",), ("no",)], [answer])
    assert len(examples) == 4


def test_several_positives_are_examples_that_are_no_negatives_of_one_another(
    tmp_path: Path,
) -> None:
    sides = [[{"role": "user", "content": text}] for text in TEXTS[:2]]
    query = [{"role": "user", "content": "cats"}]
    record = {"id": "q", "messages": query, "positive_messages": sides}
    path = write_json(tmp_path / "data.jsonl", [record])
    examples = read_examples(path, ReadOptions(language_loss=False)).examples
    assert [told(e) for e in examples] == [(("cats",), (text,), [], []) for text in TEXTS[:2]]
    assert [(e.id, e.target_id) for e in examples] == [("q-1", "q"), ("q-2", "q")]


def test_mmeb_by_hand(tmp_path: Path) -> None:
    """The instruction is the only prompt; a target with an image is no answer."""
    examples = read(tmp_path, "mmeb").examples
    answer = (("user", "[0]", REQUEST), ("assistant", TEXTS[0]))
    assert told(examples[0]) == (("[0]", REQUEST), (TEXTS[0],), [], [answer])
    target, negative = (
        ("[3]", "Represent the given image."),
        ("[0]", "Represent the given image."),
    )
    assert told(examples[3]) == ((f"{REQUEST} {TEXTS[3]}",), target, [negative], [])
    assert {e.embedding_prompt for e in examples} == {"none"}
    silent = read(tmp_path / "again", "mmeb", language_loss=False).examples
    assert [e.dialogues for e in silent] == [()] * 4
    asked = read(tmp_path / "third", "mmeb", embedding_prompt="compress").examples
    assert {e.embedding_prompt for e in asked} == {"compress"}


def test_mmeb_eval_gives_queries_with_candidates(tmp_path: Path) -> None:
    table = open_table(layouts.mmeb_eval(tmp_path / "eval"), split="test")
    reader = RankedReader(MediaResolver(table.folder))
    queries = [reader.read(raw.id, raw.content) for raw in table.rows()]
    assert [plain(q.query) for q in queries] == [(f"[{n}]", REQUEST) for n in range(4)]
    expected = [[(TEXTS[n],), (TEXTS[(n + 1) % 4],)] for n in range(4)]
    assert [[plain(c) for c in q.candidates] for q in queries] == expected
    assert {q.positives for q in queries} == {(0,)}
    assert queries[0].candidates[1] is queries[1].candidates[0]  # embedded only once
    with pytest.raises(DataError, match="for evaluation"):
        read_examples(tmp_path / "eval/test-00000-of-00001.parquet")


def test_sentence_transformers_columns_by_hand(tmp_path: Path) -> None:
    examples = read(tmp_path, "sentence_transformers").examples
    assert told(examples[0]) == ((TEXTS[0],), ("[0]",), [("[1]",)], [])
    assert told(examples[1]) == ((TEXTS[1],), ("[1]",), [("[2]",), (TEXTS[3],)], [])
    assert {e.embedding_prompt for e in examples} == {"compress"}


def test_flag_embedding_columns_by_hand(tmp_path: Path) -> None:
    examples = read(tmp_path, "flag_embedding").examples
    query = ("[2]", REQUEST)
    answer = (("user", *query), ("assistant", TEXTS[2]))
    assert told(examples[4]) == (query, (TEXTS[2],), [("[3]",)], [answer])
    assert told(examples[5]) == (query, ("[2]",), [("[3]",)], [])
    assert [e.target_id for e in examples[4:6]] == ["data-3", "data-3"]


def test_a_text_with_the_name_of_a_image_in_it_is_text(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data")
    (folder / "a red cat.png").write_bytes(layouts.image_bytes(0))
    records = [
        {"anchor": "look at cat.png now", "positive": "a red cat.png"},
        {"anchor": "cat.png", "positive": "x"},
    ]
    result = read_examples(write_json(folder / "data.jsonl", records))
    assert told(result.examples[0])[:2] == (("look at cat.png now",), ("[0]",))
    assert "image 'cat.png': no such file" in result.skipped[0].reason


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("holiday photo 2.jpg", "no such file"),
        ("b.avif", "no such file"),
        ("https://example.com/a.jpg?size=large", "on the network"),
        ("data:image/png;base64,iVBORw0KGgo=", None),
        ("there is.jfif", None),
    ],
)
def test_a_pair_takes_no_image_for_a_text(tmp_path: Path, value: str, found: str | None) -> None:
    (tmp_path / "there is.jfif").write_bytes(layouts.image_bytes(0))
    records = [{"anchor": "a red thing", "positive": value}, {"anchor": "b", "positive": "c"}]
    result = read_examples(write_json(tmp_path / "data.jsonl", records))
    if found:
        assert [found in skipped.reason for skipped in result.skipped] == [True]
    else:
        target = result.examples[0].target
        assert target is not None
        assert isinstance(target[0].content[0], Image)


def test_an_address_in_words_is_text(tmp_path: Path) -> None:
    text = "https://cambridge.org](https://cambridge.org)"
    path = write_json(tmp_path / "data.jsonl", [{"anchor": "a", "positive": text}])
    assert told(read_examples(path).examples[0])[1] == (text,)


@pytest.mark.parametrize(
    "columns", [{"image": "text", "caption": "photo"}, {"positive_image": "text", "query": "photo"}]
)
def test_a_column_of_images_that_holds_texts_is_said_at_once(
    tmp_path: Path, columns: dict[str, str]
) -> None:
    records = [{"text": text, "photo": f"{n}.png"} for n, text in enumerate(TEXTS)]
    path = write_json(tmp_path / "data.jsonl", records)
    with pytest.raises(DataError, match=r"column 'text' is one of images, and 4 of its first 4"):
        read_examples(path, ReadOptions(columns=columns))


# ---------------------------------------------------------------------- no image

NONE = ["", "  ", None, [], [""], [None, ""], {"bytes": None, "path": None}]


@pytest.mark.parametrize("empty", NONE, ids=repr)
@pytest.mark.parametrize("field", ["image", "images", "video", "videos"])
def test_an_empty_image_means_none_in_every_format(
    tmp_path: Path, field: str, empty: object
) -> None:
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "hi"}]
    for name in ("conversations", "messages"):
        path = write_json(tmp_path / f"{name}.json", [{field: empty, name: turns}])
        result = read_examples(path, ReadOptions(mode="chat"))
        assert [told(e)[3] for e in result.examples] == [[(("user", "Hello"), ("assistant", "hi"))]]
    pair = {"anchor": "a", "positive": "b", "anchor_image": empty, "positive_image": empty}
    found = read_examples(write_json(tmp_path / "pairs.json", [pair]))
    assert told(found.examples[0])[:2] == (("a",), ("b",))


def test_another_column_holds_the_image_where_one_is_empty(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data")
    record = {"image": "", "file_name": "images/2.png", "caption": "", "text": "a"}
    result = read_examples(write_json(folder / "data.json", [record]))
    assert told(result.examples[0])[:2] == (("[2]",), ("a",))


# ---------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    "layout", ["image_folder", "image_folder_csv", "webdataset", "saved_to_disk"]
)
def test_captions_by_hand(tmp_path: Path, layout: str) -> None:
    examples = read(tmp_path, layout).examples
    assert [told(e) for e in examples] == [
        caption_told(n, "Describe this image.") for n in range(4)
    ]
    chat = read(tmp_path / "chat", layout, mode="chat").examples
    assert told(chat[3]) == (None, None, [], caption_told(3, "Describe this image.")[3])


def test_several_captions_of_a_image_have_one_target_id(tmp_path: Path) -> None:
    record = {"id": 7, "image": "images/0.png", "caption": list(TEXTS[:2])}
    path = write_json(write_images(tmp_path / "data") / "data.jsonl", [record])
    examples = read_examples(path, ReadOptions(language_loss=False)).examples
    assert [told(e) for e in examples] == [(("[0]",), (text,), [], []) for text in TEXTS[:2]]
    assert [(e.id, e.target_id) for e in examples] == [("7-1", "7"), ("7-2", "7")]


def test_a_column_map_gives_any_table_a_format(tmp_path: Path) -> None:
    path = layouts.column_map(tmp_path / "data")
    captions = read_examples(path, ReadOptions(columns={"image": "photo", "text": "title"}))
    assert captions.format == "captions"
    assert told(captions.examples[2]) == caption_told(2, "Describe this image.")
    pairs = read_examples(path, ReadOptions(columns={"query": "title", "target_image": "photo"}))
    assert pairs.format == "pairs"
    assert told(pairs.examples[2]) == ((TEXTS[2],), ("[2]",), [], [])


def test_stored_images_have_names_of_their_own(tmp_path: Path) -> None:
    """Or branches of different images would merge."""
    for layout in ("trl", "sentence_transformers", "webdataset", "saved_to_disk"):
        examples = read(tmp_path, layout).examples
        sides = [side for e in examples for side in (e.query, e.target) if side is not None]
        images = [p for side in sides for p in side[0].content if isinstance(p, Image)]
        assert all(isinstance(p.source, StoredFile) for p in images)
        assert len({p.key for p in images}) == 4


# ---------------------------------------------------------------------- what is rejected


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "swift without positives": (
        {"messages": [{"role": "user", "content": "a"}], "positive_messages": []},
        "'positive_messages' is empty",
    ),
    "swift, images do not match": (
        {
            "messages": [{"role": "user", "content": "a"}],
            "positive_messages": [[{"role": "user", "content": "<image>"}]],
            "positive_images": [["images/0.png", "images/1.png"]],
        },
        "number of <image> markers is 1, number of images is 2",
    ),
    "swift, lists do not match": (
        {
            "messages": [{"role": "user", "content": "a"}],
            "positive_messages": [[{"role": "user", "content": "b"}]],
            "positive_images": [[], []],
        },
        "'positive_messages' has 1 entries and 'positive_images' has 2",
    ),
    "messages, a part of an unknown type": (
        {"messages": [{"role": "user", "content": [{"type": "odour"}]}]},
        "turn 1: a part is type 'odour'",
    ),
    "messages, an image on the network": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}],
                }
            ]
        },
        "on the network; download it",
    ),
    "messages, more images than places": (
        {
            "images": ["images/0.png"] * 2,
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
                {"role": "assistant", "content": "b"},
            ],
        },
        "number of <image> markers is 1, number of images is 2",
    ),
    "mmeb, no target": ({"qry": "a", "pos_text": "", "pos_image_path": ""}, "'pos_text' is empty"),
    "mmeb, a marker without an image": (
        {"qry": "<|image_1|>\na", "qry_image_path": "", "pos_text": "b"},
        "number of <|image_1|> markers is 1, number of images is 0",
    ),
    "pairs, no positive": ({"anchor": "a", "positive": []}, "the positive is empty"),
    "pairs, a number": ({"anchor": "a", "positive": 3}, "'positive' holds a number"),
    "captions, a missing image": (
        {"image": "images/9.png", "caption": "a"},
        "image 'images/9.png': no such file",
    ),
    "captions, no caption": ({"image": "images/0.png", "caption": " "}, "its caption is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_rejected_with_its_location_and_fix(tmp_path: Path, case: str) -> None:
    bad, reason = BAD[case]
    path = write_json(write_images(tmp_path / "data") / "data.jsonl", [bad])
    (rejected,) = read_examples(path).skipped
    assert rejected.source == str(path)
    assert rejected.record == "line 1"
    assert reason in rejected.reason


def test_a_mode_that_a_format_has_not_is_an_error(tmp_path: Path) -> None:
    path = layouts.mmeb(tmp_path / "data")
    with pytest.raises(DataError, match="format mmeb has no mode 'caption'; it has pair"):
        read_examples(path, ReadOptions(mode="caption"))
    with pytest.raises(DataError, match="format 'lava': use one of auto, llava"):
        read_examples(path, ReadOptions(format="lava"))


@pytest.mark.parametrize(
    "record",
    [
        {"image": "images/0.png", "caption": "a \ud83d mug"},
        {"anchor": "a mug", "positive": "half \ud83d"},
        {"qry": "a \ud83d", "pos_text": "a mug"},
    ],
    ids=["captions", "pairs", "mmeb"],
)
def test_half_a_surrogate_pair_leaves_the_record_out(tmp_path: Path, record: Any) -> None:
    write_images(tmp_path)
    whole = {name: value.replace("\ud83d", "whole") for name, value in record.items()}
    (tmp_path / "data.json").write_text(json.dumps([record, whole]))
    records = read_examples(tmp_path / "data.json", ReadOptions())
    assert len(records.examples) == 1
    (skipped,) = records.skipped
    assert "not Unicode ('\\ud83d' at character" in skipped.reason


# ---------------------------------------------------------------------- hard negatives


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["a cat", "a dog", "a cat"], ["a cat", "a dog"]),
        ("a cat", ["a cat"]),
        ('["a cat", "a dog"]', ["a cat", "a dog"]),
        ("[sic] a cat", ["[sic] a cat"]),
        (["  ", None, "x"], ["x"]),
        (None, []),
        ([], []),
    ],
)
@pytest.mark.parametrize("layout", ["captions", "llava", "llava pair"])
def test_hard_negative_captions(value: Any, expected: list[str], layout: str, tmp_path: Path):
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    record: dict[str, Any] = {"image": "a.png", "negatives": value}
    if layout == "captions":
        record["caption"] = "a mug"
    else:
        record["conversations"] = [
            {"from": "human", "value": "<image>What?"},
            {"from": "gpt", "value": "a mug"},
        ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record]))
    mode: Any = "pair" if layout == "llava pair" else "caption"
    (example,) = read_examples(path, ReadOptions(mode=mode)).examples
    assert [n[0].text for n in example.negatives] == expected


@pytest.mark.parametrize("value", [3, [["a"]], [{"text": "a"}], [1]])
def test_hard_negatives_that_are_no_texts(value: Any, tmp_path: Path):
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"image": "a.png", "caption": "a mug", "negatives": value}]))
    (skipped,) = read_examples(path, ReadOptions()).skipped
    assert "'negatives' holds" in skipped.reason
