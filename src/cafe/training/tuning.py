"""A recipe's `tuning` applied to a model: which layers get adapters, and what is trained."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from cafe.errors import RecipeError
from cafe.model import last_layer
from cafe.model.checkpoint.adapter import adapter_of, add_adapter, linear_layers
from cafe.model.checkpoint.directory import load_pretrained, read_config, with_protocol
from cafe.model.checkpoint.locate import lasting_name, locate
from cafe.model.families import family_of
from cafe.model.latent import add_latent_tokens, averaged_tokens, latent_count, latent_text
from cafe.model.multi_vector import (
    add_token_projection,
    new_token_projection,
    remove_token_projection,
    token_projection_of,
)
from cafe.model.rows.official import TURN_END
from cafe.model.rows.prompts import OFFICIAL_PROMPT, PROMPT_KEY
from cafe.model.rows.protocol import CAFE_PROTOCOL
from cafe.model.vlm import CAFe
from cafe.precision import resolved_precision
from cafe.recipes import Recipe, Tuning

_NEVER_ADAPTED = ("lm_head", "embed_tokens")


def load_model(recipe: Recipe, device: torch.device) -> CAFe:
    """The model of a recipe in float32 on `device`, with an adapter if the recipe trains one.

    With `compat: official` it has the published templates, and the latent tokens of the objective.

    Raises:
        RecipeError: `tuning` or `objective` does not fit the model or the machine.
    """
    if recipe.tuning.kind == "qlora":
        vlm = _in_four_bits(recipe, device)
    else:
        vlm = CAFe.from_pretrained(
            recipe.model, dtype=torch.float32, device=device, attention=recipe.attention
        )
    if adapter_of(vlm.model) is not None:
        raise RecipeError(
            f"model: {recipe.model} is an adapter, and training starts from full weights. Merge "
            f"it first (cafe export {recipe.model} --to DIR --merge), then take DIR as the model"
        )
    widest, dimension = max(recipe.objective.matryoshka_dims or [0]), vlm.embedding_dimension
    if widest > dimension:
        raise RecipeError(
            f"objective.matryoshka_dims has {widest}, and embeddings of {recipe.model} have "
            f"{dimension} dimensions; use widths up to {dimension}"
        )
    if recipe.objective.compat == "official":
        if latent_count(vlm.model.config):
            raise RecipeError(
                f"objective.compat is official, and {recipe.model} has latent tokens, which the "
                "published code has not; set compat: none, or take another model"
            )
        take_published_prompts(vlm, embeds=recipe.objective.contrastive_weight > 0)
    if recipe.objective.latent_tokens:
        objective = recipe.objective
        pooling = objective.latent_pooling
        add_latent_tokens(vlm.model, vlm.processor, objective.latent_tokens, pooling)
        latent = latent_text(vlm.model.config, vlm.processor.tokenizer)
        averages = averaged_tokens(vlm.model.config)
        vlm.collator = replace(vlm.collator, latent=latent, averages=averages)
    adapt(vlm, recipe.tuning, recipe.model)
    prepare_token_projection(vlm, recipe)
    return vlm.to(device)


def prepare_token_projection(vlm: CAFe, recipe: Recipe) -> None:
    """Give the model the token projection that the recipe trains, its own one or a new one.

    A recipe that trains none takes the model's away, which would not fit its new weights.

    Raises:
        RecipeError: the model's own has another dimension.
    """
    if not recipe.objective.multi_vector_weight:
        remove_token_projection(vlm.model)
        return
    dim, own = recipe.objective.multi_vector_dim, token_projection_of(vlm.model)
    if own is not None and own.out_features != dim:
        raise RecipeError(
            f"objective.multi_vector_dim is {dim}, and the token vectors of {recipe.model} have "
            f"{own.out_features} dimensions; set multi_vector_dim: {own.out_features}"
        )
    weight = new_token_projection(vlm.embedding_dimension, dim) if own is None else own.weight
    add_token_projection(vlm.model, weight)  # anew, as an adapter froze it


def take_published_prompts(vlm: CAFe, *, embeds: bool) -> None:
    """Give a model the templates that `compat: official` trains it with.

    They are saved with it, so every tool prompts it for answers and embeddings as training did.

    Args:
        vlm: The model, changed in place.
        embeds: Whether embeddings are trained, too; otherwise they keep the model's own prompt.
    """
    vlm.processor.chat_template = vlm.collator.render.published_template
    vlm.collator = replace(vlm.collator, pooled_token=TURN_END)
    if embeds:
        setattr(vlm.model.config, PROMPT_KEY, OFFICIAL_PROMPT)
        vlm.collator = replace(vlm.collator, own_prompt=OFFICIAL_PROMPT, protocol=CAFE_PROTOCOL)


def adapt(vlm: CAFe, tuning: Tuning, base: str) -> None:
    """Add the adapter of `tuning` to the model and freeze everything that it does not name.

    Args:
        vlm: The model, changed in place.
        tuning: The recipe's section.
        base: Where the model was loaded from, for the adapter's files.

    Raises:
        RecipeError: A part or a target has nothing to adapt.
    """
    if tuning.kind == "full":
        return
    learned = {name for name, p in vlm.model.named_parameters() if p.requires_grad}
    whole = [name for part in tuning.full_parts for name in _modules(vlm, part)]
    layers = [name for part in tuning.parts for name in _layers(vlm, part, tuning.targets)]
    _check_targets(tuning, layers)
    add_adapter(
        vlm.model,
        base=lasting_name(base),
        layers=layers,
        rank=tuning.rank,
        alpha=tuning.alpha,
        dropout=tuning.dropout,
        dora=tuning.kind == "dora",
        whole=whole,
    )
    for name, parameter in vlm.model.named_parameters():
        if name in learned and name.startswith(tuple(f"{module}." for module in whole)):
            parameter.requires_grad_(True)
    last_layer.prepare(vlm.model.get_decoder())


def _layers(vlm: CAFe, part: str, targets: list[str] | None) -> list[str]:
    """The linear layers of a part, or only those that the recipe names."""
    unused = vlm.family.unused(vlm.model.config)
    layers = linear_layers(vlm.model, vlm.family.parts[part], unused)
    if not layers:
        raise RecipeError(f"tuning.parts: {part} has no linear layers; leave it out")
    if targets is None:
        return layers
    chosen = [name for name in layers if any(_is_called(name, target) for target in targets)]
    if not chosen:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise RecipeError(
            f"tuning.targets is {targets}, but {part} has no such layer; it has {known}"
        )
    return chosen


def _is_called(name: str, target: str) -> bool:
    """Whether the recipe's target refers to the layer with this full name."""
    return f".{name}".endswith(f".{target}")


def _check_targets(tuning: Tuning, layers: list[str]) -> None:
    """Raise RecipeError for a target that matches no layer."""
    for target in tuning.targets or ():
        if any(_is_called(name, target) for name in layers):
            continue
        known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        why = f"no layer of {' and '.join(tuning.parts)} has this name"
        if target.rpartition(".")[2] in _NEVER_ADAPTED:
            why = "the language head and the token embedding are never adapted"
        raise RecipeError(
            f"tuning.targets names {target!r}, but {why}; leave it out (adapted are {known})"
        )


def _modules(vlm: CAFe, part: str) -> list[str]:
    """The modules of a part. Its bare parameters (LLaVA's newline embedding) are not trained.

    An adapter's file names modules, so other tools would silently omit a bare parameter.
    """
    modules = dict(vlm.model.named_modules())
    names: list[str] = []
    for name in (prefix.removesuffix(".") for prefix in vlm.family.parts[part]):
        if isinstance(modules.get(name), nn.ModuleList):  # peft saves modules, not lists of them
            names += [f"{name}.{i}" for i in range(len(modules[name]))]  # type: ignore[arg-type]
        elif name in modules:
            names.append(name)
    if not names:
        raise RecipeError(f"tuning.full_parts: {part} has no modules of its own; leave it out")
    return names


# ---------------------------------------------------------------------- memory


def cast_frozen_linears_to_bf16(vlm: CAFe) -> None:
    """Keep the frozen linear layers' weights in bf16, for a run whose forwards are in bf16.

    Autocast would make the same copy of them in every forward, so no bit of any output changes.
    Other frozen weights (norms, embeddings) are used without a cast, so they stay in float32.
    """
    head = vlm.model.get_output_embeddings()
    for module in vlm.model.modules():
        if type(module) is not nn.Linear or module is head:
            continue
        parameters = list(module.parameters())
        if not any(p.requires_grad for p in parameters):
            for parameter in parameters:
                parameter.data = parameter.data.to(torch.bfloat16)


def _in_four_bits(recipe: Recipe, device: torch.device) -> CAFe:
    """The model with its language part in 4 bits; vision tower, projector and head are not."""
    if find_spec("bitsandbytes") is None:
        raise RecipeError(
            "tuning.kind is qlora, which needs bitsandbytes, and that is not installed; pip "
            "install bitsandbytes, or set tuning.kind to lora"
        )
    from transformers import BitsAndBytesConfig

    family = family_of(read_config(locate(recipe.model), f"model {recipe.model!r}"))
    parts = (*family.parts["vision"], *family.parts["projector"])
    bf16 = resolved_precision(recipe.precision, device) == "bf16"
    quantization: Any = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        llm_int8_skip_modules=[*(name.removesuffix(".") for name in parts), "lm_head"],
    )
    model, processor = load_pretrained(
        recipe.model,
        dtype=torch.float32,
        attention=recipe.attention,
        quantization=quantization,
    )
    vlm = CAFe(model, processor)
    vlm.collator = with_protocol(vlm.collator, model.config, recipe.model)
    return vlm.to(device)
