"""Soft labels: a teacher's scores of some candidates, a distribution that the student copies.

InfoNCE says of a negative that it is wrong, and of two negatives that both are. A teacher that
reads the query and a candidate together says how wrong. For an anchor a with candidates C(a),

    p_c = exp(t_c / U) / sum over C(a),      t the teacher's scores, without gradient
    q_c = exp(s_ac / T) / sum over C(a),     s the cosine of the embeddings
    loss = mean over anchors of KL(p || q) = sum_c p_c log(p_c / q_c)

T is the temperature of the contrastive loss, U that of the teacher: 1 if its scores are log-odds or
logits, about T if they are cosines. With one temperature it is Sentence Transformers'
DistillKLDivLoss without its factor T^2, which only scales the weight.

Shapes: e embeddings of width d, l cells. A cell is an anchor and one of its candidates, both as
numbers of embeddings; the cells of an anchor need not be neighbours, and their number may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Float, Int

__all__ = ["soft_label_loss"]


def soft_label_loss(
    embeddings: Float[Tensor, "e d"],
    cells: Int[Tensor, "l 2"],
    scores: Float[Tensor, " l"],
    *,
    temperature: float | Float[Tensor, ""],
    teacher_temperature: float = 1.0,
    dims: Sequence[int] | None = None,
) -> Float[Tensor, ""]:
    """The mean over anchors of KL(teacher || student); 0 where no anchor has two candidates.

    Args:
        embeddings: of any length; they are L2-normalised here, in float32 or wider.
        cells: anchor and candidate of each cell.
        scores: the teacher's, of each cell; finite.
        temperature: divides the cosines; a number, or a scalar tensor, which receives a gradient.
        teacher_temperature: divides the scores.
        dims: Matryoshka widths, as in `info_nce`: the mean over them. None: the full width only.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    if cells.shape != (len(scores), 2):
        raise ValueError(
            f"cells {tuple(cells.shape)} must be ({len(scores)}, 2), as many as scores"
        )
    if not teacher_temperature > 0:
        raise ValueError(f"teacher_temperature is {teacher_temperature}; use a positive number")
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    _, anchor, counts = cells[:, 0].unique(return_inverse=True, return_counts=True)
    several = counts[anchor] > 1
    if not bool(several.any()):
        return 0.0 * embeddings.sum().to(dtype)
    cells, scores = cells[several], scores[several]
    _, anchor = anchor[several].unique(return_inverse=True)
    count = int((counts > 1).sum())
    with torch.autocast(embeddings.device.type, enabled=False):
        teacher = _log_softmax(scores.detach().to(dtype) / teacher_temperature, anchor, count)
        losses = []
        for width in dims or (embeddings.shape[1],):
            unit = functional.normalize(embeddings[:, :width].to(dtype), dim=1)
            cosines = (unit[cells[:, 0]] * unit[cells[:, 1]]).sum(1)
            student = _log_softmax(cosines / temperature, anchor, count)
            losses.append((teacher.exp() * (teacher - student)).sum() / count)
    return torch.stack(losses).mean()


def _log_softmax(
    logits: Float[Tensor, " l"], group: Int[Tensor, " l"], count: int
) -> Float[Tensor, " l"]:
    """The logarithm of each cell's share of its group; groups are numbered 0 to `count` - 1."""
    highest = logits.detach().new_full((count,), -torch.inf)
    highest = highest.scatter_reduce(0, group, logits.detach(), "amax")
    above = logits - highest[group]
    total = torch.zeros_like(highest).index_add(0, group, above.exp())
    return above - total.log()[group]
