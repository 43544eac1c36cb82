"""A tiny random model and processor of each family, saved in the hub's layout.

Nothing of this library is used here: classes, configurations and chat templates are
transformers' own, with sizes that run in milliseconds and templates written like the published
ones. `build(name, directory)` writes one to disk; `NAMES` lists them. `benchmarks/families.py`
builds larger ones of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WORDS = [
    "Describe this image. Is it a cat? a big red cat at the top left, yes no small",
    "You are a helpful assistant. Compress this image and sentence in one word:",
    "user\n\n\nmodel\n\n\n\nassistant\nUser: Assistant: [INST] [/INST]\n\n\nFrame1: Frame2:",
] * 3
PATCH = 8


@dataclass(frozen=True, slots=True)
class Sizes:
    """width, layers, heads   of the tower and of the language model
    view       pixels along a side of what the tower sees at once (where that is fixed)
    image    pixels along a side of the largest image
    window     of sliding-window layers; None: smaller than an image's tokens, for the tests
    """

    width: int = 32
    layers: int = 2
    heads: int = 2
    view: int = 32
    image: int = 64
    window: int | None = None

    @property
    def head(self) -> int:
        return self.width // self.heads

    @property
    def patches(self) -> int:
        return (self.view // PATCH) ** 2

    @property
    def square(self) -> dict[str, int]:
        return {"height": self.view, "width": self.view}

    @property
    def anyres(self) -> list[list[int]]:
        one, two = self.view, 2 * self.view
        return [[one, two], [two, one], [two, two]]

    def tower(self) -> dict[str, Any]:
        return {
            "hidden_size": self.width,
            "intermediate_size": 2 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
        }

    def text(self, words: Any) -> dict[str, Any]:
        return {
            **self.tower(),
            "vocab_size": len(words),
            "num_key_value_heads": self.heads // 2,
            "max_position_embeddings": 2048,
            "bos_token_id": None,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": words.pad_token_id,
        }

    def mrope(self, sixteenths: list[int]) -> dict[str, Any]:
        section = [share * self.head // 16 for share in sixteenths]
        return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}


# ------------------------------------------------------------------ tokenizer and templates


def tokenizer(special: Sequence[str], named: dict[str, str], *, eos: str, pad: str, **more: Any):
    """A byte-level tokenizer; line ends in a row are tokens of their own, as in real ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    core.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, pad_token=pad, extra_special_tokens=named, **more
    )


def chat_ml(image: str, *, video: str = "", audio: str = "", system: str = "") -> str:
    """Qwen's and InternVL's way: <|im_start|>role ... <|im_end|>."""
    heard = f"{{%- elif part['type'] == 'audio' -%}}{{{{- '{audio}' -}}}}" if audio else ""
    first = (
        "{%- if messages[0]['role'] != 'system' -%}"
        f"{{{{- '<|im_start|>system\\n{system}<|im_end|>\\n' -}}}}{{%- endif -%}}"
        if system
        else ""
    )
    return (
        first + "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
        "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
        "{%- for part in message['content'] -%}"
        f"{{%- if part['type'] == 'image' -%}}{{{{- '{image}' -}}}}"
        f"{{%- elif part['type'] == 'video' -%}}{{{{- '{video}' -}}}}{heard}"
        "{%- else -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
        "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )


MISTRAL = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- '[INST] ' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- ' ' -}}{%- endif -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>\\n' -}}"
    "{%- else -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- if message['role'] == 'user' -%}{{- ' [/INST]' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '</s>' -}}"
    "{%- else -%}{{- '\\n\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
)

GEMMA = (
    "{{- bos_token -}}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set before = (messages[0]['content'] if messages[0]['content'] is string "
    "else messages[0]['content'][0]['text']) + '\\n\\n' -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set before = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for message in rest -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('Conversation roles must alternate') -}}{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{- '<start_of_turn>' + role + '\\n' + (before if loop.first else '') -}}"
    "{%- if message['content'] is string -%}{{- message['content'] | trim -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<start_of_image>' -}}"
    "{%- else -%}{{- part['text'] | trim -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<end_of_turn>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
)

SMOL = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}"
    "{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


# ------------------------------------------------------------------ families


def llava_onevision(sizes: Sizes) -> tuple[Any, Any]:
    """With Qwen2, whose second layer has a sliding window."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    words = tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"],
        {"image_token": "<image>", "video_token": "<video>"},
        eos="<|im_end|>",
        pad="<|endoftext|>",
    )
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=sizes.square, image_grid_pinpoints=sizes.anyres
        ),
        tokenizer=words,
        video_processor=LlavaOnevisionVideoProcessor(size=sizes.square),
        num_image_tokens=sizes.patches,
        vision_feature_select_strategy="full",
        chat_template=chat_ml("<image>\\n", video="<video>\\n"),
    )
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            **sizes.tower(),
            "image_size": sizes.view,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            **sizes.text(words),
            "use_sliding_window": True,
            "sliding_window": sizes.window or 40,
            "max_window_layers": 1,
        },
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=sizes.anyres,
        vision_feature_select_strategy="full",
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def llava_next(sizes: Sizes) -> tuple[Any, Any]:
    """With Mistral, every layer of which sees 40 tokens: fewer than one image has."""
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    words = tokenizer(
        ["<s>", "</s>", "<pad>", "<image>"], {"image_token": "<image>"}, eos="</s>", pad="<pad>"
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": sizes.view},
            crop_size=sizes.square,
            image_grid_pinpoints=sizes.anyres,
        ),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=MISTRAL,
    )
    config = LlavaNextConfig(
        vision_config={
            "model_type": "clip_vision_model",
            **sizes.tower(),
            "image_size": sizes.view,
            "patch_size": PATCH,
            "projection_dim": sizes.width,
        },
        text_config={
            "model_type": "mistral",
            "sliding_window": sizes.window or 40,
            **sizes.text(words),
        },
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=sizes.anyres,
    )
    return LlavaNextForConditionalGeneration(config), processor


def _qwen_words() -> Any:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    return tokenizer(
        [*names, "<|image_pad|>", "<|video_pad|>"],
        {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        eos="<|im_end|>",
        pad="<|endoftext|>",
    )


_QWEN_CHAT = chat_ml(
    "<|vision_start|><|image_pad|><|vision_end|>",
    video="<|vision_start|><|video_pad|><|vision_end|>",
    system="You are a helpful assistant.",
)


def _qwen_ids(words: Any) -> dict[str, int]:
    ids = words.convert_tokens_to_ids
    return {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }


def _qwen_pixels(sizes: Sizes) -> dict[str, Any]:
    size = {"shortest_edge": 16 * 16, "longest_edge": sizes.image**2}
    return {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2, "size": size}


def qwen2_vl(sizes: Sizes) -> tuple[Any, Any]:
    """With a sliding window in its second layer, so that depth and M-RoPE positions both count."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    words = _qwen_words()
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_qwen_pixels(sizes)),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(**_qwen_pixels(sizes)),
        chat_template=_QWEN_CHAT,
    )
    config = Qwen2VLConfig(
        vision_config={
            "depth": sizes.layers,
            "embed_dim": sizes.width,
            "hidden_size": sizes.width,
            "num_heads": sizes.heads,
            "mlp_ratio": 2,
            "patch_size": PATCH,
        },
        text_config={
            **sizes.text(words),
            "rope_parameters": sizes.mrope([2, 3, 3]),
            "use_sliding_window": True,
            "sliding_window": sizes.window or 12,
            "max_window_layers": 1,
        },
        **_qwen_ids(words),
    )
    return Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl(sizes: Sizes) -> tuple[Any, Any]:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    words = _qwen_words()
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_qwen_pixels(sizes)),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(**_qwen_pixels(sizes)),
        chat_template=_QWEN_CHAT,
    )
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": sizes.layers,
            "hidden_size": sizes.width,
            "intermediate_size": 2 * sizes.width,
            "out_hidden_size": sizes.width,
            "num_heads": sizes.heads,
            "patch_size": PATCH,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        text_config={**sizes.text(words), "rope_parameters": sizes.mrope([2, 3, 3])},
        **_qwen_ids(words),
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def qwen2_5_omni(sizes: Sizes) -> tuple[Any, Any]:
    """The thinker. Windows of 0.2 seconds of sound; no recording is longer than three.

    Patches are larger than elsewhere: the processor enlarges every frame to 100,352 pixels.
    """
    from transformers import (
        Qwen2_5OmniProcessor,
        Qwen2_5OmniThinkerConfig,
        Qwen2_5OmniThinkerForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )

    named = {
        "image_token": "<|IMAGE|>",
        "audio_token": "<|AUDIO|>",
        "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    }
    words = tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()],
        named,
        eos="<|im_end|>",
        pad="<|endoftext|>",
    )
    pixels = {**_qwen_pixels(sizes), "patch_size": 2 * PATCH}
    processor = Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        video_processor=Qwen2VLVideoProcessor(**pixels),
        feature_extractor=WhisperFeatureExtractor(feature_size=16, chunk_length=3),
        tokenizer=words,
        chat_template=chat_ml(
            "<|vision_bos|><|IMAGE|><|vision_eos|>",
            video="<|vision_bos|><|VIDEO|><|vision_eos|>",
            audio="<|audio_bos|><|AUDIO|><|audio_eos|>",
            system="You are a helpful assistant.",
        ),
    )
    ids = words.convert_tokens_to_ids
    config = Qwen2_5OmniThinkerConfig(
        vision_config={
            "depth": sizes.layers,
            "hidden_size": sizes.width,
            "intermediate_size": 2 * sizes.width,
            "out_hidden_size": sizes.width,
            "num_heads": sizes.heads,
            "patch_size": 2 * PATCH,
            "window_size": 64,
            "fullatt_block_indexes": [1],
        },
        audio_config={
            "num_mel_bins": 16,
            "encoder_layers": sizes.layers,
            "encoder_attention_heads": sizes.heads,
            "encoder_ffn_dim": 2 * sizes.width,
            "d_model": sizes.width,
            "output_dim": sizes.width,
            "n_window": 10,
            "max_source_positions": 64,
        },
        text_config={**sizes.text(words), "rope_parameters": sizes.mrope([2, 3, 3])},
        audio_token_index=ids("<|AUDIO|>"),
        image_token_index=ids("<|IMAGE|>"),
        video_token_index=ids("<|VIDEO|>"),
        audio_start_token_id=ids("<|audio_bos|>"),
        audio_end_token_id=ids("<|audio_eos|>"),
        vision_start_token_id=ids("<|vision_bos|>"),
        vision_end_token_id=ids("<|vision_eos|>"),
    )
    return Qwen2_5OmniThinkerForConditionalGeneration(config), processor


def _qwen3_processor(sizes: Sizes, processor: Any, words: Any) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLVideoProcessor

    return processor(
        image_processor=Qwen2VLImageProcessor(**_qwen_pixels(sizes)),
        tokenizer=words,
        video_processor=Qwen3VLVideoProcessor(**_qwen_pixels(sizes)),
        chat_template=_QWEN_CHAT.replace("You are a helpful assistant.", ""),
    )


def _qwen3_tower(sizes: Sizes) -> dict[str, Any]:
    return {
        "depth": sizes.layers,
        "hidden_size": sizes.width,
        "intermediate_size": 2 * sizes.width,
        "out_hidden_size": sizes.width,
        "num_heads": sizes.heads,
        "patch_size": PATCH,
        "num_position_embeddings": 16,
    }


def _qwen3_vl(sizes: Sizes, config: Any, model: Any, **text: Any) -> tuple[Any, Any]:
    from transformers import Qwen3VLProcessor

    words = _qwen_words()
    return model(
        config(
            vision_config={
                **_qwen3_tower(sizes),
                "deepstack_visual_indexes": [0],
            },
            text_config={
                **sizes.text(words),
                "head_dim": sizes.head,
                "rope_parameters": {**sizes.mrope([4, 2, 2]), "mrope_interleaved": True},
                **text,
            },
            **_qwen_ids(words),
        )
    ), _qwen3_processor(sizes, Qwen3VLProcessor, words)


def qwen3_vl(sizes: Sizes) -> tuple[Any, Any]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    return _qwen3_vl(sizes, Qwen3VLConfig, Qwen3VLForConditionalGeneration)


def qwen3_vl_moe(sizes: Sizes) -> tuple[Any, Any]:
    """The first layer's MLP is dense, the others are mixtures of experts."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    return _qwen3_vl(
        sizes,
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=sizes.width,
        mlp_only_layers=[0],
    )


def _qwen3_5(sizes: Sizes, config: Any, model: Any, **text: Any) -> tuple[Any, Any]:
    """Two layers in three are linear attention; the last one is not."""
    from transformers import Qwen3VLProcessor

    words = _qwen_words()
    return model(
        config(
            vision_config={
                **_qwen3_tower(sizes),
            },
            text_config={
                **sizes.text(words),
                "num_hidden_layers": sizes.layers + 1,
                "layer_types": ["linear_attention"] * sizes.layers + ["full_attention"],
                "head_dim": sizes.head,
                "linear_key_head_dim": sizes.head // 2,
                "linear_value_head_dim": sizes.head // 2,
                "linear_num_key_heads": sizes.heads,
                "linear_num_value_heads": 2 * sizes.heads,
                "rope_parameters": {
                    **sizes.mrope([2, 1, 1]),
                    "mrope_interleaved": True,
                    "partial_rotary_factor": 0.5,
                },
                **text,
            },
            **_qwen_ids(words),
        )
    ), _qwen3_processor(sizes, Qwen3VLProcessor, words)


def qwen3_5(sizes: Sizes) -> tuple[Any, Any]:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    return _qwen3_5(sizes, Qwen3_5Config, Qwen3_5ForConditionalGeneration)


def qwen3_5_moe(sizes: Sizes) -> tuple[Any, Any]:
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    return _qwen3_5(
        sizes,
        Qwen3_5MoeConfig,
        Qwen3_5MoeForConditionalGeneration,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=sizes.width,
        shared_expert_intermediate_size=sizes.width,
    )


GLM = (
    "{{- '[gMASK]<sop>' -}}{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}"
    "{{- '<|begin_of_image|><|image|><|end_of_image|>' -}}{%- elif part['type'] == 'video' -%}"
    "{{- '<|begin_of_video|><|video|><|end_of_video|>' -}}"
    "{%- else -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)


def _glm4v(
    sizes: Sizes, config: Any, model: Any, processor: Any, image: Any, video: Any
) -> tuple[Any, Any]:
    edges = [f"<|{end}_of_{what}|>" for what in ("image", "video") for end in ("begin", "end")]
    roles = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"]
    words = tokenizer(
        ["<|endoftext|>", *roles, *edges, "<|image|>", "<|video|>"],
        {"image_token": "<|image|>", "video_token": "<|video|>"},
        eos="<|endoftext|>",
        pad="<|endoftext|>",
    )
    # These sizes are of a pair of frames, and of a whole video.
    pixels, clip = _qwen_pixels(sizes), _qwen_pixels(sizes)
    pixels["size"] = {name: 2 * size for name, size in pixels["size"].items()}
    clip["size"] = {"shortest_edge": 2 * 16 * 16, "longest_edge": 6 * sizes.image**2}
    image_id, video_id, *ids = words.convert_tokens_to_ids(["<|image|>", "<|video|>", *edges])
    names = [f"{what}_{end}_token_id" for what in ("image", "video") for end in ("start", "end")]
    return model(
        config(
            vision_config={
                "model_type": "glm4v_vision",
                "depth": sizes.layers,
                "hidden_size": sizes.width,
                "intermediate_size": 2 * sizes.width,
                "out_hidden_size": sizes.width,
                "num_heads": sizes.heads,
                "image_size": sizes.view,
                "patch_size": PATCH,
            },
            text_config={
                "model_type": "glm4v_text",
                **sizes.text(words),
                "rope_parameters": {**sizes.mrope([2, 1, 1]), "partial_rotary_factor": 0.5},
            },
            image_token_id=image_id,
            video_token_id=video_id,
            **dict(zip(names, ids, strict=True)),
        )
    ), processor(
        image_processor=image(**pixels),
        tokenizer=words,
        video_processor=video(**clip),
        chat_template=GLM,
    )


def glm4v(sizes: Sizes) -> tuple[Any, Any]:
    from transformers import (
        Glm4vConfig,
        Glm4vForConditionalGeneration,
        Glm4vImageProcessor,
        Glm4vProcessor,
        Glm4vVideoProcessor,
    )

    classes = Glm4vConfig, Glm4vForConditionalGeneration, Glm4vProcessor
    return _glm4v(sizes, *classes, Glm4vImageProcessor, Glm4vVideoProcessor)


def glm46v(sizes: Sizes) -> tuple[Any, Any]:
    from transformers import (
        Glm46VConfig,
        Glm46VForConditionalGeneration,
        Glm46VImageProcessor,
        Glm46VProcessor,
        Glm46VVideoProcessor,
    )

    classes = Glm46VConfig, Glm46VForConditionalGeneration, Glm46VProcessor
    return _glm4v(sizes, *classes, Glm46VImageProcessor, Glm46VVideoProcessor)


MISTRAL_3 = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{%- set mark = {'user': ['[INST]', '[/INST]'], 'assistant': ['', '</s>'], "
    "'system': ['[SYSTEM_PROMPT]', '[/SYSTEM_PROMPT]']}[message['role']] -%}{{- mark[0] -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{- '[IMG]' -}}"
    "{%- else -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- mark[1] -}}{%- endfor -%}"
)


def mistral3(sizes: Sizes) -> tuple[Any, Any]:
    """With Ministral 3, whose queries grow with their position: here from the eighth on."""
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        PixtralImageProcessor,
        PixtralProcessor,
    )

    marks = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    words = tokenizer(
        ["<s>", "</s>", "<pad>", *marks, "[IMG]", "[IMG_BREAK]", "[IMG_END]"],
        {},
        eos="</s>",
        pad="<pad>",
        bos_token="<s>",
    )
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessor(size={"longest_edge": sizes.image}),
        tokenizer=words,
        patch_size=PATCH,
        spatial_merge_size=2,
        chat_template=MISTRAL_3,
    )
    config = Mistral3Config(
        vision_config={
            "model_type": "pixtral",
            **sizes.tower(),
            "image_size": sizes.image,
            "patch_size": PATCH,
        },
        text_config={
            "model_type": "ministral3",
            **sizes.text(words),
            "head_dim": sizes.head,
            "bos_token_id": words.bos_token_id,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.1,
            },
        },
        image_token_index=processor.image_token_id,
    )
    return Mistral3ForConditionalGeneration(config), processor


def lfm2_vl(sizes: Sizes) -> tuple[Any, Any]:
    """Images over 2,048 pixels are split into tiles. The last layer is a convolution."""
    from transformers import (
        Lfm2VlConfig,
        Lfm2VlForConditionalGeneration,
        Lfm2VlImageProcessor,
        Lfm2VlProcessor,
    )

    named = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    }
    tiles = [f"<|img_row_{r}_col_{c}|>" for r in range(1, 5) for c in range(1, 5)]
    chat = ["<|startoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    words = tokenizer(
        [*chat, *named.values(), *tiles],
        named,
        eos="<|im_end|>",
        pad="<|pad|>",
        bos_token="<|startoftext|>",
    )
    processor = Lfm2VlProcessor(
        Lfm2VlImageProcessor(
            encoder_patch_size=PATCH,
            tile_size=sizes.view,
            max_tiles=4,
            min_image_tokens=1,
            max_image_tokens=sizes.patches // 4,
        ),
        words,
        chat_template="{{- bos_token -}}" + chat_ml("<image>"),
    )
    config = Lfm2VlConfig(
        vision_config={
            "model_type": "siglip2_vision_model",
            **sizes.tower(),
            "patch_size": PATCH,
            "num_patches": sizes.patches,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "lfm2",
            **sizes.text(words),
            "num_hidden_layers": sizes.layers + 1,
            "layer_types": ["conv"] * (sizes.layers - 1) + ["full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
            "initializer_range": 0.1,  # or the convolutions' states would hardly count
        },
        image_token_id=processor.image_token_id,
        projector_hidden_size=sizes.width,
    )
    return Lfm2VlForConditionalGeneration(config), processor


def lfm3_vl(sizes: Sizes) -> tuple[Any, Any]:
    """All three kinds of layers; the window of one of them has 12 tokens."""
    from transformers import Lfm3VlConfig, Lfm3VlForConditionalGeneration, Lfm3VlProcessor

    words = _qwen_words()
    config = Lfm3VlConfig(
        vision_config={
            **sizes.tower(),
            "num_key_value_heads": sizes.heads // 2,
            "patch_size": PATCH,
            "layer_types": ["conv"] * (sizes.layers - 1) + ["full_attention"],
        },
        text_config={
            "model_type": "lfm3",
            **sizes.text(words),
            "num_hidden_layers": sizes.layers + 1,
            "layer_types": ["conv"] * (sizes.layers - 1) + ["sliding_attention", "full_attention"],
            "head_dim": sizes.head,
            "sliding_window": sizes.window or 12,
        },
        projector_hidden_size=sizes.width,
        **_qwen_ids(words),
    )
    return Lfm3VlForConditionalGeneration(config), _qwen3_processor(sizes, Lfm3VlProcessor, words)


def gemma3(sizes: Sizes) -> tuple[Any, Any]:
    """An image has 16 tokens, the sliding window 10."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
    )

    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    words = tokenizer(
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *named.values()],
        named,
        eos="<eos>",
        pad="<pad>",
        bos_token="<bos>",
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size=sizes.square),
        tokenizer=words,
        image_seq_length=sizes.patches,
        chat_template=GEMMA,
    )
    config = Gemma3Config(
        vision_config={
            "model_type": "siglip_vision_model",
            **sizes.tower(),
            "image_size": sizes.view,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        text_config={
            **sizes.text(words),
            "head_dim": sizes.head,
            "query_pre_attn_scalar": sizes.head,
            "sliding_window": sizes.window or 10,
            "layer_types": ["sliding_attention"] * (sizes.layers - 1) + ["full_attention"],
            "bos_token_id": words.bos_token_id,
        },
        mm_tokens_per_image=sizes.patches,
        image_token_index=words.image_token_id,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
    )
    return Gemma3ForConditionalGeneration(config), processor


GEMMA_4 = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{- '<|turn>' + role + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] | trim -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '\\n\\n<|image|>\\n\\n' -}}"
    "{%- elif part['type'] == 'video' -%}{{- '\\n\\n<|video|>\\n\\n' -}}"
    "{%- else -%}{{- part['text'] | trim -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<turn|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}"
)


def gemma4(sizes: Sizes, **text: Any) -> tuple[Any, Any]:
    """All that the published models have, in one. An image has up to 70 tokens, the window 12.

    The last two layers take keys and values from the two before.
    """
    from transformers import (
        Gemma4AudioFeatureExtractor,
        Gemma4Config,
        Gemma4ForConditionalGeneration,
        Gemma4ImageProcessor,
        Gemma4Processor,
        Gemma4VideoProcessor,
    )

    named = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }
    words = tokenizer(
        ["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", *named.values(), "<|video|>"],
        named,
        eos="<turn|>",
        pad="<pad>",
        bos_token="<bos>",
    )
    pixels = {"patch_size": PATCH // 2, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    processor = Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(**pixels),
        tokenizer=words,
        video_processor=Gemma4VideoProcessor(**pixels),
        image_seq_length=70,
        chat_template=GEMMA_4,
    )
    attention = {"num_key_value_heads": sizes.heads // 2, "head_dim": sizes.head}
    ids = words.convert_tokens_to_ids
    config = Gemma4Config(
        vision_config={
            **sizes.tower(),
            **attention,
            "patch_size": PATCH // 2,
            "pooling_kernel_size": 2,
            "position_embedding_size": 160,
            "standardize": True,
        },
        audio_config={
            "hidden_size": sizes.width,
            "num_hidden_layers": 1,
            "num_attention_heads": sizes.heads,
            "subsampling_conv_channels": [4, 2],
            "output_proj_dims": sizes.width,
        },
        text_config={
            **sizes.text(words),
            **attention,
            "global_head_dim": 2 * sizes.head,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "attention_k_eq_v": True,
            "sliding_window": sizes.window or 12,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": len(words),
            "use_bidirectional_attention": "vision",
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": sizes.width,
            "bos_token_id": words.bos_token_id,
            **text,
        },
        boi_token_id=ids("<|image>"),
        eoi_token_id=ids("<image|>"),
        image_token_id=ids("<|image|>"),
        video_token_id=ids("<|video|>"),
        boa_token_id=ids("<|audio>"),
        eoa_token_index=ids("<audio|>"),
        audio_token_id=ids("<|audio|>"),
    )
    return Gemma4ForConditionalGeneration(config), processor


def internvl(sizes: Sizes) -> tuple[Any, Any]:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()],
        named,
        eos="<|im_end|>",
        pad="<|endoftext|>",
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=sizes.square, max_patches=4),
        tokenizer=words,
        video_processor=InternVLVideoProcessor(size=sizes.square),
        image_seq_length=sizes.patches // 4,
        chat_template=chat_ml("<IMG_CONTEXT>\\n", video="<video>\\n"),
    )
    config = InternVLConfig(
        vision_config={**sizes.tower(), "image_size": [sizes.view] * 2, "patch_size": [PATCH] * 2},
        text_config={"model_type": "qwen2", **sizes.text(words)},
        image_token_id=processor.image_token_id,
        image_seq_length=sizes.patches // 4,
    )
    return InternVLForConditionalGeneration(config), processor


def _smol_words() -> Any:
    tiles = [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
    chat = ["<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<image>", "<video>"]
    return tokenizer(
        [*chat, "<fake_token_around_image>", "<global-img>", *tiles],
        {
            "image_token": "<image>",
            "video_token": "<video>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
        eos="<end_of_utterance>",
        pad="<|im_end|>",
    )


def _smol_config(sizes: Sizes, words: Any, config: Any) -> Any:
    return config(
        vision_config={**sizes.tower(), "image_size": sizes.view, "patch_size": PATCH},
        text_config={"model_type": "llama", **sizes.text(words)},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )


def _smol_pixels(sizes: Sizes, image: int) -> dict[str, Any]:
    return {"size": {"longest_edge": image}, "max_image_size": {"longest_edge": sizes.view}}


def smolvlm(sizes: Sizes) -> tuple[Any, Any]:
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    words = _smol_words()
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**_smol_pixels(sizes, sizes.image)),
        words,
        SmolVLMVideoProcessor(**_smol_pixels(sizes, sizes.view), num_frames=4),
        image_seq_len=sizes.patches // 4,
        chat_template=SMOL,
    )
    return SmolVLMForConditionalGeneration(_smol_config(sizes, words, SmolVLMConfig)), processor


def idefics3(sizes: Sizes) -> tuple[Any, Any]:
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )

    words = _smol_words()
    processor = Idefics3Processor(
        Idefics3ImageProcessor(**_smol_pixels(sizes, sizes.image)),
        words,
        image_seq_len=sizes.patches // 4,
        chat_template=SMOL,
    )
    return Idefics3ForConditionalGeneration(_smol_config(sizes, words, Idefics3Config)), processor


FAMILIES: dict[str, Callable[..., tuple[Any, Any]]] = {
    family.__name__: family
    for family in (
        llava_onevision,
        llava_next,
        qwen2_vl,
        qwen2_5_vl,
        qwen2_5_omni,
        qwen3_vl,
        qwen3_vl_moe,
        qwen3_5,
        qwen3_5_moe,
        glm4v,
        glm46v,
        mistral3,
        lfm2_vl,
        lfm3_vl,
        gemma3,
        gemma4,
        internvl,
        idefics3,
        smolvlm,
    )
}
NAMES = tuple(FAMILIES)


def build(name: str, directory: Path, sizes: Sizes | None = None, **text: Any) -> Path:
    """Write the tiny model `name` to `directory`, as transformers itself writes it.

    Args:
        name: one of `NAMES`.
        directory: where to.
        sizes: other than the smallest.
        text: fields of the language model's configuration, for families that take them.
    """
    torch.manual_seed(0)
    model, processor = FAMILIES[name](sizes or Sizes(), **text)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases start alike, and some projections at zero: that would hide errors.
            spread = parameter.std() if parameter.numel() > 1 else 0
            if spread < 1e-4:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif parameter.ndim > 1:
                parameter.mul_(2)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
