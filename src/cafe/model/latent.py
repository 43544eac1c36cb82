"""Latent thoughts: learned tokens between the embedding prompt and the token that is pooled.

    … Compress this image in one word: [assistant] <|latent_0|> … <|latent_k-1|> [EMB]

They give the model k further positions to compute an embedding in, at a constant cost and without
decoding (the chorus tokens of CREM, TTE-Flash). They are tokens of the vocabulary like others, and
part of the saved embedding template: so sentence-transformers and vLLM read the same embedding. No
input can contain them, as it can contain no control token, and no answer is trained to.

An embedding is the state at the pooled token, or the mean of those at the latent tokens
(`latent_pooling: mean`). sentence-transformers reads the mean with modules of its own:
`WordWeights` weighs the latent tokens 1 and all others 0, and its mean divides by the sum of the
weights. vLLM has no such module, and would average all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cafe.errors import CheckpointError

LATENT_KEY = "latent_tokens"
"""In config.json: how many latent tokens the model's embeddings are read after."""

POOLING_KEY = "latent_pooling"
"""In config.json: "mean" if an embedding is the mean of the latent tokens' states."""

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


def averaged_tokens(config: Any) -> int:
    """How many latent tokens' states are averaged for an embedding; 0: it is the last token's.

    Raises:
        CheckpointError: the configuration names another pooling, or a mean of no tokens.
    """
    pooling, count = getattr(config, POOLING_KEY, "last"), latent_count(config)
    if pooling not in ("last", "mean") or (pooling == "mean" and count == 0):
        raise CheckpointError(
            f"config.json: {POOLING_KEY} is {pooling!r} with {count} latent tokens; use the "
            "pooling that the embeddings were trained with, last or mean, or remove the key"
        )
    return count if pooling == "mean" else 0


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
def add_latent_tokens(model: Any, processor: Any, count: int, pooling: str = "last") -> None:
    """Give a model `count` latent tokens, with random embeddings near the mean of all others.

    The model, its configuration and its tokenizer are changed. A model that has as many already
    keeps its own.

    Raises:
        CheckpointError: it has another number of them, or another pooling.
    """
    own, own_pooling = latent_count(model.config), getattr(model.config, POOLING_KEY, "last")
    if own and own_pooling != pooling:
        raise CheckpointError(
            f"the model's embeddings were trained with {POOLING_KEY}: {own_pooling}, and the "
            f"recipe asks for {pooling}; set objective.{POOLING_KEY}: {own_pooling}, or start from "
            "the model's base"
        )
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
    if pooling != "last":
        setattr(model.config, POOLING_KEY, pooling)


def _embeddings(model: Any) -> list[Any]:
    head = model.get_output_embeddings()
    return [model.get_input_embeddings(), *([] if head is None else [head])]


def latent_mean_files(
    files: Mapping[str, Any], names: Sequence[str], vocabulary: Mapping[str, int]
) -> dict[str, Any]:
    """sentence-transformers' files that read the mean of the latent tokens; content by name.

    Args:
        files: those of an embedding that is read at its last token, which these replace.
        names: the latent tokens.
        vocabulary: token -> id.
    """
    before, pooling, after = files["modules.json"]
    weights = {"path": "3_WordWeights", "type": "sentence_transformers.models.WordWeights"}
    modules = [before, weights, pooling, after]
    words = [""] * (1 + max(vocabulary.values()))  # only the weighted ones are looked up by name
    for name in names:
        words[vocabulary[name]] = name
    return {
        "modules.json": [{**module, "idx": i, "name": str(i)} for i, module in enumerate(modules)],
        "3_WordWeights/config.json": {
            "vocab": words,
            "word_weights": dict.fromkeys(names, 1.0),
            "unknown_word_weight": 0.0,
        },
        "1_Pooling/config.json": {**files["1_Pooling/config.json"], "pooling_mode": "mean"},
    }
