"""`compat: official` writes the published ChatML, whatever chat template the directory has."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import PIL.Image
import pytest

from cafe.errors import DataError
from cafe.model.rows.collate import Collator
from cafe.model.rows.official import published_template
from cafe.types import Conversation, Example, Image, Message, user
from helpers.real import material

START, END = "<|im_start|>", "<|im_end|>"
SYSTEM = f"{START}system\nYou are a helpful assistant.{END}\n"
IMAGE = Image(PIL.Image.new("RGB", (96, 96)))

# Everything that may differ: a space after the role, no newline after a turn, no system turn.
OTHER = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + ' ' -}}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{- '\\n' + part['text'] -}}"
    "{%- else -%}{{- '<image>' -}}{%- endif -%}{%- endfor -%}"
    "{{- '<|im_end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def with_template(model: Any, template: str) -> Collator:
    processor = copy.copy(model.processor)
    processor.chat_template = template
    return replace(model.collator, processor=processor, official=True, sharing="none")


def published_llava() -> str:
    file = material("hub/llava-onevision-qwen2-0.5b-ov/chat_template.json")
    return json.loads(file.read_text())["chat_template"]


def answered(*content: Any, answer: str = "A mug.") -> Conversation:
    return (*user(*content), Message("assistant", (answer,)))


@pytest.mark.parametrize("source", ["another", "published"])
def test_labels_are_those_of_the_published_template(small_model: Any, source: str) -> None:
    template = OTHER if source == "another" else published_llava()
    collator = with_template(small_model, template)
    dialogue = (*answered(IMAGE, "What is it?"), *answered("Colour?", answer="Red."))
    rows = collator([Example("x", dialogues=(dialogue,))]).rows
    decode = small_model.processor.tokenizer.decode
    assert decode(rows.label_ids) == (
        f"\n{END}\n{START}\n\n{END}\n{START}assistant\nA mug.{END}\n"
        f"{START}\n{END}\n{START}assistant\nRed.{END}\n"
    )
    tokens = rows.input_ids[0].tolist()
    image = small_model.processor.image_token_id
    assert decode([t for t in tokens if t != image]) == (
        f"{SYSTEM}{START}user\n\nWhat is it?{END}\n{START}assistant\nA mug.{END}\n"
        f"{START}user\nColour?{END}\n{START}assistant\nRed.{END}\n"
    )


@pytest.mark.parametrize("template", [OTHER, "published"])
def test_embeddings_are_asked_for_in_the_published_chatml(small_model: Any, template: str) -> None:
    template = published_llava() if template == "published" else template
    render = with_template(small_model, template).render
    tail = f"{END}\n{START}assistant\n{END}"
    text = f"{SYSTEM}{START}user\nA mug.Compress this sentence in one word:{tail}"
    assert render.embedding(user("A mug."), "official").text == text
    assert replace(render, official=False).embedding(user("A mug."), "official").text == text
    pair = render.embedding(user(IMAGE, "Find it."), "none").text
    assert pair == f"{SYSTEM}{START}user\n<image>\nFind it.{tail}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (("What is it?", IMAGE), "<image>\nWhat is it?"),
        (("  What is it? ", IMAGE), "<image>\nWhat is it?"),
        ((IMAGE, "  What is it? "), "<image>\n  What is it? "),
        ((IMAGE,), "<image>\n"),
        ((IMAGE, IMAGE, "Compare."), "<image>\n<image>\nCompare."),
        (("Compare ", IMAGE, IMAGE), "Compare <image>\n<image>\n"),
    ],
)
def test_a_lone_image_moves_to_the_front(
    small_model: Any, content: tuple[Any, ...], expected: str
) -> None:
    render = replace(small_model.collator, official=True).render
    (sequence,) = render.answers(answered(*content))
    assert sequence.text == (
        f"{SYSTEM}{START}user\n{expected}{END}\n{START}assistant\nA mug.{END}\n"
    )


def test_tokens_around_a_image_are_the_families_own(small_model: Any) -> None:
    template = OTHER.replace("'<image>'", "'<|vision_start|><image><|vision_end|>'")
    processor = copy.deepcopy(small_model.processor)
    processor.tokenizer.add_special_tokens(
        {"extra_special_tokens": ["<|vision_start|>", "<|vision_end|>"]}
    )
    processor.chat_template = template
    written = published_template(processor, "<image>", None)
    assert "'<|vision_start|><image><|vision_end|>'" in written


def test_a_model_that_is_not_chatml_is_refused(small_model: Any) -> None:
    processor = copy.copy(small_model.processor)
    processor.tokenizer = copy.copy(processor.tokenizer)
    processor.tokenizer.get_vocab = lambda: {"a": 0}
    collator = replace(small_model.collator, processor=processor, official=True)
    with pytest.raises(DataError, match=r"example 'x': .*ChatML \(Qwen\)"):
        collator([Example("x", dialogues=(answered("What is it?"),))])
