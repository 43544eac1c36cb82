"""What cafe must know about a model family. Everything else is the same for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import PIL.Image
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ProcessedImages:
    """Pictures as the model takes them.

    inputs        the vision tensors of the family (`pixel_values`, …)
    placeholders  for each picture, the text that stands for it in the prompt
    """

    inputs: dict[str, Tensor]
    placeholders: list[str]


class Family(Protocol):
    """The facts of one family.

    model_type   `config.model_type` in transformers
    parts        module or parameter prefixes of "vision", "projector" and "language", inside the
                 `…ForConditionalGeneration` model; together they cover every parameter
    """

    model_type: str
    parts: dict[str, tuple[str, ...]]

    def marker(self, processor: Any) -> str:
        """The text that a chat template writes for one picture."""
        ...

    def placeholder_id(self, processor: Any) -> int:
        """The token id that is repeated once per image feature."""
        ...

    def process_images(
        self, processor: Any, groups: Sequence[Sequence[PIL.Image.Image]]
    ) -> ProcessedImages:
        """Pictures, grouped as they share a prompt, to tensors and placeholder texts."""
        ...

    def image_features(self, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Vision tensors -> for each picture its features [tokens, hidden], with gradient."""
        ...

    def unused(self, config: Any) -> tuple[str, ...]:
        """Prefixes of parameters that no forward reads, such as layers above the feature layer.

        They get no gradient, and DDP would wait for it; so they do not train.
        """
        ...

    def alone_and_together_differ(self) -> bool:
        """Whether a picture has other features when its prompt holds several pictures."""
        ...

    @staticmethod
    def what_is_needed() -> str:
        return (
            "the module prefixes of its vision tower, projector and language model; the marker "
            "its chat template writes for a picture and the token id repeated per feature; how "
            "its processor's tensors become per-picture features. Add a file like "
            "cafe/model/families/llava_onevision.py"
        )
