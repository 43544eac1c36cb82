"""The contrastive side of the objective, with the numbers it may learn (temperature, bias).

Also the warnings for a contrastive loss that teaches nothing: before a run whose pairs have no
negatives, and once within a run whose loss does not move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cafe.model.rows.chunk import Chunk
from cafe.objective import (
    TokenVectors,
    clamped_temperature,
    info_nce,
    sigmoid_loss,
    soft_label_loss,
)
from cafe.recipes import Objective, Recipe
from cafe.training.data import TrainingData
from cafe.training.distributed import gather_around, gather_rows

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

STALL_STEPS = 60
_STALL_TOLERANCE = 0.02  # of the loss, relative
_SIGMOID_BIAS = -10.0  # SigLIP's initial value (arXiv 2303.15343, section 3.2)


@dataclass(frozen=True, slots=True)
class ContrastiveBatch:
    """The embeddings of a batch, before normalization.

    query, target  both sides of each pair
    negatives      hard negatives of all queries; may be empty
    target_ids     equal for targets that are no negatives of one another
    negative_ids   of the hard negatives, by their content
    query_ids      of the queries, by their content
    content_ids    of the targets, by their content
    query_after, target_after   both sides as they are embedded after a thought, where there is one
    tokens   vectors of the tokens of queries, targets and negatives; None: not trained
    """

    query: Float[Tensor, "pairs dim"]
    target: Float[Tensor, "pairs dim"]
    negatives: Float[Tensor, "negatives dim"]
    target_ids: Int64[Tensor, " pairs"]
    negative_ids: Int64[Tensor, " negatives"]
    query_ids: Int64[Tensor, " pairs"]
    content_ids: Int64[Tensor, " pairs"]
    query_after: Float[Tensor, "pairs dim"] | None = None
    target_after: Float[Tensor, "pairs dim"] | None = None
    tokens: tuple[TokenVectors, TokenVectors, TokenVectors] | None = None

    def after_thoughts(self) -> ContrastiveBatch:
        """The same pairs, with the embeddings after a thought in place of those without."""
        if self.query_after is None or self.target_after is None:
            return self
        return replace(self, query=self.query_after, target=self.target_after)


def gathered_batch(
    chunks: Sequence[Chunk], embeddings: Sequence[Float[Tensor, "e dim"]]
) -> ContrastiveBatch:
    """The embeddings of all chunks and ranks; gradient flows to this rank's only.

    Args:
        chunks: this rank's, without rows.
        embeddings: of each chunk, in the order of `Rows.pooled`.
    """
    device = embeddings[0].device
    parts = [_sides(chunk, e) for chunk, e in zip(chunks, embeddings, strict=True)]
    query, target, negatives, *after = (
        gather_around(torch.cat(side)) for side in zip(*parts, strict=True)
    )
    own = [torch.stack([c.query_ids, c.target_ids, c.content_ids], dim=1) for c in chunks]
    query_ids, target_ids, content_ids = torch.cat(gather_rows(torch.cat(own).to(device))).unbind(1)
    negative_ids = torch.cat([chunk.negative_ids for chunk in chunks]).to(device)
    return ContrastiveBatch(
        query=query,
        target=target,
        negatives=negatives,
        target_ids=target_ids,
        query_ids=query_ids,
        content_ids=content_ids,
        negative_ids=torch.cat(gather_rows(negative_ids)),
        query_after=after[0],
        target_after=after[1],
    )


def _sides(chunk: Chunk, embeddings: Tensor) -> tuple[Tensor, ...]:
    """Queries, targets, negatives; queries and targets after their thoughts."""
    counts = (
        chunk.pairs,
        chunk.pairs,
        len(chunk.negative_ids),
        len(chunk.query_thoughts),
        len(chunk.target_thoughts),
    )
    query, target, negatives, *after = embeddings.split(counts)
    thoughts = (chunk.query_thoughts, chunk.target_thoughts)
    replaced = (
        side.index_copy(0, numbers.to(side.device), own)
        for side, numbers, own in zip((query, target), thoughts, after, strict=True)
    )
    return query, target, negatives, *replaced


class ContrastiveLoss(nn.Module):
    """The contrastive loss of a recipe's objective, with its learned temperature and bias."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        learned = objective.learn_temperature
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(objective.temperature)), requires_grad=learned
        )
        sigmoid = objective.contrastive == "sigmoid"
        self.bias = nn.Parameter(torch.tensor(_SIGMOID_BIAS), requires_grad=sigmoid)

    def temperature(self) -> Float[Tensor, ""] | float:
        """The temperature in use; a tensor where it is learned."""
        if not self.objective.learn_temperature:
            return self.objective.temperature
        return clamped_temperature(self.log_temperature)

    def forward(self, batch: ContrastiveBatch) -> Float[Tensor, ""]:
        """The loss of all pairs; every other target of the batch is a negative (in-batch).

        Unless it is right too: the same image or text, or of a pair with the same query.
        """
        # The published code treats every other target as a negative, even an equal one.
        masks = self.objective.compat == "none"
        shared = {
            "negatives": batch.negatives if len(batch.negatives) else None,
            "target_ids": batch.target_ids if masks else None,
            "negative_ids": batch.negative_ids if masks and len(batch.negatives) else None,
            "query_ids": batch.query_ids if masks else None,
            "content_ids": batch.content_ids if masks else None,
            "temperature": self.temperature(),
            "dims": self.objective.matryoshka_dims,
        }
        if self.objective.contrastive == "sigmoid":
            return sigmoid_loss(batch.query, batch.target, bias=self.bias, **shared)
        return info_nce(
            batch.query,
            batch.target,
            directions=self.objective.directions,
            hardness=self.objective.hardness,
            false_negative_margin=self.objective.false_negative_margin,
            same_side=self.objective.same_side_negatives,
            roundings=("float32", *(self.objective.quantization_aware or ())),
            **shared,
        )

    def soft_labels(
        self, embeddings: Float[Tensor, "e dim"], cells: Int64[Tensor, "l 2"], scores: Tensor
    ) -> Float[Tensor, ""]:
        """How far the embeddings' similarities are from a teacher's distribution."""
        return soft_label_loss(
            embeddings,
            cells,
            scores,
            temperature=self.temperature(),
            teacher_temperature=self.objective.soft_label_temperature,
            dims=self.objective.matryoshka_dims,
        )


# ---------------------------------------------------------------------- nothing is learned


def no_negatives_warning(recipe: Recipe, data: TrainingData) -> str | None:
    """The warning for a run in which no pair has a negative; None where there are some."""
    objective = recipe.objective
    alone = recipe.batch.examples == 1 and objective.contrastive == "info_nce"
    if not alone or objective.contrastive_weight == 0:
        return None
    examples = [example for source in data.examples.sources for example in source.examples]
    if any(e.negatives for e in examples) or not any(e.query for e in examples):
        return None
    return (
        "warning: batch.examples is 1, so no pair has another one to contrast with, and the "
        "contrastive loss is 0 in every step; raise batch.examples (batch.chunk keeps memory low), "
        "or set objective.contrastive_weight: 0"
    )


@dataclass(slots=True)
class StallDetector:
    """Watches for a contrastive loss that stays where it is when all embeddings are alike.

    With n pairs that is ln n at any temperature, if there are no hard negatives.

    enabled   False: this loss is not watched, or the warning was given
    """

    enabled: bool
    _steps: int = field(default=0, init=False)

    def check(self, contrastive: float, pairs: int) -> str | None:
        """The warning to show after a step, at most once in a run.

        Args:
            contrastive: The contrastive loss of the step.
            pairs: Number of pairs that it is computed over.

        Returns:
            The warning, or None.
        """
        if not self.enabled or pairs < 2:
            return None
        uniform = math.log(pairs)
        stalled = abs(contrastive - uniform) < _STALL_TOLERANCE * uniform
        self._steps = self._steps + 1 if stalled else 0
        if self._steps < STALL_STEPS:
            return None
        self.enabled = False
        return (
            f"warning: for {STALL_STEPS} steps the contrastive loss has stayed at "
            f"ln({pairs}) = {uniform:.2f}, as if all embeddings were alike. What usually helps: "
            "another optimizer.learning_rate (10 times higher or lower), a look at the pairs (cafe "
            "data inspect: do both sides say the same thing?), more batch.examples"
        )
