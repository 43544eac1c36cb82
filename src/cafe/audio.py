"""Open audio safely: decode, bound, mix to one channel, resample.

Every recording, from a training file or a request, passes through `open_audio`, so a file that is
hours long, broken, or not audio at all is one clear error everywhere. Files are decoded by PyAV
(the extra `audio`), block by block, and no further than the model hears. So is whatever has to be
resampled.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe.errors import AudioError, quoted
from cafe.files import LFS_POINTER, is_lfs_pointer
from cafe.types import Audio, StoredFile

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Float

AUDIO_SUFFIXES = frozenset(
    ["wav", "flac", "mp3", "ogg", "oga", "opus", "m4a", "aac", "aif", "aiff"]
)
"""What the names of audio files end with, where a name must tell them from images and texts."""

MAX_SECONDS = 3600.0
"""The longest recording that is decoded, where a model hears as much."""

MAX_CHANNELS = 64
MIN_RATE, MAX_RATE = 100, 768_000
MAX_DECODED = 1_000_000_000
"""Samples of all channels that are decoded of one file, at its own rate: seconds of work."""

_FORMATS = "wav,w64,aiff,flac,mp3,ogg,aac,mov,matroska"
"""Containers that are opened. FFmpeg knows others that name further files or addresses to read."""

_BLOCK = 1 << 16
"""Samples of an array that are resampled at a time."""


def is_audio_name(name: str) -> bool:
    """Whether a file's name ends as that of an audio file does."""
    return Path(name).suffix.lower().removeprefix(".") in AUDIO_SUFFIXES


def open_audio(
    audio: Audio, rate: int, max_seconds: float = MAX_SECONDS
) -> Float[np.ndarray, " n"]:
    """Decode `audio` to one channel (the mean of all) at `rate` samples per second, float32.

    Args:
        audio: The recording.
        rate: What the model's processor wants, in Hz.
        max_seconds: The longest that the model hears.

    Raises:
        AudioError: naming the file, when it is missing, not audio, broken, empty, has samples that
            are not finite, or lasts longer than `max_seconds` (unless `audio.max_seconds` says to
            hear its beginning only); or when PyAV is needed and not installed.
    """
    name = audio_name(audio)
    cut = audio.max_seconds is not None
    limit = min(max_seconds, audio.max_seconds) if audio.max_seconds is not None else max_seconds
    if not limit > 0:
        raise AudioError(f"{name}: max_seconds is {limit:g}; use more than 0")
    wanted = math.ceil(limit * rate)
    blocks: list[np.ndarray] = []
    total = 0
    try:
        with contextlib.closing(_at_rate(name, audio, rate)) as samples:
            for block in samples:
                blocks.append(block)
                total += len(block)
                if total > wanted:  # the rest of the file is not decoded
                    break
    except AudioError:
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        raise AudioError(f"{name}: no such file") from error
    except Exception as error:  # decoders of broken files raise any exception
        raise AudioError(f"{name}: cannot be decoded ({error}); replace or remove it") from error
    if not total:
        raise AudioError(f"{name}: it lasts zero seconds; replace or remove it")
    # A resampler may give a few samples more than there were.
    if total - wanted > rate // 100 and not cut:
        raise AudioError(
            f"{name}: it lasts more than {limit:g} seconds, the longest that is heard; cut it, or "
            "set max_seconds to hear its beginning only"
        )
    whole = np.concatenate(blocks)[:wanted]
    if not np.isfinite(whole).all():
        raise AudioError(f"{name}: it has samples that are no finite numbers; replace or remove it")
    return whole


def audio_name(audio: Audio) -> str:
    """What messages call it."""
    match audio.source:
        case str() | Path():
            return f"audio {quoted(str(audio.source))}"
        case StoredFile():
            return f"audio {quoted(audio.source.name)}"
        case _:
            return "audio"


def _at_rate(name: str, audio: Audio, rate: int) -> Generator[np.ndarray]:
    """Blocks of one channel at `rate`."""
    source = audio.source
    if isinstance(source, np.ndarray):
        if audio.rate is None:
            raise AudioError(f"{name}: samples need a rate; give Audio(samples, rate=16_000)")
        yield from _resampled(_mixed(name, source), _checked_rate(name, audio.rate), rate)
        return
    content = source.read() if isinstance(source, StoredFile) else source
    with contextlib.ExitStack() as files:
        if isinstance(content, bytes):
            file: Any = io.BytesIO(content)
        else:
            file = files.enter_context(Path(content).open("rb"))
        head = file.read(64)
        if not head:
            raise AudioError(f"{name}: the file is empty; replace or remove it")
        if is_lfs_pointer(head):
            raise AudioError(f"{name}: {LFS_POINTER}")
        file.seek(0)
        decoded = _decoded(name, file)
        own_rate, first = next(decoded, (rate, np.zeros(0, np.float32)))
        yield from _resampled(_after(first, decoded), own_rate, rate)


def _after(first: np.ndarray, rest: Iterator[tuple[int, np.ndarray]]) -> Iterator[np.ndarray]:
    yield first
    for _, block in rest:
        yield block


def _mixed(name: str, samples: np.ndarray) -> Iterator[np.ndarray]:
    """An array [n] or [channels, n] as blocks of one channel; integers by their full scale."""
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "fiu":
        raise AudioError(
            f"{name}: an array of shape {samples.shape} and type {samples.dtype}; give numbers, "
            "[samples] or [channels, samples]"
        )
    channels = np.atleast_2d(samples)
    _check_channels(name, len(channels))
    for begin in range(0, channels.shape[1], _BLOCK):
        block = channels[:, begin : begin + _BLOCK]
        if samples.dtype.kind == "f":
            yield block.mean(axis=0, dtype=np.float32)
        else:
            half = 2.0 ** (8 * samples.dtype.itemsize - 1)
            zero = half if samples.dtype.kind == "u" else 0.0
            yield ((block.mean(axis=0) - zero) / half).astype(np.float32)


def _decoded(name: str, file: Any) -> Iterator[tuple[int, np.ndarray]]:
    """The rate of an audio file, and a block of one channel, again and again."""
    av = _pyav(name)
    allowed = {"format_whitelist": _FORMATS}
    try:
        container = av.open(file, mode="r", options=allowed, metadata_errors="replace")
    except Exception as error:  # as many kinds as there are broken files
        raise AudioError(
            f"{name}: not audio in a format that is read here (WAV, FLAC, MP3, OGG, AAC); replace "
            "or remove it"
        ) from error
    decoded = 0
    with container:
        if not container.streams.audio:
            raise AudioError(f"{name}: it has no sound, only images; replace or remove it")
        stream = container.streams.audio[0]
        rate, channel_count, packed = 0, 0, None
        for frame in container.decode(stream):
            if packed is None:
                rate, channel_count = (
                    _checked_rate(name, frame.sample_rate),
                    frame.layout.nb_channels,
                )
                _check_channels(name, channel_count)
                packed = av.AudioResampler(format="flt", layout=frame.layout, rate=rate)
            for converted in packed.resample(frame):
                channels = converted.to_ndarray().reshape(-1, channel_count)
                decoded += channels.size
                if decoded > MAX_DECODED:
                    raise AudioError(
                        f"{name}: more than {MAX_DECODED:,} samples in all channels; resample it, "
                        "or cut it"
                    )
                yield rate, channels.mean(axis=1)


def _resampled(blocks: Iterator[np.ndarray], rate: int, wanted: int) -> Iterator[np.ndarray]:
    """One channel at another rate."""
    if rate == wanted:
        yield from blocks
        return
    av = _pyav("audio")
    resampler = av.AudioResampler(format="flt", layout="mono", rate=wanted)
    for block in blocks:
        if len(block):
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(block, dtype=np.float32)[None], format="flt", layout="mono"
            )
            frame.sample_rate = rate
            for resampled in resampler.resample(frame):
                yield resampled.to_ndarray()[0]
    for resampled in resampler.resample(None):
        yield resampled.to_ndarray()[0]


def _pyav(name: str) -> Any:
    try:
        import av  # type: ignore[import-not-found]
    except ImportError as error:
        raise AudioError(
            f"{name}: reading and resampling audio needs PyAV; pip install 'cafe-vlm[audio]'"
        ) from error
    return av


def _checked_rate(name: str, rate: int) -> int:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(
            f"{name}: {rate:,} samples per second; use {MIN_RATE} to {MAX_RATE:,} (16000 is usual)"
        )
    return int(rate)


def _check_channels(name: str, count: int) -> None:
    if not 1 <= count <= MAX_CHANNELS:
        raise AudioError(
            f"{name}: {count:,} channels; use 1 to {MAX_CHANNELS} (an array is [channels, samples])"
        )
