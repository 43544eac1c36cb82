"""Protocols: what published embedders are asked with, where it is kept, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from cafe.errors import CheckpointError
from cafe.model.rows.protocol import PROTOCOL_FILE, PROTOCOLS, Protocol, read_protocol
from cafe.model.vlm import CAFe
from cafe.types import Image, Message, user

IMAGE = Image(PIL.Image.new("RGB", (30, 30), "red"))
TURN, END = "<|im_start|>", "<|im_end|>"
ASKED = (Message("system", ("Find it.",)), *user(IMAGE, "a cat"))


def written(model: Any, protocol: Protocol, conversation: Any) -> str:
    collator = replace(model.collator, protocol=protocol)
    return collator.render.embedding(conversation, "compress").text


@pytest.mark.parametrize(
    ("name", "target", "query"),
    [
        (
            "qwen3-vl-embedding",
            f"{TURN}system\nRepresent the user's input.{END}\n{TURN}user\na cat{END}\n"
            f"{TURN}assistant\n<|endoftext|>",
            f"{TURN}system\nFind it.{END}\n{TURN}user\n<image>\na cat{END}\n"
            f"{TURN}assistant\n<|endoftext|>",
        ),
        ("vlm2vec", "a cat", "<image> Find it. a cat"),
        (
            "wemm",
            f"{TURN}user\na cat{END}\n<embedding>",
            f"{TURN}user\n<image>\nFind it. a cat{END}\n<embedding>",
        ),
    ],
)
def test_the_instruction_stands_where_the_protocol_says(
    small_model: Any, name: str, target: str, query: str
) -> None:
    assert written(small_model, PROTOCOLS[name], user("a cat")) == target
    assert written(small_model, PROTOCOLS[name], ASKED) == query


def test_an_instruction_gets_a_full_stop_and_an_empty_text_a_word(small_model: Any) -> None:
    qwen, wemm = PROTOCOLS["qwen3-vl-embedding"], PROTOCOLS["wemm"]
    asked = (Message("system", ("Find it",)), *user(""))
    text = written(small_model, qwen, asked)
    assert "system\nFind it.<" in text
    assert "user\nNULL<" in text
    assert "Find it<" in written(small_model, wemm, asked)


def with_ending(model: Any, **facts: Any) -> Protocol:
    facts = {"ends_with": model.processor.tokenizer.eos_token} | facts
    return replace(PROTOCOLS["gme"], name="own", **facts)


def test_it_is_saved_and_every_loader_follows_it(small_dir: Path, tmp_path: Path) -> None:
    plain = CAFe.from_pretrained(small_dir)
    assert plain.collator.protocol == PROTOCOLS["cafe"]
    own = with_ending(plain, max_frames=4)
    model = CAFe.from_pretrained(small_dir, protocol=own)
    model.save_pretrained(tmp_path / "own")
    again = CAFe.from_pretrained(tmp_path / "own")
    assert (again.collator.protocol, again.collator.max_frames) == (own, 4)
    inputs: Any = ["a cat", {"image": PIL.Image.new("RGB", (30, 30), "red"), "text": "a dog"}]
    vectors = again.encode(inputs)
    assert np.abs(vectors - model.encode(inputs)).max() < 1e-6
    assert np.abs(vectors - plain.encode(inputs)).max() > 1e-3, "the protocol matters"
    rows, _ = again.collator.embedding_rows([user("a cat")])
    token = rows.input_ids.flatten()[rows.pooled]
    assert again.processor.tokenizer.decode(token) == own.ends_with


@pytest.mark.slow
def test_sentence_transformers_follows_it(small_dir: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    own = with_ending(CAFe.from_pretrained(small_dir), ends_with=END)
    model = CAFe.from_pretrained(small_dir, protocol=own)
    model.save_pretrained(tmp_path / "own")
    peer = SentenceTransformer(str(tmp_path / "own"), device="cpu")
    texts = ["a cat", "a big red dog"]
    assert np.abs(peer.encode(texts) - model.encode(texts)).max() < 1e-5


def test_a_token_that_the_tokenizer_lacks_is_named(small_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'wemm'.*ends_with is '<embedding>'.*tokenizer"):
        CAFe.from_pretrained(small_dir, protocol="wemm")
    CAFe.from_pretrained(small_dir).save_pretrained(tmp_path / "own")
    (tmp_path / "own" / PROTOCOL_FILE).write_text('{"name": "wemm"}')
    with pytest.raises(CheckpointError, match=rf"{PROTOCOL_FILE}: ends_with is '<embedding>'"):
        CAFe.from_pretrained(tmp_path / "own")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[", "cannot be read"),
        ('{"name": "gmee"}', "name: 'gmee' is unknown; use one of cafe"),
        ('{"name": "gme", "place": "system"}', "key 'place' is unknown"),
        ('{"name": "gme", "instruction": "user"}', "instruction is 'user'; use system or text"),
        ('{"name": "gme", "max_frames": 0}', "max_frames is 0; use 1 or more"),
        ('{"name": "gme", "chat": "yes"}', "chat is 'yes'; use bool"),
    ],
)
def test_a_file_that_is_no_protocol_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / PROTOCOL_FILE
    file.write_text(content)
    with pytest.raises(CheckpointError, match=PROTOCOL_FILE) as failure:
        read_protocol(file)
    assert reason in str(failure.value)


def test_a_name_may_stand_for_all_facts_and_others_replace_them(tmp_path: Path) -> None:
    file = tmp_path / PROTOCOL_FILE
    file.write_text(json.dumps({"name": "gme", "max_frames": 2}))
    assert read_protocol(file) == replace(PROTOCOLS["gme"], max_frames=2)
