"""What an index of token vectors records of the model that made them, and what may be searched.

Such an index holds both: the embedding of each row, and the vectors of its tokens. A search by
tokens needs a model with the same projection; one by an embedding works as in any index.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cafe.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from cafe.index import Index, ModelFacts
    from cafe.model.vlm import CAFe

_DIGEST_BYTES = 16


def with_tokens(facts: ModelFacts, model: CAFe, pool: float | None) -> ModelFacts:
    """The facts of an index that also holds token vectors.

    Args:
        facts: of an index without.
        model: makes the vectors.
        pool: one of them is kept for so many tokens; None: there are none.

    Raises:
        CheckpointError: the model has no token vectors.
    """
    if pool is None:
        return facts
    import torch

    from cafe.model.token_vectors import projection_needed

    weight = projection_needed(model.model).weight.detach()
    # In bf16, so that a model which is loaded in another type is the same one.
    content = weight.to("cpu", torch.bfloat16).float().numpy().tobytes()
    digest = hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()
    return replace(facts, tokens=digest, token_dimension=weight.shape[0], pool=float(pool))


def token_encoder(
    model: CAFe, pool: float | None, batch_size: int
) -> Callable[[Sequence[Any]], list[np.ndarray]] | None:
    """Inputs -> the vectors of their tokens; None: there are none."""
    if pool is None:
        return None
    return partial(model.encode_tokens, batch_size=batch_size, pool=pool)


def checked_pool(index: Index | None, wanted: float | None) -> float | None:
    """For how many tokens an index holds one vector; None: it holds none.

    Args:
        index: None: a new one, made as wanted.
        wanted: None: as the index is.

    Raises:
        DataError: it was made otherwise, or cannot be made so.
    """
    if wanted is not None and not 1 <= wanted < math.inf:
        raise DataError(
            f"multi_vector={wanted}: give for how many tokens a vector is kept, 1 (for each) or "
            "more"
        )
    if index is None:
        return wanted
    own = index.model.pool
    if wanted is not None and wanted != own:
        made = "without token vectors" if own is None else f"with one vector for {own:g} tokens"
        raise DataError(
            f"index {index.uri} was made {made}, not with one for {wanted:g}; leave multi_vector "
            "out, or index into another place"
        )
    return own


def searched_by_tokens(index: Index, wanted: bool | None) -> bool:
    """Whether a query is embedded by its tokens; None: if the index holds such vectors.

    Raises:
        DataError: it holds none.
    """
    has = index.model.pool is not None
    if wanted and not has:
        raise DataError(
            f"index {index.uri} holds one vector of each item, and no token vectors; search it "
            "without multi_vector, or index again: cafe index --multi-vector"
        )
    return has if wanted is None else wanted
