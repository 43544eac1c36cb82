"""What cafe must know about a model family. Everything else is the same for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from cafe.errors import FamilyError
from cafe.media import Clip


@dataclass(frozen=True, slots=True)
class Grid:
    """How the features of a picture lie, where a model counts time, height and width apart.

    frames, lines, columns   of features, in this order
    time_step                positions from one frame to the next
    """

    frames: int
    lines: int
    columns: int
    time_step: float = 1.0


@dataclass(frozen=True, slots=True)
class ProcessedImages:
    """Pictures, or videos, as the model takes them.

    inputs        the vision tensors of the family (`pixel_values`, …)
    placeholders  for each picture, the text that stands for it in the prompt
    grids         for each picture its grid, where the family's positions need it
    """

    inputs: dict[str, Tensor]
    placeholders: list[str]
    grids: list[Grid] = field(default_factory=list)


class Family(Protocol):
    """The facts of one family.

    model_type   `config.model_type` in transformers
    parts        module or parameter prefixes of "vision", "projector" and "language", inside the
                 `…ForConditionalGeneration` model; together they cover every parameter
    pictures_see_themselves   whether the tokens of one picture attend to each other in both
                              directions
    """

    model_type: str
    parts: dict[str, tuple[str, ...]]
    pictures_see_themselves: bool = False

    def marker(self, processor: Any) -> str:
        """The text that a chat template writes for one picture."""
        return processor.image_token

    def placeholder_id(self, processor: Any) -> int:
        """The token id that is repeated once per image feature."""
        return processor.image_token_id

    def process_images(
        self, processor: Any, groups: Sequence[Sequence[PIL.Image.Image]]
    ) -> ProcessedImages:
        """Pictures, grouped as they share a prompt, to tensors and placeholder texts."""
        ...

    def video_marker(self, processor: Any) -> str | None:
        """The text that a chat template writes for one video.

        None: the model takes no videos; a video is shown as its frames, picture after picture.
        """
        return None

    def video_placeholder_id(self, processor: Any) -> int:
        """The token id that is repeated once per video feature; it may be the pictures' own."""
        return self.placeholder_id(processor)

    def process_videos(self, processor: Any, clips: Sequence[Clip]) -> ProcessedImages:
        """Videos to tensors and placeholder texts; tensors that pictures have too are joined."""
        raise FamilyError(f"model type {self.model_type!r} has no videos; give their frames")

    def image_features(self, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Vision tensors -> for each picture, then for each video, its features, with gradient.

        Each is [tokens, width]. The width is the language model's, or a multiple of it where
        features enter at several layers; `encoder_output` takes them apart again.
        """
        ...

    def encoder_output(self, features: Sequence[Tensor], hidden: int) -> Any:
        """Features in the order of their placeholders -> an entry of `mm_encoder_outputs`.

        hidden   the language model's width
        """
        shown: Any = list(features)
        return BaseModelOutputWithPooling(pooler_output=shown)

    def video_output(self, features: Sequence[Tensor], hidden: int) -> Any:
        """The same for videos, where they have a token of their own."""
        return self.encoder_output(features, hidden)

    def positions(self, keys: np.ndarray, grids: Sequence[Grid]) -> np.ndarray | None:
        """The positions of one sequence, int64 [axes, t] with the depth first.

        keys    int64 [t], as `cafe.model.trie` defines them
        None means that the depth is all there is.
        """
        return None

    def unused(self, config: Any) -> tuple[str, ...]:
        """Prefixes of parameters that no forward reads, such as layers above the feature layer.

        They get no gradient, and DDP would wait for it; so they do not train.
        """
        return ()

    def alone_and_together_differ(self) -> bool:
        """Whether a picture has other features when its prompt holds several pictures."""
        return False

    def configured(self, config: Any) -> Family:
        """The facts of a model of the family, where they depend on its configuration."""
        return self

    @staticmethod
    def what_is_needed() -> str:
        return (
            "the module prefixes of its vision tower, projector and language model; the marker "
            "its chat template writes for a picture and the token id repeated per feature; how "
            "its processor's tensors become per-picture features; how it counts positions, and "
            "whether a picture's tokens see each other. Add a file like "
            "cafe/model/families/llava_onevision.py"
        )


def flat(groups: Sequence[Sequence[PIL.Image.Image]]) -> list[PIL.Image.Image]:
    """All pictures of all groups, in order."""
    return [picture for group in groups for picture in group]


def one_by_one(processor: Any, clips: Sequence[Clip]) -> tuple[Tensor, list[str]]:
    """Clips processed each by itself: all frames [frames, …] and each clip's placeholder."""
    frames, placeholders = [], []
    for clip in clips:
        inputs = processor.video_processor(
            [list(clip.frames)], do_sample_frames=False, return_tensors="pt"
        )
        frames.append(inputs["pixel_values_videos"][0])
        placeholders.append(processor.replace_video_token(inputs, 0))
    return torch.cat(frames), placeholders


def tower_above(config: Any, tower: str) -> tuple[str, ...]:
    """Prefixes of the layers of a CLIP or SigLIP `tower` above the one that features come from.

    `hidden_states[i]` is the state after i layers; negative numbers count from the end. What
    comes after the layers (norm, pooling head) is read by nobody either.
    """
    layers = config.vision_config.num_hidden_layers
    chosen = config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else chosen
    highest = max(layer if layer >= 0 else layers + 1 + layer for layer in chosen)
    above = tuple(f"{tower}encoder.layers.{i}." for i in range(highest, layers))
    return (*above, f"{tower}post_layernorm.", f"{tower}head.")


def in_blocks(features: Sequence[Tensor]) -> Any:
    """All features as [blocks, tokens, width], each block within one picture or video.

    Some models want their features so. `generate` repeats blocks when it follows several beams.
    """
    block = math.gcd(*(len(picture) for picture in features))
    together = torch.cat(tuple(features)).unflatten(0, (-1, block))
    return BaseModelOutputWithPooling(pooler_output=together)  # type: ignore[arg-type]


def metadata(clip: Clip) -> Any:
    """What transformers' video processors want to know of frames that are chosen already."""
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(
        total_num_frames=clip.total, fps=clip.fps, frames_indices=list(clip.indices)
    )
