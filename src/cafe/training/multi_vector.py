"""The token vectors of a batch: read with the embeddings, cached like them, contrasted over ranks.

The vectors of a chunk's tokens pass through the step beside its embeddings: both are leaves of the
contrastive losses, and the second pass of a cached step multiplies both with their gradients. Every
rank gathers all vectors and computes the whole loss, as it does for embeddings; its time grows with
the square of the batch, and its memory does not (`cafe.objective.maxsim`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cafe.model.multi_vector import projected, token_projection_of
from cafe.model.rows.chunk import Chunk
from cafe.model.rows.rows import Rows
from cafe.model.vlm import CAFe
from cafe.objective import TokenVectors, max_sim_info_nce
from cafe.recipes import Objective
from cafe.training.contrastive import ContrastiveBatch
from cafe.training.distributed import gather_around, gather_rows

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, slots=True)
class ReadEmbeddings:
    """What the contrastive losses need of a chunk, in the order of `Rows.pooled`.

    pooled   its embeddings
    tokens   the vectors of their sequences' tokens (`Rows.token_vectors_at`); None: not trained
    """

    pooled: Float[Tensor, "e dim"]
    tokens: TokenVectors | None = None

    def leaf(self, learns: bool) -> ReadEmbeddings:
        """The same values, which get a gradient of their own if `learns`."""
        tokens = self.tokens
        if tokens is not None:
            vectors = tokens.vectors.detach().requires_grad_(learns)
            tokens = tokens._replace(vectors=vectors)
        return ReadEmbeddings(self.pooled.detach().requires_grad_(learns), tokens)

    def surrogate(self, leaf: ReadEmbeddings) -> Float[Tensor, ""] | None:
        """<values, gradient of the leaf>, whose gradient is that of the losses; None: none is."""
        total = None if leaf.pooled.grad is None else (self.pooled * leaf.pooled.grad).sum()
        if self.tokens is None or leaf.tokens is None:
            return total
        gradient = leaf.tokens.vectors.grad
        # With zero, because DDP waits for the projection's gradient.
        token_total = (self.tokens.vectors * (0.0 if gradient is None else gradient)).sum()
        return token_total if total is None else total + token_total


def read_embedded(
    vlm: CAFe, objective: Objective, states: Float[Tensor, "n hidden"], rows: Rows
) -> ReadEmbeddings:
    """Embeddings, and token vectors if the objective has them, in float32 or wider.

    Args:
        vlm: the model itself.
        objective: says whether token vectors are trained.
        states: final hidden states of all tokens of the rows.
        rows: the chunk's.
    """
    pooled, projection = _wide(states[rows.embedded_at]).mean(dim=1), token_projection_of(vlm.model)
    if not objective.multi_vector_weight or projection is None:
        return ReadEmbeddings(pooled)
    vectors = projected(projection, states[rows.token_vectors_at])
    return ReadEmbeddings(pooled, TokenVectors(_wide(vectors), rows.token_vector_counts))


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def with_tokens(
    batch: ContrastiveBatch, chunks: Sequence[Chunk], embedded: Sequence[ReadEmbeddings]
) -> ContrastiveBatch:
    """The batch with the token vectors of all chunks and ranks, if there are any.

    Gradient flows to this rank's only.
    """
    pairs = zip(chunks, embedded, strict=True)
    parts = [_sides(chunk, one.tokens) for chunk, one in pairs if one.tokens is not None]
    if not parts:
        return batch
    query, target, negatives = (_gathered(side) for side in zip(*parts, strict=True))
    return replace(batch, tokens=(query, target, negatives))


def _sides(chunk: Chunk, tokens: TokenVectors) -> list[TokenVectors]:
    """The token vectors of queries, targets, and hard negatives."""
    lengths = tokens.lengths.split((chunk.pairs, chunk.pairs, len(chunk.negative_ids)))
    vectors = tokens.vectors.split([int(side.sum()) for side in lengths])
    return [TokenVectors(v, n) for v, n in zip(vectors, lengths, strict=True)]


def _gathered(own: Sequence[TokenVectors]) -> TokenVectors:
    vectors = torch.cat([one.vectors for one in own])
    lengths = torch.cat([one.lengths for one in own]).to(vectors.device)
    return TokenVectors(gather_around(vectors), torch.cat(gather_rows(lengths)))


def token_loss(objective: Objective, batch: ContrastiveBatch) -> Float[Tensor, ""]:
    """The contrastive loss of the token vectors; what is no negative of what is as for embeddings.

    (`cafe.training.contrastive.ContrastiveLoss`.)
    """
    assert batch.tokens is not None
    query, target, negatives = batch.tokens
    loose = len(negatives.lengths) > 0
    return max_sim_info_nce(
        query,
        target,
        negatives=negatives if loose else None,
        target_ids=batch.target_ids,
        negative_ids=batch.negative_ids if loose else None,
        query_ids=batch.query_ids,
        content_ids=batch.content_ids,
        temperature=objective.multi_vector_temperature,
        directions=objective.directions,
        dims=objective.multi_vector_dims,
    )
