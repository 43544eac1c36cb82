"""Latent thoughts: learned tokens between the embedding prompt and the token that is pooled.

    … Compress this image in one word: [assistant] <|latent_0|> … <|latent_k-1|> [EMB]

They give the model k further positions to compute an embedding in, at a constant cost and without
decoding (the chorus tokens of CREM, TTE-Flash). They are tokens of the vocabulary like others, and
part of the saved embedding template: so sentence-transformers and vLLM read the same embedding. No
input can contain them, as it can contain no control token, and no answer is trained to.
"""

from __future__ import annotations

from typing import Any

import torch

from cafe.errors import CheckpointError

LATENT_KEY = "latent_tokens"
"""In config.json: how many latent tokens the model's embeddings are read after."""

MOST = 64

_SPREAD = 0.1
"""Standard deviation of new embeddings around the mean of all, relative to that of the others."""


def latent_names(count: int) -> tuple[str, ...]:
    return tuple(f"<|latent_{number}|>" for number in range(count))


def latent_count(config: Any) -> int:
    """How many latent tokens the model has.

    Raises:
        CheckpointError: the configuration's value is not a number of tokens.
    """
    count = getattr(config, LATENT_KEY, 0)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MOST:
        raise CheckpointError(
            f"config.json: {LATENT_KEY} is {count!r}; use the number that the embeddings were "
            f"trained with (0 to {MOST}), or remove the key"
        )
    return count


def latent_text(config: Any, tokenizer: Any) -> str:
    """What stands before the pooled token in the embedding template.

    Raises:
        CheckpointError: the tokenizer lacks one of the tokens.
    """
    names = latent_names(latent_count(config))
    known = tokenizer.get_added_vocab() if names else {}
    if names and f"<|latent_{len(names)}|>" in known:
        raise CheckpointError(
            f"config.json: {LATENT_KEY} is {len(names)}, and the tokenizer has more of these "
            "tokens; set it to the number that the embeddings were trained with"
        )
    missing = [name for name in names if name not in known]
    if missing:
        raise CheckpointError(
            f"config.json: {LATENT_KEY} is {len(names)}, but the tokenizer has no {missing[0]}; "
            "copy tokenizer and configuration again, from one model"
        )
    return "".join(names)


@torch.no_grad()
def add_latent_tokens(model: Any, processor: Any, count: int) -> None:
    """Give a model `count` latent tokens, with random embeddings near the mean of all others.

    The model, its configuration and its tokenizer are changed. A model that has as many already
    keeps its own.

    Raises:
        CheckpointError: it has another number of them.
    """
    own = latent_count(model.config)
    if own == count:
        return
    if own:
        raise CheckpointError(
            f"the model's embeddings were trained with {own} latent tokens, and the recipe asks "
            f"for {count}; set objective.latent_tokens: {own}, or start from the model's base"
        )
    tokenizer = processor.tokenizer
    tokenizer.add_tokens(list(latent_names(count)), special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(latent_names(count))))
    layers = {id(layer.weight): layer for layer in _embeddings(model)}
    for layer in layers.values():  # one where input and output are tied
        others = torch.ones(len(layer.weight), dtype=torch.bool)
        others[ids] = False
        known = layer.weight[others.to(layer.weight.device)].float()
        noise = torch.randn(count, known.shape[1]).to(known.device)
        fresh = known.mean(0) + _SPREAD * known.std(0) * noise
        layer.weight[ids.to(layer.weight.device)] = fresh.to(layer.weight.dtype)
    setattr(model.config, LATENT_KEY, count)


def _embeddings(model: Any) -> list[Any]:
    head = model.get_output_embeddings()
    return [model.get_input_embeddings(), *([] if head is None else [head])]
