"""A recipe's `tuning` applied to a model: which layers an adapter changes, and what learns."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from cafe.errors import RecipeError
from cafe.model import last_layer
from cafe.model.adapter import adapter_of, add_adapter, linear_layers
from cafe.model.checkpoint import load_pretrained
from cafe.model.families import family_of
from cafe.model.location import lasting_name, locate
from cafe.model.vlm import CAFe
from cafe.recipes import Recipe, Tuning


def load_core(recipe: Recipe, device: torch.device) -> CAFe:
    """The model of a recipe in float32 on `device`, with its adapter if there is one to train.

    Raises RecipeError for a `tuning` that does not fit the model or the machine.
    """
    if recipe.tuning.kind == "qlora":
        core = _in_four_bits(recipe, device)
    else:
        core = CAFe.from_pretrained(
            recipe.model, dtype=torch.float32, device=device, attention=recipe.attention
        )
    if adapter_of(core.model) is not None:
        raise RecipeError(
            f"model: {recipe.model} is an adapter, and training starts from whole weights. Merge "
            f"it first (cafe export {recipe.model} --to DIR --merge), then take DIR as the model"
        )
    adapt(core, recipe.tuning, recipe.model)
    return core.to(device)


def adapt(core: CAFe, tuning: Tuning, base: str) -> None:
    """Put the adapter that `tuning` asks for into the model; all that it does not name is frozen.

    base   what the model was loaded from, as the adapter's files will say
    Raises RecipeError when a part or a target has nothing to adapt.
    """
    if tuning.kind == "full":
        return
    learned = {name for name, p in core.model.named_parameters() if p.requires_grad}
    whole = [name for part in tuning.full_parts for name in _modules(core, part)]
    add_adapter(
        core.model,
        base=lasting_name(base),
        layers=[name for part in tuning.parts for name in _layers(core, part, tuning.targets)],
        rank=tuning.rank,
        alpha=tuning.alpha,
        dropout=tuning.dropout,
        dora=tuning.kind == "dora",
        whole=whole,
    )
    for name, parameter in core.model.named_parameters():
        if name in learned and name.startswith(tuple(f"{module}." for module in whole)):
            parameter.requires_grad_(True)
    last_layer.prepare(core.model.get_decoder())


def _layers(core: CAFe, part: str, targets: list[str] | None) -> list[str]:
    """The linear layers of a part, or those among them that the recipe names."""
    unused = core.family.unused(core.model.config)
    layers = linear_layers(core.model, core.family.parts[part], unused)
    if not layers:
        raise RecipeError(f"tuning.parts: {part} has no linear layers; leave it out")
    if targets is None:
        return layers
    chosen = [name for name in layers if f".{name}".endswith(tuple(f".{t}" for t in targets))]
    if not chosen:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise RecipeError(
            f"tuning.targets is {targets}, but {part} has no such layer; it has {known}"
        )
    return chosen


def _modules(core: CAFe, part: str) -> list[str]:
    """The modules of a part. Its bare parameters (LLaVA's line end) stay as they are.

    An adapter's file names modules, so other tools would leave out a bare parameter and not say so.
    """
    modules = dict(core.model.named_modules())
    found: list[str] = []
    for name in (prefix.removesuffix(".") for prefix in core.family.parts[part]):
        if isinstance(modules.get(name), nn.ModuleList):  # peft keeps modules, not lists of them
            found += [f"{name}.{i}" for i in range(len(modules[name]))]  # type: ignore[arg-type]
        elif name in modules:
            found.append(name)
    if not found:
        raise RecipeError(f"tuning.full_parts: {part} has no modules of its own; leave it out")
    return found


# ---------------------------------------------------------------------- memory


def halve_frozen_layers(core: CAFe) -> None:
    """Hold the frozen linear layers' weights in bf16, for a run whose forwards are in bf16.

    Autocast makes the same copy of them at every forward, so no bit of any output changes. Other
    frozen weights (norms, embeddings) are read as they are, so they stay.
    """
    head = core.model.get_output_embeddings()
    for module in core.model.modules():
        if type(module) is not nn.Linear or module is head:
            continue
        parameters = list(module.parameters())
        if not any(p.requires_grad for p in parameters):
            for parameter in parameters:
                parameter.data = parameter.data.to(torch.bfloat16)


def _in_four_bits(recipe: Recipe, device: torch.device) -> CAFe:
    """The model with its language part in 4 bits; vision tower, projector and head are whole."""
    if find_spec("bitsandbytes") is None:
        raise RecipeError(
            "tuning.kind is qlora, which needs bitsandbytes, and that is not installed; pip "
            "install bitsandbytes, or set tuning.kind to lora"
        )
    from transformers import AutoConfig, BitsAndBytesConfig

    family = family_of(AutoConfig.from_pretrained(locate(recipe.model)))
    parts = (*family.parts["vision"], *family.parts["projector"])
    quantization: Any = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if recipe.precision == "bf16" else torch.float32,
        llm_int8_skip_modules=[*(name.removesuffix(".") for name in parts), "lm_head"],
    )
    model, processor = load_pretrained(
        recipe.model,
        dtype=torch.float32,
        attention=recipe.attention,
        quantization=quantization,
    )
    return CAFe(model, processor).to(device)
