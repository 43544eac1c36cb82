"""One directory for every tool.

The directory is an ordinary transformers checkpoint of the *generation* model, `lm_head` intact,
plus the five small files that make sentence-transformers (and vLLM, which reads them) pool and
format as this library does, without custom code:

    config.json  generation_config.json  model*.safetensors     transformers
    processor_config.json  tokenizer*.json  chat_template.jinja
    embedding_template.jinja  cafe_protocol.json                prompts for an embedding
    modules.json  config_sentence_transformers.json             sentence-transformers
    sentence_bert_config.json  1_Pooling/  2_Normalize/
    multi_vector/     of models with token vectors only (`cafe.model.checkpoint.multi_vector`)

The weights have the names that the hub's checkpoints have, which are the ones vLLM loads. The
embedding template is no named chat template of the processor: vLLM takes none that has several.

A model with an adapter is saved as an adapter directory (`cafe.model.checkpoint.adapter`).

Never save it with `SentenceTransformer.save_pretrained`: that drops `lm_head`.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cafe.errors import CafeError, CheckpointError, first_line
from cafe.model.attention import register_flex
from cafe.model.checkpoint.adapter import (
    adapter_of,
    is_adapter,
    load_adapter,
    locate_base,
    save_adapter,
)
from cafe.model.checkpoint.locate import check_index, locate
from cafe.model.checkpoint.multi_vector import (
    load_projection,
    remove_projection,
    save_modules,
    save_projection,
)
from cafe.model.checkpoint.sentence_transformers_files import (
    EMBEDDING_TEMPLATE,
    NAMED_TEMPLATES,
    sentence_transformers_files,
)
from cafe.model.families import family_of, part_that_answers
from cafe.model.latent import latent_mean_files, latent_names
from cafe.model.multi_vector import (
    TOKEN_PROJECTION,
    add_token_projection,
    remove_token_projection,
    without_token_projection,
)
from cafe.model.rows.collate import Collator
from cafe.model.rows.prompts import DEFAULT_PROMPT, UNPROMPTED, default_chat_template
from cafe.model.rows.protocol import Protocol, protocol_of, write_protocol


def load_pretrained(
    name_or_dir: str | Path,
    *,
    dtype: torch.dtype,
    attention: str,
    adapter: str | Path | None = None,
    quantization: Any = None,
) -> tuple[Any, Any]:
    """The transformers model and processor of a directory, a hub id (owner/name), or "tiny".

    For an adapter directory, its base is loaded and the adapter added to it
    (`cafe.model.checkpoint.adapter`).

    Args:
        name_or_dir: the model.
        dtype: of the weights.
        attention: the language model's attention kernel.
        adapter: directory or hub id of an adapter for this base.
        quantization: transformers' configuration for loading the base in fewer bits.

    Raises:
        CheckpointError: there is no model, or weights are missing or do not match.
        FamilyError: the family is not supported; raised before any weight is read.
    """
    path = locate(name_or_dir)
    if is_adapter(path):
        if adapter is not None:
            raise CheckpointError(
                f"model {str(name_or_dir)!r}: is an adapter itself, so it cannot take {adapter}; "
                "merge it first: cafe export"
            )
        adapter, name_or_dir = path, locate_base(path)
    if adapter is None:
        return _load_whole(name_or_dir, dtype, attention, quantization)
    adapter = locate(adapter, "adapter")
    # Adapters that cafe wrote contain the processor they were trained with; peft's do not.
    processor_dir = adapter if (adapter / "processor_config.json").is_file() else None
    model, processor = _load_whole(name_or_dir, dtype, attention, quantization, processor_dir)
    load_adapter(model, adapter)
    _take_projection(model, adapter)
    return model.to(dtype), processor


def _take_projection(model: Any, directory: Path) -> None:
    """Give the model the token projection of its directory, or take that of its base away.

    An adapter changes the states that the base's projection was trained on.
    """
    remove_token_projection(model)
    hidden = int(model.config.get_text_config().hidden_size)
    if (weight := load_projection(directory, hidden)) is not None:
        add_token_projection(model, weight)


def _load_whole(
    name_or_dir: str | Path,
    dtype: torch.dtype,
    attention: str,
    quantization: Any,
    processor_dir: Path | None = None,
) -> tuple[Any, Any]:
    """A model with all of its weights, and its processor or the one in `processor_dir`."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    name = f"model {str(name_or_dir)!r}"
    path = _checked(name, locate(name_or_dir))
    config = read_config(path, name)
    family_of(config)
    try:
        with quiet():
            processor = AutoProcessor.from_pretrained(
                processor_dir or path, trust_remote_code=False
            )
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                attn_implementation=kernels(attention, config),
                quantization_config=quantization,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # collected in `info` and rejected below
                output_loading_info=True,
                trust_remote_code=False,
            )
    except CafeError:
        raise
    except Exception as error:  # parsers of many files, which raise all kinds of exceptions
        raise cannot_be_loaded(name, error) from error
    if processor.chat_template is None:  # some models (Gemma 3) have it in tokenizer_config.json
        processor.chat_template = processor.tokenizer.chat_template
    model, info = loaded
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(m[0]) for m in info["mismatched_keys"])
    if missing or mismatched:
        raise CheckpointError(
            f"{name}: {len(missing)} weights are missing and {len(mismatched)} have another "
            f"shape than config.json says (first: {[*missing, *mismatched][0]}); copy config and "
            "weights again, from one model"
        )
    tokens, rows = len(processor.tokenizer), model.get_input_embeddings().num_embeddings
    if tokens > rows:
        raise CheckpointError(
            f"{name}: the tokenizer has {tokens:,} tokens and the model embeddings for {rows:,}; "
            "copy tokenizer and weights again, from one model, or enlarge the embedding "
            "(resize_token_embeddings) and save both"
        )
    _take_projection(model, path)
    return model, processor


def with_protocol(
    collator: Collator,
    config: Any,
    name_or_dir: str | Path,
    adapter: str | Path | None = None,
    protocol: str | Protocol | None = None,
) -> Collator:
    """The collator of a loaded model, with the protocol that was named or that its files say."""
    path = locate(name_or_dir)
    directories = [path] if adapter is None else [locate(adapter, "adapter"), path]
    if is_adapter(path):
        directories.append(locate_base(path))
    found = protocol_of(protocol, directories, config, collator.processor)
    own_prompt = collator.own_prompt if found.one_word else UNPROMPTED
    return replace(collator, protocol=found, max_frames=found.max_frames, own_prompt=own_prompt)


def read_config(path: Path, name: str) -> Any:
    """The configuration of a model's directory.

    Args:
        path: the directory.
        name: what error messages call the model.

    Raises:
        CheckpointError: it cannot be read, or needs code of its own.
    """
    from transformers import AutoConfig

    try:
        with quiet():
            return part_that_answers(AutoConfig.from_pretrained(path, trust_remote_code=False))
    except Exception as error:  # as in `_load_whole`
        raise cannot_be_loaded(name, error) from error


def cannot_be_loaded(name: str, error: Exception) -> CheckpointError:
    """What is wrong with a model that transformers cannot load.

    Code that a checkpoint brings along is never run, and transformers must not ask the terminal
    whether to: `trust_remote_code=False` at every call makes that an error.
    """
    if "trust_remote_code" in str(error):
        return CheckpointError(
            f"{name}: needs Python code of its own (auto_map in its JSON files), and cafe runs no "
            "code from checkpoints; give a checkpoint in transformers' own layout (publishers name "
            "it …-hf or …-HF)"
        )
    return CheckpointError(f"{name}: cannot be loaded ({first_line(error)})")


def _takes_flex(config: Any) -> bool:
    """Whether transformers' class of a configuration says that it supports FlexAttention."""
    from transformers import AutoModelForImageTextToText

    mapping = AutoModelForImageTextToText._model_mapping
    return config is None or bool(getattr(mapping[type(config)], "_supports_flex_attn", False))


def kernels(attention: str, config: Any = None) -> str | dict[str, str]:
    """The attention kernel of each component, as transformers takes it.

    FlexAttention is only for the language model, whose rows branch: the vision tower has no such
    mask, and its heads may have a width that the kernel does not support. An audio tower, which
    cafe does not use, may have no kernel but its own.
    """
    vision = "sdpa" if attention == "flex_attention" else attention
    if attention == "flex_attention" and not _takes_flex(config):
        attention = register_flex()
    if getattr(config, "audio_config", None) is None and vision == attention:
        return attention
    each = {"": attention, "text_config": attention, "vision_config": vision}
    return {**each, "audio_config": "eager"}


def weights_dtype(name_or_dir: str | Path) -> torch.dtype:
    """The type that the model's weights were saved in; for an adapter, its base's."""
    path = locate(name_or_dir)
    if is_adapter(path):
        path = locate_base(path)
    dtype = read_config(path, f"model {str(name_or_dir)!r}").dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _checked(name: str, path: Path) -> Path:
    """`path`, after checking that it has a configuration and weights."""
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{name}: no config.json in {path}; give a checkpoint directory")
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{name}: no *.safetensors weights in {path}; save the model there again "
            "(pickled weights are not read: they can run code)"
        )
    check_index(path, name)
    return path


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars and reports: what matters becomes a CheckpointError."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def save_checkpoint(
    model: Any,
    processor: Any,
    collator: Collator,
    directory: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write model, processor and the sentence-transformers files to `directory`.

    Of a model with an adapter only the adapter is written, in peft's format. sentence-transformers
    could not apply it to its bare model (other layer names) and would pool another token, so its
    files are not written; merge the adapter for it.

    Args:
        model: transformers' model.
        processor: its processor.
        collator: of the model.
        directory: created if it does not exist.
        weights: full parameters by name, if those in the model are sharded.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_projection(directory)
    name = f"{TOKEN_PROJECTION}.weight"
    projection = (dict(model.named_parameters()) if weights is None else weights).get(name)
    if projection is not None:
        save_projection(projection, directory)
    if adapter_of(model) is not None:
        save_adapter(model, directory, weights)
        save_processor(processor, collator, directory)
        return
    with (
        quiet(),
        without_token_projection(model),
        _hub_names(model if weights is None else _model_around(model, weights)) as whole,
    ):
        whole.save_pretrained(directory)
    save_processor(processor, collator, directory)
    hidden = int(model.config.get_text_config().hidden_size)
    template = collator.render.template(DEFAULT_PROMPT)
    files = sentence_transformers_files(hidden, template)
    if collator.averages:
        tokenizer = processor.tokenizer
        files |= latent_mean_files(files, latent_names(collator.averages), tokenizer.get_vocab())
    for name, content in files.items():
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n")
    if projection is not None:
        save_modules(directory)


@contextmanager
def _hub_names(model: Any) -> Iterator[Any]:
    """The model, which in this block saves its weights under the names of the hub's checkpoints.

    transformers saves them under the names that they were loaded from, and those of a model that
    was never loaded without the prefixes that loading removes (`vision_tower.vision_model.`). The
    prefix of a part within a larger model is not among them: the part is saved alone.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    loaded_from = vars(model).get("_weight_conversions")
    names = get_model_conversion_mapping(model, add_legacy=False)
    if family_of(model.config).whole is not None:
        names = [name for name in names if not isinstance(name, PrefixChange)]
    model._weight_conversions = names or None
    try:
        yield model
    finally:
        model._weight_conversions = loaded_from


def _model_around(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A model with the same configuration and these weights; for saving only."""
    with torch.device("meta"):
        shell = type(model)(copy.deepcopy(model.config))
    shell.load_state_dict(weights, strict=False, assign=True)
    shell.tie_weights()
    shell.generation_config = model.generation_config
    return shell


def save_processor(processor: Any, collator: Collator, directory: Path) -> None:
    """Write the processor with its chat template, the embedding template and the protocol."""
    write_protocol(collator.protocol, directory)
    named = processor.chat_template
    processor.chat_template = default_chat_template(processor)
    try:
        processor.save_pretrained(directory)
    finally:
        processor.chat_template = named
    template = collator.render.template(DEFAULT_PROMPT)
    (directory / EMBEDDING_TEMPLATE).write_text(template, encoding="utf-8")
    # Left there by a version before, it would be read as a second chat template.
    shutil.rmtree(directory / NAMED_TEMPLATES, ignore_errors=True)
