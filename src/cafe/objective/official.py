"""What the published code's numbers depend on besides the objective: the number of ranks.

Each rank there backpropagates

    con_weight * C + L_r        C    the contrastive loss of the whole batch, of which the rank sees
                                     the gradient by its own embeddings only
                                L_r  the mean loss of the rank's own tokens

and gradients are averaged over W ranks. So the contrastive gradient is 1/W of the true one, and the
language loss is the mean over ranks of means over tokens, whatever the ranks' token counts. Here a
rank's loss is multiplied by W before the average; these functions say what takes its place.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["Compat", "contrastive_share", "language_count"]

Compat = Literal["none", "official"]


def contrastive_share(compat: Compat, ranks: int) -> float:
    """What the contrastive gradient is multiplied by: 1, or 1/ranks as published."""
    return 1.0 / ranks if compat == "official" else 1.0


def language_count(compat: Compat, own: int, total: int, ranks: int) -> int:
    """What a rank's summed token loss is divided by (`joint_loss`'s token_count).

    own     labels of this rank;  total  of all ranks
    Published: ranks * own, so that the average over ranks is the mean of their means.
    """
    return ranks * own if compat == "official" else total
