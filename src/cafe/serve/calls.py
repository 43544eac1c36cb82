"""How the engine's batches are asked of the model: the only place where serving meets its inside.

Nothing is cut here: a text that the model cannot read whole is refused, while `CAFe.encode` reads
its beginning.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cafe.errors import DataError
from cafe.model.inference import yes_over_no
from cafe.model.vlm import CAFe
from cafe.serve.decoding import Generation
from cafe.serve.work import Embedding, Item, Score
from cafe.types import Conversation


class CafeCalls:
    """A `CAFe` in the shape of `cafe.serve.work.ModelCalls`."""

    def __init__(self, model: CAFe) -> None:
        self._model = model
        self._collator = replace(model.collator, max_tokens=sys.maxsize)
        self._odds = yes_over_no(model)
        self.dimension = model.embedding_dimension
        self.max_tokens = model.collator.max_tokens

    def embed(self, items: list[Item]) -> list[Embedding]:
        """Raises DataError, naming the input, for one that is too long or cannot be read."""
        pooled, counts = self._states(
            items, lambda texts, numbers: self._collator.embedding_rows(texts, numbers=numbers)
        )
        vectors = pooled.float().cpu().numpy()
        return [Embedding(v, count) for v, count in zip(vectors, counts, strict=True)]

    @torch.inference_mode()
    def score(self, items: list[Item]) -> list[Score]:
        """Each item is a `cafe.model.inference.match_question`. Raises as `embed` does."""
        pooled, counts = self._states(items, self._collator.prompt_rows)
        scores = self._odds(pooled).sigmoid().tolist()
        return [Score(s, count) for s, count in zip(scores, counts, strict=True)]

    def generate(self, items: list[Item]) -> Generation:
        return Generation(self._model, items)

    @torch.inference_mode()
    def _states(
        self, items: list[Item], collate: Callable[..., tuple[Any, dict[str, Tensor]]]
    ) -> tuple[Tensor, list[int]]:
        """States [n, hidden] at the pooled tokens, and how many tokens each item has."""
        rows, vision = collate([_conversation(item) for item in items], [i.number for i in items])
        # Each item has a row of its own, and its last token is the pooled one.
        counts = (rows.pooled % rows.input_ids.shape[1] + 1).tolist()
        for item, count in zip(items, counts, strict=True):
            if count > self.max_tokens:
                raise DataError(
                    f"input {item.number}: {count} tokens, and the model reads {self.max_tokens}"
                )
        return self._model.read(rows, vision), counts


def _conversation(item: Item) -> Conversation:
    if not isinstance(item.content, tuple):
        raise TypeError("a prompt can only be answered")
    return item.content
