"""Think-then-embed: an image's embedding is read after what the model says of it.

A model that was trained so (`objective.thought_weight`) has two embeddings of an image, a plain one
and one that is read behind its own description; texts have one. config.json says so, and how long
the thoughts of the training were. Any model can be read in this way, but one that never was trained
to embeds worse by it, which is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cafe.model import inference
from cafe.model.captions import CAPTION_TOKENS, caption_request, write_captions
from cafe.model.inference import InferenceModel
from cafe.model.rows.inputs import Inputs, as_messages
from cafe.model.rows.prompts import DEFAULT_PROMPT, trained_thought_tokens
from cafe.model.thought_cache import readable, think_and_read
from cafe.types import Conversation, thought_about

if TYPE_CHECKING:
    from jaxtyping import Float

_log = logging.getLogger(__name__)

UNTRAINED = (
    "the model was never trained to embed after a thought (objective.thought_weight), and embeds "
    "worse by it"
)

_said: WeakSet[Any] = WeakSet()


def warn_if_untrained(model: InferenceModel) -> None:
    """Say, once for each model, that it was not trained to be read after a thought."""
    inner = model.model
    if not trained_thought_tokens(inner.config) and inner not in _said:
        _said.add(inner)
        _log.warning("think: %s", UNTRAINED)


def checked_think(model: InferenceModel, think: Any) -> int | Sequence[str | None]:
    """The most tokens that a thought may have, or the thoughts themselves.

    A number is at most the model's context: a model that never ends its thought ends there.

    Args:
        model: True stands for its own number (`trained_thought_tokens`), or that of a caption.
        think: as for `CAFe.encode`.

    Raises:
        ValueError: it is neither a number of tokens nor a sequence of thoughts.
    """
    if think is True:
        think = trained_thought_tokens(model.model.config) or CAPTION_TOKENS
    if isinstance(think, int) and think >= 0:
        return min(int(think), model.collator.max_tokens)
    if isinstance(think, str) or not isinstance(think, Sequence):
        raise ValueError(
            f"think={think!r}: use the largest number of tokens of a thought, or one thought (or "
            "None) for each input"
        )
    return think


@dataclass(frozen=True, slots=True)
class ThoughtEmbeddings:
    """Embeddings that were read after thoughts, and these.

    vectors   float32 [n, hidden], of length one, in input order
    thoughts  one for each input; None: it was embedded as it is, because it has words of its own or
              the model says nothing of it
    """

    vectors: Float[np.ndarray, "n hidden"]
    thoughts: list[str | None]


def encode_with_thoughts(
    model: InferenceModel,
    inputs: Inputs,
    max_new_tokens: int = CAPTION_TOKENS,
    batch_size: int = 32,
    *,
    prompt_name: str = DEFAULT_PROMPT,
) -> ThoughtEmbeddings:
    """What `CAFe.encode(inputs, think=max_new_tokens)` returns, and the thoughts.

    Args:
        model: a `CAFe`.
        inputs: as for `CAFe.encode`.
        max_new_tokens: the most tokens that a thought may have; at most the model's context.
        batch_size: inputs per forward.
        prompt_name: name of the embedding prompt.

    Raises:
        DataError: an input that cannot be read or is too long; the message names it.
        ValueError: a number of tokens below 1.

    Example:
        >>> from cafe.model.thoughts import encode_with_thoughts
        >>> found = encode_with_thoughts(CAFe.from_pretrained("tiny"), [image, "a text"])
        >>> found.vectors.shape, [type(thought).__name__ for thought in found.thoughts]
        ((2, 256), ['str', 'NoneType'])
    """
    conversations = as_messages(inputs)
    tokens = checked_think(model, max_new_tokens)
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: use 1 or more")
    vectors, thoughts = read_after_own_thoughts(
        model, conversations, tokens, batch_size, prompt_name
    )
    return ThoughtEmbeddings(functional.normalize(vectors, dim=1).numpy(), thoughts)


def read_after_own_thoughts(
    model: InferenceModel,
    conversations: Sequence[Conversation],
    tokens: int,
    batch_size: int,
    prompt: str,
    *,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Float[Tensor, "n hidden"], list[str | None]]:
    """Embeddings as of `inference.encode`, and the thoughts that the model writes before, greedily.

    A thought is None where the input has words of its own, or the model says nothing of it. Where
    the cache allows it, embeddings are read in the pass that writes (`cafe.model.thought_cache`).
    """
    vectors = torch.zeros(len(conversations), model.embedding_dimension, device=device)
    thoughts: list[str | None] = [None] * len(conversations)
    report = on_progress or (lambda count: None)
    unread = {*range(len(conversations))}
    requests = {i: r for i in unread if (r := caption_request(conversations[i])) is not None}
    if readable(model):
        asked = [*requests]
        for batch in inference.length_buckets([conversations[i] for i in asked], batch_size):
            chosen = [asked[i] for i in batch]
            found, states = think_and_read(
                model,
                [conversations[i] for i in chosen],
                [requests[i] for i in chosen],
                chosen,
                tokens,
                prompt,
            )
            for i, thought in zip(chosen, found, strict=True):
                thoughts[i] = thought or None
            for i, state in states.items():
                vectors[chosen[i]] = state.to(vectors)
                unread.discard(chosen[i])
            report(len(states))
    else:
        thoughts = write_captions(model, conversations, batch_size, tokens)
    if any(thoughts):
        warn_if_untrained(model)
    others = sorted(unread)
    thoughtful = after_thoughts([conversations[i] for i in others], [thoughts[i] for i in others])
    vectors[others] = inference.encode(
        model, thoughtful, batch_size, prompt, device=device, on_progress=on_progress,
        numbers=others,
    )  # fmt: skip
    return vectors, thoughts


def after_thoughts(
    conversations: Sequence[Conversation], thoughts: Sequence[str | None]
) -> list[Conversation]:
    """Each input followed by the thought about it; an empty one is none, and its input stays.

    Raises:
        ValueError: not one string or None for each input.
    """
    if len(thoughts) != len(conversations):
        raise ValueError(f"think: {len(thoughts)} thoughts for {len(conversations)} inputs")
    for number, thought in enumerate(thoughts):
        if not isinstance(thought, str | None):
            raise ValueError(f"thought {number} is {type(thought).__name__}; give a string or None")
    return [
        thought_about(conversation, thought) if thought and thought.strip() else conversation
        for conversation, thought in zip(conversations, thoughts, strict=True)
    ]
