"""The match question as an objective: which wrong images and texts are worth it, and its loss.

As in ALBEF (arXiv 2107.07651, §3.2, image-text matching) the wrong partner of an image is the text
of the batch that its embedding likes best, and the reverse: their similarities are computed for the
contrastive loss anyway. ALBEF samples in proportion to the similarity; here the most similar one is
taken, which depends on no random number.

Shapes: a images, b texts, n pairs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from cafe.objective.contrastive import cosines

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Bool, Float, Int

__all__ = ["hardest_wrong", "known_right", "log_odds", "match_loss"]

MOST_PER_IMAGE = 4
"""An image that many texts resemble is asked about this many of them, the most similar ones."""


def known_right(
    images: Int[Tensor, " a"],
    texts: Int[Tensor, " b"],
    pair_images: Int[Tensor, " n"],
    pair_texts: Int[Tensor, " n"],
    pair_groups: Int[Tensor, " n"],
) -> Bool[Tensor, "a b"]:
    """Where a text is known to belong to an image, so that it must not be called wrong.

    An image has the groups of all pairs that contain it, and so has a text; the two belong together
    if they have a group in common. So every caption of an image is right for it, and so is a
    caption that is word for word one of them.

    Args:
        images: ids by content.
        texts: ids by content.
        pair_images: the id of each pair's image.
        pair_texts: the id of each pair's text.
        pair_groups: pairs with equal ids are no negatives of one another (`Example.target_id`).
    """
    _, group = pair_groups.unique(return_inverse=True)
    groups = int(group.max()) + 1 if len(group) else 0

    def membership(ids: Tensor, of_pairs: Tensor) -> Tensor:
        distinct, inverse = torch.cat([ids, of_pairs]).unique(return_inverse=True)
        member = torch.zeros(len(distinct), groups, device=ids.device)
        member[inverse[len(ids) :], group] = 1.0
        return member[inverse[: len(ids)]]

    return membership(images, pair_images) @ membership(texts, pair_texts).T > 0


def hardest_wrong(
    images: Float[Tensor, "a d"],
    texts: Float[Tensor, "b d"],
    right: Bool[Tensor, "a b"],
    of_pairs: tuple[int, int],
    most_per_image: int = MOST_PER_IMAGE,
    ids: tuple[Int[Tensor, " a"], Int[Tensor, " b"]] | None = None,
) -> Int[Tensor, "q 2"]:
    """The wrong texts of each image, and the wrong images of each text, that are most alike.

    Args:
        images: embeddings of any length; those of pairs come first, then those of hard negatives.
        texts: the same.
        right: cells that are not wrong.
        of_pairs: how many of the images, and of the texts, belong to pairs. For each of these one
            wrong partner is chosen, among all.
        most_per_image: how many texts may choose the same image.
        ids: by content. Equal ones are equally alike, and the first is chosen: their embeddings are
            equal but for rounding, which depends on how a batch is cut into chunks. None: none are.

    Returns:
        (image, text), each once, in ascending order. Fewer where there is nothing wrong.
    """
    similarity = cosines(images, texts, images.shape[1])
    if ids is not None:
        similarity = similarity[_first_equal(ids[0])][:, _first_equal(ids[1])]
    similarity = similarity.masked_fill(right, -math.inf)
    chosen = torch.zeros_like(right)
    if similarity.numel() == 0:
        return chosen.nonzero()
    image = torch.arange(of_pairs[0], device=chosen.device)
    text = torch.arange(of_pairs[1], device=chosen.device)
    by_text = torch.zeros_like(right)
    by_text[similarity.argmax(dim=0)[text], text] = True
    # The texts of an image in descending order; only those that chose it count.
    likes = similarity.masked_fill(~by_text, -math.inf)
    best = likes.topk(min(most_per_image, likes.shape[1]), dim=1).indices
    chosen.scatter_(1, best, torch.ones_like(chosen))
    chosen &= by_text
    chosen[image, similarity.argmax(dim=1)[image]] = True
    return (chosen & ~right).nonzero()


def _first_equal(ids: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """For each id the number of the first one that is equal."""
    _, inverse = ids.unique(return_inverse=True)
    numbers = torch.arange(len(ids), device=ids.device)
    return torch.full_like(numbers, len(ids)).scatter_reduce(0, inverse, numbers, "amin")[inverse]


def log_odds(
    states: Float[Tensor, "q d"],
    yes: Float[Tensor, "y d"],
    no: Float[Tensor, "z d"],
    *,
    biases: tuple[Float[Tensor, " y"], Float[Tensor, " z"]] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, " q"]:
    """Log P("yes") - log P("no") of the next token, from these words' rows of the language head.

    In float32 (float64 of float64), also under autocast: a bfloat16 logit near 10 is off by up to
    1/32. It is the number that `CAFe.score` reads (`cafe.model.judging.yes_over_no`).

    Args:
        states: final hidden states, at the last token of each question.
        yes: the head's rows of the tokens that begin a "yes".
        no: the same for "no".
        biases: the head's biases of these tokens.
        softcap: the bound of the logits' absolute value; None: unbounded.
    """
    dtype = torch.promote_types(torch.promote_types(states.dtype, yes.dtype), torch.float32)

    def evidence(rows: Tensor, bias: Tensor | None) -> Tensor:
        logits = functional.linear(
            states.to(dtype), rows.to(dtype), None if bias is None else bias.to(dtype)
        )
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return logits.logsumexp(-1)

    with torch.autocast(states.device.type, enabled=False):
        yes_bias, no_bias = (None, None) if biases is None else biases
        return evidence(yes, yes_bias) - evidence(no, no_bias)


def match_loss(
    odds: Float[Tensor, " q"], right: Bool[Tensor, " q"], counts: tuple[int, int]
) -> Float[Tensor, ""]:
    """The cross-entropy of "yes" against "no", with right and wrong questions of equal weight.

        1/2 mean over right of log(1 + exp(-odds))  +  1/2 mean over wrong of log(1 + exp(odds))

    Equal weights, though there are about two wrong questions for each right one: so a probability
    of 1/2 means that both are as likely if they are as frequent.

    Args:
        odds: log-odds of each question of a chunk.
        right: whether its answer is yes.
        counts: number of right and of wrong questions of the whole batch, over all ranks; the terms
            of all chunks add up to that of the batch. Without one of the two the loss is 0.
    """
    if min(counts) == 0:
        return 0.0 * odds.sum()
    yes = functional.softplus(-odds[right]).sum() / counts[0]
    no = functional.softplus(odds[~right]).sum() / counts[1]
    return (yes + no) / 2
