"""The small LLaVA-OneVision that ships with the package: its configuration and its directory.

About 6M parameters: a SigLIP tower of 4 layers x 192 over 96 px images in patches of 24, a
two-layer projector, a Qwen2 language model of 4 layers x 256, a byte-level BPE vocabulary
under 1,000. An image takes 16 tokens of overview, 16 of its one tile and 4 line ends.
`scripts/pretrain_tiny.py` made the weights in `tiny_base/`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TINY_DIR = Path(__file__).parent / "tiny_base"

IMAGE_PIXELS = 96
PATCH_PIXELS = 24
VOCABULARY = 960

ONE_IMAGE_KEY = "cafe_answers_from_one_image"
"""In config.json, true: the model was trained on one image at a time, and answers from one only.

A checkpoint inherits it from its base with the rest of the configuration.
"""

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>\\n' -}}"
    "{%- elif part['type'] == 'video' -%}{{- '<video>\\n' -}}"
    "{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def tiny_processor(
    texts: Iterable[str], image_pixels: int = IMAGE_PIXELS, patch_pixels: int = PATCH_PIXELS
) -> Any:
    """A LLaVA-OneVision processor whose tokenizer is trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        PreTrainedTokenizerFast,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=_SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        padding_side="left",
    )
    size = {"height": image_pixels, "width": image_pixels}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=[[image_pixels, image_pixels]]
        ),
        tokenizer=wrapped,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(image_pixels // patch_pixels) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(
    processor: Any,
    *,
    vision_layers: int = 4,
    vision_width: int = 192,
    language_layers: int = 4,
    language_width: int = 256,
    dropout: float = 0.0,
) -> Any:
    """A randomly initialised model for `processor`; tests use other sizes."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    tokenizer, images = processor.tokenizer, processor.image_processor
    heads = max(1, language_width // 64)
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": vision_width,
            "intermediate_size": 4 * vision_width,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": max(1, vision_width // 64),
            "image_size": images.size["height"],
            "patch_size": images.size["height"] // math.isqrt(processor.num_image_tokens),
            "vision_use_head": False,
            "attention_dropout": dropout,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": language_width,
            "intermediate_size": 3 * language_width,
            "num_hidden_layers": language_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},  # as in Qwen2
            "attention_dropout": dropout,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=images.image_grid_pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=True,
    )
    setattr(config, ONE_IMAGE_KEY, True)  # `scripts/pretrain_tiny.py` shows one scene at a time
    return LlavaOnevisionForConditionalGeneration(config)
