"""Audio features that were computed before, as an input of transformers' models.

transformers takes the features of images and videos in `mm_encoder_outputs`, so that they are
computed once per distinct image. It has no such entry for audio: a model's forward always runs its
audio tower, over as many recordings as the rows let hear. `allow_given_audio` adds the entry
"audio", features [tokens, width] in the order of their placeholders, to one model: what a model
would get from its own `get_audio_features`, it is given. Without the entry nothing is changed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from cafe.model.families import Family


def allow_given_audio(inner: Any, family: Family) -> None:
    """Let a `…Model` (that inside `…ForConditionalGeneration`) take "audio"; twice is once.

    Nothing is changed for a family that does not hear.
    """
    if not family.audio_inputs or getattr(inner, "_cafe_given_audio", False):
        return
    own = inner.get_audio_features

    def get_audio_features(input_features: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input_features, ModelOutput):
            return input_features
        return own(input_features, *args, **kwargs)

    inner.get_audio_features = get_audio_features
    inner.register_forward_pre_hook(partial(_as_inputs, family), with_kwargs=True)
    inner._cafe_given_audio = True


def _as_inputs(
    family: Family, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The entry "audio" as `input_features`, which the model hands to `get_audio_features`."""
    given = kwargs.get("mm_encoder_outputs")
    if not given or given.get("audio") is None:
        return None
    kept = {name: output for name, output in given.items() if name != "audio"}
    heard = kwargs["input_ids"] == inner.config.audio_token_id
    features = for_each_beam(given["audio"], heard.sum(dim=1))
    asked: dict[str, Any] = {"input_features": family.audio_output(features)}
    if "input_features_mask" in family.audio_inputs:
        asked["input_features_mask"] = heard.any(dim=1, keepdim=True)
    return args, kwargs | asked | {"mm_encoder_outputs": kept}


def for_each_beam(features: Tensor, counts: Tensor) -> Tensor:
    """Features as rows need them where `generate` repeats each row for several beams.

    Args:
        features: [tokens, width] of the rows before they were repeated.
        counts: int64 [rows], how many each of the repeated rows needs.
    """
    needed = int(counts.sum())
    if needed == len(features) or not len(features):
        return features
    beams = needed // len(features)
    of_rows = features.split(counts[::beams].tolist())
    return torch.cat([row for row in of_rows for _ in range(beams)])
