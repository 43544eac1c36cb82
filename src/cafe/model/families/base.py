"""What cafe must know about a model family. Everything else is common to all families."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from cafe.errors import FamilyError
from cafe.media import Clip
from cafe.model.image_keys import MediaOrders

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Int


@dataclass(frozen=True, slots=True)
class Grid:
    """The layout of an image's features, for models that count time, height and width separately.

    frames, lines, columns   numbers of features, in this order
    time_step                positions from one frame to the next
    """

    frames: int
    lines: int
    columns: int
    time_step: float = 1.0


@dataclass(frozen=True, slots=True)
class ProcessedImages:
    """Images, videos, or recordings, as model inputs.

    inputs        the tensors of the family's tower (`pixel_values`, …)
    placeholders  for each of them, the text that represents it in the prompt
    grids         for each image or video its grid, if the family's positions need it
    """

    inputs: dict[str, Tensor]
    placeholders: list[str]
    grids: list[Grid] = field(default_factory=list)


class Family(Protocol):
    """The facts of one family.

    model_type   `config.model_type` in transformers
    parts        module or parameter prefixes of "vision", "projector" and "language", inside the
                 `…ForConditionalGeneration` model; together they cover every parameter
    bidirectional_image_attention   whether the tokens of one image attend to each other in both
                              directions
    bidirectional_layers      in which kinds of layers (`layer_types`) they do; None: in all
    token_types               what `generate` calls the input that marks the tokens of images
    whole                     model type of a larger model that has this one as a part, and the name
                              of this part's configuration in the other's
    audio_inputs              names of the tensors that `process_audio` gives; empty: it hears not
    """

    model_type: str
    parts: dict[str, tuple[str, ...]]
    bidirectional_image_attention: bool = False
    bidirectional_layers: tuple[str, ...] | None = None
    token_types: str = "token_type_ids"
    whole: tuple[str, str] | None = None
    audio_inputs: tuple[str, ...] = ()

    def marker(self, processor: Any) -> str:
        """The text that a chat template writes for one image."""
        return processor.image_token

    def placeholder_id(self, processor: Any) -> int:
        """The token id that is repeated once per image feature."""
        return processor.image_token_id

    def process_images(
        self, processor: Any, groups: Sequence[Sequence[PIL.Image.Image]]
    ) -> ProcessedImages:
        """Process images, grouped by prompt, to tensors and placeholder texts."""
        ...

    def video_marker(self, processor: Any) -> str | None:
        """The text that a chat template writes for one video.

        None: the model takes no videos; a video's frames are given as images.
        """
        return None

    def video_placeholder_id(self, processor: Any) -> int:
        """The token id that is repeated once per video feature; it may be the images' own."""
        return self.placeholder_id(processor)

    def process_videos(self, processor: Any, clips: Sequence[Clip]) -> ProcessedImages:
        """Process videos; tensors with the names of the images' own are concatenated to them."""
        raise FamilyError(f"model type {self.model_type!r} takes no videos; give their frames")

    def audio_marker(self, processor: Any) -> str | None:
        """The text that a chat template writes for one recording; None: the model does not hear."""
        return None

    def audio_placeholder_id(self, processor: Any) -> int | None:
        """The token id that is repeated once per feature of a recording."""
        return None

    def audio_rate(self, processor: Any) -> int:
        """Samples per second that the processor takes."""
        return int(processor.feature_extractor.sampling_rate)

    def max_seconds(self, processor: Any) -> float:
        """The longest recording that the model hears."""
        raise self._deaf()

    def process_audio(self, processor: Any, samples: Sequence[np.ndarray]) -> ProcessedImages:
        """Process recordings, each float32 [n] at `audio_rate`, to tensors and placeholders."""
        raise self._deaf()

    def audio_features(self, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        """The features [tokens, width] of each recording, with gradient."""
        raise self._deaf()

    def audio_output(self, features: Tensor) -> Any:
        """What the model's own `get_audio_features` would return for features [tokens, width]."""
        raise self._deaf()

    def _deaf(self) -> FamilyError:
        return FamilyError(f"model type {self.model_type!r} takes no audio")

    def image_features(self, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        """The features of each image, then of each video, with gradient.

        Each is [tokens, width]. The width is the language model's, or a multiple of it where
        features enter at several layers; `encoder_output` splits them again.
        """
        ...

    def encoder_output(self, features: Sequence[Tensor], hidden: int) -> Any:
        """An entry of `mm_encoder_outputs`.

        Args:
            features: in the order of their placeholders.
            hidden: the language model's width.
        """
        ordered: Any = list(features)
        return BaseModelOutputWithPooling(pooler_output=ordered)

    def video_output(self, features: Sequence[Tensor], hidden: int) -> Any:
        """The same for videos, where they have their own placeholder token."""
        return self.encoder_output(features, hidden)

    def positions(
        self, keys: Int[np.ndarray, " t"], grids: Sequence[Grid | None]
    ) -> Int[np.ndarray, "axes t"] | None:
        """The positions of one sequence, with the depth first; None: the depth is the position.

        Args:
            keys: of the sequence (`cafe.model.image_keys`).
            grids: of the images that the keys name; None: its tokens are counted like text.
        """
        return None

    def unused(self, config: Any) -> tuple[str, ...]:
        """Prefixes of parameters that no forward uses, such as layers above the feature layer.

        They are frozen: they get no gradient, and DDP would wait for one.
        """
        return ()

    def features_depend_on_image_count(self) -> bool:
        """Whether an image has different features when its prompt contains several images."""
        return False

    def configured(self, config: Any) -> Family:
        """The facts of one model, where they depend on its configuration."""
        return self

    @staticmethod
    def what_is_needed() -> str:
        return (
            "the module prefixes of its vision tower, projector and language model; the marker "
            "its chat template writes for an image and the token id repeated per feature; how "
            "its processor's tensors become per-image features; how it counts positions, and "
            "whether an image's tokens see each other. Add a file like "
            "cafe/model/families/llava_onevision.py"
        )


def flat(groups: Sequence[Sequence[PIL.Image.Image]]) -> list[PIL.Image.Image]:
    """All images of all groups, in order."""
    return [image for group in groups for image in group]


def not_thinner(image: PIL.Image.Image, ratio: int) -> PIL.Image.Image:
    """The image, broadened where one side is more than `ratio` times the other.

    For processors that fail on images whose shorter side they would scale to nothing.
    """
    least = math.ceil(max(image.size) / ratio)
    if min(image.size) >= least:
        return image
    return image.resize((max(image.width, least), max(image.height, least)))


def one_by_one(processor: Any, clips: Sequence[Clip]) -> tuple[Tensor, list[str]]:
    """Process each clip separately: all frames [frames, ...] and each clip's placeholder."""
    frames, placeholders = [], []
    for clip in clips:
        inputs = processor.video_processor(
            [list(clip.frames)], do_sample_frames=False, return_tensors="pt"
        )
        frames.append(inputs["pixel_values_videos"][0])
        placeholders.append(processor.replace_video_token(inputs, 0))
    return torch.cat(frames), placeholders


def together(processor: Any, clips: Sequence[Clip]) -> tuple[Any, list[str]]:
    """Process clips whose frames are sampled: the processor's tensors, each clip's placeholder."""
    inputs = processor.video_processor(
        [list(clip.frames) for clip in clips],
        do_sample_frames=False,
        video_metadata=[metadata(clip) for clip in clips],
        return_metadata=True,
        return_tensors="pt",
    )
    return inputs, [processor.replace_video_token(inputs, i) for i in range(len(clips))]


def tower_above(config: Any, tower: str) -> tuple[str, ...]:
    """Prefixes of the layers of a CLIP or SigLIP `tower` above the one that features come from.

    `hidden_states[i]` is the state after i layers; negative numbers count from the end. What
    follows the layers (norm, pooling head) is unused too.
    """
    layers = config.vision_config.num_hidden_layers
    chosen = config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else chosen
    highest = max(layer if layer >= 0 else layers + 1 + layer for layer in chosen)
    above = tuple(f"{tower}encoder.layers.{i}." for i in range(highest, layers))
    return (*above, f"{tower}post_layernorm.", f"{tower}head.")


def distinct_features(family: Family, model: Any, vision: dict[str, Tensor]) -> list[Tensor]:
    """Features of each image, video and recording, computed in the type of the model's weights."""
    dtype = model.dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in vision.items()}
    sounds = {name: inputs.pop(name) for name in family.audio_inputs if name in inputs}
    features = family.image_features(model.model, inputs) if inputs else []
    return [*features, *(family.audio_features(model.model, sounds) if sounds else [])]


def features_in_order(
    family: Family,
    features: Sequence[Tensor],
    orders: MediaOrders,
    hidden: int,
) -> dict[str, Any]:
    """Features in the order of their placeholders, as transformers' `mm_encoder_outputs`.

    transformers knows no "audio" there; `cafe.model.hearing` adds it.

    Args:
        family: whose form the entries take.
        features: [tokens, width] of each distinct image, then of each video and each recording.
        orders: which of them each run of placeholders stands for.
        hidden: the language model's width.
    """
    image_order, video_order, audio_order = orders
    outputs: dict[str, Any] = {}
    if image_order:
        outputs["image"] = family.encoder_output([features[i] for i in image_order], hidden)
    if video_order:
        outputs["video"] = family.video_output([features[i] for i in video_order], hidden)
    if audio_order:
        outputs["audio"] = torch.cat([features[i] for i in audio_order])
    return outputs


def in_blocks(features: Sequence[Tensor]) -> Any:
    """All features as [blocks, tokens, width], each block within one image or video.

    Some models need this form. `generate` repeats blocks for several beams.
    """
    block = math.gcd(*(len(image) for image in features))
    together = torch.cat(tuple(features)).unflatten(0, (-1, block))
    return BaseModelOutputWithPooling(pooler_output=together)  # type: ignore[arg-type]


def metadata(clip: Clip) -> Any:
    """What transformers' video processors need to know about frames that were sampled before."""
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(
        total_num_frames=clip.total, fps=clip.fps, frames_indices=list(clip.indices)
    )
