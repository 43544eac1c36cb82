"""A checkpoint in LLaVA-NeXT's own layout (`llava_qwen`) becomes transformers' LLaVA-OneVision.

    LLaVA-NeXT, CAFe's official code                   here
    model.vision_tower.vision_tower.vision_model.*     vision_tower.*
    model.mm_projector.{0,2}.*                         multi_modal_projector.linear_{1,2}.*
    model.image_newline                                image_newline
    model.{embed_tokens,layers,norm}.*                 language_model.model.*
    lm_head.weight                                     language_model.lm_head.weight

**The vision layer.** LLaVA-NeXT's SigLIP tower deletes its last encoder layer when it loads, and
always takes the last state of the rest, before the post-norm. It never reads
`mm_vision_select_layer`; -2 there names the same state, counted before the deletion. So a tower of
N layers becomes one of N - 1 (26 for SigLIP-so400m) with `vision_feature_layer: -1`; whatever a
checkpoint holds of layer N, or of the pooling head, the original ignores, and so does this.

**Pinpoints** are (width, height) there and (height, width) here: each pair is turned, the order
stays, and ties are broken as there.

**Chat template.** The original writes ChatML with the system turn "You are a helpful assistant."
and each picture as `<image>` and a newline; so does the template written here.

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

from cafe.errors import CheckpointError
from cafe.model.convert_weights import check_weights, is_ignored, read_headers, write_weights
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
"""The towers that `mm_vision_tower` may name without being a directory with a config.json."""

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}" + CHATML
)

# The settings that this layout can have, where it can have only one.
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


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written.

    shards   files of weights;  tensors  weights in them;  bytes  their size
    ignored  names in the source that nothing reads: they were left out
    """

    shards: int
    tensors: int
    bytes: int
    ignored: tuple[str, ...]


def convert_llava_next(source: Path, target: Path) -> Conversion:
    """Write `target`, a transformers LLaVA-OneVision directory, from the checkpoint in `source`.

    `source` holds config.json, *.safetensors and the tokenizer's files; `target` must be new.
    Raises CheckpointError, before anything is written, for a setting that LLaVA-OneVision does not
    have, a missing, unknown or misshapen weight, or a tokenizer without room for `<image>`.
    """
    if target.exists():
        raise CheckpointError(f"{target}: exists already; name a new directory")
    settings = _settings(source)
    names, shapes = read_headers(source)
    tied = bool(settings.get("tie_word_embeddings", False))
    vision, layers = _vision(source, settings)
    ignored = tuple(sorted(n for n in shapes if is_ignored(n, layers, tied)))
    config = _config(source, settings, vision, tied)
    processor = _processor(source, config, settings)
    check_weights(source, shapes, set(ignored), config)

    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        written = write_weights(source, unfinished, names, set(ignored))
        config.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        if (source / "generation_config.json").is_file():
            shutil.copy(source / "generation_config.json", unfinished)
        unfinished.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Conversion(*written, ignored=ignored)


# ---------------------------------------------------------------------- what is there


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
    if not re.fullmatch(r"anyres_max_\d+", str(settings.get("image_aspect_ratio"))):
        raise CheckpointError(
            f"{source}/config.json: image_aspect_ratio is {settings.get('image_aspect_ratio')!r}, "
            "and LLaVA-OneVision has anyres_max_N only, e.g. anyres_max_9"
        )
    pinpoints = settings.get("image_grid_pinpoints")
    if not isinstance(pinpoints, list) or not all(len(pair) == 2 for pair in pinpoints):
        raise CheckpointError(
            f"{source}/config.json: image_grid_pinpoints must be a list of [width, height] pixels"
        )
    return settings


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error


def _vision(source: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The tower's settings as trained, without its last layer, and how many layers remain."""
    named = str(settings.get("mm_vision_tower"))
    file = Path(named) / "config.json"
    if file.is_file():
        whole = _json(file)
        whole = whole.get("vision_config", whole)
        tower = {key: whole[key] for key in SIGLIP_TOWERS["siglip-so400m-patch14-384"]}
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


# ---------------------------------------------------------------------- what it becomes


def _config(source: Path, settings: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
    """LlavaOnevisionConfig. LLaVA-NeXT sets rope_scaling to None, whatever the file says."""
    from transformers import LlavaOnevisionConfig

    text = {key: settings[key] for key in _TEXT_KEYS if key in settings}
    dtype = settings.get("torch_dtype", settings.get("dtype"))
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
        config.dtype = getattr(torch, str(dtype).removeprefix("torch."))
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

    mend = "copy the tokenizer's files of the language model there"
    # Without any, transformers makes an empty tokenizer.
    if not any((source / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(f"{source}: no tokenizer.json; {mend}")
    try:
        return AutoTokenizer.from_pretrained(
            source,
            config=Qwen2Config(),  # the directory's own is of a type that transformers lacks
            extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        )
    except Exception as error:  # parsers of many files: they raise whatever they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{source}: its tokenizer cannot be loaded ({reason}); {mend}"
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
