"""A checkpoint in LLaVA-NeXT's own layout, small, in the names and settings of published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

TILE, PATCH, LAYERS, WIDTH, HIDDEN = 32, 8, 3, 24, 32
SIDE = TILE // PATCH
ROWS = 400
SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "hidden_act",
)  # fmt: skip
TOWER = "model.vision_tower.vision_tower.vision_model."


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """As the published ones: ChatML's tokens, and neither <image> nor <video>."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    pieces.decoder = decoders.ByteLevel()  # type: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(["Compress this image in one word: a red cat"], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def make_source(
    folder: Path, *, tied: bool = False, most_tiles: int = 9, **changes: Any
) -> dict[str, Tensor]:
    """A checkpoint in LLaVA-NeXT's layout; returns its weights."""
    torch.manual_seed(0)
    folder.mkdir()
    vision = transformers.SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=2,
        image_size=TILE, patch_size=PATCH,
    )  # fmt: skip
    vision.save_pretrained(folder / "siglip")
    text = transformers.Qwen2Config(
        vocab_size=ROWS, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=tied,
    )  # fmt: skip
    weights = dict(transformers.Qwen2ForCausalLM(text).state_dict())
    if tied:
        del weights["lm_head.weight"]
    tower = transformers.SiglipVisionModel(vision).state_dict()
    whole = {f"{TOWER}{name.removeprefix('vision_model.')}": w for name, w in tower.items()}
    # Deleted when the original loads, so a checkpoint of it lacks them.
    weights |= {
        name: w
        for name, w in whole.items()
        if f"layers.{LAYERS - 1}." not in name and ".head." not in name
    }
    for layer, inputs in ((0, WIDTH), (2, HIDDEN)):
        weights[f"model.mm_projector.{layer}.weight"] = torch.randn(HIDDEN, inputs) / inputs**0.5
        weights[f"model.mm_projector.{layer}.bias"] = torch.randn(HIDDEN)
    weights["model.image_newline"] = torch.randn(HIDDEN)
    # Initial biases and position embeddings are (nearly) zero, and would hide a mistake.
    weights = {n: w + 0.1 * torch.randn_like(w) for n, w in weights.items()}
    grid = [[TILE * w, TILE * h] for w in range(1, 5) for h in range(1, 4)]
    settings = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "torch_dtype": "float32",
        "mm_vision_tower": str(folder / "siglip"),
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_resampler_type": None,
        "mm_use_im_start_end": False,
        "image_aspect_ratio": f"anyres_max_{most_tiles}",
        "image_grid_pinpoints": grid,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        **{key: value for key, value in text.to_dict().items() if key in SHARED},
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer().save_pretrained(folder)
    save_file(weights, folder / "model.safetensors")
    return weights
