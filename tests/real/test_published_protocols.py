"""Published embedders' prompts, character by character, on published templates and tokenizers.

The expected strings are what the models' own code renders, as mteb 2.26 (GME, VLM2Vec-V2) and
ms-swift 4.6 (Qwen3-VL-Embedding) write it down. GME is built on Qwen2-VL; the template here is that
of Qwen2.5-VL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from cafe.model.vlm import CAFe
from cafe.types import Image, Message, user

pytestmark = pytest.mark.real

S, E = "<|im_start|>", "<|im_end|>"
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
TAIL = f"{E}\n{S}assistant\n<|endoftext|>"
# directory, protocol -> a target with an image, a query with both, the pooled token of the query
PUBLISHED = {
    ("qwen3_vl", None): (
        f"{S}system\nRepresent the user's input.{E}\n{S}user\n{SEEN}{TAIL}",
        f"{S}system\nFind a mug.{E}\n{S}user\n{SEEN}what is red{TAIL}",
        "<|endoftext|>",
    ),
    ("qwen2_5_vl", "gme"): (
        f"{S}system\nYou are a helpful assistant.{E}\n{S}user\n{SEEN}{TAIL}",
        f"{S}system\nFind a mug.{E}\n{S}user\n{SEEN}what is red{TAIL}",
        "<|endoftext|>",
    ),
    ("qwen2_5_vl", "vlm2vec"): (
        "<|image_pad|>",
        "<|image_pad|> Find a mug. what is red",
        " red",
    ),
}


@pytest.mark.parametrize(("directory", "protocol"), PUBLISHED)
def test_prompts_and_pooled_tokens_are_the_published_ones(
    hub: Path, directory: str, protocol: str | None
) -> None:
    model: Any = CAFe.from_pretrained(hub / directory, device="cpu", protocol=protocol)
    assert model.collator.protocol.name == (protocol or "qwen3-vl-embedding")
    image = Image(PIL.Image.new("RGB", (64, 64), "red"))
    asked = (Message("system", ("Find a mug.",)), *user(image, "what is red"))
    target, query, token = PUBLISHED[directory, protocol]
    render = model.collator.render
    for prompt in ("compress", "none"):
        assert render.embedding(user(image), prompt).text == target
        assert render.embedding(asked, prompt).text == query
    rows, _ = model.collator.embedding_rows([asked, user("a")])
    pooled = int(rows.pooled[0])
    ids = rows.input_ids.flatten()
    assert model.processor.tokenizer.decode(ids[pooled]) == token
    width = rows.input_ids.shape[1]
    end = int(rows.subtree_end.flatten()[pooled])
    assert end == pooled % width + 1, "nothing follows it in its sequence"
