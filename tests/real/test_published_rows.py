"""Published processor settings and templates: tokens, tiles and prompts at true image sizes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from cafe.data.read import read_examples
from cafe.data.records import ReadOptions
from cafe.errors import DataError
from cafe.types import Conversation, Image, user

pytestmark = pytest.mark.real

# (width, height) -> crops with the overview, placeholders. The tower sees 384 px as 27 x 27
# patches.
#   640 x 480: grid 2 x 2, 54 x 54 patches. Of its rows int(54 * 480 / 640) = 40 show the image;
#              729 of the overview + 40 * 54 + a line end for each of 40 rows.
#   480 x 640: 40 columns; 729 + 54 * 40 + 54.
#   384 x 384: grid 1 x 1; 729 + 27 * 27 + 27.
#   1000 x 300: grid 3 x 1, 81 x 27 patches; int(81 * 300 / 1000) = 24 rows, and (27 - 24) // 2 = 1
#              is cut at the top and at the bottom, so 25 remain; 729 + 25 * 81 + 25.
#   2304 x 2304: grid 6 x 6, 162 x 162 patches, twice the side of the 9 tiles of anyres_max_9:
#              reduced to 81 x 81; 729 + 81 * 81 + 81.
TILES = {
    (640, 480): (5, 2929),
    (480, 640): (5, 2943),
    (384, 384): (2, 1485),
    (1000, 300): (4, 2779),
    (2304, 2304): (37, 7371),
}

# (width, height) -> (rows, columns): a side in units of patch x merge (28 px, 32 px), rounded.
GRIDS = {
    "qwen2_5_vl": {
        (640, 480): (17, 23),  # 17.1, 22.9
        (480, 640): (23, 17),
        (384, 384): (14, 14),  # 13.7
        (1000, 300): (11, 36),  # 10.7, 35.7
        (30, 30): (2, 2),  # 1 x 1 is less than the least, 56 x 56 = 3136 pixels
        (2304, 2304): (82, 82),  # 82.3; within the most, 12,845,056 pixels
    },
    "qwen3_vl": {
        (640, 480): (15, 20),
        (480, 640): (20, 15),
        (384, 384): (12, 12),
        (1000, 300): (9, 31),  # 9.4, 31.25
        (30, 30): (2, 2),  # 1 x 1 is less than the least, 64 x 64 = 4096 pixels
        (2304, 2304): (35, 35),  # the most is 1,310,720 pixels: sqrt(1,310,720) / 32 = 35.8
    },
}


def shown(width: int, height: int) -> Image:
    return Image(PIL.Image.new("RGB", (width, height), (200, 30, 90)))


def placeholders(model: Any, conversation: Conversation) -> tuple[int, dict[str, Any]]:
    rows, vision = model.collator.prompt_rows([conversation])
    placeholder = model.collator.family.placeholder_id(model.processor)
    return int((rows.input_ids == placeholder).sum()), vision


def family(model: Any) -> str:
    return model.model.config.model_type


def test_an_image_has_the_tiles_and_tokens_of_the_published_settings(published: Any) -> None:
    name = family(published)
    if name == "llava_onevision":
        for size, (tiles, tokens) in TILES.items():
            count, vision = placeholders(published, user(shown(*size)))
            assert (vision["pixel_values"].shape[1], count) == (tiles, tokens), size
        return
    for size, (rows, columns) in GRIDS[name].items():
        count, vision = placeholders(published, user(shown(*size)))
        assert vision["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]], size
        assert count == rows * columns, size


START, END = "<|im_start|>", "<|im_end|>"
_SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
# family -> before the turn's content, an image, between the turns
WRITTEN = {
    "llava_onevision": (f"{START}user ", "<image>", END),
    "qwen2_5_vl": (
        f"{START}system\nYou are a helpful assistant.{END}\n{START}user\n",
        _SEEN,
        f"{END}\n",
    ),
    "qwen3_vl": (
        f"{START}system\nRepresent the user's input.{END}\n{START}user\n",
        _SEEN,
        f"{END}\n",
    ),
}
EMBEDDERS = {"qwen3_vl"}
"""Published with the template of Qwen3-VL-Embedding, which is then read as it was trained."""


def closing_token(model: Any) -> str:
    return "<|endoftext|>" if family(model) in EMBEDDERS else END


def test_prompts_are_written_by_the_published_templates(published: Any) -> None:
    head, image, between = WRITTEN[family(published)]
    # LLaVA-OneVision's template opens a turn's texts with a line end; Qwen's do not.
    line = "\n" if family(published) == "llava_onevision" else ""
    tail = f"{between}{START}assistant\n"
    render = published.collator.render
    picture = shown(64, 48)
    if family(published) in EMBEDDERS:
        asks = {"image": "", "sentence": "", "both": ""}
    else:
        asks = {
            "image": "Compress this image in one word:",
            "sentence": "\nCompress this sentence in one word:",
            "both": "\nCompress this image and sentence in one word:",
        }
    closing = closing_token(published)

    def embedding(*parts: Any) -> str:
        return render.embedding(user(*parts), "compress").text

    assert embedding(picture) == f"{head}{image}{line}{asks['image']}{tail}{closing}"
    assert embedding("A mug.") == f"{head}{line}A mug.{asks['sentence']}{tail}{closing}"
    assert embedding(picture, "A mug.") == (
        f"{head}{image}{line}A mug.{asks['both']}{tail}{closing}"
    )
    assert render.prompt(user(picture, "What is it?")).text == (
        f"{head}{image}{line}What is it?{tail}"
    )


def test_the_pooled_token_closes_the_empty_turn(published: Any) -> None:
    given = [user(shown(640, 480)), user("A mug."), user(shown(100, 60), "A mug.")]
    rows, _ = published.collator.embedding_rows(given)
    closing = published.processor.tokenizer.convert_tokens_to_ids(closing_token(published))
    tokens, length = rows.input_ids.flatten().tolist(), rows.input_ids.shape[1]
    ends = rows.subtree_end.flatten().tolist()
    assert len(rows.pooled) == 3
    for pooled in rows.pooled.tolist():
        assert tokens[pooled] == closing
        assert ends[pooled] == pooled % length + 1, "nothing follows it in its sequence"


# ---------------------------------------------------------------------- tools

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city"}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TURNS = [
    {"role": "user", "content": "How warm is it in Rome?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
    {"role": "tool", "content": "22"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "23"},
    {"role": "tool", "content": "24"},
    {"role": "assistant", "content": "24 degrees."},
]


def test_turns_of_tools_are_what_transformers_writes(published: Any, tmp_path: Path):
    """Each answer: what is written up to it, after what is written when it is asked for."""
    (tmp_path / "data.json").write_text(json.dumps([{"messages": TURNS, "tools": TOOLS}]))
    (example,) = read_examples(tmp_path / "data.json", ReadOptions(mode="chat")).examples
    if "tool_calls" not in published.processor.chat_template:
        with pytest.raises(DataError, match="the chat template does not write which tools there"):
            published.collator.render.answers(example.dialogues[0])
        return
    answers = published.collator.render.answers(example.dialogues[0])
    write = partial(published.processor.apply_chat_template, tools=TOOLS, tokenize=False)
    for end, answer in zip((2, 4, 7), answers, strict=True):
        assert answer.text == write(TURNS[:end]).rstrip()
        asked = write(TURNS[: end - 1], add_generation_prompt=True)
        assert answer.text[: -answer.labelled] == asked
    assert answers[0].text.endswith(
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n'
        "</tool_call><|im_end|>"
    )
