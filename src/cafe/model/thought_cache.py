"""Write a thought and read the embedding after it in one pass, by the key-value cache.

A thought is decoded with a cache of keys and values. What the embedding is read from is the same
conversation, a few tokens longer: the rest of the template, the embedding prompt, the pooled token.
So only these are computed, attending to the cache, and neither the images nor the thought are read
again.

The text is rendered and tokenized anew as a whole, and only what is equal token for token is taken
from the cache: at the seams the tokenizer may join differently what was generated apart. Where a
cache cannot be continued, `readable` says so, and inputs are read anew (`cafe.model.thoughts`):
layers that see a window forget what they no longer need, and FlexAttention and FlashAttention take
no such mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cafe.model.attention import layer_windows, stateful_layers
from cafe.model.inference import InferenceModel, generation_inputs, generation_settings
from cafe.types import Conversation, thought_about

if TYPE_CHECKING:
    from jaxtyping import Float


def readable(model: InferenceModel) -> bool:
    """Whether the model's cache can be continued by several tokens of rows of unequal lengths."""
    config = model.model.config
    beams = model.model.generation_config.num_beams or 1
    return (
        config._attn_implementation in ("sdpa", "eager")
        and not any(layer_windows(config).values())
        and not stateful_layers(config)
        and beams == 1
    )


@dataclass(frozen=True, slots=True)
class _Written:
    """A batch of thoughts, and the cache that they were decoded with.

    prompt     int64 [rows, p], padded on the left
    real       bool [rows, p], without padding
    generated  int64 [rows, g]; the cache has all but the last column
    positions  int64 [rows] or [axes, rows], of the last token of each prompt
    """

    prompt: Tensor
    real: Tensor
    generated: Tensor
    positions: Tensor
    cache: Any


@torch.inference_mode()
def think_and_read(
    model: InferenceModel,
    conversations: Sequence[Conversation],
    requests: Sequence[Conversation],
    numbers: Sequence[int],
    tokens: int,
    prompt: str,
) -> tuple[list[str], dict[int, Float[Tensor, " hidden"]]]:
    """Thoughts of a batch, and the embeddings that can be read by the cache.

    Args:
        model: one that is `readable`.
        conversations: the inputs.
        requests: what asks for a thought about each.
        numbers: what error messages call the inputs.
        tokens: the most that a thought may have.
        prompt: name of the embedding prompt.

    Returns:
        The thoughts, empty where the model says nothing, and states by index; those that are
        missing are to be read anew.
    """
    written = _write(model, requests, numbers, tokens)
    thoughts = [
        text.strip()
        for text in model.processor.tokenizer.batch_decode(
            written.generated, skip_special_tokens=True
        )
    ]
    rests: dict[int, list[int]] = {}
    for i, (conversation, thought) in enumerate(zip(conversations, thoughts, strict=True)):
        if thought:
            whole = thought_about(conversation, thought)
            rest = _rest(model, requests[i], whole, prompt)
            room = model.collator.max_tokens - int(written.real[i].sum())
            if rest is not None and len(rest) <= room:
                rests[i] = rest
    return thoughts, _read(model, written, rests) if rests else {}


def _write(
    model: InferenceModel,
    requests: Sequence[Conversation],
    numbers: Sequence[int],
    tokens: int,
) -> _Written:
    inputs = generation_inputs(model, requests, numbers)
    settings = generation_settings(model, tokens, {}) | {"return_dict_in_generate": True}
    found: Any = model.generate_tokens(**inputs, **settings)
    length = inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].bool()
    positions = inputs.get("position_ids")
    last = real.sum(1) - 1 if positions is None else positions[..., -1]
    return _Written(
        inputs["input_ids"], real, found.sequences[:, length:], last, found.past_key_values
    )


def _rest(
    model: InferenceModel, request: Conversation, whole: Conversation, prompt: str
) -> list[int] | None:
    """The tokens of the whole text after those of the request; None where it does not begin so.

    Images are not among the tokens that are compared: they stand before the seam in both.
    """
    render = model.collator.render
    texts = [render.prompt(request).text, render.embedding(whole, prompt).text]
    asked, read = model.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return read[len(asked) :] if read[: len(asked)] == asked else None


def _read(
    model: InferenceModel, written: _Written, rests: dict[int, list[int]]
) -> dict[int, Float[Tensor, " hidden"]]:
    """What is read at the ends of `rests`, which follow the prompts of these rows."""
    device, cached = written.prompt.device, written.generated.shape[1] - 1
    read = model.collator.averages + 1  # the latent tokens, if it is their mean, and the last one
    kept = {
        i: _common(written.generated[i, :cached].tolist(), rest[:-read])
        for i, rest in rests.items()
    }
    longest = max(len(rest) - kept[i] for i, rest in rests.items())
    rows = len(written.prompt)
    ids = torch.full((rows, longest), model.collator.pad_id)
    offsets = torch.zeros((rows, longest), dtype=torch.long)
    here = torch.zeros((rows, longest), dtype=torch.bool)
    thought = torch.zeros((rows, cached), dtype=torch.bool)
    for i, rest in rests.items():
        new = rest[kept[i] :]
        ids[i, : len(new)] = torch.tensor(new)
        offsets[i, : len(new)] = torch.arange(kept[i], len(rest)) + 1
        here[i, : len(new)] = True
        thought[i, : kept[i]] = True
    mask = torch.cat([written.real, thought.to(device), here.to(device)], 1)
    states = model.model.model(
        input_ids=ids.to(device),
        attention_mask=mask.long(),
        position_ids=written.positions[..., None] + offsets.to(device),
        past_key_values=written.cache,
        use_cache=True,
    ).last_hidden_state
    ends = {i: len(rest) - kept[i] for i, rest in rests.items()}
    if read == 1:
        return {i: states[i, end - 1] for i, end in ends.items()}
    return {i: states[i, end - read : end - 1].mean(0) for i, end in ends.items()}


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
