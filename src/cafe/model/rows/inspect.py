"""One example as the model will see it: its sequences in tokens, and its images.

`cafe data inspect` shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any

import PIL.Image

from cafe.media import open_image, open_video
from cafe.model.rows.collate import Collator
from cafe.model.rows.inputs import as_conversation
from cafe.model.rows.prompts import DEFAULT_PROMPT, trained_thought_tokens
from cafe.types import Example, Image, Video


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Consecutive tokens of one kind.

    text       the tokens decoded; of image tokens one and their number
    labelled   whether the language loss is computed on them
    """

    text: str
    labelled: bool


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence of an example.

    name             query, target, negative, or answer
    runs             its tokens
    image_tokens     number of tokens of images and videos
    text_tokens      number of all others
    labelled_tokens  number of tokens that the language loss is computed on
    """

    name: str
    runs: tuple[TokenRun, ...]
    image_tokens: int
    text_tokens: int
    labelled_tokens: int


def sequence_views(collator: Collator, example: Example) -> list[SequenceView]:
    """The sequences of an example, as tokens.

    Args:
        collator: That of the model, or the one that a recipe trains with.
        example: The example.

    Returns:
        One view per sequence: both sides of the pair, negatives, and one per answer.

    Raises:
        DataError: The example cannot be collated.
    """
    rows = replace(collator, sharing="none", row_tokens=None, block_cost=None)([example]).rows
    family, processor = collator.family, collator.processor
    placeholders = {family.placeholder_id(processor), family.video_placeholder_id(processor)}
    count, width = rows.input_ids.shape
    pooled = [index // width for index in rows.pooled.tolist()]
    names = ["query", "target", *["negative"] * len(example.negatives)]
    thoughts = (example.query_thought, example.target_thought)
    names += [f"{side} after a thought" for side, t in zip(names, thoughts, strict=False) if t]
    sides = dict(zip(pooled, names, strict=False))
    labelled = {index + 1 for index in rows.label_source.tolist()}
    views: list[SequenceView] = []
    for r in range(count):
        length = int(rows.subtree_end[r, 0])  # the first token's subtree is the sequence
        tokens = [
            (token, r * width + i in labelled)
            for i, token in enumerate(rows.input_ids[r, :length].tolist())
        ]
        runs: list[TokenRun] = []
        for (image, label), run in groupby(tokens, key=lambda t: (t[0] in placeholders, t[1])):
            ids = [token for token, _ in run]
            text = processor.tokenizer.decode(ids[:1] if image else ids, skip_special_tokens=False)
            runs.append(TokenRun(f"{text} x {len(ids)} " if image else text, label))
        image_tokens = sum(token in placeholders for token, _ in tokens)
        views.append(
            SequenceView(
                name=sides.get(r, "answer"),
                runs=tuple(runs),
                image_tokens=image_tokens,
                text_tokens=length - image_tokens,
                labelled_tokens=sum(label for _, label in tokens),
            )
        )
    return views


def row_tokens(collator: Collator, example: Example) -> int:
    """Number of tokens of the example when its sequences share their common prefixes."""
    return replace(collator, sharing="trie", row_tokens=None)([example]).rows.input_ids.numel()


def opened_images(example: Example, max_frames: int) -> Iterator[tuple[str, PIL.Image.Image]]:
    """The distinct images of an example, and the frames of its videos that the model sees.

    Args:
        example: The example.
        max_frames: Number of frames that the collator samples from a video.

    Yields:
        A name for messages and the opened image, in the order in which the model sees them.

    Raises:
        ImageError: One of them cannot be opened.
    """
    messages = chain.from_iterable(example.conversations)
    parts = (part for message in messages for part in message.content)
    for part in {p.key: p for p in parts if not isinstance(p, str)}.values():
        if isinstance(part, Image):
            yield "image", open_image(part)
        elif isinstance(part, Video):
            clip = open_video(part, max_frames)
            for index, frame in zip(clip.indices, clip.frames, strict=True):
                yield f"frame {index + 1} of {clip.total}", frame


def embedding_contract(collator: Collator, dimension: int, config: Any) -> dict[str, str]:
    """What an embedding is read from.

    The prompts, token counts and pooled tokens of an example text and an example image; the
    dimension and the longest input; and the longest thought, if the model was trained with any.
    """
    contract: dict[str, str] = {}
    for kind, example in {"text": "a red mug", "image": PIL.Image.new("RGB", (384, 384))}.items():
        conversation = as_conversation(example)
        rendered = collator.render.embedding(conversation, DEFAULT_PROMPT)
        rows, _ = collator.embedding_rows([conversation])
        pooled = rows.input_ids.flatten()[rows.pooled]
        contract |= {
            f"embedding prompt ({kind})": rendered.text,
            f"tokens ({kind})": str(rows.input_ids.shape[1]),
            f"pooled token ({kind})": collator.processor.tokenizer.decode(pooled),
            **(
                {f"averaged ({kind})": f"the {collator.averages} tokens before it"}
                if collator.averages
                else {}
            ),
        }
    thought = trained_thought_tokens(config)
    return {
        **contract,
        "dimension": str(dimension),
        "max tokens": str(collator.max_tokens),
        **({"thought tokens": str(thought)} if thought else {}),
    }
