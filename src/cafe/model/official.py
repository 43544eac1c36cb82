r"""The published code's text and labels, for ChatML (Qwen) models; see `preprocess_qwen` there.

    <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n
    <|im_start|>user\n<image>\nWhat is it?<|im_end|>\n
    <|im_start|>assistant\nA mug.<|im_end|>\n

**System turn.** Always this one; a turn that a record has before the first question is dropped.

**Labels.** Of an assistant turn everything, its header and its last newline too. Of the other turns
`<|im_start|>`, `<|im_end|>` and every token that is exactly one newline: the code unmasks these
three ids wherever they stand, so also the newline after `<image>`, which is predicted from the
picture's last token. Only the first token of all is predicted by nothing.

**Prompt.** A text is followed by "Compress this sentence in one word:" without a space
(`cafe.model.prompts`, "official"); several answers of one record are joined without one.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe.errors import DataError
from cafe.model.prompts import DEFAULT_PROMPT, OFFICIAL_PROMPT
from cafe.types import Conversation, Example, Message, user

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Int

SYSTEM_TURN = Message("system", ("You are a helpful assistant.",))

_ASSISTANT_TURN = re.compile(r"<\|im_start\|>assistant\n.*?<\|im_end\|>\n?", re.DOTALL)


def with_system_turn(conversation: Conversation) -> Conversation:
    """The conversation after the one system turn that the published code knows."""
    return (SYSTEM_TURN, *(m for m in conversation if m.role != "system"))


def official_labels(
    text: str, tokens: Int[np.ndarray, " t"], spans: Int[np.ndarray, "t 2"], tokenizer: Any
) -> Int[np.ndarray, " labels"]:
    """Where the labels of a rendered dialogue stand; see the module's text.

    spans   the characters of `text` that each token stands for, from and to
    Raises DataError for a tokenizer without ChatML's tokens.
    """
    labelled = np.isin(tokens, _always_labelled(tokenizer))
    for turn in _ASSISTANT_TURN.finditer(text):
        labelled |= (spans[:, 0] >= turn.start()) & (spans[:, 1] <= turn.end())
    labelled[:1] = False
    return np.flatnonzero(labelled)


def _always_labelled(tokenizer: Any) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    special = ("<|im_start|>", "<|im_end|>")
    if any(token not in vocabulary for token in special) or len(newline) != 1:
        raise DataError(
            "objective.compat is official, and the published code is for ChatML (Qwen): this "
            "model's tokenizer lacks <|im_start|>, <|im_end|> or a newline; set compat to none"
        )
    return [*newline, *(vocabulary[token] for token in special)]


def official_example(example: Example) -> Example:
    """The example with the published prompt, and its answers joined as the published code does.

    Only what the default prompt asks is changed; MMEB's pairs have no prompt there either.
    """
    if example.target is None or example.embedding_prompt != DEFAULT_PROMPT:
        return example
    answers = [m.text for d in example.dialogues for m in d if m.role == "assistant"]
    target = example.target
    if len(target) == 1 and target[0].text == " ".join(answers):
        target = user("".join(answers))
    return replace(example, target=target, embedding_prompt=OFFICIAL_PROMPT)
