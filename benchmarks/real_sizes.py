"""The trie step at real sizes on one GPU: LLaVA-OneVision 0.5B or 7B, random weights, bf16.

    python benchmarks/real_sizes.py --model 0.5b --batch 8
    python benchmarks/real_sizes.py --model 7b --batch 8 --checkpointing
    python benchmarks/real_sizes.py --model 0.5b --batch 8 --cached 64

The published configurations with an image of 384 x 384: an overview and one tile, 1,485 image
tokens. Each side runs forward and backward of the whole joint loss, without an optimizer. The three
passes run on SDPA without a mask (their fastest case), the trie step on SDPA with its mask and on
FlexAttention. All sides must have equal losses.

tokens/s refers to the rows of the trie. MFU counts the floating-point operations that the trie step
cannot avoid (no padding, nothing twice): 6 per matrix weight and token, and those of the token
pairs that attend to each other, over 989 TFLOP/s, the dense bf16 peak of an H100 SXM. The three
passes solve the same task, so their MFU uses the same count. `--cached N` instead compares a batch
of N in chunks of `--batch` with one chunk: memory and time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from cafe.model.checkpoint.directory import kernels
from cafe.model.rows.chunk import Chunk
from cafe.model.tiny import tiny_processor
from cafe.model.vlm import CAFe
from cafe.recipes import Objective
from cafe.training.contrastive import ContrastiveLoss
from cafe.training.step import TrainingStep
from three_passes import CAPTION, ThreePasses, make_examples

PIXELS, PATCH = 384, 14
PEAK_FLOPS = 989e12
TEXT: dict[str, dict[str, Any]] = {  # llava-hf/llava-onevision-qwen2-*-ov-hf
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 152_000,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_128,
        "tie_word_embeddings": False,
    },
}
TOWER = {  # google/siglip-so400m-patch14-384 without its last layer
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": PIXELS,
    "patch_size": PATCH,
    "vision_use_head": False,
}


def build(size: str, device: torch.device) -> CAFe:
    """The model of that configuration with random bf16 weights, and a small tokenizer."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    processor = tiny_processor(
        [CAPTION, "Describe this image. Compress in one word:"] * 50, PIXELS, PATCH
    )
    config = LlavaOnevisionConfig(
        vision_config=TOWER,
        text_config={
            "model_type": "qwen2",
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "eos_token_id": processor.tokenizer.eos_token_id,
            "pad_token_id": processor.tokenizer.pad_token_id,
            **TEXT[size],
        },
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=TEXT[size]["tie_word_embeddings"],
    )
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlavaOnevisionForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    return CAFe(model.to(device), processor).train()


def step_flops(model: CAFe, chunk: Chunk) -> float:
    """Floating-point operations of forward and backward that no implementation can avoid."""

    def matrices(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.ndim == 2)

    inner, text = model.model.model, model.model.config.get_text_config()
    tower = model.model.config.vision_config
    rows = chunk.rows
    i = torch.arange(rows.input_ids.shape[1], device=rows.subtree_end.device)
    seen = (i[None, :, None] >= i) & (i[None, :, None] < rows.subtree_end[:, None, :])
    real = rows.subtree_end > i
    pairs, tokens = int(seen[real].sum()), int(real.sum())
    views = sum(v.shape[:2].numel() for k, v in chunk.vision.items() if k == "pixel_values")
    patches = (PIXELS // PATCH) ** 2
    language = matrices(inner.language_model.layers) * tokens
    head = text.hidden_size * text.vocab_size * rows.label_ids.numel()
    seeing = (matrices(inner.vision_tower) + matrices(inner.multi_modal_projector)) * patches
    attention = 2 * text.num_hidden_layers * text.hidden_size * pairs
    looking = 2 * tower.num_hidden_layers * tower.hidden_size * patches**2
    return 6.0 * (language + head + attention + views * (seeing + looking))


def measured(run: Callable[[], tuple[float, float]], model: CAFe, repeats: int) -> dict[str, Any]:
    """Median seconds over `repeats` after two warm-ups, and peak bytes over the repeats."""
    losses = run()
    model.zero_grad(set_to_none=True)
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "losses": losses,
        "seconds": statistics.median(seconds),
        "spread": max(seconds) - min(seconds),
        "bytes": torch.cuda.max_memory_allocated(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(TEXT), default="0.5b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--cached", type=int, help="batch size, in chunks of --batch")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda")

    torch.manual_seed(0)
    model = build(arguments.model, device)
    if arguments.checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    objective = Objective()
    step = TrainingStep(model, model, ContrastiveLoss(objective), objective)
    examples = make_examples(arguments.cached or arguments.batch, PIXELS)
    size = arguments.batch
    chunks = [model.collator(examples[i : i + size]) for i in range(0, len(examples), size)]
    chunk: Chunk = chunks[0].to(device)
    flops = step_flops(model, chunk)
    image_tokens = int((chunk.rows.input_ids[0] == model.processor.image_token_id).sum())
    weights = sum(p.numel() for p in model.parameters())
    facts = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": weights,
        "batch": arguments.batch,
        "checkpointing": arguments.checkpointing,
        "image_tokens": image_tokens,
        "row_tokens": chunk.rows.input_ids.shape[1],
        "teraflop": flops / 1e12,
    }
    print(facts, flush=True)

    def trie(attention: str, chunks: list[Chunk]) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            numbers = step(chunks)
            return float(numbers.contrastive), float(numbers.language)

        model.model.set_attn_implementation(kernels(attention))
        return run

    results: dict[str, dict[str, Any]] = {}

    def side(name: str, run: Callable[[], tuple[float, float]], examples: int) -> None:
        try:
            results[name] = one = measured(run, model, arguments.repeats)
        except torch.OutOfMemoryError:
            print(f"{name:28s} out of memory", flush=True)
            return
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        rate = examples / one["seconds"]
        print(
            f"{name:28s} contrastive {one['losses'][0]:.4f}  language {one['losses'][1]:.4f}  "
            f"{one['seconds'] * 1e3:7.1f} ms (spread {one['spread'] * 1e3:.1f})  "
            f"{one['bytes'] / 2**30:5.1f} GiB  {rate:6.2f} examples/s  "
            f"{rate * chunk.rows.input_ids.shape[1]:8.0f} tokens/s  "
            f"MFU {rate * flops / arguments.batch / PEAK_FLOPS:.1%}",
            flush=True,
        )

    if arguments.cached:
        side("one chunk", trie("flex_attention", chunks[:1]), size)
        side(f"batch {arguments.cached} in chunks", trie("flex_attention", chunks), len(examples))
        one, many = results.values()
        print(f"memory_ratio: {many['bytes'] / one['bytes']:.2f}")
        per_chunk = many["seconds"] / len(chunks)
        print(f"time_ratio (per example): {per_chunk / one['seconds']:.2f}")
    else:
        side("three passes (published)", ThreePasses(model, examples, zero_images=True), size)
        side("three passes (lean)", ThreePasses(model, examples, zero_images=False), size)
        side("trie step, sdpa", trie("sdpa", [chunk]), size)
        side("trie step, flex_attention", trie("flex_attention", [chunk]), size)
        losses = [Tensor(one["losses"]) for one in results.values()]
        difference = max(float((a - losses[0]).abs().max()) for a in losses)
        print(f"losses differ by at most {difference:.4f}")
        assert difference < 0.1, "the losses of the sides differ"
        trie_seconds = min(v["seconds"] for k, v in results.items() if k.startswith("trie"))
        for name, one in results.items():
            print(f"{name} over the faster trie step: {one['seconds'] / trie_seconds:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"facts": facts, "sides": results}, indent=2))


if __name__ == "__main__":
    main()
