"""One training step: chunks of examples in, gradients in place, named numbers out.

    batch  what contrasts: all pairs of one optimizer step, over all ranks
    chunk  what fits in memory

The pairs of a batch are one another's in-batch negatives. With one chunk the step is direct. With
several it is a gradient-cache step (GradCache: Gao et al. 2021, arXiv 2101.06983), made joint: the
language loss is computed in the second pass from the same hidden states as the embeddings, so it
needs no forward of its own.

    1. Per chunk, without gradient: embeddings, from rows without answers. No chunk is kept here;
       for step 3 it comes again (`cafe.training.chunks`).
    2. The contrastive loss of the whole batch and its gradient with respect to this rank's
       embeddings.
    3. Per chunk, with gradient: loss = <embedding, that gradient> + language weight x
       (sum of the chunk's token NLL / token count of the whole batch); one backward. Match
       questions, which step 1 has shown to be hard, are further branches of these rows
       (`cafe.training.matching`); with them a single chunk is read twice, too.

Ranks average their gradients, so each rank's loss is scaled by the number of ranks: the weights
mean the same on 1 and on 64 GPUs.

Forwards and backwards of a wrapped or sharded model are collective (DDP agrees on its buckets in
the first forward with gradient after the first step). So all ranks take the same path through a
step, and run it the same number of times: a rank with fewer chunks repeats its last one, idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cafe.model.rows.chunk import Chunk
from cafe.model.rows.matching import MatchQuestion
from cafe.model.rows.rows import Rows
from cafe.model.vlm import CAFe
from cafe.objective import (
    contrastive_share,
    joint_loss,
    language_count,
    match_loss,
    next_token_nll,
)
from cafe.recipes import Objective
from cafe.training.chunks import StepChunks, planned_pairs
from cafe.training.contrastive import ContrastiveBatch, ContrastiveLoss, gathered_batch
from cafe.training.distributed import (
    add_over_ranks,
    max_over_ranks,
    sum_over_ranks,
    world_size,
)
from cafe.training.matching import Matcher
from cafe.training.multi_vector import ReadEmbeddings, read_embedded, token_loss, with_tokens
from cafe.training.soft_labels import SoftLabels, embeddings_of, soft_labels
from cafe.training.state import replay, torch_random_state, uses_dropout

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Metrics of one step, detached.

    contrastive   the contrastive loss of the whole batch (all ranks); 0 without pairs
    language      nats per labelled token, over all ranks
    thought       the contrastive loss of the embeddings after a thought; None: none are trained
    soft_label    divergence from a teacher's soft labels, of the whole batch; None: there is none
    match         cross-entropy of the match questions of all ranks, in nats; None: none are trained
    multi_vector  the contrastive loss of the tokens' vectors; None: none are trained
    tokens        labelled tokens of the batch, over all ranks
    pairs         contrastive pairs of the batch, over all ranks
    row_tokens    tokens that this rank's full rows hold, padding included
    padding       how many of them are padding
    chunk_values  one scalar per chunk, not finite when something in that chunk is not
    sides         embeddings of all queries and of all targets; None: nothing contrasts
    """

    contrastive: Float[Tensor, ""]
    language: Float[Tensor, ""]
    thought: Float[Tensor, ""] | None
    soft_label: Float[Tensor, ""] | None
    match: Float[Tensor, ""] | None
    multi_vector: Float[Tensor, ""] | None
    tokens: int
    pairs: int
    row_tokens: int
    padding: int
    chunk_values: list[Float[Tensor, ""]]
    sides: tuple[Tensor, Tensor] | None = None


@dataclass(slots=True)
class _Totals:
    """What is kept and counted of this rank's chunks, as they pass.

    chunks   without rows and images; those that pad the share included
    labels   number of labelled tokens
    row_tokens, padding   as in `StepMetrics`
    """

    chunks: list[Chunk] = field(default_factory=list)
    labels: int = 0
    row_tokens: int = 0
    padding: int = 0

    def add(self, chunk: Chunk, rows: Rows, *, own: bool = True) -> None:
        """`own`: the chunk is of this rank's share, and does not pad it."""
        self.chunks.append(chunk.without_inputs())
        if own:
            self.labels += rows.label_ids.numel()

    def computed(self, rows: Rows) -> None:
        """Count rows that were computed with gradient."""
        self.row_tokens += rows.computed_tokens
        self.padding += rows.computed_tokens - rows.tokens


@dataclass(frozen=True, slots=True)
class _Read:
    """A chunk's forward with gradient.

    embedded   embeddings, and the vectors of their tokens
    nll        the summed NLL of the labels
    match      the chunk's part of the loss of the match questions; None: it is asked none
    """

    embedded: ReadEmbeddings
    nll: Tensor
    match: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """The step of one run.

    model       the `CAFe`, or a wrapper of it (DDP) whose forward is the same
    unwrapped  the `CAFe` itself
    backward    how a loss is backpropagated (accelerate's, or `Tensor.backward`)
    autocast    the context of every forward
    no_sync     the context of a backward that does not reduce gradients over ranks
    sharded     every forward is a collective of all ranks, so none may be skipped
    matcher     chooses and reads match questions, if the objective has them
    """

    model: nn.Module
    unwrapped: CAFe
    contrast: ContrastiveLoss
    objective: Objective
    backward: Callable[[Tensor], None] = torch.Tensor.backward
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext
    sharded: bool = False
    matcher: Matcher | None = None

    def __call__(self, chunks: Sequence[Chunk] | StepChunks) -> StepMetrics:
        """Accumulate the gradients of one batch in the parameters.

        Args:
            chunks: This rank's share of the batch; at least one. With several on any rank they are
                iterated over twice.

        Returns:
            The losses of the whole batch, and how much was computed.
        """
        most = max_over_ranks(len(chunks), self.unwrapped.device)
        direct = most == 1 and self.matcher is None
        return self._direct(chunks[0]) if direct else self._cached(chunks, most)

    def padded_chunks(self, chunks: Sequence[Chunk] | StepChunks, most: int) -> Iterator[Chunk]:
        """The chunks, followed by idle copies of the last one until there are `most`."""
        chunk = None
        for chunk in chunks:
            yield chunk
        for _ in range(most - len(chunks)):
            assert chunk is not None
            yield chunk.idle()

    def _rows(self, chunk: Chunk) -> Rows:
        """Without a language loss the answers are left out of the forward, too."""
        return chunk.rows if self.objective.language_weight > 0 else chunk.embedding_rows

    def _direct(self, chunk: Chunk) -> StepMetrics:
        """One chunk: the embeddings in the contrastive loss are those that carry the gradient."""
        totals, rows = _Totals(), self._rows(chunk)
        totals.add(chunk, rows)
        totals.computed(rows)
        pairs, tokens, count = self._counts(totals)
        with self.autocast():
            read = self._forward(chunk, rows)
        contrasts = self.objective.contrastive_weight > 0 and pairs > 0
        batch, leaves = self._batch(totals.chunks, [read.embedded], contrasts)
        losses = self._contrast(batch, soft_labels(self.objective, batch, totals.chunks))
        value = self._backward(read, leaves[0], count)
        metrics = self._metrics(totals, losses, read.nll.detach(), (tokens, pairs), [value])
        return replace(metrics, sides=_sides(batch))

    def _cached(self, chunks: Sequence[Chunk] | StepChunks, most: int) -> StepMetrics:
        """Several chunks: embed all, contrast, then a second pass with gradient, chunk by chunk."""
        device = self.unwrapped.device
        embeds = self.objective.contrastive_weight > 0
        embeds = sum_over_ranks(planned_pairs(chunks), device) > 0 and embeds
        totals, states, embeddings = _Totals(), [], []
        for number, chunk in enumerate(self.padded_chunks(chunks, most)):
            totals.add(chunk, self._rows(chunk), own=number < len(chunks))
            states.append(torch_random_state(device))
            embeddings.append(self._embed(chunk) if embeds else ReadEmbeddings(torch.zeros(0, 0)))
        pairs, tokens, count = self._counts(totals)
        batch, leaves = self._batch(totals.chunks, embeddings, embeds and pairs > 0)
        plan = self.matcher.plan(totals.chunks, batch) if self.matcher and batch else None
        judged = None if plan is None else (self.padded_chunks(chunks, most), plan, self._odds)
        losses = self._contrast(batch, soft_labels(self.objective, batch, totals.chunks, judged))
        sums, matches, values = [], [], []
        for i, chunk in enumerate(self.padded_chunks(chunks, most)):
            rows, right = self._asked_rows(chunk, plan.questions[i] if plan else ())
            if i < len(chunks):
                totals.computed(rows)
            with self._synced(i, most), replay(states[i], device, active=embeds):
                with self.autocast():
                    read = self._forward(chunk, rows, right, plan.counts if plan else None)
                values.append(self._backward(read, leaves[i], count))
            sums.append(read.nll.detach())
            matches += [] if read.match is None else [read.match.detach()]
        nll, values = torch.stack(sums).sum(), values[: len(chunks)]
        match = torch.stack([*matches, nll.new_zeros(())]).sum() if self.matcher else None
        metrics = self._metrics(totals, losses, nll, (tokens, pairs), values, match)
        return replace(metrics, sides=_sides(batch))

    def _asked_rows(
        self, chunk: Chunk, questions: Sequence[MatchQuestion]
    ) -> tuple[Rows, list[bool]]:
        """The rows of the second pass, and for each match question whether it is right."""
        if chunk.match is None or not questions:
            return self._rows(chunk), []
        return chunk.match.rows(questions, answers=self.objective.language_weight > 0)

    def _counts(self, totals: _Totals) -> tuple[int, int, int]:
        """Pairs and labelled tokens of all ranks, and what the language loss is divided by."""
        device = self.unwrapped.device
        pairs = sum_over_ranks(sum(chunk.pairs for chunk in totals.chunks), device)
        tokens = sum_over_ranks(totals.labels, device)
        compat = self.objective.compat
        return pairs, tokens, language_count(compat, totals.labels, tokens, world_size())

    @staticmethod
    def _metrics(
        totals: _Totals,
        losses: Mapping[str, Tensor],
        nll: Tensor,
        counts: tuple[int, int],
        values: list[Tensor],
        match: Tensor | None = None,
    ) -> StepMetrics:
        """`nll`, `match` are this rank's; `counts` are labelled tokens and pairs of all ranks."""
        tokens, pairs = counts
        return StepMetrics(
            contrastive=losses["contrastive"],
            thought=losses.get("thought"),
            soft_label=losses.get("soft_label"),
            multi_vector=losses.get("multi_vector"),
            language=add_over_ranks(nll) / max(tokens, 1),
            match=None if match is None else add_over_ranks(match),
            tokens=tokens,
            pairs=pairs,
            row_tokens=totals.row_tokens,
            padding=totals.padding,
            chunk_values=values,
        )

    def _synced(self, i: int, count: int) -> AbstractContextManager[object]:
        """The context of a backward: ranks reduce gradients in the last one only."""
        return nullcontext() if i == count - 1 else self.no_sync()

    @torch.no_grad()
    def _embed(self, chunk: Chunk) -> ReadEmbeddings:
        """Pass 1. With dropout both passes need the same tokens, so it then reads full rows."""
        chunk = chunk.to(self.unwrapped.device)
        idle = self.sharded and chunk.embedding_rows.input_ids.numel() == 0
        full = idle or uses_dropout(self.unwrapped)
        rows = self._rows(chunk) if full else chunk.embedding_rows
        with self.autocast():
            return self._embedded(self._hidden(rows, chunk), rows)

    def _batch(
        self, chunks: Sequence[Chunk], embeddings: Sequence[ReadEmbeddings], contrasts: bool
    ) -> tuple[ContrastiveBatch | None, list[ReadEmbeddings]]:
        """The batch of all ranks (None: nothing contrasts); the leaves that get its gradient."""
        leaves = [embedded.leaf(contrasts) for embedded in embeddings]
        if not contrasts:
            return None, leaves
        with torch.enable_grad():
            batch = gathered_batch(chunks, [leaf.pooled for leaf in leaves])
            return with_tokens(batch, chunks, leaves), leaves

    def _odds(self, chunk: Chunk, questions: Sequence[MatchQuestion]) -> Tensor:
        """The log-odds of the chunk's match questions, in the order of `Rows.asked`."""
        assert self.matcher is not None
        chunk = chunk.to(self.unwrapped.device)
        rows = chunk.embedding_rows  # read for nothing, where forwards are collective
        if chunk.match is not None and questions:
            rows = chunk.match.rows(questions, answers=False)[0].to(self.unwrapped.device)
        elif not self.sharded:
            return torch.zeros(0, device=self.unwrapped.device)
        with self.autocast():
            states = self._hidden(rows, chunk).flatten(0, 1)
            return self.matcher.log_odds(states[rows.asked], self.unwrapped.lm_head)

    def _contrast(
        self, batch: ContrastiveBatch | None, labels: SoftLabels | None
    ) -> dict[str, Tensor]:
        """The losses of the whole batch, by their names in `StepMetrics`, detached.

        The leaves get the gradient of the weighted sum. Every rank computes the same losses, so
        its own parameters (temperature, bias) get the same gradient everywhere without averaging.
        """
        objective = self.objective
        weights = {
            "contrastive": objective.contrastive_weight
            * contrastive_share(objective.compat, world_size()),
            "thought": objective.thought_weight,
            "soft_label": objective.soft_label_weight,
            "multi_vector": objective.multi_vector_weight,
        }
        if batch is None:
            nothing = torch.zeros((), device=self.unwrapped.device)
            trained = (name for name, weight in weights.items() if weight > 0)
            return dict.fromkeys(("contrastive", *trained), nothing)
        with torch.enable_grad():
            losses = {"contrastive": self.contrast(batch)}
            if objective.thought_weight > 0:
                losses["thought"] = self.contrast(batch.after_thoughts())
            if labels is not None:
                losses["soft_label"] = self.contrast.soft_labels(
                    embeddings_of(batch), labels.cells, labels.scores
                )
            if objective.multi_vector_weight > 0:
                losses["multi_vector"] = token_loss(objective, batch)
            torch.stack([weights[name] * loss for name, loss in losses.items()]).sum().backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _backward(self, read: _Read, leaf: ReadEmbeddings, tokens: int) -> Tensor:
        """Backpropagate one chunk: <embedding, gradient> stands in for the contrastive term."""
        loss = joint_loss(
            read.embedded.surrogate(leaf),
            read.nll,
            tokens,
            contrastive_weight=1.0,  # the gradient includes the weight already
            language_weight=self.objective.language_weight,
            match=read.match,
            match_weight=self.objective.match_weight,
        )
        self.backward(loss * world_size())
        return loss.detach()

    def _forward(
        self,
        chunk: Chunk,
        rows: Rows,
        right: Sequence[bool] = (),
        counts: tuple[int, int] | None = None,
    ) -> _Read:
        """What is read of the chunk's rows; `counts` of match questions over all ranks."""
        chunk = chunk.to(self.unwrapped.device)  # only one chunk's images are on the device
        rows, head = rows.to(self.unwrapped.device), self.unwrapped.lm_head
        hidden = self._hidden(rows, chunk)
        states = hidden.flatten(0, 1)
        nll, _ = next_token_nll(
            states[rows.label_source],
            rows.label_ids,
            head.weight,
            bias=head.bias,
            softcap=self.unwrapped.logit_softcap,
        )
        match = None
        if self.matcher is not None and counts is not None and right:
            odds = self.matcher.log_odds(states[rows.asked], head)
            match = match_loss(odds, torch.tensor(right, device=odds.device), counts)
        return _Read(self._embedded(hidden, rows), nll, match)

    def _hidden(self, rows: Rows, chunk: Chunk) -> Tensor:
        if rows.input_ids.numel() == 0:
            size, head = self.unwrapped.embedding_dimension, self.unwrapped.lm_head.weight
            return torch.zeros(0, 1, size, device=self.unwrapped.device, dtype=head.dtype)
        return self.model(rows, chunk.vision, read_only=True)

    def _embedded(self, hidden: Tensor, rows: Rows) -> ReadEmbeddings:
        return read_embedded(self.unwrapped, self.objective, hidden.flatten(0, 1), rows)


def _sides(batch: ContrastiveBatch | None) -> tuple[Tensor, Tensor] | None:
    return None if batch is None else (batch.query.detach(), batch.target.detach())
