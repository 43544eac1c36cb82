"""Recordings made by code: tones, and files that hold them."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

RATE = 16_000


def tone(hertz: float, seconds: float = 0.5, rate: int = RATE, loud: float = 0.5) -> np.ndarray:
    """A sine, float32 [n]."""
    time = np.arange(round(seconds * rate)) / rate
    return (loud * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


CODECS = {
    ".wav": "pcm_s16le",
    ".flac": "flac",
    ".mp3": "libmp3lame",
    ".ogg": "libopus",
    ".mp4": "aac",
}


def write_audio(path: Path, samples: np.ndarray, rate: int = RATE, codec: str = "") -> Path:
    """A file of the kind that its suffix says; `samples` are [n] or [channels, n]."""
    channels = np.atleast_2d(samples)
    layout = {1: "mono", 2: "stereo", 8: "7.1"}[len(channels)]
    with av.open(str(path), "w") as container:
        codec = codec or CODECS[path.suffix]
        stored = 48_000 if codec == "libopus" else rate
        stream = container.add_stream(codec, rate=stored, layout=layout)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(channels.T, np.float32).reshape(1, -1), format="flt", layout=layout
        )
        frame.sample_rate = rate
        fitting = av.AudioResampler(
            format=stream.format, layout=layout, rate=stored, frame_size=stream.frame_size or 4096
        )
        for part in [*fitting.resample(frame), *fitting.resample(None)] if samples.size else ():
            container.mux(stream.encode(part))
        container.mux(stream.encode())
    return path


def pitch(samples: np.ndarray, rate: int = RATE) -> float:
    """The loudest frequency, in Hz."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * rate / len(samples))
