"""Converts LLaVA-NeXT's own checkpoint layout (`llava_qwen`) to transformers' LLaVA-OneVision.

    LLaVA-NeXT, CAFe's official code                   here
    model.vision_tower.vision_tower.vision_model.*     vision_tower.vision_model.*
    model.mm_projector.{0,2}.*                         multi_modal_projector.linear_{1,2}.*
    model.image_newline                                image_newline
    model.{embed_tokens,layers,norm}.*                 language_model.model.*
    lm_head.weight                                     language_model.lm_head.weight

**The vision layer.** LLaVA-NeXT's SigLIP tower deletes its last encoder layer on loading, and
always takes the last state of the rest, before the post-norm. It never reads
`mm_vision_select_layer`; its -2 names the same state, counted before the deletion. So a tower of
N layers becomes one of N - 1 (26 for SigLIP-so400m) with `vision_feature_layer: -1`. The original
ignores weights of layer N and of the pooling head, and so does this.

**Pinpoints** are (width, height) there and (height, width) here: each pair is swapped, their order
is kept, and ties are broken in the same way.

**Chat template.** The original writes ChatML with the system turn "You are a helpful assistant."
and each image as `<image>` and a newline; so does the template written here.

One shard is in memory at a time. Weights keep their numbers and their dtype.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cafe.errors import CheckpointError, first_line
from cafe.files import whole_directory
from cafe.model.checkpoint.convert_weights import (
    check_weights,
    is_ignored,
    read_headers,
    write_weights,
)
from cafe.model.checkpoint.locate import locate
from cafe.model.tiny import CHAT_TEMPLATE as CHATML

SIGLIP_TOWERS: dict[str, dict[str, Any]] = {
    "siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
"""The towers that `mm_vision_tower` may name; any other must be a directory with a config.json."""

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}" + CHATML
)

# The only supported values of these settings.
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("spatial_unpad",),
    "mm_vision_select_layer": (-2,),
    "mm_vision_select_feature": ("patch", None),
    "mm_resampler_type": (None,),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None),
}

_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
    *("initializer_range", "rms_norm_eps", "rope_theta", "attention_dropout"),
    *("use_sliding_window", "sliding_window", "max_window_layers"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
_REQUIRED_TEXT_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")

_MARKERS = ("<image>", "<video>")
_SIZE = "expected a positive whole number"


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written.

    shards   number of weight files
    tensors  number of weights in them
    bytes    their total size
    ignored  names of weights in the source that the original never reads: they were skipped
    """

    shards: int
    tensors: int
    bytes: int
    ignored: tuple[str, ...]


def convert(source: str | Path, target: str | Path) -> Conversion:
    """Convert a checkpoint in LLaVA-NeXT's own layout (`llava_qwen`) to transformers' layout.

    One weights file is in memory at a time.

    Args:
        source: The checkpoint, a directory or a hub id: config.json, *.safetensors and the
            tokenizer's files.
        target: The LLaVA-OneVision directory to write; must not exist.

    Raises:
        CheckpointError: before anything is written, for a setting that LLaVA-OneVision does not
            have, a missing, unknown or misshapen weight, or a tokenizer without room for `<image>`.
    """
    target = Path(target)
    if target.exists():
        raise CheckpointError(f"{target}: already exists; name a new directory")
    source = locate(source)
    settings = _settings(source)
    names, shapes = read_headers(source)
    tied = bool(settings.get("tie_word_embeddings", False))
    vision, layers = _vision(source, settings)
    ignored = tuple(sorted(n for n in shapes if is_ignored(n, layers, tied)))
    config = _config(source, settings, vision, tied)
    processor = _processor(source, config, settings)
    check_weights(source, shapes, set(ignored), config)

    try:
        with whole_directory(target, sync=False) as unfinished:
            written = write_weights(source, unfinished, names, set(ignored))
            config.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)
            if (source / "generation_config.json").is_file():
                shutil.copy(source / "generation_config.json", unfinished)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from error
    return Conversion(*written, ignored=ignored)


# ---------------------------------------------------------------------- the source


def _settings(source: Path) -> dict[str, Any]:
    settings = _json(source / "config.json")
    architectures = settings.get("architectures") or ["none named"]
    if "LlavaQwenForCausalLM" not in architectures:
        raise CheckpointError(
            f"{source}/config.json: architecture {architectures[0]}, expected LlavaQwenForCausalLM "
            "(LLaVA-NeXT's layout); other models load as they are"
        )
    for key, allowed in _EXPECTED.items():
        if settings.get(key, allowed[-1]) not in allowed:
            raise CheckpointError(
                f"{source}/config.json: {key} is {settings[key]!r}, and LLaVA-OneVision has "
                f"{allowed[0]!r} only"
            )
    missing = [key for key in _REQUIRED_TEXT_KEYS if key not in settings]
    if missing:
        raise CheckpointError(f"{source}/config.json: {', '.join(missing)} is missing")
    for key in _REQUIRED_TEXT_KEYS:
        if not _is_size(settings[key]):
            raise CheckpointError(f"{source}/config.json: {key} is {settings[key]!r}, {_SIZE}")
    if not re.fullmatch(r"anyres_max_\d+", str(settings.get("image_aspect_ratio"))):
        raise CheckpointError(
            f"{source}/config.json: image_aspect_ratio is {settings.get('image_aspect_ratio')!r}, "
            "and LLaVA-OneVision has anyres_max_N only, e.g. anyres_max_9"
        )
    pinpoints = settings.get("image_grid_pinpoints")
    if not isinstance(pinpoints, list) or not all(map(_is_resolution, pinpoints)):
        raise CheckpointError(
            f"{source}/config.json: image_grid_pinpoints must be a list of [width, height] pixels"
        )
    dtype = _dtype_name(settings)
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise CheckpointError(
            f"{source}/config.json: torch_dtype is {dtype!r}, expected e.g. bfloat16"
        )
    return settings


def _dtype_name(settings: dict[str, Any]) -> str | None:
    dtype = settings.get("torch_dtype", settings.get("dtype"))
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_resolution(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_size, value))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object of settings")
    return content


def _vision(source: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The tower's settings as trained, without its last layer, and how many layers remain."""
    named = str(settings.get("mm_vision_tower"))
    file = Path(named) / "config.json"
    if file.is_file():
        tower = _siglip_sizes(file)
    elif Path(named).name in SIGLIP_TOWERS:
        tower = dict(SIGLIP_TOWERS[Path(named).name])
    else:
        raise CheckpointError(
            f"{source}/config.json: mm_vision_tower is {named!r}, known are "
            f"{', '.join(SIGLIP_TOWERS)}; for another SigLIP tower set it to a directory that "
            "holds its config.json"
        )
    tower["num_hidden_layers"] -= 1
    return tower, tower["num_hidden_layers"]


def _siglip_sizes(file: Path) -> dict[str, int]:
    """The sizes that a SigLIP's config.json states; those that it omits are SigLIP's defaults."""
    from transformers import SiglipVisionConfig

    stated = _json(file)
    prefix = "vision_config." if "vision_config" in stated else ""
    stated = stated.get("vision_config", stated)
    if not isinstance(stated, dict):
        raise CheckpointError(f"{file}: vision_config is {stated!r}, expected an object")
    kind = stated.get("model_type", "siglip_vision_model")
    if kind not in ("siglip_vision_model", "siglip"):
        raise CheckpointError(
            f"{file}: {prefix}model_type is {kind!r}, and LLaVA-NeXT's towers that can be "
            "converted are siglip_vision_model"
        )
    default = SiglipVisionConfig()
    sizes: dict[str, int] = {}
    for key in SIGLIP_TOWERS["siglip-so400m-patch14-384"]:
        value = stated.get(key, getattr(default, key))
        if not _is_size(value):
            raise CheckpointError(f"{file}: {prefix}{key} is {value!r}, {_SIZE}")
        sizes[key] = value
    return sizes


# ---------------------------------------------------------------------- the target


def _config(source: Path, settings: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
    """The LlavaOnevisionConfig. LLaVA-NeXT always sets rope_scaling to None."""
    from transformers import LlavaOnevisionConfig

    text = {key: settings[key] for key in _TEXT_KEYS if key in settings}
    dtype = _dtype_name(settings)
    first = _first_marker(source)
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision},
        text_config={"model_type": "qwen2", "tie_word_embeddings": tied, **text},
        image_token_index=first,
        video_token_index=first + 1,
        image_grid_pinpoints=[
            [height, width] for width, height in settings["image_grid_pinpoints"]
        ],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=settings["image_aspect_ratio"],
        tie_word_embeddings=tied,
        architectures=["LlavaOnevisionForConditionalGeneration"],
    )
    if dtype is not None:
        config.dtype = getattr(torch, dtype)
    rows = settings["vocab_size"]
    if first + len(_MARKERS) > rows:
        raise CheckpointError(
            f"{source}: the tokenizer has {first} tokens and the embedding {rows} rows; "
            f"{' and '.join(_MARKERS)} need {len(_MARKERS)} rows of their own. Enlarge the "
            "embedding (resize_token_embeddings) and save again"
        )
    return config


def _tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer, Qwen2Config

    fix = "copy the tokenizer's files of the language model there"
    # Without either, transformers creates an empty tokenizer.
    if not any((source / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(f"{source}: no tokenizer.json; {fix}")
    try:
        return AutoTokenizer.from_pretrained(
            source,
            trust_remote_code=False,
            config=Qwen2Config(),  # transformers does not know the type of the directory's own
            extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        )
    except Exception as error:  # parsers of many files, which raise all kinds of exceptions
        raise CheckpointError(
            f"{source}: its tokenizer cannot be loaded ({first_line(error)}); {fix}"
        ) from error


def _first_marker(source: Path) -> int:
    """The id of <image>; <video> is the next one."""
    tokenizer = _tokenizer(source)
    image, video = (int(tokenizer.convert_tokens_to_ids(marker)) for marker in _MARKERS)
    if video != image + 1:
        raise CheckpointError(f"{source}: <image> is token {image} and <video> {video}")
    return image


def _processor(source: Path, config: Any, settings: dict[str, Any]) -> Any:
    """Resizing and normalising as LLaVA-NeXT's SigLIP image processor: bicubic, to [-1, 1]."""
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    side = config.vision_config.image_size
    pixels: dict[str, Any] = {
        "size": {"height": side, "width": side},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,  # bicubic
    }
    tokenizer = _tokenizer(source)
    tokenizer.padding_side = "left"
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            image_grid_pinpoints=config.image_grid_pinpoints, **pixels
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(**pixels),
        num_image_tokens=(side // config.vision_config.patch_size) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=settings["image_aspect_ratio"],
        chat_template=CHAT_TEMPLATE,
    )
