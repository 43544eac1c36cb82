"""The published code's loss depends on the number of ranks; these functions reproduce that.

Each rank there backpropagates

    con_weight * C + L_r        C    the contrastive loss of the whole batch; the rank gets the
                                     gradient with respect to its own embeddings only
                                L_r  the mean loss of the rank's own tokens

and gradients are averaged over W ranks. So the contrastive gradient is 1/W of the true one, and the
language loss is the mean over ranks of means over tokens, whatever the ranks' token counts. Here a
rank's loss is multiplied by W before the average; these functions give the published factors.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["Compat", "contrastive_share", "language_count"]

Compat = Literal["none", "official"]


def contrastive_share(compat: Compat, ranks: int) -> float:
    """The factor of the contrastive gradient: 1, or 1/ranks as published."""
    return 1.0 / ranks if compat == "official" else 1.0


def language_count(compat: Compat, own: int, total: int, ranks: int) -> int:
    """The divisor of a rank's summed token loss (`joint_loss`'s token_count).

    As published it is ranks * own, so that the average over ranks is the mean of their means.

    Args:
        compat: "official" as published.
        own: number of labels on this rank.
        total: number of labels on all ranks.
        ranks: number of ranks.
    """
    return ranks * own if compat == "official" else total
