"""The slow twin of the match questions: chosen by loops, each a sequence of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cafe.model.judging import yes_no_tokens
from cafe.model.rows.matching import match_question
from cafe.model.rows.rows import identity
from cafe.model.vlm import CAFe
from cafe.types import Conversation, Example, Image
from helpers.twin import embedded_states, last_states


class Side(NamedTuple):
    """An image, or a text, of a pair or hard negative."""

    content: Conversation
    embedding: Tensor
    pair: bool


class Pair(NamedTuple):
    image: str
    text: str
    group: str


def chosen_questions(
    model: CAFe, examples: list[Example]
) -> list[tuple[Conversation, Conversation, bool]]:
    """(image, text, right) of each question of the batch: by definition, one after the other."""
    images, texts, pairs = _sides(model, examples)
    wrong: dict[tuple[int, int], None] = {}
    for i, image in enumerate(images):
        options = [t for t in range(len(texts)) if not _right(image, texts[t], pairs)]
        if image.pair and options:
            wrong[i, max(options, key=lambda t: _cosine(images[i], texts[t]))] = None
    for t, text in enumerate(texts):
        options = [i for i in range(len(images)) if not _right(images[i], text, pairs)]
        if text.pair and options:
            wrong[max(options, key=lambda i: _cosine(images[i], texts[t])), t] = None
    questions = [(i.content, t.content, True) for i, t in _own(images, texts)]
    return questions + [(images[i].content, texts[t].content, False) for i, t in wrong]


def question_odds(model: CAFe, questions: list[tuple[Conversation, Conversation, bool]]) -> Tensor:
    """The log-odds of yes of each question, written anew as a sequence of its own."""
    rendered = [model.collator.render.prompt(match_question(i, t)) for i, t, _ in questions]
    logits = model.lm_head(last_states(model, rendered))
    yes, no = yes_no_tokens(model)
    return logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1)


def match_pass(model: CAFe, examples: list[Example], weight: float) -> tuple[Tensor, list[bool]]:
    """The loss of the questions, backpropagated with its weight; and which are right."""
    with torch.no_grad():
        questions = chosen_questions(model, examples)
    odds = question_odds(model, questions)
    right = torch.tensor([r for _, _, r in questions])
    loss = (
        functional.binary_cross_entropy_with_logits(odds[right], torch.ones_like(odds[right]))
        + functional.binary_cross_entropy_with_logits(odds[~right], torch.zeros_like(odds[~right]))
    ) / 2
    (weight * loss).backward()
    return loss.detach(), right.tolist()


def _own(images: list[Side], texts: list[Side]) -> list[tuple[Side, Side]]:
    return list(zip([i for i in images if i.pair], [t for t in texts if t.pair], strict=True))


def _sides(model: CAFe, examples: list[Example]) -> tuple[list[Side], list[Side], list[Pair]]:
    images: list[Side] = []
    texts: list[Side] = []
    loose: list[tuple[list[Side], Side]] = []
    pairs = []
    for example in examples:
        query, target = example.query, example.target
        if query is None or target is None or _shows(query) == _shows(target):
            continue
        image, text = (query, target) if _shows(query) else (target, query)
        images.append(Side(image, _embedded(model, image), True))
        texts.append(Side(text, _embedded(model, text), True))
        group = example.target_id or identity(target)
        pairs.append(Pair(identity(image), identity(text), group))
        for negative in example.negatives:
            side = Side(negative, _embedded(model, negative), False)
            if _shows(negative) != _shows(query):
                loose.append((images if _shows(negative) else texts, side))
    for into, side in loose:
        into.append(side)
    return images, texts, pairs


def _right(image: Side, text: Side, pairs: list[Pair]) -> bool:
    """Whether a pair with this image and one with this text are of one group."""
    of_image = {p.group for p in pairs if p.image == identity(image.content)}
    of_text = {p.group for p in pairs if p.text == identity(text.content)}
    return bool(of_image & of_text)


def _shows(side: Conversation) -> bool:
    return any(isinstance(part, Image) for message in side for part in message.content)


def _embedded(model: CAFe, side: Conversation) -> Tensor:
    return embedded_states(model, [side])[0]


def _cosine(a: Any, b: Any) -> float:
    return float(functional.cosine_similarity(a.embedding.detach(), b.embedding.detach(), dim=0))
