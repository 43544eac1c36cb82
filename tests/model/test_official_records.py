"""LLaVA records under `compat: official`: texts and labels, by hand from the published steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from cafe.data.merge import merge_with_origin
from cafe.data.read import read_examples
from cafe.data.records import Mode, ReadOptions
from cafe.model.rows.official import official_example
from cafe.types import Example

START, END = "<|im_start|>", "<|im_end|>"
SYSTEM = f"{START}system\nYou are a helpful assistant.{END}\n"
ASKED = f"{END}\n{START}assistant\n{END}"


def read(folder: Path, *turns: str, mode: Mode = "caption", images: Any = "a.png") -> Example:
    for name in ("a.png", "b.png"):
        PIL.Image.new("RGB", (96, 96)).save(folder / name)
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    (folder / "d.json").write_text(json.dumps([{"image": images, "conversations": said}]))
    (example,) = read_examples(str(folder / "d.json"), ReadOptions(mode=mode)).examples
    return official_example(example)


@pytest.mark.parametrize(
    ("question", "answer", "asked", "labelled"),
    [
        ("<image>\nWhat?", "A mug.", "<image>\nWhat?", "\n"),
        ("What?\n<image>", "A mug.", "<image>\nWhat?", "\n"),
        ("\n<image>\n What?", "A mug.", "<image>\nWhat?", "\n"),
        ("See <image> and say.", "A mug.", "<image>\nSee  and say.", "\n"),
        ("<image>What?", "A mug.", "<image>What?", ""),
        ("<image>\n  What?  ", "A mug.", "<image>\n  What?  ", "\n"),
        ("<image>\nWhat?", " A mug. ", "<image>\nWhat?", "\n"),
        ("What?", "A mug.", "What?", ""),
        ("<image>", "A mug.", "<image>", ""),
    ],
)
def test_a_record_is_what_the_published_code_makes_of_it(
    small_model: Any, tmp_path: Path, question: str, answer: str, asked: str, labelled: str
) -> None:
    example = read(tmp_path, question, answer)
    collator = replace(small_model.collator, official=True, sharing="none")
    (dialogue,) = example.dialogues
    (sequence,) = collator.render.answers(dialogue)
    said = f"{START}assistant\n{answer}{END}\n"
    assert sequence.text == f"{SYSTEM}{START}user\n{asked}{END}\n{said}"
    labels = small_model.processor.tokenizer.decode(collator([example]).rows.label_ids)
    assert labels == f"\n{END}\n{START}\n{labelled}{END}\n{said}"
    assert example.query is not None
    assert example.target is not None
    image = collator.render.embedding(example.query, example.embedding_prompt).text
    assert image == f"{SYSTEM}{START}user\n<image>\nCompress this image in one word:{ASKED}"
    text = collator.render.embedding(example.target, example.embedding_prompt).text
    assert text == f"{SYSTEM}{START}user\n{answer}Compress this sentence in one word:{ASKED}"


def test_several_images_and_answers_stay_as_written(small_model: Any, tmp_path: Path) -> None:
    turns = ("<image>\n<image> Compare.", " Red. ", "And <image>?", "Blue.")
    example = read(tmp_path, *turns, images=["a.png", "b.png", "a.png"])
    render = replace(small_model.collator, official=True).render
    (sequence,) = render.answers(example.dialogues[0])
    assert sequence.text == (
        f"{SYSTEM}{START}user\n<image>\n<image> Compare.{END}\n{START}assistant\n Red. {END}\n"
        f"{START}user\n<image>\nAnd ?{END}\n{START}assistant\nBlue.{END}\n"
    )
    assert example.target is not None
    assert example.target[0].text == " Red. Blue."


def test_sides_of_a_pair_are_as_written(small_model: Any, tmp_path: Path) -> None:
    example = read(tmp_path, "Find it. <image>", " A mug. ", mode="pair")
    render = replace(small_model.collator, official=True).render
    assert example.query is not None
    assert example.target is not None
    query = render.embedding(example.query, example.embedding_prompt).text
    assert query == f"{SYSTEM}{START}user\n<image>\nFind it.{ASKED}"
    target = render.embedding(example.target, example.embedding_prompt).text
    assert target == f"{SYSTEM}{START}user\n A mug. {ASKED}"
    alone = read(tmp_path, "<image>Find it.", "A mug.", mode="pair").query
    assert alone is not None
    assert render.embedding(alone, "none").text == f"{SYSTEM}{START}user\n<image>Find it.{ASKED}"


def test_without_compat_spaces_and_places_are_as_before(small_model: Any, tmp_path: Path) -> None:
    example = read(tmp_path, "See <image> and say.", " A mug. ")
    (sequence,) = small_model.collator.render.answers(example.dialogues[0])
    assert sequence.text == (
        f"{START}user\nSee <image>\n and say.{END}\n{START}assistant\nA mug.{END}"
    )


def test_merged_records_stay_as_written(small_model: Any, tmp_path: Path) -> None:
    examples = [read(tmp_path, "<image>What?", " A mug. ")] * 2
    ((_, merged),) = merge_with_origin(examples)
    collator = replace(small_model.collator, official=True)
    (sequence,) = collator.render.answers(merged.dialogues[0])
    assert f"<image>What?{END}\n{START}assistant\n A mug. {END}\n" in sequence.text
    assert collator([merged]).label_count
