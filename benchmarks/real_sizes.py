"""The trie step at real sizes on one GPU: LLaVA-OneVision 0.5B or 7B, random weights, bf16.

    python benchmarks/real_sizes.py --model 0.5b --batch 8
    python benchmarks/real_sizes.py --model 7b --batch 8 --checkpointing
    python benchmarks/real_sizes.py --model 0.5b --batch 8 --cached 64

The published configurations with a picture of 384 x 384: an overview and one tile, 1,485 picture
tokens. Each side is forward and backward of the whole joint loss, without an optimizer. The three
passes run on SDPA without a mask (their fastest case), the trie step on SDPA with its mask and on
FlexAttention. Losses are checked to be equal.

tokens/s is of the trie's row. MFU counts what the trie step must compute (no padding, nothing
twice): 6 multiplications per matrix weight and token, and the pairs of tokens that see each other,
over 989 TFLOP/s, the dense bf16 peak of an H100 SXM. The three passes do the same job, so their
MFU is of the same count.
`--cached N` instead compares a batch of N in chunks of `--batch` with one chunk: memory and time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from cafe.model.checkpoint import kernels
from cafe.model.rows import Chunk
from cafe.model.tiny import tiny_processor
from cafe.model.vlm import CAFe
from cafe.recipes import Objective
from cafe.train.contrast import Contrast
from cafe.train.step import TrainingStep
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
    """The configuration's model with random bf16 weights; a tokenizer of few pieces serves it."""
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
    """Floating-point operations of forward and backward that no implementation can leave out."""

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
    """Median seconds over `repeats` after a warm-up, and peak bytes over all of them."""
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
    parser.add_argument("--cached", type=int, help="batch, in chunks of --batch")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    device = torch.device("cuda")

    torch.manual_seed(0)
    model = build(arguments.model, device)
    if arguments.checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    objective = Objective()
    step = TrainingStep(model, model, Contrast(objective), objective)
    examples = make_examples(arguments.cached or arguments.batch, PIXELS)
    size = arguments.batch
    chunks = [model.collator(examples[i : i + size]) for i in range(0, len(examples), size)]
    chunk: Chunk = chunks[0].to(device)
    flops = step_flops(model, chunk)
    shown = int((chunk.rows.input_ids[0] == model.processor.image_token_id).sum())
    weights = sum(p.numel() for p in model.parameters())
    facts = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": weights,
        "batch": arguments.batch,
        "checkpointing": arguments.checkpointing,
        "picture_tokens": shown,
        "row_tokens": chunk.rows.input_ids.shape[1],
        "teraflop": flops / 1e12,
    }
    print(facts, flush=True)

    def trie(attention: str, given: list[Chunk]) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            numbers = step(given)
            return float(numbers.contrastive), float(numbers.language)

        model.model.set_attn_implementation(kernels(attention))
        return run

    found: dict[str, dict[str, Any]] = {}

    def side(name: str, run: Callable[[], tuple[float, float]], examples: int) -> None:
        try:
            found[name] = one = measured(run, model, arguments.repeats)
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
        one, many = found.values()
        print(f"memory_ratio: {many['bytes'] / one['bytes']:.2f}")
        per_chunk = many["seconds"] / len(chunks)
        print(f"time_ratio (per example): {per_chunk / one['seconds']:.2f}")
    else:
        side("three passes (published)", ThreePasses(model, examples, zero_pictures=True), size)
        side("three passes (lean)", ThreePasses(model, examples, zero_pictures=False), size)
        side("trie step, sdpa", trie("sdpa", [chunk]), size)
        side("trie step, flex_attention", trie("flex_attention", [chunk]), size)
        losses = [Tensor(one["losses"]) for one in found.values()]
        apart = max(float((a - losses[0]).abs().max()) for a in losses)
        print(f"losses differ by at most {apart:.4f}")
        assert apart < 0.1, "the sides have other losses"
        trie_seconds = min(v["seconds"] for k, v in found.items() if k.startswith("trie"))
        for name, one in found.items():
            print(f"{name} over the faster trie step: {one['seconds'] / trie_seconds:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"facts": facts, "sides": found}, indent=2))


if __name__ == "__main__":
    main()
