"""LLaVA-NeXT's layout -> transformers' LLaVA-OneVision, against a computation of its own.

The source checkpoints are made here, in the names and settings of the published ones. What the
converted model computes is compared with plain modules: SigLIP's layers but the last, two linear
layers, tiles put together pixel row by pixel row, and transformers' Qwen2 on embeddings.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

from cafe.cli import app
from cafe.errors import CheckpointError
from cafe.model.checkpoint.convert import convert
from cafe.model.vlm import CAFe
from cafe.types import Image, user
from helpers.images import noise
from helpers.llava_next import (
    HIDDEN,
    LAYERS,
    PATCH,
    ROWS,
    SIDE,
    TILE,
    TOWER,
    WIDTH,
    make_source,
    tokenizer,
)

# ---------------------------------------------------------------------- the slow twin


def tile_features(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """[tiles, 3, side, side] -> [tiles, patches, hidden], layer by layer."""
    vision = transformers.SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=LAYERS - 1,
        num_attention_heads=2, image_size=TILE, patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip
    tower = transformers.SiglipVisionModel(vision).eval()
    own = {n.removeprefix(TOWER): w for n, w in weights.items() if n.startswith(TOWER)}
    tower.load_state_dict(own)
    state = tower.embeddings(pixels)
    for layer in tower.encoder.layers:
        state = layer(state, attention_mask=None)
    for number in (0, 2):
        name = f"model.mm_projector.{number}"
        state = functional.linear(state, weights[f"{name}.weight"], weights[f"{name}.bias"])
        state = functional.gelu(state) if number == 0 else state
    return state


def packed(features: Tensor, size: tuple[int, int], grid: tuple[int, int], most: int) -> Tensor:
    """Overview, then the tiles as one image without its padding, a newline after each row."""
    height, width = size
    down, across = grid
    overview, tiles = features[0], features[1:].view(down, across, SIDE, SIDE, HIDDEN)
    rows = [
        torch.cat([tiles[r // SIDE, c, r % SIDE] for c in range(across)])
        for r in range(down * SIDE)
    ]
    if width / height > across / down:  # padded above and below
        pad = (len(rows) - int(height * across * SIDE / width)) // 2
        rows = rows[pad : len(rows) - pad]
    else:
        pad = (across * SIDE - int(width * down * SIDE / height)) // 2
        rows = [row[pad : len(row) - pad] for row in rows]
    canvas = torch.stack(rows)
    times = math.sqrt(canvas.shape[0] * canvas.shape[1] / (most * SIDE**2))
    if times > 1.1:
        smaller = [int(canvas.shape[0] // times), int(canvas.shape[1] // times)]
        shrunk = functional.interpolate(canvas.permute(2, 0, 1)[None], smaller, mode="bilinear")
        canvas = shrunk[0].permute(1, 2, 0)
    return torch.cat([overview, *(torch.cat([row, NEWLINE[None]]) for row in canvas)])


NEWLINE: Tensor


def expected_logits(
    weights: dict[str, Tensor], tied: bool, text: str, pixels: Tensor, *geometry: Any
) -> Tensor:
    global NEWLINE
    NEWLINE = weights["model.image_newline"]
    config = transformers.Qwen2Config(
        vocab_size=ROWS, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    language = transformers.Qwen2ForCausalLM(config).eval()
    own = {
        n: w
        for n, w in weights.items()
        if n.startswith(("model.layers", "model.embed", "model.norm", "lm_head"))
    }
    language.load_state_dict(own, strict=not tied)
    before, after = (
        language.model.embed_tokens(torch.tensor(tokenizer()(part)["input_ids"]))
        for part in text.split("<image>")
    )
    shown = packed(tile_features(weights, pixels), *geometry)
    return language(inputs_embeds=torch.cat([before, shown, after])[None]).logits[0]


# ---------------------------------------------------------------------- tests

TEXT = "<|im_start|>user\n<image>\nCompress this image<|im_end|>\n<|im_start|>assistant\na red cat"


@pytest.mark.parametrize(
    ("tied", "most_tiles", "size", "grid"),
    [(False, 9, (50, 120), (2, 4)), (True, 9, (90, 40), (3, 2)), (False, 2, (60, 90), (2, 3))],
    ids=["wide", "tall, tied", "more tiles than fit"],
)
@torch.no_grad()
def test_the_converted_model_computes_what_the_layout_says(
    tied: bool, most_tiles: int, size: tuple[int, int], grid: tuple[int, int], tmp_path: Path
) -> None:
    weights = make_source(tmp_path / "source", tied=tied, most_tiles=most_tiles)
    convert(tmp_path / "source", tmp_path / "out")
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(images=noise(3, size[1], size[0]), text=TEXT, return_tensors="pt")
    tiles = 1 + grid[0] * grid[1]
    assert inputs["pixel_values"].shape[1] == tiles, "the image has the grid this test means"

    found = model(**inputs).logits[0]

    geometry = (size, grid, most_tiles)
    expected = expected_logits(weights, tied, TEXT, inputs["pixel_values"][0], *geometry)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # The comparison can fail: another vision layer gives other numbers.
    model.config.vision_feature_layer = model.model.config.vision_feature_layer = -2
    assert (model(**inputs).logits[0] - expected).abs().max() > 0.01


def test_what_the_original_never_reads_is_left_out_and_named(tmp_path: Path) -> None:
    weights = make_source(tmp_path / "source")
    extra = {
        f"{TOWER}encoder.layers.{LAYERS - 1}.layer_norm1.weight": torch.randn(WIDTH),
        f"{TOWER}head.probe": torch.randn(1, 1, WIDTH),
        "img_emb_head.weight": torch.randn(HIDDEN, HIDDEN),
        "text_emb_head.bias": torch.randn(HIDDEN),
    }
    save_file(weights | extra, tmp_path / "source" / "model.safetensors")
    done = convert(tmp_path / "source", tmp_path / "out")
    assert done.ignored == tuple(sorted(extra))
    assert done.tensors == len(weights)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == LAYERS - 1
    assert config["vision_feature_layer"] == -1


def test_a_head_beside_tied_embeddings_is_the_embedding(tmp_path: Path) -> None:
    weights = make_source(tmp_path / "source", tied=True)
    head = {"lm_head.weight": torch.randn(ROWS, HIDDEN)}
    save_file(weights | head, tmp_path / "source" / "model.safetensors")
    assert convert(tmp_path / "source", tmp_path / "out").ignored == ("lm_head.weight",)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_files_hold_the_names_that_transformers_itself_writes(tied: bool, tmp_path: Path) -> None:
    make_source(tmp_path / "source", tied=tied)
    convert(tmp_path / "source", tmp_path / "out")
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_each_shard_becomes_one_and_only_one_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = make_source(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    shares = [dict(list(weights.items())[i::3]) for i in range(3)]
    for number, share in enumerate(shares, 1):
        save_file(share, tmp_path / "source" / f"model-{number:05d}-of-00003.safetensors")
    written: list[int] = []

    def counted(tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        written.append(len(tensors))
        save_file(tensors, *args, **kwargs)

    monkeypatch.setattr("safetensors.torch.save_file", counted)
    done = convert(tmp_path / "source", tmp_path / "out")
    assert written == [len(share) for share in shares]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert (
        index["metadata"]["total_size"]
        == done.bytes
        == 4 * sum(map(Tensor.numel, weights.values()))
    )
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    assert len(index["weight_map"]) == len(weights) == done.tensors

    CAFe.from_pretrained(tmp_path / "out")


def test_bf16_stays_bf16(tmp_path: Path) -> None:
    weights = make_source(tmp_path / "source", torch_dtype="bfloat16")
    halved = {name: w.bfloat16() for name, w in weights.items()}
    save_file(halved, tmp_path / "source" / "model.safetensors")
    convert(tmp_path / "source", tmp_path / "out")
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, halved["lm_head.weight"])


def test_the_prompt_is_the_published_one(tmp_path: Path) -> None:
    make_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")

    model = CAFe.from_pretrained(tmp_path / "out")
    shown = user(Image(noise(3, 40, 40)))
    assert model.collator.render.embedding(shown, "compress").text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nCompress this image in one word:<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>"
    )
    assert model.collator.pooled_token == "<|im_end|>"
    assert model.encode([noise(3, 40, 40), "a red cat"]).shape == (2, HIDDEN)


def test_pinpoints_are_turned_and_keep_their_order(tmp_path: Path) -> None:
    grid = [[64, 32], [32, 96], [128, 64]]
    make_source(tmp_path / "source", image_grid_pinpoints=grid)
    convert(tmp_path / "source", tmp_path / "out")
    turned = [[32, 64], [96, 32], [64, 128]]
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["image_grid_pinpoints"] == turned
    )
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert processor["image_processor"]["image_grid_pinpoints"] == turned


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["LlavaLlamaForCausalLM"]}, "architecture LlavaLlamaForCausalLM"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type is 'flat'"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio is 'pad'"),
        ({"image_grid_pinpoints": "(1x1)"}, "image_grid_pinpoints must be a list"),
        ({"mm_vision_tower": "openai/clip-vit-large"}, "known are siglip-so400m-patch14-384"),
        ({"vocab_size": 100}, "need 2 rows of their own"),
        ({"intermediate_size": 47}, "of another shape: model.layers.0.mlp.down_proj.weight"),
        ({"num_hidden_layers": 3}, "are missing: model.layers.2."),
        ({"num_hidden_layers": 1}, "are unknown: model.layers.1."),
    ],
)
def test_settings_that_do_not_fit_are_named(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    make_source(tmp_path / "source", **changes)
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "source", tmp_path / "out")
    assert says in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("drop", "add", "says"),
    [
        ("model.image_newline", None, "missing: model.image_newline"),
        ("lm_head.weight", None, "missing: lm_head.weight"),
        ("model.mm_projector.2.bias", None, "missing: model.mm_projector.2.bias"),
        (None, "model.vision_resampler.proj", "unknown: model.vision_resampler.proj"),
        (None, "model.faster_token", "unknown: model.faster_token"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    drop: str | None, add: str | None, says: str, tmp_path: Path
) -> None:
    weights = make_source(tmp_path / "source")
    weights = {n: w for n, w in weights.items() if n != drop}
    if add is not None:
        weights[add] = torch.zeros(1)
    save_file(weights, tmp_path / "source" / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "source", tmp_path / "out")
    assert says in str(caught.value)


def test_without_weights_or_tokenizer_it_says_what_to_bring(tmp_path: Path) -> None:
    make_source(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(CheckpointError, match="pickled weights are not read"):
        convert(tmp_path / "source", tmp_path / "out")
    (tmp_path / "weights").rename(tmp_path / "source" / "model.safetensors")
    for file in (tmp_path / "source").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="copy the tokenizer's files"):
        convert(tmp_path / "source", tmp_path / "out")


def test_the_verb_converts_and_never_overwrites(tmp_path: Path) -> None:
    make_source(tmp_path / "source")
    run = CliRunner()
    arguments = ["convert", str(tmp_path / "source"), "--to", str(tmp_path / "out")]
    done = run.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "in " + str(tmp_path / "out") in done.output
    again = run.invoke(app, arguments)
    assert isinstance(again.exception, CheckpointError)
    assert "already exists" in str(again.exception)
