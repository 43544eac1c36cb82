"""Contrastive losses: pairs of embeddings in, one number out. Temperature always divides.

Row i of `query` and row i of `target` belong together. Everything else in the batch is a negative,
unless its id says that it is the same thing. No function here knows a model, a rank or a world
size: the caller gathers first and passes the whole batch.

Shapes: n pairs, m explicit hard negatives, d embedding coordinates; s are the n x (n + m) cosines
of queries against targets, then negatives; T is the temperature.

**Precision.** Cosines are computed in float32 (float64 for float64 inputs) also when the inputs are
bfloat16 or autocast is on: a bfloat16 cosine near 1 is off by up to 0.002, and at T = 0.05 a
logit by 0.04. The loss has the dtype of the cosines.

**Memory.** One matrix of n * (n + m) floats stays until backward, a second one if the temperature
is learned, and a boolean one if ids are given; backward peaks at five or six. For n = 4,096 in
float32 one is 64 MiB. Each Matryoshka width keeps its own.

**Duplicates.** Where `target_ids[j] == target_ids[i]` and j != i, pair j is excluded from the
denominators of pair i in both directions: it is not a negative, and not a second positive either. A
hard negative is a column for every query; it is excluded for queries with the same target id.
With `query_ids`, a candidate is excluded for query i also where any pair of the batch with an equal
query has that candidate as its target (another caption of the same image, and whatever equals it),
and where the candidate is the query itself. `content_ids` are a second numbering of the targets:
candidates are equal if either says so.

**Hardness** (LLaVE, arXiv 2503.04812, eq. 5). A negative's term in a denominator is weighted by
w_ij = exp(hardness * sg(s_ij)), that is, `hardness * sg(s_ij)` is added to its logit; the positive
keeps weight 1. For the direction query -> target of pair i,

    loss_i = -log( exp(s_ii/T) / Z_i ),    Z_i = exp(s_ii/T) + sum_j w_ij exp(s_ij/T)

    d loss_i / d s_ij = (1/T) * w_ij exp(s_ij/T) / Z_i    (j != i)

sg stops the gradient: the weight says how much a negative counts and must not be optimised. Without
sg the factor would be (1/T + hardness), and negatives would merely have a lower temperature than
the positive. Both directions and explicit negatives are weighted (what sentence-transformers calls
`all_negatives`). LLaVE uses 9.

**False negatives.** With `false_negative_margin` m, a candidate with s_ij > sg(s_ii) + m is left
out of the denominator of pair i, as if its id said that it is right, too (ms-swift's
INFONCE_MASK_FAKE_NEGATIVE, whose margin is 0.1; Qwen3-Embedding, arXiv 2506.05176, eq. 1). In the
other direction it is the query whose cosine exceeds that of the target's own.

**Same side.** With `same_side` the denominators of pair i also have exp(s(q_i, q_j)/T) and
exp(s(d_i, d_j)/T) for all pairs j that are not known to be right for i, as in Qwen3-Embedding's
denominator and ms-swift (INFONCE_INCLUDE_QQ, INFONCE_INCLUDE_DD): the margin applies to the queries
among themselves, and not to the targets. Hardness weights neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from cafe.objective.negatives import duplicates, same_side_logits, without_false

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Bool, Float, Int

__all__ = ["Directions", "Rounding", "clamped_temperature", "info_nce", "rounded", "sigmoid_loss"]

Directions = Literal["both", "query_to_target", "target_to_query"]
Rounding = Literal["float32", "int8", "binary"]


def info_nce(
    query: Float[Tensor, "n d"],
    target: Float[Tensor, "n d"],
    *,
    negatives: Float[Tensor, "m d"] | None = None,
    target_ids: Int[Tensor, " n"] | None = None,
    negative_ids: Int[Tensor, " m"] | None = None,
    query_ids: Int[Tensor, " n"] | None = None,
    content_ids: Int[Tensor, " n"] | None = None,
    temperature: float | Float[Tensor, ""] = 0.05,
    directions: Directions = "both",
    hardness: float = 0.0,
    dims: Sequence[int] | None = None,
    false_negative_margin: float | None = None,
    same_side: bool = False,
    roundings: Sequence[Rounding] = ("float32",),
) -> Float[Tensor, ""]:
    """InfoNCE over cosines, averaged over the n pairs.

    Duplicates and hardness are explained in the module's docstring.

        query_to_target   mean over i of  -log( exp(s_ii/T) / sum_j exp(s_ij/T) )
        target_to_query   mean over i of  -log( exp(s_ii/T) / sum_j exp(s_ji/T) )
        both              the mean of the two, as the official CAFe code has it at T = 0.05
                          (the formula its paper prints is the sum, which is twice this)

    Args:
        query: embeddings of any length; they are L2-normalised here.
        target: embeddings of what belongs to each query.
        negatives: embeddings of explicit hard negatives, additional columns for every query. They
            have no query of their own, so they take no part in `target_to_query`.
        target_ids: equal ids mark equal targets, over everything that was gathered.
        negative_ids: ids of the negatives in the same numbering; needs `target_ids`.
        query_ids: equal ids mark equal queries; needs `target_ids`.
        content_ids: a second numbering of targets and negatives, shared with `query_ids`.
        temperature: a number, or a scalar tensor, which receives a gradient.
        directions: which softmaxes to average.
        hardness: strength of the weighting of hard negatives; 0 weights all equally.
        dims: Matryoshka widths: the loss is the mean over widths w of the loss on the first w
            coordinates, normalised again. None is the full width only.
        false_negative_margin: candidates whose cosine exceeds the positive's by more are taken for
            right and left out; None: none are (see "False negatives").
        same_side: other queries and other targets are negatives, too (see "Same side").
        roundings: the loss is the mean over these, of embeddings rounded so (`rounded`).

    Raises:
        ValueError: no pairs, shapes that do not fit, a width out of range, a temperature that is
            not positive, a negative hardness, an unknown direction, or ids without what they name.
    """
    _check_batch(query, target, negatives, target_ids, negative_ids)
    _check_options(temperature, directions, hardness)
    n = len(query)
    candidates = target if negatives is None else torch.cat([target, negatives])
    known = duplicates(n, len(candidates), target_ids, negative_ids, query_ids, content_ids)
    rules = _Rules(temperature, directions, hardness, false_negative_margin, same_side)
    with torch.autocast(query.device.type, enabled=False):
        losses = [
            _of_unit(*_unit(query, candidates, width, rounding), known, query_ids, rules)
            for width, rounding in product(_widths(dims, query.shape[1]), roundings)
        ]
    return torch.stack(losses).mean()


class _Rules(NamedTuple):
    """The options of `info_nce` that do not change which embeddings it is computed of."""

    temperature: float | Tensor
    directions: Directions
    hardness: float
    false_negative_margin: float | None
    same_side: bool


def _of_unit(
    query: Float[Tensor, "n d"],
    candidates: Float[Tensor, "k d"],
    known: Bool[Tensor, "n k"] | None,
    query_ids: Int[Tensor, " n"] | None,
    rules: _Rules,
) -> Float[Tensor, ""]:
    """InfoNCE of unit embeddings; `known` are cells that are right under another index."""
    n = len(query)
    cosines = query @ candidates.T
    logits = cosines / rules.temperature
    if rules.hardness > 0:
        logits = logits + (rules.hardness * cosines.detach()).fill_diagonal_(0.0)
    if known is not None:
        logits = logits.masked_fill_(known, -math.inf)
    threshold = None
    if rules.false_negative_margin is not None:
        threshold = cosines.detach().diagonal() + rules.false_negative_margin
    others: list[Tensor] = []
    if rules.same_side:
        others = same_side_logits(
            query, candidates[:n], rules.temperature, known, query_ids, threshold
        )
    positives = logits.diagonal()
    terms = []
    if rules.directions != "target_to_query":
        rows = without_false(logits, cosines, threshold)
        rows = torch.cat([rows, *others], dim=1) if others else rows
        terms.append((torch.logsumexp(rows, dim=1) - positives).mean())
    if rules.directions != "query_to_target":
        # Explicit negatives are targets without a query: they have no row here.
        rows = without_false(logits[:, :n].T, cosines[:, :n].T, threshold)
        rows = torch.cat([rows, *others], dim=1) if others else rows
        terms.append((torch.logsumexp(rows, dim=1) - positives).mean())
    return torch.stack(terms).mean()


def sigmoid_loss(
    query: Float[Tensor, "n d"],
    target: Float[Tensor, "n d"],
    *,
    temperature: float | Float[Tensor, ""],
    bias: float | Float[Tensor, ""],
    negatives: Float[Tensor, "m d"] | None = None,
    target_ids: Int[Tensor, " n"] | None = None,
    negative_ids: Int[Tensor, " m"] | None = None,
    query_ids: Int[Tensor, " n"] | None = None,
    content_ids: Int[Tensor, " n"] | None = None,
    dims: Sequence[int] | None = None,
) -> Float[Tensor, ""]:
    """The pairwise sigmoid loss of SigLIP (arXiv 2303.15343): a yes/no question per pair.

        -(1/n) sum_i sum_j log sigmoid( z_ij (s_ij / T + bias) ),   z_ii = 1, z_ij = -1 elsewhere

    j runs over targets and negatives. Duplicates (as in `info_nce`) are excluded. SigLIP starts
    training at T = 0.1 and bias = -10, so that the many negatives do not swamp the start.

    All other arguments are as in `info_nce`; temperature and bias are numbers, or scalar tensors,
    which receive gradients.

    Raises:
        ValueError: as in `info_nce`.
    """
    _check_batch(query, target, negatives, target_ids, negative_ids)
    _check_options(temperature)

    n = len(query)
    candidates = target if negatives is None else torch.cat([target, negatives])
    ids = target_ids, negative_ids, query_ids, content_ids
    not_negative = duplicates(n, len(candidates), *ids)
    if not_negative is None:
        not_negative = torch.zeros(n, len(candidates), dtype=torch.bool, device=query.device)
    not_negative.fill_diagonal_(True)
    losses = []
    for width in _widths(dims, query.shape[1]):
        logits = cosines(query, candidates, width) / temperature + bias
        yes = functional.logsigmoid(logits.diagonal()).sum()
        # log sigmoid(+inf) and its derivative are 0: excluded cells add nothing.
        no = functional.logsigmoid(-logits.masked_fill(not_negative, -math.inf)).sum()
        losses.append(-(yes + no) / n)
    return torch.stack(losses).mean()


def clamped_temperature(
    log_temperature: Float[Tensor, ""], minimum: float = 0.01, maximum: float = 1.0
) -> Float[Tensor, ""]:
    """A learned temperature, exp(log_temperature) kept within [minimum, maximum].

    The gradient is that of exp inside the bounds. At or beyond a bound it is that of exp at the
    bound if a descent step leads back inside, and zero if the step would lead further out:

        log_temperature <= log(minimum): passes only a negative gradient (descent raises it)
        log_temperature >= log(maximum): passes only a positive gradient (descent lowers it)

    A plain clamp has no gradient beyond the bounds: after one overshoot the temperature never moves
    again. Passing every gradient (straight-through) lets the parameter drift away under a steady
    push, and it then needs as many steps to return. Exclude the parameter from weight decay, which
    pulls it towards temperature 1.

    Args:
        log_temperature: the parameter, a scalar tensor (natural logarithm).
        minimum: lowest temperature; 0.01 is CLIP's (a logit scale of 100).
        maximum: highest temperature.

    Raises:
        ValueError: unless 0 < minimum < maximum.
    """
    if not 0 < minimum < maximum:
        raise ValueError(
            f"temperature bounds are {minimum} and {maximum}; use 0 < minimum < maximum"
        )
    return _ClampedExp.apply(log_temperature, math.log(minimum), math.log(maximum))


class _ClampedExp(torch.autograd.Function):
    """exp(clamp(x, low, high)) with the one-sided gradient of `clamped_temperature`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        value = x.clamp(low, high).exp()
        ctx.save_for_backward(x, value)
        ctx.bounds = low, high
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable  # its stub hides the name of `ctx` from pyright:
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None, None]:
        x, value = ctx.saved_tensors
        low, high = ctx.bounds
        gradient = grad_outputs[0] * value
        outward = ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0))
        return gradient.masked_fill(outward, 0.0), None, None


def rounded(embeddings: Float[Tensor, "n d"], rounding: Rounding) -> Float[Tensor, "n d"]:
    """Unit embeddings as an index stores them; the gradient passes as if nothing were rounded.

    So the loss sees what a search in int8 or binary vectors sees, and teaches embeddings that
    survive it (the straight-through estimator, Bengio et al., arXiv 1308.3432).

        float32   as they are
        int8      each dimension in 256 equal steps between its lowest and its highest value here,
                  each value at the middle of its step
        binary    the sign of each value, divided by sqrt(d)

    Args:
        embeddings: of length one; the ranges of int8 are those of this batch.
        rounding: of the result.

    Raises:
        ValueError: an unknown rounding.
    """
    match rounding:
        case "float32":
            return embeddings
        case "int8":
            values = embeddings.detach()
            low, high = values.amin(dim=0), values.amax(dim=0)
            step = (high - low) / 255
            levels = ((values - low) / torch.where(step == 0, 1.0, step)).floor().clamp(0, 255)
            hard = low + (levels + 0.5) * step
        case "binary":
            ones = torch.ones_like(embeddings)
            hard = torch.where(embeddings > 0, ones, -ones) / embeddings.shape[1] ** 0.5
        case _:
            raise ValueError(f"rounding is {rounding!r}; use one of {get_args(Rounding)}")
    return embeddings + (hard - embeddings).detach()


def _unit(
    query: Float[Tensor, "n d"], candidates: Float[Tensor, "k d"], width: int, rounding: Rounding
) -> tuple[Float[Tensor, "n w"], Float[Tensor, "k w"]]:
    """The first `width` coordinates, normalised and rounded, in float32 or wider."""
    dtype = torch.promote_types(torch.promote_types(query.dtype, candidates.dtype), torch.float32)
    both = torch.cat([query[:, :width].to(dtype), candidates[:, :width].to(dtype)])
    unit = rounded(functional.normalize(both, dim=1), rounding)
    return unit[: len(query)], unit[len(query) :]


def cosines(
    query: Float[Tensor, "n d"], candidates: Float[Tensor, "k d"], width: int
) -> Float[Tensor, "n k"]:
    """Cosines of the first `width` coordinates, in float32 or wider even under autocast."""
    with torch.autocast(query.device.type, enabled=False):
        left, right = _unit(query, candidates, width, "float32")
        return left @ right.T


def _widths(dims: Sequence[int] | None, full: int) -> Sequence[int]:
    if dims is None:
        return (full,)
    if not dims or not all(1 <= width <= full for width in dims):
        raise ValueError(f"dims is {list(dims)}; use widths between 1 and {full}, the embedding's")
    return dims


def _check_options(
    temperature: float | Tensor, directions: Directions = "both", hardness: float = 0.0
) -> None:
    # A tensor is not checked: that would synchronise a GPU. `clamped_temperature` is positive.
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}; use a positive number")
    if directions not in get_args(Directions):
        raise ValueError(f"directions is {directions!r}; use one of {get_args(Directions)}")
    if not hardness >= 0:
        raise ValueError(f"hardness is {hardness}; use 0 (all negatives alike) or more")


def _check_batch(
    query: Tensor,
    target: Tensor,
    negatives: Tensor | None,
    target_ids: Tensor | None,
    negative_ids: Tensor | None,
) -> None:
    n, m = len(query), 0 if negatives is None else len(negatives)
    if query.shape != target.shape or n == 0:
        raise ValueError(
            f"query {tuple(query.shape)} and target {tuple(target.shape)} must be of one shape "
            "(n, d) with at least one pair; without pairs leave the contrastive term out"
        )
    if negatives is not None and negatives.shape[1:] != query.shape[1:]:
        raise ValueError(
            f"negatives {tuple(negatives.shape)} must be as wide as query {tuple(query.shape)}"
        )
    if target_ids is not None and target_ids.shape != (n,):
        raise ValueError(f"target_ids {tuple(target_ids.shape)} must hold one id per pair ({n},)")
    if negative_ids is not None and (target_ids is None or negative_ids.shape != (m,)):
        raise ValueError(
            f"negative_ids {tuple(negative_ids.shape)} must hold one id per negative ({m},) and "
            "need target_ids to be compared with"
        )
