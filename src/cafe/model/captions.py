"""An image's embedding, improved by the caption that the same model writes of it.

An embedding is read from one forward pass; a caption is written token by token, each with another
look at the image. So a caption names what the embedding leaves out, and as a text it lies where the
queries lie: embedded and averaged with the image's own embedding it finds more, with no training
(docs/benchmarks.md). The cost is one generation per image, when it is embedded; queries in words
cost nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from cafe.model import inference
from cafe.model.inference import InferenceModel
from cafe.types import CAPTION_REQUEST, Conversation, Image, Message, user

if TYPE_CHECKING:
    from jaxtyping import Float

CAPTION_WEIGHT = 0.5
"""The caption's share of the mean (the image's own embedding has the rest). Chosen by R@1 on scenes
that nothing else is measured on (`benchmarks/captions.py`): 0.5 and 0.625 are the best there; more
brings the modalities nearer, and names single words better."""

CAPTION_TOKENS = 64
"""The longest caption; the embedding of a longer text would say less of its beginning."""


def caption_request(conversation: Conversation) -> Conversation | None:
    """The request for a caption of a conversation's images; None if it has none, or has words.

    Words beside an image say what is meant by it (a modified image, a question): a caption of the
    image alone would say something else.
    """
    parts = [part for message in conversation for part in message.content]
    if not parts or not all(isinstance(part, Image) for part in parts):
        return None
    return (Message("user", (*parts, CAPTION_REQUEST)),)


def write_captions(
    model: InferenceModel,
    conversations: Sequence[Conversation],
    batch_size: int,
    max_new_tokens: int = CAPTION_TOKENS,
) -> list[str | None]:
    """Greedy captions in input order; None where there is no request, or an empty answer."""
    requests = [caption_request(conversation) for conversation in conversations]
    asked = [i for i, request in enumerate(requests) if request is not None]
    texts = inference.generate(
        model, [r for r in requests if r is not None], max_new_tokens, batch_size, {}
    )
    captions: list[str | None] = [None] * len(requests)
    for i, text in zip(asked, texts, strict=True):
        captions[i] = text or None
    return captions


def check_captions(captions: Sequence[str | None], count: int, weight: float) -> list[str | None]:
    """The captions, with empty ones as None.

    Raises:
        ValueError: not `count` strings or None, or a weight outside 0 to 1.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"caption_weight={weight}: use 0 (the image alone) to 1 (the caption)")
    if len(captions) != count:
        raise ValueError(f"caption: {len(captions)} captions for {count} inputs")
    for number, caption in enumerate(captions):
        if not isinstance(caption, str | None):
            raise ValueError(f"caption {number} is {type(caption).__name__}; give a string or None")
    return [caption if caption and caption.strip() else None for caption in captions]


def inputs_and_captions(
    conversations: Sequence[Conversation], captions: Sequence[str | None]
) -> list[Conversation]:
    """What is embedded: all inputs, and behind them the captions that there are."""
    return [*conversations, *(user(caption) for caption in captions if caption is not None)]


def mixed(
    vectors: Float[Tensor, "n+m hidden"], captions: Sequence[str | None], weight: float
) -> Float[Tensor, "n hidden"]:
    """The embeddings of n inputs, from those of `inputs_and_captions` (`with_captions`)."""
    own, texts = vectors[: len(captions)], vectors[len(captions) :]
    captioned = [i for i, caption in enumerate(captions) if caption is not None]
    return with_captions(own, texts, captioned, weight)


def with_captions(
    vectors: Float[Tensor, "n hidden"],
    texts: Float[Tensor, "m hidden"],
    captioned: Sequence[int],
    weight: float,
) -> Float[Tensor, "n hidden"]:
    """Vectors whose rows `captioned` are means with the embeddings of their captions.

    (1 - weight) image + weight caption, both of length one before, the mean again of length one.
    Other rows stay as they are.

    Args:
        vectors: of the inputs, of any length.
        texts: of the m captions.
        captioned: the m rows of `vectors` that the captions belong to.
        weight: the captions' share, 0 to 1.
    """
    if not len(captioned):
        return vectors
    rows = torch.as_tensor(captioned, device=vectors.device)
    own = functional.normalize(vectors[rows], dim=1)
    mean = (1 - weight) * own + weight * functional.normalize(texts, dim=1)
    return vectors.index_copy(0, rows, functional.normalize(mean, dim=1))
