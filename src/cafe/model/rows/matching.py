"""Match questions about any image and any text of a batch, as branches of the image's row.

    [user, <image> x N] ─┬─ "Compress this image in one word:" … [EMB]
                         ├─ MATCH_QUESTION of "a red mug" … [answer]      its own text
                         └─ MATCH_QUESTION of "a blue mug" … [answer]     another one's

Which wrong texts are worth a question is known only when all embeddings of the batch are
(`cafe.training.matching`), and then no text has to be tokenized again: a question is the tokens up
to its image, the *head*, and the tokens after it, the *tail*, which do not depend on the image. So
the tails of a batch go with any of its heads. A chat template that writes text by the number of
images sees one image in every question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch

from cafe.errors import DataError
from cafe.model.rows.assembly import Orders, ReadSequence, RowLayout, embedding_order
from cafe.model.rows.rows import Rows
from cafe.model.rows.trie import TokenSequence
from cafe.types import (
    CAPTION_REQUEST,
    MATCH_QUESTION,
    PAIR_QUESTION,
    Conversation,
    Example,
    Image,
    Message,
    Part,
)

if TYPE_CHECKING:
    from jaxtyping import Int

NO_QUESTION, TEXT_TARGET, IMAGE_TARGET = 0, 1, 2
"""What can be asked about a pair: nothing; its query is an image and its target a text; the
reverse. A hard negative stands on its pair's target side."""


ASKED_PER_PAIR = 3
"""About how many questions a pair adds to its row: the right one, and two wrong ones."""


def match_question(a: Conversation, b: Conversation) -> Conversation:
    """The yes/no matching prompt: does the image (one side) show what the text (the other) says?

    Raises:
        DataError: unless one side is one image and the other is text.
    """
    found = _image_and_text(a, b)
    if found is None:
        raise DataError("a match question needs a single image on one side, text on the other")
    image, statement = found
    return (Message("user", (image, MATCH_QUESTION.format(statement=statement))),)


def pair_question(query: Conversation, document: Conversation) -> Conversation:
    """The yes/no question about any two sides.

    It is `match_question`, which models are trained with, for one image and a text. For all other
    pairs (two texts, two images, a page of both) it shows both sides, one after the other.

    Raises:
        DataError: a side has neither text nor image.
    """
    if _image_and_text(query, document) is not None:
        return match_question(query, document)
    sides = [_parts(side) for side in (query, document)]
    for name, parts in zip(("query", "candidate"), sides, strict=True):
        if not any(parts):
            raise DataError(f"the {name} is empty: give it a text or an image")
    before, between, after = PAIR_QUESTION
    return (Message("user", (before, *sides[0], between, *sides[1], after)),)


def caption_dialogue(a: Conversation, b: Conversation) -> Conversation:
    """The request for a caption of the image (one side), with the text (the other) as its answer.

    Raises:
        DataError: unless one side is one image and the other is text.
    """
    found = _image_and_text(a, b)
    if found is None:
        raise DataError(
            "by likelihood compares one image with a text: one side must be a single image, the "
            "other text only; other pairs are judged by question"
        )
    image, text = found
    return (Message("user", (image, CAPTION_REQUEST)), Message("assistant", (text,)))


def _parts(side: Conversation) -> list[Part]:
    return [part for message in side for part in message.content]


def _image_and_text(a: Conversation, b: Conversation) -> tuple[Image, str] | None:
    """The image of one side and the text of the other; None for a pair of another kind."""
    sides = [_parts(side) for side in (a, b)]
    image_side, text_side = sorted(
        sides, key=lambda side: not any(isinstance(p, Image) for p in side)
    )
    text = " ".join(p for p in text_side if isinstance(p, str))
    match image_side:
        case [Image() as image] if len(text) and all(isinstance(p, str) for p in text_side):
            return image, text
    return None


def match_questions(example: Example) -> list[Conversation | None]:
    """The question about the example's pair, then those about its query and each hard negative.

    None where the two sides are not an image and a text; an empty list without a pair.
    """
    if example.query is None or example.target is None:
        return []
    sides = (example.target, *example.negatives)
    return [
        None
        if _image_and_text(example.query, side) is None
        else match_question(example.query, side)
        for side in sides
    ]


class MatchQuestion(NamedTuple):
    """One question of a chunk.

    head    number of the pair, or hard negative, whose image it is about
    tail    the tokens after the image
    right   whether the answer is yes
    """

    head: int
    tail: Int[np.ndarray, " t"]
    right: bool


@dataclass(frozen=True, slots=True)
class MatchSide:
    """What one pair, or one hard negative, has of a match question.

    kind      what can be asked
    group     the example it belongs to, by its number in the chunk
    head      the tokens up to the image; None where there is no question, or it was dropped
    length    number of tokens of the head
    after     int64 [axes], the position of the token after the head, where a model counts along
              several axes (M-RoPE); None: only the depth
    tail      the tokens after the image; empty for an image without a text
    """

    kind: int
    group: int
    head: TokenSequence | None
    length: int
    after: Int[np.ndarray, " axes"] | None
    tail: Int[np.ndarray, " t"]

    @classmethod
    def of(cls, kind: int, group: int, question: TokenSequence | None) -> Self:
        """The two sides of a question about one image; None: there is no question."""
        if question is None:
            return cls(NO_QUESTION, group, None, 0, None, np.zeros(0, dtype=np.int64))
        end = int(np.flatnonzero(question.keys < 0)[-1]) + 1
        positions = question.positions
        head = TokenSequence(
            question.tokens[:end],
            question.keys[:end],
            None if positions is None else positions[:, :end],
        )
        after = None if positions is None else positions[:, end]
        # A copy: a view would keep the whole question in memory.
        return cls(kind, group, head, end, after, question.tokens[end:].copy())

    def without_head(self) -> Self:
        """What is needed to choose questions: thousands of heads would be kept for a step."""
        return replace(self, head=None)

    def question(self, tail: Int[np.ndarray, " t"]) -> TokenSequence:
        """The question about this image that ends with any tail."""
        assert self.head is not None
        return TokenSequence(
            np.concatenate([self.head.tokens, tail]),
            np.concatenate([self.head.keys, tail]),  # a text token is its own key
            None
            if self.after is None or self.head.positions is None
            else np.concatenate(
                [self.head.positions, self.after[:, None] + np.arange(len(tail))], axis=1
            ),
        )


@dataclass(frozen=True, slots=True)
class MatchSides:
    """What a chunk can be asked, and what its rows are built from once that is decided.

    pairs, negatives   in the order of the chunk's embeddings
    groups             all sequences of each example
    orders, layout     as in `RowLayout.rows`
    max_tokens         longest sequence; a longer question is not asked
    """

    pairs: tuple[MatchSide, ...]
    negatives: tuple[MatchSide, ...]
    groups: tuple[tuple[ReadSequence, ...], ...]
    orders: Orders
    layout: RowLayout
    max_tokens: int

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        questions: Sequence[Sequence[TokenSequence | None]],
        groups: Sequence[Sequence[ReadSequence]],
        **layout: Any,
    ) -> Self:
        """From the examples of a chunk, with their `match_questions` tokenized."""
        pairs: list[MatchSide] = []
        negatives: list[MatchSide] = []
        for number, (example, asked) in enumerate(zip(examples, questions, strict=True)):
            parts = [part for message in example.query or () for part in message.content]
            kind = TEXT_TARGET if any(isinstance(p, Image) for p in parts) else IMAGE_TARGET
            sides = [MatchSide.of(kind, number, question) for question in asked]
            pairs += sides[:1]
            negatives += sides[1:]
        return cls(tuple(pairs), tuple(negatives), tuple(map(tuple, groups)), **layout)

    @property
    def sides(self) -> tuple[MatchSide, ...]:
        return (*self.pairs, *self.negatives)

    def without_rows(self) -> MatchSides:
        """What choosing the questions needs to know."""
        return replace(
            self,
            pairs=tuple(side.without_head() for side in self.pairs),
            negatives=tuple(side.without_head() for side in self.negatives),
            groups=(),
        )

    def fits(self, head: int, tail: Int[np.ndarray, " t"]) -> bool:
        """Whether a question about the image of pair, or negative, `head` is not too long."""
        count = len(self.pairs)
        side = self.pairs[head] if head < count else self.negatives[head - count]
        return side.length + len(tail) <= self.max_tokens

    def rows(self, questions: Sequence[MatchQuestion], *, answers: bool) -> tuple[Rows, list[bool]]:
        """The chunk's rows with the questions as further branches.

        Args:
            questions: in any order.
            answers: also the sequences of dialogues.

        Returns:
            The rows, and for each of `Rows.asked` whether the answer is yes.
        """
        groups = [[s for s in g if answers or s.role != "answer"] for g in self.groups]
        right: list[list[bool]] = [[] for _ in groups]
        sides = self.sides
        for question in questions:
            side = sides[question.head]
            sequence = ReadSequence(side.question(question.tail), "question")
            groups[side.group].append(sequence)
            right[side.group].append(question.right)
        rows = self.layout.rows(groups, embedding_order(groups), self.orders)
        return rows, [answer for group in right for answer in group]


def tails(sides: Sequence[MatchSide]) -> tuple[torch.Tensor, torch.Tensor]:
    """What other processes need to know of some sides.

    Returns:
        facts    int64 [sides, 2]: kind, and number of tokens of the tail.
        tokens   int64 [n], of all tails.
    """
    facts = [[side.kind, len(side.tail)] for side in sides]
    tokens = np.concatenate([side.tail for side in sides]) if sides else np.zeros(0, np.int64)
    return torch.tensor(facts, dtype=torch.long).view(-1, 2), torch.from_numpy(tokens).long()
