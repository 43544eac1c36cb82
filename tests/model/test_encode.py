"""Encode, generate and score: what a user calls."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from cafe.errors import DataError, ImageError
from cafe.model import inference
from cafe.model.rows.cutting import tokens_to_cut
from cafe.model.rows.inputs import as_conversation, as_messages, is_many
from cafe.model.vlm import CAFe
from cafe.types import MATCH_QUESTION, PAIR_QUESTION, Example, Image, Message, user
from helpers.images import noise

SQUARE, WIDE = noise(1), noise(2, 120, 50)
TALK = [
    {"role": "user", "content": [{"type": "image", "image": SQUARE}, "What is it?"]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Where?"},
]


@pytest.fixture(scope="module")
def model(babbling_model: CAFe) -> CAFe:
    return babbling_model


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    SQUARE.save(tmp_path / "square.png")
    return tmp_path / "square.png"


# ------------------------------------------------------------------ what an input is


def test_every_kind_of_input_is_a_conversation(image_path: Path):
    assert as_conversation("a cat") == user("a cat")
    assert as_conversation(str(image_path)) == user(str(image_path)), "a string is text"
    for image in (image_path, SQUARE, Image(SQUARE)):
        ((message),) = as_conversation(image)
        assert isinstance(message.content[0], Image)
    (message,) = as_conversation({"text": "what", "image": [SQUARE, image_path]})
    assert [type(p) for p in message.content] == [Image, Image, str]
    assert as_conversation({"text": "what"}) == user("what")
    assert as_conversation({"text": ""}) == user("")
    (message,) = as_conversation({"text": None, "image": SQUARE})
    assert len(message.content) == 1
    assert as_conversation({"role": "user", "content": "hi"}) == user("hi")
    assert as_conversation(user("hi")) == user("hi")
    assert as_conversation(Message("user", ("hi",))) == user("hi")
    first, second, third = as_conversation(TALK)
    assert [first.role, second.role, third.role] == ["user", "assistant", "user"]
    assert first.content[1] == "What is it?"


@pytest.mark.parametrize(
    ("value", "several"),
    [
        ("a", False),
        (SQUARE, False),
        ({"text": "a"}, False),
        (TALK, False),
        (tuple(TALK), False),
        (user("a"), False),
        (Message("user", ("a",)), False),
        ([], True),
        ((), True),
        (["a"], True),
        (("a", SQUARE), True),
        ([TALK], True),
        ([user("a"), user("b")], True),
        ([TALK, "a"], True),
        (np.array(["a", "b"]), True),
        ([{"text": "a"}], True),
    ],
)
def test_a_list_of_messages_is_one_input_and_any_other_is_several(value: Any, several: bool):
    assert is_many(value) is several
    assert len(as_messages(value)) == (len(value) if several else 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "input of type int"),
        (None, "input of type NoneType"),
        (b"abc", "input of type bytes"),
        (["a", "b"], "input of type list"),
        (np.zeros((4, 4, 3)), "input of type ndarray"),
        ({}, "input of type dict"),
        ({"txt": "a"}, "input of type dict"),
        ({"text": "a", "img": 1}, "input key 'img' is unknown"),
        ({"text": 5}, "'text' of type int"),
        ({"text": None}, "neither text nor image"),
        ({"image": []}, "neither text nor image"),
        ({"image": 5}, "an image of type int"),
        ({"role": "robot", "content": "a"}, "message role 'robot'"),
        ({"role": "user", "content": None}, "message content of type NoneType"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "message part"),
    ],
)
def test_what_cannot_be_read_is_one_error(value: Any, message: str):
    with pytest.raises(DataError, match=message):
        as_conversation(value)


# ------------------------------------------------------------------ encode


@pytest.fixture
def inputs(image_path: Path) -> list[Any]:
    return [
        "a red cat",
        SQUARE,
        {"text": "what is this", "image": WIDE},
        image_path,
        TALK,
        "yes " * 60,
        {"text": "which", "image": [SQUARE, WIDE]},
        user("a red cat"),
        "",
    ]


def test_mixed_inputs_come_back_in_order_as_if_encoded_alone(model: CAFe, inputs: list[Any]):
    alone = np.stack([model.encode(value) for value in inputs])
    for batch_size in (1, 2, 4, 32):
        together = model.encode(inputs, batch_size=batch_size)
        assert together.shape == (len(inputs), model.embedding_dimension)
        assert together.dtype == np.float32
        assert np.abs(together - alone).max() <= 1e-5
    backwards = model.encode(inputs[::-1], batch_size=3)
    assert np.abs(backwards[::-1] - alone).max() <= 1e-5
    # Equal inputs, equal embeddings, and only those (an image and its file; a text twice).
    same = np.abs(alone[:, None] - alone[None]).max(-1) <= 1e-5
    assert {(int(i), int(j)) for i, j in np.argwhere(same) if i < j} == {(1, 3), (0, 7)}


def test_lists_tuples_and_arrays_are_read_alike(model: CAFe):
    expected = model.encode(["a cat", "a dog"])
    assert np.array_equal(model.encode(("a cat", "a dog")), expected)
    assert np.array_equal(model.encode(np.array(["a cat", "a dog"])), expected)


def test_one_input_gives_a_vector_and_a_list_a_matrix(model: CAFe):
    d = model.embedding_dimension
    for single in ("a cat", SQUARE, {"text": "a"}, TALK):
        assert model.encode(single).shape == (d,)
        assert model.encode([single]).shape == (1, d)
    assert model.encode([]).shape == (0, d)
    assert model.encode([], truncate_dim=5).shape == (0, 5)


def test_embeddings_have_unit_length_also_when_truncated(model: CAFe):
    texts = ["a cat", "a dog", "the car"]
    raw = model.encode(texts, normalize=False)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.1, "there is something to normalise"
    for width in (None, 1, 7, model.embedding_dimension):
        cut = raw[:, :width]
        expected = cut / np.linalg.norm(cut, axis=1, keepdims=True)
        assert np.abs(model.encode(texts, truncate_dim=width) - expected).max() <= 1e-6
    assert np.array_equal(model.encode(texts, truncate_dim=7, normalize=False), raw[:, :7])


@pytest.mark.parametrize("width", [0, -1, 65])
def test_a_width_that_the_embedding_has_not_is_refused(model: CAFe, width: int):
    with pytest.raises(ValueError, match="use 1 to 64"):
        model.encode("a cat", truncate_dim=width)


def test_batches_hold_inputs_of_like_length_the_longest_first():
    texts = ["a" * n for n in (5, 50, 7, 48, 49, 6)]
    conversations = [as_conversation(t) for t in texts]
    assert inference.length_buckets(conversations, 3) == [[1, 4, 3], [2, 5, 0]]
    has_image = [*conversations, as_conversation(SQUARE)]
    assert inference.length_buckets(has_image, 4)[0][0] == 6


def test_an_unusable_input_is_named_by_its_place_in_the_list(model: CAFe, tmp_path: Path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    values: list[Any] = ["short", SQUARE, "longer text", tmp_path / "broken.jpg"]
    with pytest.raises(ImageError, match=r"input 3: image .*broken\.jpg"):
        model.encode(values, batch_size=1)
    many = [SQUARE, {"image": [noise(i) for i in range(30)]}, "text"]
    with pytest.raises(DataError, match=r"input 1: 11\d\d tokens, and max_tokens is 1024"):
        model.encode(many)


def test_encoding_may_show_its_progress(model: CAFe, capsys: pytest.CaptureFixture[str]):
    texts = ["a cat", "a dog", "the car"]
    quiet = model.encode(texts, batch_size=1)
    assert capsys.readouterr() == ("", "")
    assert np.array_equal(model.encode(texts, batch_size=1, show_progress_bar=True), quiet)
    out, err = capsys.readouterr()
    assert out == ""
    assert "encode" in err


def test_similarity_is_the_cosine_of_every_pair():
    a, b = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[0.0, 2.0], [-5.0, 0.0], [0.0, 0.0]])
    expected = [[0.8, -0.6, 0.0], [0.0, -1.0, 0.0]]
    assert np.allclose(CAFe.similarity(a, b), expected, atol=1e-12)


# ------------------------------------------------------------------ generate


PROMPTS: list[Any] = [
    "hi",
    {"text": "What is it?", "image": SQUARE},
    TALK,
    "a long question about " * 5,
    {"text": "Which?", "image": [SQUARE, WIDE]},
    WIDE,
]


def test_answers_of_a_batch_are_those_of_single_questions(model: CAFe):
    alone = [model.generate(prompt, max_new_tokens=12) for prompt in PROMPTS]
    assert len(set(map(str, alone))) >= 4, "the answers differ, so order matters"
    for batch_size in (2, 32):
        assert model.generate(PROMPTS, max_new_tokens=12, batch_size=batch_size) == alone
    assert model.generate([], max_new_tokens=2) == []


def test_one_conversation_gives_a_string_and_several_a_list(model: CAFe):
    assert isinstance(model.generate(TALK, max_new_tokens=2), str)
    assert isinstance(model.generate([TALK], max_new_tokens=2), list)
    assert len(model.generate([TALK, TALK], max_new_tokens=2)) == 2


@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_streamed_pieces_are_the_answer(model: CAFe, prompt: Any):
    pieces = list(model.generate(prompt, max_new_tokens=40, stream=True))
    assert "".join(pieces) == model.generate(prompt, max_new_tokens=40)
    assert len(pieces) > 1


@pytest.mark.parametrize(
    ("pieces", "kept"),
    [
        ([" \n", " a", " b ", " ", "c", " \n"], ["a", " b", "  c"]),
        (["", "a"], ["a"]),
        ([" ", "\n"], []),
        ([], []),
    ],
)
def test_a_stream_drops_the_white_space_around_an_answer(pieces: list[str], kept: list[str]):
    assert list(inference.stripped_pieces(pieces)) == kept
    assert "".join(kept) == "".join(pieces).strip()


def test_an_error_while_streaming_reaches_the_caller(model: CAFe):
    with pytest.raises(ValueError, match="no_such_setting"):
        list(model.generate("hi", stream=True, no_such_setting=1))
    with pytest.raises(ValueError, match="one conversation at a time"):
        model.generate(["a", "b"], stream=True)


def test_a_stream_that_is_abandoned_stops(model: CAFe):
    steps = []
    handle = model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    threads = threading.active_count()
    pieces = model.generate("hi", max_new_tokens=900, stream=True, min_new_tokens=900)
    try:
        next(iter(pieces))
        pieces.close()  # type: ignore[union-attr]
    finally:
        handle.remove()
    assert threading.active_count() == threads
    assert len(steps) < 500


def test_generation_stops_at_the_end_of_the_turn(model: CAFe):
    """A head that always says one word and then, given that word, the turn's end."""
    end = model.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    head = model.model.lm_head
    before = head.weight.data.clone()
    try:
        head.weight.data[end] = 0
        head.bias = torch.nn.Parameter(torch.zeros(len(before)))
        head.bias.data[end] = 1e6
        assert model.generate("hi", max_new_tokens=5) == ""
    finally:
        head.weight.data, head.bias = before, None


def test_sampling_settings_reach_transformers(model: CAFe):
    torch.manual_seed(0)
    answers = {
        model.generate("hi", max_new_tokens=6, do_sample=True, temperature=3.0) for _ in range(5)
    }
    assert len(answers) > 1


def settings_of(model: CAFe, monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
    for name, value in settings.items():
        monkeypatch.setattr(model.model.generation_config, name, value)


def test_what_the_caller_asks_for_holds_against_generation_config(
    model: CAFe, monkeypatch: pytest.MonkeyPatch
):
    settings_of(model, monkeypatch, do_sample=True, temperature=0.01, top_p=0.001, top_k=1)
    greedy = model.generate("hi", max_new_tokens=6, do_sample=False)
    torch.manual_seed(0)

    def said(**asked: Any) -> set[str]:
        return {model.generate("hi", max_new_tokens=6, **asked) for _ in range(6)}

    assert len(said(temperature=3.0)) > 1
    assert len(said(top_k=40)) > 1
    assert said() == said(temperature=0) == said(temperature=0.0, top_p=0.9) == {greedy}
    assert said(do_sample=True) == {greedy}, "nothing else was asked: the file's values"


def test_a_beam_search_is_streamed_in_one_piece(model: CAFe, monkeypatch: pytest.MonkeyPatch):
    beams = model.generate("hi", max_new_tokens=6, num_beams=3)
    assert list(model.generate("hi", max_new_tokens=6, num_beams=3, stream=True)) == [beams]
    settings_of(model, monkeypatch, num_beams=3, num_return_sequences=2)
    assert model.generate("hi", max_new_tokens=6) == beams
    assert list(model.generate("hi", max_new_tokens=6, stream=True)) == [beams]


# ------------------------------------------------------------------ score


def score_by_hand(model: CAFe, image: PIL.Image.Image, statement: str) -> float:
    """With the plain processor and model: the softmax over the vocabulary after the question."""
    question = MATCH_QUESTION.format(statement=statement)
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = model.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        probability = model.model(**inputs).logits[0, -1].softmax(-1)
    ids = model.processor.tokenizer.get_vocab()
    # The first tokens of "yes", "Yes", " yes", " Yes" in this vocabulary, and of "no" likewise.
    yes = sum(probability[ids[token]] for token in ("yes", "Y"))
    no = sum(probability[ids[token]] for token in ("no", "N", "Ġno"))
    return float(yes / (yes + no))


STATEMENTS = ["a red cat", "no {braces}", "the top left"]


def test_a_score_is_the_probability_of_yes(model: CAFe):
    images = [SQUARE, WIDE, noise(5, 30, 90)]
    by_image = model.score(STATEMENTS[0], images)
    expected = [score_by_hand(model, p, STATEMENTS[0]) for p in images]
    assert by_image.dtype == np.float32
    assert np.abs(by_image - expected).max() <= 1e-6
    by_text = model.score(WIDE, STATEMENTS, batch_size=2)
    expected = [score_by_hand(model, WIDE, s) for s in STATEMENTS]
    assert np.abs(by_text - expected).max() <= 1e-6
    for scores in (by_image, by_text):
        assert ((scores > 0) & (scores < 1)).all()
        assert np.ptp(scores) > 1e-4
    assert by_image[1] == pytest.approx(by_text[0], abs=1e-6)


def test_one_candidate_may_come_without_a_list(model: CAFe):
    assert model.score(WIDE, "a red cat").shape == (1,)
    assert model.score(WIDE, []).shape == (0,)


@pytest.mark.parametrize(
    ("query", "candidate"),
    [
        (SQUARE, WIDE),
        ("a cat", "a dog"),
        ({"image": [SQUARE, WIDE]}, "a cat"),
        ({"image": SQUARE, "text": "this"}, "a cat"),
        ({"image": SQUARE, "text": "this"}, WIDE),
    ],
)
def test_other_pairs_are_judged_by_a_question_that_shows_both_sides(
    model: CAFe, query: Any, candidate: Any
):
    def content(side: Any) -> list[Any]:
        if not isinstance(side, dict):
            side = {"text": side} if isinstance(side, str) else {"image": side}
        images = side.get("image", [])
        return [
            *(images if isinstance(images, list) else [images]),
            *([side["text"]] if "text" in side else []),
        ]

    before, between, after = PAIR_QUESTION
    parts = [before, *content(query), between, *content(candidate), after]
    question = (Message("user", tuple(p if isinstance(p, str) else Image(p) for p in parts)),)
    rows, vision = model.collator.prompt_rows([question])
    with torch.inference_mode():
        probability = model.lm_head(model.hidden_at(rows, vision))[0].softmax(-1)
    ids = model.processor.tokenizer.get_vocab()
    yes = sum(probability[ids[token]] for token in ("yes", "Y"))
    no = sum(probability[ids[token]] for token in ("no", "N", "Ġno"))
    assert model.score(query, [candidate])[0] == pytest.approx(float(yes / (yes + no)), abs=1e-6)
    assert 0 < model.score(query, [candidate])[0] < 1


def test_an_empty_side_has_no_score(model: CAFe):
    with pytest.raises(DataError, match="the candidate is empty: give it a text or an image"):
        model.score(SQUARE, [""])


# ------------------------------------------------------------------ length


def test_a_text_longer_than_the_context_loses_its_end_only(model: CAFe):
    text = " ".join(f"word{i}" for i in range(2000))
    for content in ((text,), (Image(SQUARE), text)):
        rows, _ = model.collator.embedding_rows([user(*content)])
        assert rows.input_ids.shape == (1, 1024)
        whole = model.processor.tokenizer.decode(rows.input_ids[0])
        shown = whole.count("<image>")
        assert shown == (78 if len(content) == 2 else 0)
        both = "image and sentence" if shown else "sentence"
        begin = "<|im_start|>user\n" + "<image>" * shown + "\n" * bool(shown)
        end = f"\nCompress this {both} in one word:<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
        assert whole.startswith(begin)
        assert whole.endswith(end)
        kept = whole[len(begin) : -len(end)]
        assert text.startswith(kept)
        assert len(kept) > 900
        assert rows.pooled.tolist() == [1023]
    assert model.encode(text).shape == (64,)
    assert isinstance(model.generate(text, max_new_tokens=1), str)


def test_what_a_text_says_within_the_context_decides_and_nothing_behind_it(model: CAFe):
    long = "a cat, " * 2000
    embedding = model.encode(long + "and a dog")
    assert np.array_equal(model.encode(long + "and a car"), embedding)
    assert not np.array_equal(model.encode("and a dog, " + long + "and a dog"), embedding)


def test_an_answer_longer_than_the_context_keeps_its_question_and_its_end(model: CAFe):
    answer = " ".join(f"word{i}" for i in range(2000))
    dialogue = (Message("user", (Image(SQUARE), "What?")), Message("assistant", (answer,)))
    rows = model.collator([Example(id="x", dialogues=(dialogue,))]).rows
    assert rows.input_ids.shape == (1, 1024)
    labelled = model.processor.tokenizer.decode(rows.label_ids)
    assert labelled.endswith("<|im_end|>")
    assert answer.startswith(labelled.removesuffix("<|im_end|>"))
    whole = model.processor.tokenizer.decode(rows.input_ids[0])
    assert whole.startswith("<|im_start|>user\n" + "<image>" * 78 + "\nWhat?<|im_end|>\n")


def test_two_long_texts_are_both_cut(model: CAFe):
    first, second = (" ".join(f"{letter}{i}" for i in range(800)) for letter in "ab")
    dialogue = (Message("user", (Image(SQUARE), first)), Message("assistant", (second,)))
    rows = model.collator([Example(id="x", dialogues=(dialogue,))]).rows
    assert rows.input_ids.shape == (1, 1024)
    whole = model.processor.tokenizer.decode(rows.input_ids[0])
    question, answer = whole.split("<|im_end|>\n<|im_start|>assistant\n")
    assert question.count("<image>") == 78
    assert first.startswith(question.partition(f"{'<image>' * 78}\n")[2])
    assert second.startswith(answer.removesuffix("<|im_end|>"))
    assert 0.8 < len(question.partition("a0")[2]) / len(answer) < 1.25


@pytest.mark.parametrize(
    ("lengths", "excess", "cut"),
    [
        ([100], 99, [99]),
        ([100], 100, None),
        ([100, 40, 10], 50, [50, 0, 0]),
        ([100, 90, 10], 50, [30, 20, 0]),
        ([100, 90, 10], 51, [31, 20, 0]),
        ([100, 100], 136, [68, 68]),
        ([100, 100], 137, None),
        ([20] * 50, 10, None),
    ],
)
def test_the_longest_texts_become_equally_long(lengths: list[int], excess: int, cut: Any):
    assert tokens_to_cut(lengths, excess) == cut


def test_images_that_do_not_fit_are_an_error_with_the_numbers(model: CAFe):
    images = [Image(noise(i)) for i in range(30)]
    example = Example(id="album-3", query=user(*images, "short"), target=user("a cat"))
    # Thirty images of 37 tokens and the prompt around them.
    with pytest.raises(
        DataError, match=r"example 'album-3': 11\d\d tokens, and max_tokens is 1024; images"
    ):
        model.collator([example])


# ------------------------------------------------------------------ the contract


def test_the_contract_shows_what_an_embedding_is_read_from(model: CAFe):
    contract = model.embedding_contract()
    end = "<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    assert contract["embedding prompt (text)"] == (
        "<|im_start|>user\na red mug\nCompress this sentence in one word:" + end
    )
    assert contract["embedding prompt (image)"] == (
        "<|im_start|>user\n<image>\nCompress this image in one word:" + end
    )
    text = contract["embedding prompt (text)"]
    tokens = len(model.processor.tokenizer(text)["input_ids"])
    assert contract["tokens (text)"] == str(tokens)
    assert int(contract["tokens (image)"]) > 78
    assert contract["pooled token (text)"] == contract["pooled token (image)"] == "<|im_end|>"
    assert contract["dimension"] == "64"
    assert contract["max tokens"] == "1024"
    assert all(isinstance(v, str) for v in contract.values())


def test_a_lone_pixel_is_encoded(model: CAFe):
    tiny = PIL.Image.new("RGB", (1, 1), "red")
    embedding = model.encode(tiny)
    assert np.isfinite(embedding).all()
    assert np.abs(embedding - model.encode(PIL.Image.new("RGB", (1, 1), "blue"))).max() > 1e-4


def test_half_a_surrogate_pair_is_one_error(small_model: CAFe):
    calls = (
        lambda: small_model.encode(["fine", "a \ud800"]),
        lambda: small_model.generate("a \ud800"),
        lambda: small_model.score(noise(1), ["a \ud800"]),
    )
    for call in calls:
        with pytest.raises(
            DataError, match=r"^input [01]: .*not Unicode \('.ud800' at character \d+ is half"
        ):
            call()


def test_a_long_chat_is_embedded_and_answered_without_its_oldest_turns(model: CAFe):
    turns: list[Message] = []
    for number in range(400):
        turns.append(Message("user", (f"Question {number}?",)))
        turns.append(Message("assistant", (f"Answer {number}.",)))
    turns.append(Message("user", ("What was the last one?",)))
    for rows, _ in (
        model.collator.embedding_rows([tuple(turns)]),
        model.collator.prompt_rows([tuple(turns)]),
    ):
        assert rows.input_ids.shape[1] <= model.collator.max_tokens
        text = model.processor.tokenizer.decode(rows.input_ids[0])
        first = int(text.split("Question ")[1].split("?")[0])
        assert 0 < first < 399
        kept = [f"Question {n}?" in text and f"Answer {n}." in text for n in range(400)]
        assert kept == [n >= first for n in range(400)]
        assert "What was the last one?" in text
    assert isinstance(model.generate(turns, max_new_tokens=1), str)


def test_of_many_short_turns_the_oldest_are_left_out_and_images_stay(model: CAFe):
    """No text is long enough to be cut, so a long dialogue loses its oldest exchanges."""
    image = Image(noise(1, 64, 64))
    turns = [Message("system", ("Be brief.",))]
    for number in range(6):
        shown = (image,) if number == 0 else ()
        turns.append(Message("user", (*shown, f"What is number {number}?")))
        turns.append(Message("assistant", (f"It is {number}.",)))
    whole = model.collator([Example("e", dialogues=(tuple(turns),))])
    assert not whole.rows.input_ids.shape[0] > 1
    longest = int(whole.rows.positions.max()) + 1
    # Enough for the images, the system turn, and the last two exchanges.
    kept = (*turns[:3], *turns[-4:])
    alone = model.collator([Example("e", dialogues=(kept,))])
    limit = int(alone.rows.positions.max()) + 1
    assert limit < longest
    short = replace(model.collator, max_tokens=limit)([Example("e", dialogues=(tuple(turns),))])
    assert int(short.rows.positions.max()) + 1 == limit
    assert short.label_count == whole.label_count, "every answer is still trained"
    tokenizer = model.processor.tokenizer
    text = tokenizer.decode(short.rows.input_ids[0])
    last = tokenizer.decode(alone.rows.input_ids[0])
    assert last[last.index("4?") :] in text
    with pytest.raises(DataError, match="images and prompts are never cut"):
        replace(model.collator, max_tokens=20)([Example("e", dialogues=(tuple(turns[:3]),))])
