"""What an evaluation keeps for people to look at (`cafe.report.views`): built from its embeddings.

It is made after the scores, on one process, of a bounded number of points, searches and small
images. Nothing here draws random numbers or touches the model.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cafe.errors import CafeError
from cafe.media import open_image
from cafe.metrics import project_2d
from cafe.report.views import EvaluationView, ShownHit, ShownSearch, ShownSide
from cafe.types import Audio, Conversation, Image, Video

if TYPE_CHECKING:
    from jaxtyping import Float

MAP_POINTS = 300
"""Number of points of each side on the map."""
SEARCHES = 3
"""Number of queries each way."""
HITS = 4
SAMPLE_IMAGES = 16
"""Number of samples whose image is kept."""
TEXT_LENGTH = 240
_THUMBNAIL = 160
_QUALITY = 80


@dataclass(frozen=True, slots=True)
class PairedSides:
    """The distinct queries and targets of an evaluation.

    names       of the two sides
    shown       what each embedding is of
    embeddings  unit vectors
    right       the indices of the other side that belong to each
    """

    names: tuple[str, str]
    shown: tuple[Sequence[Conversation], Sequence[Conversation]]
    embeddings: tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]]
    right: tuple[Sequence[set[int]], Sequence[set[int]]]

    def images_first(self) -> PairedSides:
        """The same, with images first if they are a side."""
        if self.names[1] != "image":
            return self
        names, shown, embeddings, right = self.names, self.shown, self.embeddings, self.right
        return PairedSides(
            (names[1], names[0]),
            (shown[1], shown[0]),
            (embeddings[1], embeddings[0]),
            (right[1], right[0]),
        )


def build_view(
    step: int, sides: PairedSides | None, sampled: Sequence[Conversation]
) -> EvaluationView:
    """The view of an evaluation.

    Args:
        step: Number of steps that were done.
        sides: What was measured; None: there are no pairs.
        sampled: The prompts of the samples.
    """
    images = tuple(_shown(prompt).image for prompt in sampled[:SAMPLE_IMAGES])
    if sides is None:
        return EvaluationView(step=step, sample_images=images)
    sides = sides.images_first()
    points = project_2d(*(side[:MAP_POINTS] for side in sides.embeddings))
    return EvaluationView(
        step=step,
        sides=sides.names,
        map=tuple([(float(x), float(y)) for x, y in np.round(side, 4)] for side in points),
        searches=(*_searches(sides, 1, 0), *_searches(sides, 0, 1)),
        sample_images=images,
    )


def _searches(sides: PairedSides, one: int, other: int) -> Iterator[ShownSearch]:
    """A few queries of a side, evenly spaced, among all of the other side."""
    count = len(sides.shown[one])
    for index in np.linspace(0, count - 1, min(SEARCHES, count)).astype(int).tolist():
        scores = sides.embeddings[other] @ sides.embeddings[one][index]
        right = sides.right[one][index]
        best = max(scores[j] for j in right)
        wrong = np.delete(scores, sorted(right))
        order = np.argsort(-scores, kind="stable")[:HITS].tolist()
        hits = (
            ShownHit(
                **_shown(sides.shown[other][j]).model_dump(),
                score=round(float(scores[j]), 4),
                right=j in right,
            )
            for j in order
        )
        yield ShownSearch(
            query=_shown(sides.shown[one][index]),
            rank=1 + int((wrong >= best).sum()),
            hits=tuple(hits),
        )


def _shown(conversation: Conversation) -> ShownSide:
    """The words of a conversation and its first image; one that cannot be opened is left out."""
    parts = [part for message in conversation for part in message.content]
    words = " ".join(_said(part) for part in parts if not isinstance(part, Image))
    text = words if len(words) <= TEXT_LENGTH else f"{words[: TEXT_LENGTH - 1]}…"
    image = next((part for part in parts if isinstance(part, Image)), None)
    return ShownSide(text=text.strip(), image=None if image is None else _thumbnail(image))


def _said(part: str | Video | Audio) -> str:
    if isinstance(part, str):
        return part
    return "(video)" if isinstance(part, Video) else "(audio)"


def _thumbnail(image: Image) -> str | None:
    try:
        small = open_image(image)
    except (CafeError, OSError):
        return None
    small = small.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
