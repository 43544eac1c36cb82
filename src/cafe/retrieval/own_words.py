"""A corpus embedded with what a model says of its images: averaged with captions, or read after
thoughts.

Both are written once for each image, when it is embedded. What an index or a set of shards was made
with is among the facts that it keeps (`cafe.index.ModelFacts`), so that nobody mixes vectors of two
kinds, and queries can be embedded accordingly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe.batching import WithCaption
from cafe.errors import DataError
from cafe.index import ModelFacts, WriteCaptions

if TYPE_CHECKING:
    from cafe.model.vlm import CAFe
    from cafe.retrieval.blocks import EncodeInputs


@dataclass(frozen=True, slots=True)
class OwnWords:
    """How images without words of their own are embedded with those that a model writes.

    caption   averaged with the embedding of the model's caption (`CAFe.encode`)
    think     read after what the model says of the image in at most this many tokens; 0: not
    With neither, images are embedded alone.
    """

    caption: bool = False
    think: int = 0

    def __post_init__(self) -> None:
        """Raises DataError for both at once, and for a number of tokens that is none."""
        if self.caption and self.think:
            raise DataError(
                "caption and think are two ways to use what the model says of an image; name one"
            )
        if isinstance(self.think, bool) or not isinstance(self.think, int) or self.think < 0:
            raise DataError(
                f"think={self.think}: give the largest number of tokens of a thought, or 0"
            )

    def __bool__(self) -> bool:
        return self.caption or self.think > 0

    def __str__(self) -> str:
        if self.think:
            return f"with thoughts of at most {self.think} tokens"
        return "with captions" if self.caption else "without captions"

    @classmethod
    def of(cls, facts: ModelFacts) -> OwnWords:
        """What vectors were made with."""
        return cls(facts.caption is not None, facts.think or 0)

    def facts(self, facts: ModelFacts, writer: ModelFacts | None = None) -> ModelFacts:
        """The facts of vectors that are made so.

        Args:
            facts: of the model that makes the vectors.
            writer: of the one that writes the words; None: the same.
        """
        from cafe.model.captions import CAPTION_WEIGHT  # late: its package loads torch

        other = None if not self or writer is None or writer.weights == facts.weights else writer
        return replace(
            facts,
            caption=CAPTION_WEIGHT if self.caption else None,
            think=self.think or None,
            writer=None if other is None else other.name,
            writer_weights=None if other is None else other.weights,
        )

    def functions(
        self,
        model: CAFe,
        batch_size: int,
        encode: EncodeInputs | None = None,
        writer: CAFe | None = None,
    ) -> tuple[EncodeInputs, WriteCaptions | None]:
        """What embeds, and what writes words first, as `cafe.batching.encode_each_captioned` calls
        them; None: what embeds also writes them, or there are none.

        Args:
            model: embeds, and writes.
            batch_size: inputs per forward.
            encode: embeds in place of the model.
            writer: writes in place of the model.
        """
        own = encode or partial(model.encode, batch_size=batch_size)
        if not self:
            return own, None
        length = {"max_new_tokens": self.think} if self.think else {}
        write = partial((writer or model).write_captions, batch_size=batch_size, **length)
        if self.caption:
            return own, write
        if encode is None and writer is None:
            return partial(_thinking, model, self.think, batch_size), None
        return partial(_after, own), write


def _thinking(
    model: CAFe, tokens: int, batch_size: int, values: Sequence[Any]
) -> list[WithCaption[np.ndarray]]:
    """Embeddings of length one, each with the thought that it was read after."""
    from cafe.model.thoughts import encode_with_thoughts

    found = encode_with_thoughts(model, values, tokens, batch_size)
    return [WithCaption(v, t) for v, t in zip(found.vectors, found.thoughts, strict=True)]


def _after(
    encode: EncodeInputs, values: Sequence[Any], caption: Sequence[str | None]
) -> Iterable[Any]:
    """Embeddings after thoughts that were written before, which come as captions do."""
    return encode(values, think=caption)
