"""One training step: chunks of examples in, gradients in place, named numbers out.

    batch  what contrasts: all pairs of one optimizer step, over all ranks
    chunk  what fits in memory at once

With one chunk the step is direct. With several it is a gradient-cache step (Gao et al. 2021),
joint: the language loss is computed in the second pass from the same hidden states as the
embeddings, so it costs no forward of its own.

    1. Per chunk, without gradient: embeddings, from rows without answers.
    2. The contrastive loss of the whole batch and its gradient by this rank's embeddings.
    3. Per chunk, with gradient: loss = <embedding, that gradient> + language weight x
       (sum of the chunk's token NLL / token count of the whole batch); one backward.

Ranks average their gradients, so each rank's loss is scaled by the number of ranks: the weights
mean the same on 1 and on 64 GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cafe.model.rows import Chunk, Rows
from cafe.model.vlm import CAFe
from cafe.objective import contrastive_share, joint_loss, language_count, next_token_nll
from cafe.recipes import Objective
from cafe.train.contrast import Contrast, Sides
from cafe.train.distributed import (
    add_over_ranks,
    gather_around,
    gather_rows,
    max_over_ranks,
    sum_over_ranks,
    world_size,
)
from cafe.train.randomness import replay, snapshot, uses_dropout


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """What a step tells, detached.

    contrastive   the contrastive loss of the whole batch (all ranks); 0 without pairs
    language      nats per labelled token, over all ranks
    tokens        labelled tokens of the batch, over all ranks
    pairs         contrastive pairs of the batch, over all ranks
    row_tokens    tokens that this rank's full rows hold, padding included
    chunk_values  one number per chunk, not finite when something in that chunk is not
    """

    contrastive: Tensor
    language: Tensor
    tokens: int
    pairs: int
    row_tokens: int
    chunk_values: list[Tensor]


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """The step of one run.

    model       the `CAFe`, or a wrapper of it (DDP) whose forward is the same
    core        the `CAFe` itself
    backward    how a loss is backpropagated (accelerate's, or `Tensor.backward`)
    autocast    the context of every forward
    no_sync     the context in which a backward leaves other ranks alone
    sharded     every forward and backward is all ranks' together, so all do equally many
    """

    model: nn.Module
    core: CAFe
    contrast: Contrast
    objective: Objective
    backward: Callable[[Tensor], None] = torch.Tensor.backward
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext
    sharded: bool = False

    def __call__(self, chunks: Sequence[Chunk]) -> StepNumbers:
        """Add the gradients of the batch that `chunks` are this rank's share of."""
        device = self.core.device
        pairs = sum_over_ranks(sum(chunk.pairs for chunk in chunks), device)
        own = sum(self._rows(c).label_ids.numel() for c in chunks)
        tokens = sum_over_ranks(own, device)
        count = language_count(self.objective.compat, own, tokens, world_size())
        contrasts = self.objective.contrastive_weight > 0 and pairs > 0
        run = self._direct if len(self.rounds(chunks)) == 1 else self._cached
        contrastive, nll, values = run(chunks, count, contrasts)
        return StepNumbers(
            contrastive=contrastive,
            language=add_over_ranks(nll) / max(tokens, 1),
            tokens=tokens,
            pairs=pairs,
            row_tokens=sum(self._rows(c).input_ids.numel() for c in chunks),
            chunk_values=values,
        )

    def rounds(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The chunks, and for a sharded model the last again until all ranks have as many."""
        most = max_over_ranks(len(chunks), self.core.device) if self.sharded else len(chunks)
        return [*chunks, *[chunks[-1]] * (most - len(chunks))]

    def _rows(self, chunk: Chunk) -> Rows:
        """Without a language loss the answers are not even read."""
        return chunk.rows if self.objective.language_weight > 0 else chunk.embedding_rows

    def _direct(
        self, chunks: Sequence[Chunk], tokens: int, contrasts: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """One chunk: the embeddings that contrast are those that carry the gradient."""
        with self.autocast():
            embedding, nll = self._forward(chunks[0])
        contrastive, gradients = self._contrast(chunks, [embedding.detach()], contrasts)
        value = self._backward(embedding, gradients[0], nll, tokens)
        return contrastive, nll.detach(), [value]

    def _cached(
        self, chunks: Sequence[Chunk], tokens: int, contrasts: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Several chunks: embed all, contrast, then once more with gradient, chunk by chunk."""
        rounds = self.rounds(chunks)
        states, embeddings = [], []
        for chunk in rounds:
            states.append(snapshot(self.core.device))
            embeddings.append(self._embed(chunk) if contrasts else torch.zeros(0, 0))
        del embeddings[len(chunks) :]
        contrastive, gradients = self._contrast(chunks, embeddings, contrasts)
        sums, values = [], []
        for i, chunk in enumerate(chunks):
            with self._synced(i, rounds), replay(states[i], active=contrasts):
                with self.autocast():
                    embedding, nll = self._forward(chunk)
                values.append(self._backward(embedding, gradients[i], nll, tokens))
            sums.append(nll.detach())
        for i in range(len(chunks), len(rounds)):  # other ranks have more: help, and add nothing
            with self._synced(i, rounds):
                with self.autocast():
                    embedding, nll = self._forward(rounds[i])
                self.backward(0 * (embedding.sum() + nll))
        return contrastive, torch.stack(sums).sum(), values

    def _synced(self, i: int, rounds: Sequence[Chunk]) -> AbstractContextManager[object]:
        """The context of a backward: ranks synchronise on the last only."""
        return nullcontext() if i == len(rounds) - 1 else self.no_sync()

    @torch.no_grad()
    def _embed(self, chunk: Chunk) -> Tensor:
        """Pass 1. Dropout must meet the same tokens in both passes, so then it reads full rows."""
        chunk = chunk.to(self.core.device)
        idle = self.sharded and chunk.embedding_rows.input_ids.numel() == 0
        full = idle or uses_dropout(self.core)
        rows = self._rows(chunk) if full else chunk.embedding_rows
        with self.autocast():
            return self._pooled(self._hidden(rows, chunk), rows)

    def _contrast(
        self, chunks: Sequence[Chunk], embeddings: Sequence[Tensor], contrasts: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The contrastive loss, and the weighted loss's gradient by each chunk's embeddings.

        Every rank has the same loss, so what it learns (temperature, bias) gets the same gradient
        everywhere without averaging.
        """
        if not contrasts:
            return torch.zeros((), device=self.core.device), [None] * len(chunks)
        leaves = [embedding.requires_grad_() for embedding in embeddings]
        with torch.enable_grad():
            loss = self.contrast(_gathered(chunks, leaves))
            share = contrastive_share(self.objective.compat, world_size())
            (loss * (self.objective.contrastive_weight * share)).backward()
        return loss.detach(), [leaf.grad for leaf in leaves]

    def _backward(
        self, embedding: Tensor, gradient: Tensor | None, nll: Tensor, tokens: int
    ) -> Tensor:
        """Backpropagate one chunk: <embedding, gradient> stands in for the contrastive term."""
        loss = joint_loss(
            None if gradient is None else (embedding * gradient).sum(),
            nll,
            tokens,
            contrastive_weight=1.0,  # the weight is in the gradient already
            language_weight=self.objective.language_weight,
        )
        self.backward(loss * world_size())
        return loss.detach()

    def _forward(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Embeddings [e, d] and the summed NLL of the labels."""
        chunk = chunk.to(self.core.device)  # one chunk's pictures at a time are on the device
        rows, head = self._rows(chunk), self.core.lm_head
        hidden = self._hidden(rows, chunk)
        states = hidden.flatten(0, 1)[rows.label_source]
        nll, _ = next_token_nll(
            states, rows.label_ids, head.weight, bias=head.bias, softcap=self.core.logit_softcap
        )
        return self._pooled(hidden, rows), nll

    def _hidden(self, rows: Rows, chunk: Chunk) -> Tensor:
        if rows.input_ids.numel() == 0:
            return torch.zeros(0, 1, self.core.embedding_dimension, device=self.core.device)
        return self.model(rows, chunk.vision)

    @staticmethod
    def _pooled(hidden: Tensor, rows: Rows) -> Tensor:
        pooled = hidden.flatten(0, 1)[rows.pooled]
        return pooled if pooled.dtype == torch.float64 else pooled.float()


def _gathered(chunks: Sequence[Chunk], embeddings: Sequence[Tensor]) -> Sides:
    """The batch's sides over all chunks and ranks; gradient flows to this rank's only."""
    device = embeddings[0].device
    query, target, negatives = [], [], []
    for chunk, e in zip(chunks, embeddings, strict=True):
        query.append(e[: chunk.pairs])
        target.append(e[chunk.pairs : 2 * chunk.pairs])
        negatives.append(e[2 * chunk.pairs :])
    return Sides(
        query=gather_around(torch.cat(query)),
        target=gather_around(torch.cat(target)),
        negatives=gather_around(torch.cat(negatives)),
        target_ids=torch.cat(gather_rows(torch.cat([c.target_ids for c in chunks]).to(device))),
        negative_ids=torch.cat(gather_rows(torch.cat([c.negative_ids for c in chunks]).to(device))),
    )
