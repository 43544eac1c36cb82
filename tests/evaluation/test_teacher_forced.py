"""Reading an answer tells what greedy decoding would write, and what the caption loss is."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import PIL.Image
import pytest
import torch

from cafe.model.teacher_forced import score_examples
from cafe.model.vlm import CAFe
from cafe.objective import next_token_nll
from cafe.types import Conversation, Example, Image, Message, user


def dialogue(image: Image, question: str, answer: str) -> Conversation:
    return (*user(image, question), Message("assistant", (answer,)))


def image(colour: str) -> Image:
    return Image(PIL.Image.new("RGB", (96, 96), colour))


RED, BLUE = image("red"), image("blue")
LEARNED = (
    (RED, "Is it red?", "yes"),
    (RED, "What is it?", "a big red cat"),
    (BLUE, "Is it red?", "no"),
    (BLUE, "What is it?", "a cat at the top left"),
)
NOT_LEARNED = (
    (RED, "Is it red?", "no"),
    (RED, "Is it red?", "yes yes"),  # the first token is right, the end comes too late
    (RED, "What is it?", "a big red"),  # all tokens are right, the end comes too early
    (BLUE, "What is it?", "a cat at the left"),
)


def examples(turns: Any) -> list[Example]:
    """One example per image, its dialogues as branches."""
    return [
        Example(
            id=name,
            dialogues=tuple(dialogue(*turn) for turn in turns if turn[0] is image),
        )
        for name, image in (("red", RED), ("blue", BLUE))
    ]


@pytest.fixture(scope="module")
def taught(small_model: CAFe) -> CAFe:
    """A small model that has learned four answers by heart, so that some matches are true."""
    model = deepcopy(small_model)
    chunk = model.collator(examples(LEARNED))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(50):
        states = model(chunk.rows, chunk.vision).flatten(0, 1)[chunk.rows.label_source]
        nll, count = next_token_nll(states, chunk.rows.label_ids, model.lm_head.weight)
        (nll / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def asked(turns: Any) -> list[tuple[Image, str, str]]:
    """The turns in the order in which `examples` has them."""
    return [turn for image in (RED, BLUE) for turn in turns if turn[0] is image]


def greedy_matches(model: CAFe, asked: list[Example]) -> list[tuple[bool, ...]]:
    """For each example, per assistant turn: would greedy decoding have given exactly it?"""
    readings = score_examples(model, asked)
    return [tuple(answer.greedy for answer in reading.answers) for reading in readings]


def test_a_match_is_true_exactly_where_greedy_generation_writes_the_answer(taught):
    turns = asked((*LEARNED, *NOT_LEARNED))
    prompts: Any = [user(image, question) for image, question, _ in turns]
    written = taught.generate(prompts, max_new_tokens=12)
    expected = [text == answer for text, (_, _, answer) in zip(written, turns, strict=True)]

    found = greedy_matches(taught, examples((*LEARNED, *NOT_LEARNED)))

    assert [match for of_example in found for match in of_example] == expected
    assert sum(expected) == len(LEARNED)  # both cases occur, so the test can fail
    assert len(expected) == len(LEARNED) + len(NOT_LEARNED)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_losses_are_those_of_the_training_objective_on_separate_rows(taught, batch_size):
    both = examples((*LEARNED, *NOT_LEARNED))
    apart = replace(taught.collator, sharing="none")([*both])
    with torch.no_grad():
        states = taught(apart.rows, apart.vision).flatten(0, 1)[apart.rows.label_source]
        expected, count = next_token_nll(states, apart.rows.label_ids, taught.lm_head.weight)

    readings = score_examples(taught, both, batch_size=batch_size)

    answers = [answer for reading in readings for answer in reading.answers]
    assert [len(reading.answers) for reading in readings] == [5, 3]
    assert sum(a.tokens for a in answers) == count
    assert sum(a.nll_nats for a in answers) == pytest.approx(float(expected), rel=1e-5)
    surprising = [a.nll_nats / a.tokens for a in answers if not a.greedy]
    assert min(surprising) > max(a.nll_nats / a.tokens for a in answers if a.greedy)


def test_pairs_are_embedded_along_with_the_answers_and_are_what_encode_gives(taught):
    first, second = examples(LEARNED)
    pairs = [
        replace(first, query=user(RED), target=user("a big red cat")),
        second,
        Example("alone", query=user(BLUE), target=user("yes no")),
    ]

    red, blue, alone = score_examples(taught, pairs, batch_size=3)

    expected = taught.encode([RED, "a big red cat", BLUE, "yes no"], normalize=False)
    found = [red.query, red.target, alone.query, alone.target]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-4, rtol=1e-4)
    assert blue.query is None
    assert blue.target is None
    assert [len(r.answers) for r in (red, blue, alone)] == [2, 2, 0]


def test_every_turn_of_a_conversation_is_an_answer(taught):
    turns = (*dialogue(RED, "Is it red?", "yes"), Message("user", ("Sure?",)))
    example = Example("talk", dialogues=((*turns, Message("assistant", ("no",))),))
    assert greedy_matches(taught, [example])[0][0]  # learned by heart, whatever follows
    assert len(greedy_matches(taught, [example])[0]) == 2


def test_where_a_chat_template_never_closes_a_turn_an_answer_ends_with_the_token_that_would(
    small_model,
):
    model = deepcopy(small_model)
    template = model.processor.chat_template
    model.processor.chat_template = template.replace("<|im_end|>", "")
    assert model.processor.chat_template != template
    scores = score_examples(model, examples(LEARNED))
    turns = [
        [m for d in e.dialogues for m in d if m.role == "assistant"] for e in examples(LEARNED)
    ]
    tokenizer = model.processor.tokenizer
    for found, own in zip(scores, turns, strict=True):
        words = [len(tokenizer(m.text, add_special_tokens=False)["input_ids"]) for m in own]
        assert [answer.tokens for answer in found.answers] == [count + 1 for count in words]
