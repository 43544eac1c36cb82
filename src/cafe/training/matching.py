"""Match questions in the second pass of a cached step, about what the first pass found alike.

After the first pass all embeddings of the batch are known, on every rank. So is, for each image,
the wrong text that it is nearest to, and the reverse; the questions about these are branches of the
images' rows in the second pass (`cafe.model.rows.matching`). Every rank chooses for all and keeps
the questions about its own images. Of the texts of other ranks it needs the tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from cafe.errors import DataError, RecipeError, TrainingError
from cafe.model.judging import yes_no_tokens
from cafe.model.rows.chunk import Chunk
from cafe.model.rows.matching import (
    IMAGE_TARGET,
    NO_QUESTION,
    TEXT_TARGET,
    MatchQuestion,
    MatchSide,
    match_questions,
    tails,
)
from cafe.model.vlm import CAFe
from cafe.objective import hardest_wrong, known_right, log_odds
from cafe.training.contrastive import ContrastiveBatch
from cafe.training.distributed import gather_rows, rank, sum_over_ranks
from cafe.training.state import uses_dropout

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from cafe.training.loader import Steps

_CHECKED = 32
"""Number of steps in whose pairs there must be an image with a text."""


@dataclass(frozen=True, slots=True)
class MatchPlan:
    """The match questions of a step.

    questions   of each chunk of this rank
    about       for each of these the numbers of its image's and its text's embedding in the batch:
                queries, targets, hard negatives
    counts      number of right and of wrong questions, over all ranks
    """

    questions: list[list[MatchQuestion]]
    about: list[list[tuple[int, int]]]
    counts: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Matcher:
    """Chooses the questions of a step, and reads their answers.

    yes, no   the tokens that begin these words
    softcap   the bound of the logits' absolute value; None: unbounded
    """

    yes: list[int]
    no: list[int]
    softcap: float | None = None

    @classmethod
    def of(cls, vlm: CAFe) -> Matcher:
        """
        Raises:
            RecipeError: The model has dropout.
        """
        if uses_dropout(vlm):
            raise RecipeError(
                "objective.match_weight: the model has dropout, which must be the same in both "
                "passes of a step, and is not where questions are added; set tuning.dropout: 0"
            )
        yes, no = yes_no_tokens(vlm)
        return cls(yes, no, vlm.logit_softcap)

    def log_odds(self, states: Float[Tensor, "q hidden"], head: nn.Linear) -> Float[Tensor, " q"]:
        """Log P("yes") - log P("no") after each state, with gradient."""
        bias: Tensor | None = head.bias
        biases = None if bias is None else (bias[self.yes], bias[self.no])
        yes, no = head.weight[self.yes], head.weight[self.no]
        return log_odds(states, yes, no, biases=biases, softcap=self.softcap)

    def plan(self, chunks: Sequence[Chunk], batch: ContrastiveBatch) -> MatchPlan:
        """The questions of this rank's chunks.

        Args:
            chunks: this rank's, at least with what `MatchSides.without_rows` keeps.
            batch: the embeddings of all ranks.
        """
        own = [(number, chunk.match) for number, chunk in enumerate(chunks) if chunk.match]
        pairs = [(number, i) for number, sides in own for i in range(len(sides.pairs))]
        negatives = [
            (number, len(sides.pairs) + i)
            for number, sides in own
            for i in range(len(sides.negatives))
        ]
        device = batch.query.device
        of_pairs = _gathered([side for _, sides in own for side in sides.pairs], device)
        of_negatives = _gathered([side for _, sides in own for side in sides.negatives], device)
        items = _Items.of(batch, of_pairs, of_negatives)
        # Global number of each of this rank's pairs and negatives -> its chunk and number there.
        homes = dict(zip(of_pairs.own, pairs, strict=True))
        homes |= dict(zip([of_pairs.count + i for i in of_negatives.own], negatives, strict=True))
        questions: list[list[MatchQuestion]] = [[] for _ in chunks]
        about: list[list[tuple[int, int]]] = [[] for _ in chunks]
        for image, text, right in items.questions():
            if image not in homes:
                continue
            chunk, head = homes[image]
            sides, tail = chunks[chunk].match, items.tail(text)
            if sides is not None and sides.fits(head, tail):
                questions[chunk].append(MatchQuestion(head, tail, right))
                shown = of_pairs.embedding(image, TEXT_TARGET)
                about[chunk].append((shown, of_pairs.embedding(text, IMAGE_TARGET)))
        right = sum(q.right for asked in questions for q in asked)
        wrong = sum(not q.right for asked in questions for q in asked)
        counts = sum_over_ranks(right, device), sum_over_ranks(wrong, device)
        return MatchPlan(questions, about, counts)


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Sides of all ranks, in rank order.

    kinds   int64 [sides]
    tails   of each
    own     the numbers of this rank's
    """

    kinds: Int[Tensor, " sides"]
    tails: list[Int[np.ndarray, " t"]]
    own: range

    @property
    def count(self) -> int:
        return len(self.kinds)

    def embedding(self, number: int, if_query: int) -> int:
        """The number of an item's embedding, where all queries come first, then all targets.

        Args:
            number: of its pair, or behind all pairs that of its hard negative.
            if_query: the kind of a pair whose query, and not its target, is the item.
        """
        is_query = number < self.count and int(self.kinds[number]) == if_query
        return number if is_query else self.count + number


def _gathered(own: Sequence[MatchSide], device: torch.device) -> _Gathered:
    facts, tokens = tails(own)
    by_rank = [part.cpu() for part in gather_rows(facts.to(device))]
    counts = [len(part) for part in by_rank]
    begin = sum(counts[: rank()])
    every = torch.cat(by_rank)
    flat = torch.cat([part.cpu() for part in gather_rows(tokens.to(device))]).numpy()
    ends = every[:, 1].cumsum(0).tolist()
    parts = np.split(flat, ends[:-1]) if ends else []
    return _Gathered(every[:, 0], parts, range(begin, begin + len(own)))


@dataclass(frozen=True, slots=True)
class _Items:
    """The images and the texts of a batch that questions can be asked about.

    images, texts   numbers of their pairs; those of hard negatives come after all pairs
    vectors         embeddings of the images, and of the texts
    ids             content ids of the images, and of the texts
    of_pairs        how many images, and texts, belong to pairs
    pair_ids        int64 [3, pairs]: ids of image, text and group of each pair
    """

    images: Int[Tensor, " a"]
    texts: Int[Tensor, " b"]
    vectors: tuple[Float[Tensor, "a d"], Float[Tensor, "b d"]]
    ids: tuple[Int[Tensor, " a"], Int[Tensor, " b"]]
    of_pairs: tuple[int, int]
    pair_ids: Int[Tensor, "3 pairs"]
    tails: list[Int[np.ndarray, " t"]] = field(repr=False)

    @classmethod
    def of(cls, batch: ContrastiveBatch, pairs: _Gathered, negatives: _Gathered) -> _Items:
        device = batch.query.device
        kind, extra = pairs.kinds.to(device), negatives.kinds.to(device)
        shown, said = kind == TEXT_TARGET, kind == IMAGE_TARGET  # what the query is
        asked = (kind != NO_QUESTION).nonzero()[:, 0]
        image_negatives = (extra == IMAGE_TARGET).nonzero()[:, 0]
        text_negatives = (extra == TEXT_TARGET).nonzero()[:, 0]
        query, target = batch.query.detach(), batch.target.detach()
        loose = batch.negatives.detach()
        image_ids = torch.where(shown, batch.query_ids, batch.content_ids)
        text_ids = torch.where(said, batch.query_ids, batch.content_ids)
        image_vectors = torch.where(shown[:, None], query, target)[asked]
        text_vectors = torch.where(said[:, None], query, target)[asked]
        count = len(kind)
        return cls(
            images=torch.cat([asked, count + image_negatives]),
            texts=torch.cat([asked, count + text_negatives]),
            vectors=(
                torch.cat([image_vectors, loose[image_negatives]]),
                torch.cat([text_vectors, loose[text_negatives]]),
            ),
            ids=(
                torch.cat([image_ids[asked], batch.negative_ids[image_negatives]]),
                torch.cat([text_ids[asked], batch.negative_ids[text_negatives]]),
            ),
            of_pairs=(len(asked), len(asked)),
            pair_ids=torch.stack([image_ids, text_ids, batch.target_ids])[:, asked],
            tails=[*pairs.tails, *negatives.tails],
        )

    def right(self) -> Bool[Tensor, "a b"]:
        return known_right(*self.ids, *self.pair_ids)

    def questions(self) -> Iterator[tuple[int, int, bool]]:
        """Number of an image's pair, number of a text's pair, whether they belong together."""
        for pair in self.images[: self.of_pairs[0]].tolist():
            yield pair, pair, True
        wrong = hardest_wrong(*self.vectors, self.right(), self.of_pairs, ids=self.ids)
        for image, text in zip(
            self.images[wrong[:, 0]].tolist(), self.texts[wrong[:, 1]].tolist(), strict=True
        ):
            yield image, text, False

    def tail(self, text: int) -> Int[np.ndarray, " t"]:
        return self.tails[text]


def check_matchable(steps: Steps) -> None:
    """Check that there are questions to ask, before anything is trained.

    Raises:
        TrainingError: None of the first pairs is an image and a text.
    """
    planned = (
        steps.data.examples[i]
        for step in range(min(steps.data.steps, _CHECKED))
        for i in steps.data.plan.plan(step)
    )
    failure: DataError | None = None
    for example in planned:
        if all(question is None for question in match_questions(example)[:1]):
            continue
        try:
            match = steps.collator([example]).match
        except DataError as error:
            failure = failure or error  # a broken example is skipped and reported in training
            continue
        if match is not None and match.pairs:
            return
    raise TrainingError(
        "objective.match_weight: none of the first pairs is one image and one text, which is what "
        "a match question is asked about"
        + ("; set it to 0" if failure is None else f", and can be used ({failure})")
    )
