"""Qwen2.5-Omni's thinker: Qwen2.5-VL's tower for images, Whisper's for audio, M-RoPE positions.

The part of Qwen2.5-Omni that reads and answers; of a published checkpoint only this part is loaded,
and saved as a model of its own, not the talker, which speaks. An image
lies at one time, a video's frames at the times when they are shown (25 positions a second), and
the tokens of a recording, 25 a second, count like text. Recordings are heard whole, in windows of
two seconds that do not see each other in the tower.

Freezing or adapting `vision` means both towers; `projector` means what leads from either into the
language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from cafe.media import Clip
from cafe.model.families.base import Grid, ProcessedImages, metadata
from cafe.model.families.mrope import mrope_positions
from cafe.model.families.qwen2_vl import Qwen2VL

_FRAMES_PER_SECOND = 2.0
"""Of a video whose own rate is not known, as in the processor."""

_LEAST_FRAMES = 3
"""Spectrogram frames of 10 ms of which the tower makes one token."""


class Qwen25Omni(Qwen2VL):
    model_type = "qwen2_5_omni_thinker"
    whole = ("qwen2_5_omni", "thinker_config")
    parts = {  # noqa: RUF012 - facts, never written to
        "vision": (
            "model.visual.patch_embed.",
            "model.visual.blocks.",
            "model.audio_tower.conv1.",
            "model.audio_tower.conv2.",
            "model.audio_tower.layers.",
            "model.audio_tower.ln_post.",
            "model.audio_tower.audio_bos_eos_token.",
        ),
        "projector": ("model.visual.merger.", "model.audio_tower.proj."),
        "language": ("model.language_model.", "lm_head."),
    }
    audio_inputs = ("input_features", "feature_attention_mask")

    def __init__(self, positions_per_second: float = 25.0) -> None:
        self.positions_per_second = positions_per_second

    def configured(self, config: Any) -> Qwen25Omni:
        return Qwen25Omni(config.position_id_per_seconds)

    def process_videos(self, processor: Any, clips: Sequence[Clip]) -> ProcessedImages:
        inputs = processor.video_processor(
            [list(clip.frames) for clip in clips],
            **_sizes(processor),
            do_sample_frames=False,
            video_metadata=[metadata(clip) for clip in clips],
            return_tensors="pt",
        )
        merge = processor.video_processor.merge_size
        grids = [
            Grid(frames, height // merge, width // merge, self.time_step(processor, clip))
            for clip, (frames, height, width) in zip(
                clips, inputs["video_grid_thw"].tolist(), strict=True
            )
        ]
        counts = [grid.frames * grid.lines * grid.columns for grid in grids]
        names = ("pixel_values_videos", "video_grid_thw")
        return ProcessedImages(
            {name: inputs[name] for name in names},
            [processor.video_token * count for count in counts],
            grids,
        )

    def time_step(self, processor: Any, clip: Clip) -> float:
        rate = _FRAMES_PER_SECOND if clip.fps is None else metadata(clip).sampled_fps
        seconds = np.float32(processor.video_processor.temporal_patch_size / rate)
        return float(seconds * np.float32(self.positions_per_second))

    def audio_marker(self, processor: Any) -> str:
        return processor.audio_token

    def audio_placeholder_id(self, processor: Any) -> int:
        return processor.audio_token_id

    def max_seconds(self, processor: Any) -> float:
        extractor = processor.feature_extractor
        return extractor.n_samples / extractor.sampling_rate

    def process_audio(self, processor: Any, samples: Sequence[np.ndarray]) -> ProcessedImages:
        """Each spectrogram as in a recording of the longest length, without its silent end."""
        spectrograms = [_spectrogram(processor.feature_extractor, own) for own in samples]
        lengths = torch.tensor([len(own) for own in spectrograms])
        padded = torch.nn.utils.rnn.pad_sequence(spectrograms, batch_first=True)
        mask = torch.arange(padded.shape[1])[None] < lengths[:, None]
        inputs = {
            "input_features": padded.transpose(1, 2),
            "feature_attention_mask": mask.long(),
            "num_audio_tokens": ((lengths - 1) // 2 - 1) // 2 + 1,
        }
        placeholders = [processor.replace_audio_token(inputs, i) for i in range(len(samples))]
        return ProcessedImages({name: inputs[name] for name in self.audio_inputs}, placeholders)

    def audio_features(self, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        features = model.get_audio_features(**inputs, return_dict=True).last_hidden_state
        lengths = inputs["feature_attention_mask"].sum(-1)
        _, counts = model.audio_tower._get_feat_extract_output_lengths(lengths)
        return list(features.split(counts.tolist()))

    def audio_output(self, features: Tensor) -> Any:
        return BaseModelOutputWithPooling(last_hidden_state=features)  # type: ignore[arg-type]

    def positions(self, keys: np.ndarray, grids: Sequence[Grid | None]) -> np.ndarray | None:
        return mrope_positions(keys, grids, after_time=True)

    def unused(self, config: Any) -> tuple[str, ...]:
        return ("model.audio_tower.audio_bos_eos_token.",)


def _sizes(processor: Any) -> dict[str, Any]:
    """The pixels of a frame: Qwen2.5-Omni's processor has its own, which win over the saved ones.

    Source: `Qwen2_5OmniProcessor.videos_kwargs` of transformers.
    """
    return {"size": processor.videos_kwargs["size"]}


def _spectrogram(extractor: Any, samples: np.ndarray) -> Tensor:
    """[frames, mels], one frame per begun hop of the samples.

    The processor fills recordings up to the longest with silence. What a frame hears of that lies
    within one window after its centre, so no more silence is added here.
    """
    least = _LEAST_FRAMES * extractor.hop_length
    samples = np.pad(samples, (0, max(0, least - len(samples))))
    silence = min(extractor.n_fft, extractor.n_samples - len(samples))
    inputs = extractor(
        np.pad(samples, (0, silence)),
        sampling_rate=extractor.sampling_rate,
        padding="longest",
        return_tensors="pt",
    )
    frames = -(-len(samples) // extractor.hop_length)
    return inputs["input_features"][0, :, :frames].T
