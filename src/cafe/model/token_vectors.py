"""Late interaction in use: a vector for every token of an input, fewer of them, their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cafe.errors import CheckpointError
from cafe.model.inference import InferenceModel, length_buckets
from cafe.model.multi_vector import projected, token_projection_of
from cafe.model.rows.inputs import Inputs, as_messages
from cafe.model.rows.prompts import DEFAULT_PROMPT
from cafe.progress import progress_bar
from cafe.types import Conversation

if TYPE_CHECKING:
    from jaxtyping import Float


_DOCUMENTS_AT_ONCE = 64
"""Whose vectors are compared with a query by one product of matrices."""


class TokenEncoder:
    """What `CAFe` offers for late interaction, beside `encode` and `similarity`."""

    @torch.inference_mode()
    def encode_tokens(
        self: InferenceModel,
        inputs: Inputs,
        *,
        pool: float = 1.0,
        batch_size: int = 32,
        truncate_dim: int | None = None,
        prompt_name: str = DEFAULT_PROMPT,
        show_progress_bar: bool = False,
    ) -> list[np.ndarray]:
        """Embed every token of each input, for late interaction (`max_sim`).

        Args:
            inputs: as for `CAFe.encode`.
            pool: keep one vector for so many tokens (`pooled`). For what is searched: queries keep
                all of theirs.
            batch_size: inputs per forward.
            truncate_dim: keep this many leading coordinates (Matryoshka).
            prompt_name: as for `CAFe.encode`.
            show_progress_bar: on stderr.

        Returns:
            Unit vectors, float32 [tokens, dim] of each input; a list for a single one, too.

        Raises:
            CheckpointError: the model has no token vectors (objective.multi_vector_weight).
            DataError: an input that cannot be read or is too long; the message names it.
        """
        projection, conversations = projection_needed(self.model), as_messages(inputs)
        width = projection.out_features if truncate_dim is None else truncate_dim
        if not 1 <= width <= projection.out_features:
            raise ValueError(f"truncate_dim={width}: use 1 to {projection.out_features}")
        if not pool >= 1:
            raise ValueError(f"pool={pool}: use 1 (all vectors) or more")
        found = [np.zeros((0, width), dtype=np.float32)] * len(conversations)
        with progress_bar("encode", len(found), show=show_progress_bar, stays=True) as bar:
            for batch, states in token_states(self, conversations, batch_size, prompt_name):
                for i, own in zip(batch, states, strict=True):
                    vectors = projected(projection, own)[:, :width].float()
                    unit = functional.normalize(vectors, dim=1)
                    found[i] = pooled(unit.cpu().numpy(), pool)
                bar.more(len(batch))
        return found

    @staticmethod
    def max_sim(
        queries: Sequence[Float[np.ndarray, "_ d"]], documents: Sequence[Float[np.ndarray, "_ d"]]
    ) -> Float[np.ndarray, "q n"]:
        """How well the tokens of each query are found in each document.

        The mean over a query's vectors of the largest cosine with a vector of the document: what
        sentence-transformers calls meanmaxsim, its maxsim being the sum.

        >>> a, b = np.eye(3)[:2], np.eye(3)[1:]
        >>> TokenEncoder.max_sim([a], [a, b])
        array([[1. , 0.5]])

        Args:
            queries: the vectors of each query, as `encode_tokens` returns them.
            documents: the vectors of each document.

        Raises:
            ValueError: one of them has no vectors.
        """
        for name, items in (("queries", queries), ("documents", documents)):
            if any(len(item) == 0 for item in items):
                raise ValueError(f"one of the {name} has no vectors; leave it out")
        scores = np.zeros((len(queries), len(documents)))
        for first in range(0, len(documents), _DOCUMENTS_AT_ONCE):
            block = documents[first : first + _DOCUMENTS_AT_ONCE]
            begins = np.cumsum([0, *(len(document) for document in block[:-1])])
            # In float64, so that equal vectors tie wherever they stand (`cafe.metrics.ranking`).
            every = np.concatenate(block).astype(np.float64)
            for i, query in enumerate(queries):
                best = np.maximum.reduceat(every @ query.T.astype(np.float64), begins, axis=0)
                scores[i, first : first + len(block)] = best.mean(axis=1)
        return scores


def projection_needed(model: Any) -> nn.Linear:
    """The model's token projection.

    Raises:
        CheckpointError: it has none.
    """
    projection = token_projection_of(model)
    if projection is None:
        raise CheckpointError(
            "the model has no token vectors: it was not trained with objective.multi_vector_weight"
        )
    return projection


def token_states(
    model: InferenceModel, conversations: Sequence[Conversation], batch_size: int, prompt: str
) -> Iterator[tuple[list[int], tuple[Float[Tensor, "_ hidden"], ...]]]:
    """Indices of each batch, and the hidden states of all tokens of each of its inputs.

    Inputs of a batch with equal beginnings share them, as in `cafe.model.inference.encode`. Call it
    in inference mode.
    """
    collator = replace(model.collator, every_token=True)
    for batch in length_buckets(conversations, batch_size):
        chosen = [conversations[i] for i in batch]
        rows, vision = collator.embedding_rows(chosen, prompt, batch, model.token_cost)
        states = model.hidden_at(rows, vision, rows.token_vectors_at)
        yield batch, states.split(rows.token_vector_counts.tolist())


def pooled(vectors: Float[np.ndarray, "n d"], factor: float) -> Float[np.ndarray, "m d"]:
    """Fewer vectors, m = n // factor or one: clusters of similar ones, as the mean of each.

    Ward's clusters of the cosine distances, which EVIE and PyLate use; equal to the
    `HierarchicalTokenPooling` of sentence-transformers without protected tokens. For documents: a
    query keeps all of its vectors.

    Args:
        vectors: of unit length.
        factor: 1 or more.

    Returns:
        Of unit length; in the order of the first vector of each cluster.
    """
    count = max(int(len(vectors) // factor), 1)
    if count >= len(vectors):
        return vectors
    labels = _clusters(vectors, count)
    means = np.zeros((int(labels.max()) + 1, vectors.shape[1]), dtype=vectors.dtype)
    np.add.at(means, labels, vectors)
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)


def _clusters(vectors: Float[np.ndarray, "n d"], count: int) -> np.ndarray:
    """The cluster of each vector, numbered by their first members.

    The nearest-neighbour chain: two clusters that are each other's nearest are merged, in any
    order, and the merges at the largest distances are undone (Murtagh, 1983). n² memory and time.
    """
    n = len(vectors)
    wide = vectors.astype(np.float64)
    squared = np.clip(1 - wide @ wide.T, 0, 2) ** 2
    np.fill_diagonal(squared, np.inf)
    sizes, chain = np.ones(n), list[int]()
    merges: list[tuple[float, int, int]] = []
    alive = np.ones(n, dtype=bool)
    for _ in range(n - 1):
        if not chain:
            chain = [int(alive.argmax())]
        while True:
            last = chain[-1]
            near = int(squared[last].argmin())
            if len(chain) > 1 and squared[last, chain[-2]] <= squared[last, near]:
                near = chain[-2]
                break
            chain.append(near)
        chain = chain[:-2]
        a, b = min(last, near), max(last, near)
        distance = squared[a, b]
        merges.append((float(distance), a, b))
        total = sizes + sizes[a] + sizes[b]  # Lance and Williams, for Ward's criterion
        new = (
            (sizes + sizes[a]) * squared[a] + (sizes + sizes[b]) * squared[b] - sizes * distance
        ) / total
        alive[a] = False
        new[~alive] = np.inf
        new[b] = np.inf
        squared[b], squared[:, b] = new, new
        squared[a], squared[:, a] = np.inf, np.inf
        sizes[b] += sizes[a]
    parent = np.arange(n)
    for _, a, b in sorted(merges, key=lambda merge: merge[0])[: n - count]:
        parent[parent == parent[a]] = parent[b]
    _, first, labels = np.unique(parent, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[labels]
