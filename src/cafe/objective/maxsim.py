"""Late interaction: how well many vectors of one item match many vectors of another, and its loss.

An item is a list of unit vectors, one per token. Its score with another item (MaxSim, ColBERT,
arXiv 2004.12832), divided by its own number of vectors, is the mean over its vectors of the largest
cosine with a vector of the other:

    s(a, b) = (1/|a|) sum_i max_j a_i . b_j                          in [-1, 1], not symmetric

**Never [n, m, tokens, tokens].** For 256 pairs of 30 and 700 tokens that would be 5.5 GB. The
scores are computed in blocks of items, each with at most `block_elements` cosines (or those of one
pair of items, if they are more), and the backward pass computes each block again instead of keeping
it: what stays until backward is the vectors and the [n, m] scores. The gradient of a maximum goes
to the vector that reached it, and is written into the block's own memory, as a matrix W with
d loss / d a = W b and d loss / d b = W' a.

**Precision.** As in `cafe.objective.contrastive`: float32 (float64 for float64 inputs), also under
autocast.

Shapes: n pairs, m explicit hard negatives, k = n + m candidates, d coordinates; tokens of all items
one after another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cafe.objective.contrastive import Directions
from cafe.objective.negatives import duplicates

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Bool, Float, Int

__all__ = ["TokenVectors", "max_sim", "max_sim_info_nce"]

BLOCK_ELEMENTS = 2**24
"""Cosines that are in memory at a time: 64 MiB in float32."""


class TokenVectors(NamedTuple):
    """The vectors of some items.

    vectors   of all items, one item after another, of any length
    lengths   number of vectors of each item, at least one
    """

    vectors: Float[Tensor, "tokens d"]
    lengths: Int[Tensor, " items"]


def max_sim_info_nce(
    query: TokenVectors,
    target: TokenVectors,
    *,
    negatives: TokenVectors | None = None,
    target_ids: Int[Tensor, " n"] | None = None,
    negative_ids: Int[Tensor, " m"] | None = None,
    query_ids: Int[Tensor, " n"] | None = None,
    content_ids: Int[Tensor, " n"] | None = None,
    temperature: float = 0.02,
    directions: Directions = "both",
    dims: Sequence[int] | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> Float[Tensor, ""]:
    """InfoNCE over MaxSim scores, averaged over the n pairs; duplicates as in `info_nce`.

        query_to_target   mean over i of  -log( exp(s(q_i, t_i)/T) / sum_j exp(s(q_i, t_j)/T) )
        target_to_query   mean over i of  -log( exp(s(t_i, q_i)/T) / sum_j exp(s(t_i, q_j)/T) )
        both              the mean of the two

    In each direction the side that searches has the mean over its vectors, as in a search. (ColPali
    trains the first direction, at T = 0.02.)

    Args:
        query: vectors of any length; they are L2-normalised here.
        target: those of what belongs to each query.
        negatives: explicit hard negatives, additional columns for every query.
        target_ids: equal ids mark equal targets, over everything that was gathered.
        negative_ids: ids of the negatives in the same numbering.
        query_ids: equal ids mark equal queries.
        content_ids: a second numbering of targets and negatives, shared with `query_ids`.
        temperature: divides the scores.
        directions: which softmaxes to average.
        dims: Matryoshka widths: the loss is the mean over widths w of the loss on the first w
            coordinates, normalised again. None is the full width only.
        block_elements: cosines in memory at a time.

    Raises:
        ValueError: no pairs, sides of unequal numbers, or a width out of range.
    """
    n, width = len(query.lengths), query.vectors.shape[1]
    if n == 0 or len(target.lengths) != n:
        raise ValueError(f"{n} queries and {len(target.lengths)} targets; give one for each")
    if dims is not None and not (dims and all(1 <= w <= width for w in dims)):
        raise ValueError(f"dims is {list(dims)}; use widths between 1 and {width}, the vectors'")
    candidates = target if negatives is None else _joined(target, negatives)
    known = duplicates(n, len(candidates.lengths), target_ids, negative_ids, query_ids, content_ids)
    losses = []
    for w in dims or (width,):
        scores = max_sim(_unit(query, w), _unit(candidates, w), directions, block_elements)
        losses += _cross_entropies(scores, known, temperature)
    return torch.stack(losses).mean()


def _cross_entropies(
    scores: tuple[Float[Tensor, "n k"] | None, Float[Tensor, "k n"] | None],
    known: Bool[Tensor, "n k"] | None,
    temperature: float,
) -> list[Float[Tensor, ""]]:
    """One loss for each direction that there is."""
    forward, reverse = scores
    losses = []
    if forward is not None:
        logits = forward / temperature
        hidden = logits if known is None else logits.masked_fill(known, -math.inf)
        losses.append((hidden.logsumexp(dim=1) - logits.diagonal()).mean())
    if reverse is not None:
        n = reverse.shape[1]  # an explicit negative has no query of its own
        logits = reverse[:n] / temperature
        hidden = logits if known is None else logits.masked_fill(known[:, :n].T, -math.inf)
        losses.append((hidden.logsumexp(dim=1) - logits.diagonal()).mean())
    return losses


def max_sim(
    query: TokenVectors,
    target: TokenVectors,
    directions: Directions = "both",
    block_elements: int = BLOCK_ELEMENTS,
) -> tuple[Float[Tensor, "n k"] | None, Float[Tensor, "k n"] | None]:
    """The scores of every query with every target, and of every target with every query.

    Args:
        query: unit vectors.
        target: unit vectors, as wide.
        directions: None is returned for the one that is not asked for.
        block_elements: cosines in memory at a time.

    Raises:
        ValueError: an item without vectors, numbers that do not fit, or no room for a cosine.
    """
    for side in (query, target):
        lengths = side.lengths
        if len(lengths) and (int(lengths.min()) < 1 or int(lengths.sum()) != len(side.vectors)):
            raise ValueError(
                f"{len(lengths)} items of {lengths.tolist()} vectors, and {len(side.vectors)} "
                "vectors; each needs at least one"
            )
    if block_elements < 1:
        raise ValueError(f"block_elements is {block_elements}; use 1 or more")
    with torch.autocast(query.vectors.device.type, enabled=False):
        forward, reverse = _MaxSim.apply(
            query.vectors, target.vectors, query.lengths.cpu(), target.lengths.cpu(), block_elements
        )
    return (
        None if directions == "target_to_query" else forward,
        None if directions == "query_to_target" else reverse.T,
    )


class _MaxSim(torch.autograd.Function):
    """Scores of both directions, [n, k] each: both maxima of a block of cosines are cheap."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, target: Tensor, lengths: Tensor, others: Tensor, budget: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(query, target)
        ctx.rest = lengths, others, budget
        scores = query.new_zeros(len(lengths), len(others))
        reverse = scores.clone()
        for a, b in _blocks(lengths, others, budget, query.device):
            cosines = _cosines(a, b, query, target)
            best = cosines.amax(3).masked_fill(~a.real[:, :, None], 0.0)  # [a, t, b]
            back = cosines.amax(1).masked_fill(~b.real, 0.0)  # [a, b, u]
            where = a.items[:, None], b.items[None]
            scores[where] = best.sum(1) / a.lengths[:, None]
            reverse[where] = back.sum(2) / b.lengths
        return scores, reverse

    @staticmethod
    @torch.autograd.function.once_differentiable  # its stub hides the name of `ctx` from pyright:
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        query, target = ctx.saved_tensors
        lengths, others, budget = ctx.rest
        of_query, of_target = torch.zeros_like(query), torch.zeros_like(target)
        for a, b in _blocks(lengths, others, budget, query.device):
            cosines = _cosines(a, b, query, target)  # a backward pass runs without autocast
            best, back = cosines.argmax(3, keepdim=True), cosines.argmax(1, keepdim=True)
            where = a.items[:, None], b.items[None]
            forward = (grad_outputs[0][where] / a.lengths[:, None])[:, None, :] * a.real[:, :, None]
            reverse = (grad_outputs[1][where] / b.lengths)[:, :, None] * b.real
            weights = cosines.zero_()
            weights.scatter_add_(3, best, forward[..., None])
            weights.scatter_add_(1, back, reverse[:, None])
            flat = weights.view(a.tokens.numel(), b.tokens.numel())
            of_query.index_add_(0, a.tokens.flatten(), flat @ target[b.tokens.flatten()])
            of_target.index_add_(0, b.tokens.flatten(), flat.T @ query[a.tokens.flatten()])
        return of_query, of_target, None, None, None


class _Items(NamedTuple):
    """Some items, padded to the longest of them.

    items     their numbers
    tokens    the indices of their vectors; a padded place has that of some vector
    real      False at padded places
    lengths   number of vectors of each
    """

    items: Int[Tensor, " a"]
    tokens: Int[Tensor, "a t"]
    real: Bool[Tensor, "a t"]
    lengths: Int[Tensor, " a"]


def _cosines(a: _Items, b: _Items, query: Tensor, target: Tensor) -> Float[Tensor, "a t b u"]:
    """The cosines of two groups of items; minus infinity with what is padded."""
    flat = query[a.tokens.flatten()] @ target[b.tokens.flatten()].T
    cosines = flat.view(*a.tokens.shape, *b.tokens.shape)
    cosines.masked_fill_(~a.real[:, :, None, None], -math.inf)
    return cosines.masked_fill_(~b.real, -math.inf)


def _blocks(
    lengths: Tensor, others: Tensor, budget: int, device: torch.device
) -> Iterator[tuple[_Items, _Items]]:
    """Pairs of groups that cover all pairs of items, each within the budget where that can be."""
    if not len(lengths) or not len(others):
        return
    longest = int(lengths.max())
    columns = _groups(others, max(budget // longest, 1), math.isqrt(budget), device)
    widest = max(b.tokens.numel() for b in columns)
    rows = _groups(lengths, max(budget // widest, 1), budget, device)
    yield from ((a, b) for a in rows for b in columns)


def _groups(lengths: Tensor, most: int, usual: int, device: torch.device) -> list[_Items]:
    """Items of similar length together, up to a number of places, the padded ones included."""
    room = min(most, max(usual, int(lengths.max())))
    order = lengths.argsort(stable=True).tolist()
    counts = lengths.tolist()
    begins = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)[:-1]])
    groups: list[list[int]] = [[]]
    for item in order:  # the last of a group is its longest
        if groups[-1] and (len(groups[-1]) + 1) * counts[item] > room:
            groups.append([])
        groups[-1].append(item)
    return [_padded(torch.tensor(group), begins, lengths, device) for group in groups]


def _padded(items: Tensor, begins: Tensor, lengths: Tensor, device: torch.device) -> _Items:
    items = items.to(lengths.device)
    own, places = lengths[items], torch.arange(int(lengths[items].max()), device=lengths.device)
    real = places < own[:, None]
    tokens = (begins[items][:, None] + places).where(real, begins[items][:, None])
    return _Items(items.to(device), tokens.to(device), real.to(device), own.to(device))


def _joined(a: TokenVectors, b: TokenVectors) -> TokenVectors:
    return TokenVectors(torch.cat([a.vectors, b.vectors]), torch.cat([a.lengths, b.lengths]))


def _unit(items: TokenVectors, width: int) -> TokenVectors:
    """The first coordinates, normalised, in float32 or wider, even under autocast."""
    dtype = torch.promote_types(items.vectors.dtype, torch.float32)
    with torch.autocast(items.vectors.device.type, enabled=False):
        unit = functional.normalize(items.vectors[:, :width].to(dtype), dim=1)
    return items._replace(vectors=unit)
