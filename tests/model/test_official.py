"""The published code's text and labels, written out by hand from its description."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import pytest

from cafe.errors import DataError
from cafe.model.rows.official import official_example, official_labels, with_system_turn
from cafe.types import Example, Image, Message, user

START, END = "<|im_start|>", "<|im_end|>"
SYSTEM = f"{START}system\nYou are a helpful assistant.{END}\n"


def sample_image() -> Image:
    return Image(PIL.Image.new("RGB", (96, 96)))


def dialogue(*turns: str, image: Image | None = None) -> tuple[Message, ...]:
    messages = []
    for number, text in enumerate(turns):
        shown = (image,) if image is not None and number == 0 else ()
        role = "assistant" if number % 2 else "user"
        messages.append(Message(role, (*shown, text)))  # type: ignore[arg-type]
    return tuple(messages)


def labels_of(chunk: Any, model: Any) -> str:
    return model.processor.tokenizer.decode(chunk.rows.label_ids)


@pytest.mark.parametrize("sharing", ["trie", "none"])
def test_labels_are_the_answers_with_headers_and_three_tokens_everywhere(
    small_model: Any, sharing: str
) -> None:
    example = Example(
        "x", dialogues=(dialogue("Is it\nred?", "yes", "Is it big?", "no", image=sample_image()),)
    )
    collator = replace(small_model.collator, official=True, sharing=sharing)
    chunk = collator([example])
    by_hand = (
        f"\n{END}\n"  # of the system turn; its first token is predicted by nothing
        f"{START}\n\n\n{END}\n"  # the header's, the image's, the question's newline
        f"{START}assistant\nyes{END}\n"
        f"{START}\n{END}\n"
        f"{START}assistant\nno{END}\n"
    )
    assert labels_of(chunk, small_model) == by_hand
    assert labels_of(small_model.collator([example]), small_model) == f"yes{END}no{END}"


def test_the_newline_after_a_image_is_predicted_from_its_last_token(small_model: Any) -> None:
    example = Example("x", dialogues=(dialogue("What?", "yes", image=sample_image()),))
    rows = replace(small_model.collator, official=True)([example]).rows
    sources = rows.input_ids.flatten()[rows.label_source]
    image = small_model.processor.image_token_id
    assert (sources == image).sum() == 1
    decoded = small_model.processor.tokenizer.decode(rows.label_ids[sources == image])
    assert decoded == "\n"


def test_labels_follow_their_sources_in_the_row(small_model: Any) -> None:
    """Each label is the token after its source, as in the published shift by one."""
    example = Example("x", dialogues=(dialogue("a cat", "yes"),))
    rows = replace(small_model.collator, official=True, sharing="none")([example]).rows
    flat = rows.input_ids.flatten()
    assert flat[rows.label_source + 1].tolist() == rows.label_ids.tolist()


def test_prompts_are_the_published_strings(small_model: Any) -> None:
    collator = replace(small_model.collator, official=True)
    tail = f"{END}\n{START}assistant\n{END}"
    text = collator.render.embedding(user("A red mug."), "official").text
    assert text == (f"{SYSTEM}{START}user\nA red mug.Compress this sentence in one word:{tail}")
    shown = collator.render.embedding(user(sample_image()), "official").text
    assert shown == f"{SYSTEM}{START}user\n<image>\nCompress this image in one word:{tail}"
    # MMEB mode: the instruction is the only prompt.
    pair = collator.render.embedding(user(sample_image(), "Find it."), "none").text
    assert pair == f"{SYSTEM}{START}user\n<image>\nFind it.{tail}"
    # At inference the prompt's name is enough.
    assert small_model.collator.render.embedding(user("A red mug."), "official").text == text


def test_a_records_own_system_turn_is_dropped() -> None:
    own = (Message("system", ("Be brief.",)), *user("hi"))
    assert [m.text for m in with_system_turn(own)] == ["You are a helpful assistant.", "hi"]


def test_several_answers_are_joined_without_a_space() -> None:
    talk = dialogue("What?", "A mug.", "Where?", "On a table.", image=sample_image())
    example = Example(
        "x", query=user(sample_image()), target=user("A mug. On a table."), dialogues=(talk,)
    )
    official = official_example(example)
    assert official.target == user("A mug.On a table.")
    assert official.embedding_prompt == "official"
    branches = replace(example, dialogues=(talk[:2], talk[2:]))
    assert official_example(branches).target == official.target


def test_pairs_with_their_own_instructions_stay_as_they_are() -> None:
    pair = Example("x", query=user("q"), target=user("t"), embedding_prompt="none")
    assert official_example(pair) is pair
    alone = Example("y", dialogues=(dialogue("q", "a"),))
    assert official_example(alone) is alone


def test_a_tokenizer_without_chatml_is_refused() -> None:
    class Plain:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [5]}

    with pytest.raises(DataError, match=r"ChatML \(Qwen\)"):
        official_labels("a", np.array([0]), np.array([[0, 1]]), Plain())
