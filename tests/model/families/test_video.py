"""Videos: sampled evenly, shared as images are, and equal to what the plain processor makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from cafe.errors import ImageError
from cafe.media import evenly_spaced, open_video
from cafe.model.families import Grid
from cafe.model.families.mrope import mrope_positions
from cafe.model.image_keys import image_keys
from cafe.model.vlm import CAFe
from cafe.types import Example, Message, Video, user
from helpers import builders, plain
from helpers.family_examples import EXACT, A, turn
from helpers.images import noise

QWEN = {
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen2_5_omni_thinker",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
}
GLM = {"glm4v", "glm46v"}
NATIVE = {"llava_onevision", *QWEN, *GLM, "lfm3_vl", "gemma4", "internvl", "smolvlm"}
ALONE = {"smolvlm", *GLM}
"""Whose images and videos cannot share a call of transformers: SmolVLM's processor overwrites the
images with the videos, and GLM-4V's model counts the placeholders of both as either's."""


def video(seed: int, frames: int, width: int = 64, height: int = 48) -> Video:
    return Video(tuple(noise(100 * seed + i, width, height) for i in range(frames)))  # type: ignore[misc]


SHORT, OTHER, LONG = video(1, 4), video(3, 4, 50, 60), video(2, 6, 40, 70)

EXAMPLES = [
    Example(
        "shared video",
        query=user(SHORT),
        target=user("a cat"),
        dialogues=(turn(SHORT, "Is it?", "yes"), turn(SHORT, "Is it?", "yellow")),
    ),
    # In one prompt of one length: most of transformers' processors cannot stack others.
    Example("videos of two lengths", query=user(SHORT, "and", OTHER), target=user(LONG)),
    Example("text", query=user("a cat"), target=user("a red cat")),
]
MIXED = Example(
    "beside an image",
    query=user(A, "and", SHORT),
    target=user(SHORT, A, "which"),
    dialogues=(turn(A, "It?", "no"),),
)


def test_every_state_is_that_of_the_plain_processor_and_model(family_model: CAFe):
    examples = [*EXAMPLES]
    if family_model.family.model_type not in ALONE:
        examples.append(MIXED)
    if family_model.family.model_type not in NATIVE:
        rows, _, _ = plain.run(family_model, EXAMPLES[1:2])
        assert len(rows.image_order) == 4 + 4 + 6
    else:
        rows, _, _ = plain.run(family_model, [*EXAMPLES, MIXED])
        assert len(rows.image_order) + len(rows.video_order) == 8
    assert plain.worst_difference(family_model, examples) <= EXACT
    assert plain.worst_difference(family_model, examples, sharing="none") <= EXACT


def test_images_and_videos_of_one_batch_train_and_answer(family_model: CAFe):
    chunk = family_model.collator([*EXAMPLES, MIXED])
    hidden = family_model(chunk.rows, chunk.vision)
    hidden.square().sum().backward()
    family_model.model.zero_grad(set_to_none=True)
    asked = [(Message("user", (SHORT, "What?")),), (Message("user", (A, LONG, "And?")),)]
    together = family_model.generate([list(a) for a in asked], max_new_tokens=4)
    assert together == [family_model.generate(list(a), max_new_tokens=4) for a in asked]


def test_videos_of_different_lengths_share_a_prompt(family_model: CAFe):
    example = Example("e", query=user(SHORT, "and", LONG), target=user(LONG, SHORT))
    rows, hidden, _ = plain.run(family_model, [example])
    apart = [
        family_model.encode([m[0]], normalize=False) for m in (example.query, example.target) if m
    ]
    found = hidden.flatten(0, 1)[rows.pooled].numpy()
    np.testing.assert_allclose(found, np.stack(apart), atol=1e-5)


def test_the_frames_matter_and_their_order(family_model: CAFe):
    turned = Video(tuple(reversed(SHORT.source)))  # type: ignore[arg-type]
    a, b = (family_model.encode([Message("user", (v,))]) for v in (SHORT, turned))
    assert float(np.abs(a - b).max()) > 1e-4


def test_max_frames_bounds_what_a_video_costs(family_model: CAFe):
    counts = []
    for frames in (2, 6):
        rows, _ = replace(family_model.collator, max_frames=frames).embedding_rows([user(LONG)])
        counts.append(rows.input_ids.shape[1])
    assert counts[0] < counts[1]


# ------------------------------------------------------------------ sampling and files


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (10, 1, (5,)),
        (10, 2, (2, 7)),
        (4, 4, (0, 1, 2, 3)),
        (3, 16, (0, 1, 2)),
        (100, 4, (12, 37, 62, 87)),
    ],
)
def test_frames_are_the_middles_of_equal_parts(total: int, count: int, expected: tuple[int, ...]):
    assert evenly_spaced(total, count) == expected


def test_an_unusable_video_is_named(tmp_path: Path):
    with pytest.raises(ImageError, match="it has no frames"):
        open_video(Video(()), 4)
    with pytest.raises(ImageError, match=r"video '.*gone.mp4': no such file"):
        open_video(Video(tmp_path / "gone.mp4"), 4)
    (tmp_path / "broken.mp4").write_bytes(b"this is no video")
    with pytest.raises(ImageError, match=r"video '.*broken.mp4': .*(pip install av|cannot be dec)"):
        open_video(Video(tmp_path / "broken.mp4"), 4)


def test_a_video_that_cannot_be_read_names_the_example(tmp_path: Path):
    model = CAFe.from_pretrained(builders.build("qwen2_5_vl", tmp_path / "model"))
    example = Example("v", query=user(Video(tmp_path / "gone.mp4")), target=user("a"))
    with pytest.raises(ImageError, match=r"example 'v'.*gone.mp4.*no such file"):
        model.collator([example])


# ------------------------------------------------------------------ positions in time


@pytest.mark.parametrize(("name", "step"), [("qwen2_vl", 1.0), ("qwen2_5_vl", 1.5)])
def test_positions_of_a_video_are_those_of_the_model_itself(name: str, step: float):
    model = builders.FAMILIES[name](builders.Sizes())[0].model
    grids = [Grid(3, 2, 3, step), Grid(2, 1, 1, step)]
    keys = np.concatenate([[4, 4], image_keys(0, 18), [5], image_keys(1, 2), [6, 6]])
    times: dict[str, Any] = {}
    if name == "qwen2_5_vl":
        # 2 positions a second, in the tiny configuration.
        times["second_per_grid_ts"] = torch.tensor([step / 2] * 2)
    expected, _ = model.get_rope_index(
        input_ids=torch.ones(1, len(keys), dtype=torch.long),
        mm_token_type_ids=2 * torch.from_numpy(keys < 0).long()[None],
        video_grid_thw=torch.tensor([[3, 4, 6], [2, 2, 2]]),
        **times,
    )
    assert mrope_positions(keys, grids)[1:].tolist() == expected[:, 0].tolist()


def test_pillow_frames_of_any_mode_become_rgb():
    grey = PIL.Image.new("L", (5, 4), 7)
    clip = open_video(Video((grey, grey)), 1)
    assert (clip.indices, clip.total, clip.fps) == ((1,), 2, None)
    assert clip.frames[0].mode == "RGB"
