"""Adapters (LoRA, DoRA): small additional weights, in peft's directory format.

    adapter_config.json          the base, the adapted layers by their full names, rank and scale;
                                 `modules_to_save`: modules whose full weights are here too
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight, ...; in its metadata the
                                 contrastive temperature and the embedding prompt, which a full
                                 model has in config.json
    processor_config.json …      the processor with its templates

Layers are injected into the model itself, so parameter names keep the prefixes of their components
and nothing else in this library knows of adapters. peft, and transformers with it, load the keys
that match and silently skip the rest; here every key is accounted for.

A module of `modules_to_save` is trained and loaded in place, without peft's second copy of it.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cafe.errors import CheckpointError, first_line
from cafe.model.checkpoint.locate import locate
from cafe.model.rerank import TEMPERATURE_KEY, as_temperature
from cafe.model.rows.prompts import (
    PROMPT_KEY,
    TRAINED_PROMPTS_KEY,
    TRAINED_THOUGHTS_KEY,
    as_prompt,
    as_thought_tokens,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's wrapper, which is in every key of its files

_NAME = "default"  # of the adapter within the model
_OWN = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b")


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def adapter_of(model: nn.Module) -> Any | None:
    """Peft's configuration of the model's adapter, or None."""
    return getattr(model, "peft_config", {}).get(_NAME)


def linear_layers(model: Any, prefixes: tuple[str, ...], excluded: tuple[str, ...]) -> list[str]:
    """Full names of the linear layers below `prefixes`, without `excluded` and the head."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and f"{name}.".startswith(prefixes)
        and not f"{name}.".startswith(excluded)
    ]


def add_adapter(
    model: nn.Module,
    *,
    base: str,
    layers: list[str],
    rank: int,
    alpha: int,
    dropout: float,
    dora: bool = False,
    whole: Iterable[str] = (),
) -> None:
    """Add a new adapter to linear layers; all other parameters are frozen.

    A new adapter changes no output: its B matrices are zero.

    Args:
        model: changed in place.
        base: what the model was loaded from; saved with the adapter.
        layers: full names of the linear layers.
        rank: of the update matrices.
        alpha: the update is scaled by alpha / rank.
        dropout: before the update's first matrix.
        dora: DoRA instead of LoRA.
        whole: full names of modules that are saved whole (peft's `modules_to_save`); the caller
            unfreezes them.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config: Any = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=dora,
        target_modules=layers,
        base_model_name_or_path=base,
    )
    inject_adapter_in_model(config, model, _NAME)
    # peft may have shortened the names to suffixes; full names cannot match another component.
    config.target_modules = set(layers)
    config.modules_to_save = sorted(whole) or None
    if _adapted(model) != sorted(layers):
        raise AssertionError("peft did not adapt the requested layers")


def _adapted(model: nn.Module) -> list[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return sorted(n for n, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def _within(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter lies in one of the modules; peft's rule: full names or their ends."""
    return any(re.search(rf"(^|\.){re.escape(module)}\.", name) for module in modules)


# ---------------------------------------------------------------------- files


def save_adapter(
    model: nn.Module, directory: Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write the adapter's two files. `weights`: full parameters, if the model's are sharded."""
    from peft import get_peft_model_state_dict

    config: Any = adapter_of(model)
    every = dict(model.state_dict() if weights is None else weights)
    saved = get_peft_model_state_dict(model, state_dict=every, save_embedding_layers=False)
    saved |= {n: t for n, t in every.items() if _within(n, config.modules_to_save or ())}
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in saved.items()}
    temperature = getattr(model.config, TEMPERATURE_KEY, None)
    known = {} if temperature is None else {TEMPERATURE_KEY: repr(temperature)}
    if (prompt := getattr(model.config, PROMPT_KEY, None)) is not None:
        known[PROMPT_KEY] = prompt
    if trained := getattr(model.config, TRAINED_PROMPTS_KEY, None):
        known[TRAINED_PROMPTS_KEY] = ",".join(trained)
    if (thoughts := getattr(model.config, TRAINED_THOUGHTS_KEY, None)) is not None:
        known[TRAINED_THOUGHTS_KEY] = str(thoughts)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt", **known})
    written = copy.copy(config)
    written.inference_mode = True
    if not isinstance(config.target_modules, str):  # a set's order would differ from run to run
        written.target_modules = sorted(config.target_modules)
    written.save_pretrained(str(directory))


def base_of(directory: Path) -> str:
    """The base that the adapter in `directory` was trained on.

    Raises:
        CheckpointError: its configuration names none.
    """
    base = _settings(directory).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(
            f"adapter {str(directory)!r}: {CONFIG} names no base_model_name_or_path; write the "
            "base's name there, or give the base: CAFe.from_pretrained(base, adapter=directory)"
        )
    return str(base)


def locate_base(directory: Path) -> Path:
    """The directory of the base that the adapter in `directory` was trained on.

    Raises:
        CheckpointError: it is not there; says which file names it, and how to give another.
    """
    base = base_of(directory)
    try:
        return locate(base, "base")
    except CheckpointError as error:
        raise CheckpointError(
            f"adapter {str(directory)!r}: {CONFIG} says that it was trained on {base!r} "
            f"(base_model_name_or_path), which cannot be used ({error}); write there where the "
            "base is now, or give it: CAFe.from_pretrained(base, adapter=directory)"
        ) from error


def _settings(directory: Path) -> dict[str, Any]:
    """The configuration file.

    Raises:
        CheckpointError: it cannot be used.
    """
    name = f"adapter {str(directory)!r}"
    try:
        settings = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        kind = settings["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{name}: {CONFIG} cannot be read ({first_line(error)}); give a directory that peft or "
            "cafe wrote"
        ) from error
    if kind != "LORA":
        raise CheckpointError(
            f"{name}: an adapter of kind {kind}; cafe reads LoRA and DoRA. Merge it with peft "
            "(merge_and_unload), save that model, and give its directory"
        )
    return settings


def load_adapter(model: Any, directory: str | Path) -> None:
    """Add the adapter of a directory or hub id to `model`: every key of it, and no other.

    Raises:
        CheckpointError: names the directory, the first key that does not match, and the fix.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    path = locate(directory, "adapter")
    name = f"adapter {str(path)!r}"
    base = _settings(path).get("base_model_name_or_path")
    tensors = _tensors(path, name)
    try:
        config: Any = LoraConfig.from_pretrained(str(path))
        whole, config.modules_to_save = config.modules_to_save or (), None
        config.inference_mode = True
        missing, unexpected = _load_whole(model, whole, tensors)
        named = config.target_modules
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns about is an error below
            inject_adapter_in_model(config, model, _NAME)
            result = set_peft_model_state_dict(model, tensors, _NAME)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{name}: does not fit the model ({reason}); {_fix(base)}") from error
    config.target_modules, config.modules_to_save = named, list(whole) or None
    missing += [_in_file(key) for key in result.missing_keys if _OWN.search(key)]
    unexpected += [_in_file(key) for key in result.unexpected_keys]
    if missing or unexpected:
        raise CheckpointError(_mismatch(name, sorted(missing), sorted(unexpected), base))
    with safe_open(path / WEIGHTS, "pt") as file:
        trained = file.metadata() or {}
    # Files that peft wrote have none of these: then the base's values apply.
    if (prompts := trained.get(TRAINED_PROMPTS_KEY)) is not None:
        setattr(model.config, TRAINED_PROMPTS_KEY, prompts.split(","))
    if (thoughts := trained.get(TRAINED_THOUGHTS_KEY)) is not None:
        number = int(thoughts) if thoughts.isdecimal() else thoughts
        number = as_thought_tokens(number, f"{name}: {WEIGHTS}")
        setattr(model.config, TRAINED_THOUGHTS_KEY, number)
    if (prompt := trained.get(PROMPT_KEY)) is not None:
        setattr(model.config, PROMPT_KEY, as_prompt(prompt, f"{name}: {WEIGHTS}"))
    if (temperature := trained.get(TEMPERATURE_KEY)) is not None:
        number = as_temperature(temperature, f"{name}: {WEIGHTS}")
        setattr(model.config, TEMPERATURE_KEY, number)


def _tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Key without peft's prefix -> tensor."""
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(
            f"{name}: no {WEIGHTS}; save the adapter there again (pickled weights are not read: "
            "they can run code)"
        )
    try:
        tensors = load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{name}: {WEIGHTS} cannot be read ({first_line(error)})") from error
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def _load_whole(
    model: nn.Module, modules: Iterable[str], tensors: dict[str, Tensor]
) -> tuple[list[str], list[str]]:
    """Copy the modules that the adapter saved whole; their tensors are removed from `tensors`.

    Returns:
        The missing and the unexpected keys, as in the file.
    """
    shared = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    shared -= {n for n, _ in model.named_parameters()}
    wanted = {n: t for n, t in model.state_dict().items() if _within(n, modules)}
    if tied := sorted(shared & wanted.keys()):
        raise ValueError(f"it has its own {tied[0]}, which this model shares with another layer")
    missing = [PREFIX + key for key in wanted if key not in tensors]
    for key in wanted.keys() & tensors.keys():
        tensor = tensors.pop(key)
        if tensor.shape != wanted[key].shape:
            raise ValueError(f"{key} is {list(tensor.shape)}, not {list(wanted[key].shape)}")
        wanted[key].copy_(tensor)
    others = [key for key in tensors if not _OWN.search(key)]
    for key in others:
        tensors.pop(key)
    return missing, [PREFIX + key for key in others]


def _in_file(key: str) -> str:
    """A parameter's name in the model -> its key in the file."""
    key = key.replace(f".{_NAME}.weight", ".weight").removesuffix(f".{_NAME}")
    return PREFIX + key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def _mismatch(name: str, missing: list[str], unexpected: list[str], base: str | None) -> str:
    """The error message, with a hint for keys that another version of transformers renamed."""
    first = [*unexpected, *missing][0]
    message = (
        f"{name}: {len(missing)} of its weights are missing and {len(unexpected)} have no place in "
        f"the model (first: {first}); "
    )
    ends = {_tail(key): key.partition(".layers.")[0] for key in missing}
    for key in unexpected:
        here, there = ends.get(_tail(key)), key.partition(".layers.")[0]
        if here is not None and here != there:
            return message + (
                f"its keys begin with {there}.layers, as another version of transformers names "
                f"these layers (v4: model.layers, v5: model.language_model.layers): rename them to "
                f"{here}.layers"
            )
    return message + _fix(base)


def _tail(key: str) -> str:
    return key.partition(".layers.")[2]


def _fix(base: str | None) -> str:
    trained_on = f", {base!r}," if base else ""
    return f"load it on the model that it was trained on{trained_on} or copy its two files again"


# ---------------------------------------------------------------------- merging


def merge_into_base(model: nn.Module) -> None:
    """Add the adapter's updates to the model's weights and remove the adapter, in place.

    Raises:
        CheckpointError: an update is not finite; the model must then be discarded.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name in _adapted(model):
        parent, _, child = name.rpartition(".")
        layer: Any = model.get_submodule(name)
        assert isinstance(layer, BaseTunerLayer)
        try:
            layer.merge(safe_merge=True)  # type: ignore[operator]
        except ValueError as error:
            raise CheckpointError(
                f"the adapter's update of {name} cannot be merged ({first_line(error)})"
            ) from error
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model.__dict__.pop("peft_config", None)
