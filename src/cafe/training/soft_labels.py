"""The soft labels of a step: which embeddings a teacher compared, and its scores.

Two teachers. *Stored* scores come with the data (`data.*.scores`): of a pair's target, then of each
of its hard negatives. The *matcher* is the model itself: its log-odds of the step's match
questions, which one more pass without gradient gives (`cafe.training.matching` chooses them). The
questions about one image compare texts, and those about one text compare images, the right one
among them; so they teach both directions.

Embeddings are numbered queries, targets, hard negatives, each over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from cafe.model.rows.chunk import Chunk
from cafe.model.rows.matching import MatchQuestion
from cafe.recipes import Objective
from cafe.training.contrastive import ContrastiveBatch
from cafe.training.distributed import gather_rows, rank
from cafe.training.matching import MatchPlan

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64


@dataclass(frozen=True, slots=True)
class SoftLabels:
    """A teacher's scores of a batch, the same on all ranks.

    cells    anchor and candidate, by the numbers of their embeddings
    scores   of each cell
    """

    cells: Int64[Tensor, "cells 2"]
    scores: Float64[Tensor, " cells"]

    @classmethod
    def stored(cls, chunks: Sequence[Chunk], device: torch.device) -> Self:
        """Those that came with the data of all ranks.

        Args:
            chunks: this rank's, without rows.
            device: where the batch is.
        """
        sizes = torch.tensor([[chunk.pairs, len(chunk.negative_ids)] for chunk in chunks])
        of_ranks = torch.stack([part.sum(0) for part in gather_rows(sizes.to(device))]).cpu()
        pairs = int(of_ranks[:, 0].sum())
        begin, loose = of_ranks[: rank()].sum(0).tolist()
        own = []
        for chunk in chunks:
            query, candidate = chunk.scored.cpu().unbind(1)
            target = pairs + begin + candidate
            negative = 2 * pairs + loose + candidate - chunk.pairs
            is_target = candidate < chunk.pairs
            own.append(torch.stack([begin + query, torch.where(is_target, target, negative)], 1))
            begin, loose = begin + chunk.pairs, loose + len(chunk.negative_ids)
        return cls._gathered(torch.cat(own), torch.cat([c.scores.cpu() for c in chunks]), device)

    @classmethod
    def of_matcher(
        cls, plan: MatchPlan, log_odds: Sequence[Float[Tensor, " q"]], pairs: int
    ) -> Self:
        """The log-odds of all ranks' match questions, as scores.

        Args:
            plan: the questions of this rank's chunks.
            log_odds: of each chunk's questions, in their order.
            pairs: of all ranks.
        """
        device = log_odds[0].device
        asked = [about for chunk in plan.about for about in chunk]
        both = torch.tensor(asked, dtype=torch.long, device=device).view(-1, 2)
        odds = torch.cat(list(log_odds)).detach().double()
        cells, scores = torch.cat([both, both.flip(1)]), torch.cat([odds, odds])
        # A hard negative is a candidate only: as an anchor it would have no right partner.
        of_pair = cells[:, 0] < 2 * pairs
        return cls._gathered(cells[of_pair], scores[of_pair], device)

    @classmethod
    def _gathered(cls, cells: Tensor, scores: Tensor, device: torch.device) -> Self:
        return cls(
            torch.cat(gather_rows(cells.to(device))), torch.cat(gather_rows(scores.to(device)))
        )


def embeddings_of(batch: ContrastiveBatch) -> Float[Tensor, "e dim"]:
    """All embeddings of a batch, in the order of their numbers."""
    return torch.cat([batch.query, batch.target, batch.negatives])


Judged = tuple[
    Iterable[Chunk],
    MatchPlan,
    Callable[[Chunk, Sequence[MatchQuestion]], "Float[Tensor, ' asked']"],
]
"""What the matcher as a teacher needs: this rank's chunks, idle ones included, so that all ranks
have as many; the match questions; chunk, its questions -> log-odds in the order of `Rows.asked`."""


def soft_labels(
    objective: Objective,
    batch: ContrastiveBatch | None,
    chunks: Sequence[Chunk],
    judged: Judged | None = None,
) -> SoftLabels | None:
    """The soft labels of a step; None if there is no teacher, or nothing contrasts.

    Args:
        objective: says who the teacher is.
        batch: of all ranks.
        chunks: this rank's, without rows.
        judged: the match questions, which are read here if the matcher is the teacher.
    """
    if batch is None or objective.soft_label_weight == 0:
        return None
    if objective.soft_labels == "scores":
        return SoftLabels.stored(chunks, batch.query.device)
    assert judged is not None, "the recipe has soft_labels: matcher with match_weight 0"
    return SoftLabels.of_matcher(judged[1], _log_odds(*judged), len(batch.query))


@torch.no_grad()
def _log_odds(
    chunks: Iterable[Chunk],
    plan: MatchPlan,
    read: Callable[[Chunk, Sequence[MatchQuestion]], Float[Tensor, " asked"]],
) -> list[Float[Tensor, " q"]]:
    """The log-odds of each chunk's questions, in the order of `plan.questions`."""
    odds = []
    for chunk, questions in zip(chunks, plan.questions, strict=True):
        found = read(chunk, questions)  # also without questions: a sharded forward is collective
        sides = () if chunk.match is None else chunk.match.sides
        # Rows hold the examples one after the other, each with its questions in their order.
        groups = [sides[question.head].group for question in questions]
        order = sorted(range(len(groups)), key=groups.__getitem__)
        odds.append(found.index_copy(0, torch.tensor(order, device=found.device).long(), found))
    return odds
