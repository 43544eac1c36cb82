"""Late interaction from the same checkpoint: a vector for every token, beside the embedding.

    hidden states of the embedding's own sequence -> token projection [dim, hidden] -> unit vectors

**Which tokens.** All of the sequence that an embedding is read from, from its first to the pooled
one: chat header, text or image, embedding prompt. So do ColPali, ColQwen and the
`MultiVectorEncoder` of sentence-transformers by default, for queries and for documents. The tokens
of the embedding prompt see everything before them, as ColBERT's query augmentation does; those of
the header are the same in every item, so they add the same to every score of a query.
`cafe.model.token_vectors.pooled` keeps fewer.

The projection is a module of transformers' model, so that what trains, resumes, shards and counts
parameters knows it without being told. transformers' own files do not contain it
(`cafe.model.checkpoint.multi_vector`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from jaxtyping import Float

TOKEN_PROJECTION = "token_projection"
"""Name of the module in transformers' model."""


def token_projection_of(model: Any) -> nn.Linear | None:
    """The model's projection; None: it has none."""
    return getattr(model, TOKEN_PROJECTION, None)


def add_token_projection(model: Any, weight: Float[Tensor, "dim hidden"]) -> None:
    """Give a model a projection, in the type and on the device of its language head."""
    own = model.get_output_embeddings().weight
    projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    projection.weight = nn.Parameter(weight.detach().to(own.device, own.dtype))
    setattr(model, TOKEN_PROJECTION, projection)


def new_token_projection(hidden: int, dim: int) -> Float[Tensor, "dim hidden"]:
    """A random one, which keeps cosines about as they are (Johnson and Lindenstrauss)."""
    return torch.randn(dim, hidden) / dim**0.5


def remove_token_projection(model: Any) -> None:
    """Take a projection away that no longer fits the model's other weights."""
    if token_projection_of(model) is not None:
        delattr(model, TOKEN_PROJECTION)


@contextmanager
def without_token_projection(model: Any) -> Iterator[None]:
    """In this block the model has no projection, so that transformers saves none."""
    projection = token_projection_of(model)
    remove_token_projection(model)
    try:
        yield
    finally:
        if projection is not None:
            setattr(model, TOKEN_PROJECTION, projection)


def projected(projection: nn.Linear, states: Float[Tensor, "n hidden"]) -> Float[Tensor, "n dim"]:
    """The vectors of tokens, before normalisation.

    Not by calling the module: a sharded one may be called within the model's forward only.
    """
    return functional.linear(states, projection.weight)
