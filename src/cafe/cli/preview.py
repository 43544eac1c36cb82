"""One example as the model will see it: its sequences in tokens, and its pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path

import PIL.Image
from rich.console import Console
from rich.style import Style
from rich.text import Text

from cafe.cli.files import writing
from cafe.errors import DataError
from cafe.media import open_image, open_video
from cafe.model.collate import Collator
from cafe.types import Example, Image

_WIDTH = 32  # characters of a picture


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence of an example.

    name           query, target, negative, or answer
    text           what the tokens are, learnt ones in bold, each run of picture tokens as one
    image_tokens   those of pictures and videos
    text_tokens, learnt_tokens
    """

    name: str
    text: Text
    image_tokens: int
    text_tokens: int
    learnt_tokens: int


def preview(
    console: Console, collator: Collator, example: Example, png: tuple[Path, str] | None = None
) -> None:
    """Print `example`; an example that cannot be collated is told in a line.

    png   a folder and the beginning of file names: its pictures are written as they are opened
    """
    console.print(f"example {example.id!r}", style="bold")
    try:
        views = sequence_views(collator, example)
        pictures = list(opened(example, collator.max_frames))
        tokens = row_tokens(collator, example)
    except DataError as error:
        console.print(f"  cannot be used: {error}", style="red")
        return
    for number, (name, picture) in enumerate(pictures, 1):
        where = "" if png is None else f", {_written(picture, *png, number)}"
        console.print(f"  {name} {picture.width}x{picture.height}{where}")
        if console.is_terminal:
            console.print(half_blocks(picture, _WIDTH))
    for view in views:
        learnt = f", {view.learnt_tokens} learnt" if view.learnt_tokens else ""
        console.print(
            f"  {view.name}: {view.image_tokens} image tokens, {view.text_tokens} text tokens"
            f"{learnt}",
            style="cyan",
        )
        for line in view.text.split("\n", allow_blank=True):
            console.print(Text("    ").append_text(line))
    alone = sum(view.image_tokens + view.text_tokens for view in views)
    console.print(f"  in one row: {tokens} tokens, alone {alone}", style="dim")


def sequence_views(collator: Collator, example: Example) -> list[SequenceView]:
    """The sequences of `example`, as tokens. Raises DataError when it cannot be collated."""
    rows = replace(collator, sharing="none", row_tokens=None)([example]).rows
    tokenizer = collator.processor.tokenizer
    family, processor = collator.family, collator.processor
    placeholders = {family.placeholder_id(processor), family.video_placeholder_id(processor)}
    count, width = rows.input_ids.shape
    pooled = [place // width for place in rows.pooled.tolist()]
    sides = dict(zip(pooled, chain(("query", "target"), _forever("negative")), strict=False))
    learnt = {place + 1 for place in rows.label_source.tolist()}
    views: list[SequenceView] = []
    for r in range(count):
        length = int(rows.subtree_end[r, 0])  # the first token's subtree is the sequence
        tokens = [
            (token, r * width + i in learnt)
            for i, token in enumerate(rows.input_ids[r, :length].tolist())
        ]
        text = Text()
        for (shown, bold), run in groupby(tokens, key=lambda t: (t[0] in placeholders, t[1])):
            ids = [token for token, _ in run]
            said = tokenizer.decode(ids[:1] if shown else ids, skip_special_tokens=False)
            text.append(f"{said} x {len(ids)} " if shown else said, "bold" if bold else "")
        images = sum(token in placeholders for token, _ in tokens)
        views.append(
            SequenceView(
                name=sides.get(r, "answer"),
                text=text,
                image_tokens=images,
                text_tokens=length - images,
                learnt_tokens=sum(bold for _, bold in tokens),
            )
        )
    return views


def row_tokens(collator: Collator, example: Example) -> int:
    """Tokens of the example when its sequences share what they can."""
    return replace(collator, sharing="trie", row_tokens=None)([example]).rows.input_ids.numel()


def opened(example: Example, max_frames: int) -> Iterator[tuple[str, PIL.Image.Image]]:
    """Its different pictures, and the frames of its videos that the model sees, with their names.

    In the order in which they are seen. Raises ImageError for one that cannot be opened.
    """
    sides = [side for side in (example.query, example.target) if side is not None]
    messages = chain.from_iterable((*sides, *example.negatives, *example.dialogues))
    parts = (part for message in messages for part in message.content)
    for part in {p.key: p for p in parts if not isinstance(p, str)}.values():
        if isinstance(part, Image):
            yield "picture", open_image(part)
        else:
            clip = open_video(part, max_frames)
            for index, frame in zip(clip.indices, clip.frames, strict=True):
                yield f"frame {index + 1} of {clip.total}", frame


def half_blocks(picture: PIL.Image.Image, width: int) -> Text:
    """A picture of `width` characters, each the upper and the lower of two pixels."""
    height = max(1, round(picture.height / picture.width * width / 2))
    small = picture.resize((width, 2 * height), PIL.Image.Resampling.BOX)
    text = Text()
    for line in range(height):
        for column in range(width):
            upper, lower = (_hex(small, column, 2 * line + i) for i in (0, 1))
            text.append("▀", Style(color=upper, bgcolor=lower))
        text.append("\n" if line + 1 < height else "")
    return text


def _hex(picture: PIL.Image.Image, x: int, y: int) -> str:
    pixel = picture.getpixel((x, y))
    assert isinstance(pixel, tuple)  # RGB
    return "#{:02x}{:02x}{:02x}".format(*pixel)


def _written(picture: PIL.Image.Image, folder: Path, name: str, number: int) -> Path:
    path = folder / f"{name}-{number}.png"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return path


def _forever(name: str) -> Iterator[str]:
    while True:
        yield name
