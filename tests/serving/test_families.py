"""Families with their own positions (M-RoPE) or windows: embeddings between tokens change nothing.

Qwen-VL keeps a trace of its last prompt on the module itself; two prompts in turns must not mix.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cafe.model.vlm import CAFe
from cafe.serving.messages import Prompt, WorkItem
from cafe.serving.model_calls import CafeCalls
from cafe.types import Conversation, Image, user
from helpers import builders
from helpers.images import noise

TOKENS = 10


def question(seed: int, width: int, height: int) -> Conversation:
    return user(Image(noise(seed, width, height)), "a red cat")


def tokens(model: CAFe, conversations: list[Conversation], together: bool) -> list[list[int]]:
    """Of each conversation's answer: joining one after another, or each by itself."""
    calls = CafeCalls(model)
    items = [WorkItem(Prompt(conversation, TOKENS)) for conversation in conversations]
    found: dict[int, list[int]] = {}
    decoding = calls.decoding()
    for number, item in enumerate(items):
        decoding.admit({number: item})
        rows = {row.number: row.detokenizer for row in decoding._rows}
        found |= {row: own._tokens for row, own in rows.items()}
        while decoding.step():
            calls.embed([WorkItem(conversations[-1])])
            if together:
                break
    while decoding.step():
        pass
    return [found[number] for number in range(len(items))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3"])
def test_answers_written_together_are_those_written_alone(name: str, tmp_path: Path):
    model = CAFe.from_pretrained(builders.build(name, tmp_path / name))
    asked = [question(0, 96, 96), question(1, 192, 64), user("two dogs")]
    alone = tokens(model, asked, together=False)
    assert max(map(len, alone)) > 3, "too little is written to show anything"
    assert tokens(model, asked, together=True) == alone
    decode = model.processor.tokenizer.decode
    want = [model.generate(conversation, max_new_tokens=TOKENS) for conversation in asked]
    assert [decode(t, skip_special_tokens=True).strip() for t in alone] == want
    found = [e.vector for e in CafeCalls(model).embed([WorkItem(c) for c in asked])]
    assert np.allclose(np.stack(found), model.encode(asked, normalize=False), atol=1e-4)
