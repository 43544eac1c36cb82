"""Recordings: what is heard of each kind of file, and what a broken one says."""

from __future__ import annotations

import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest

from cafe import audio as audio_module
from cafe.audio import is_audio_name, open_audio
from cafe.errors import AudioError
from cafe.types import Audio
from helpers.tones import CODECS, RATE, pitch, tone, write_audio


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_every_format_is_heard_at_the_rate_that_is_asked_for(
    tmp_path: Path, suffix: str, rate: int
) -> None:
    path = write_audio(tmp_path / f"a{suffix}", tone(440, 1.0, rate), rate)
    heard = open_audio(Audio(path), RATE)
    assert heard.dtype == np.float32
    assert len(heard) == pytest.approx(RATE, rel=0.16)  # codecs pad
    assert pitch(heard) == pytest.approx(440, abs=2)
    assert np.median(np.abs(heard)) == pytest.approx(0.5 * np.sin(np.pi / 4), abs=0.08)
    np.testing.assert_array_equal(open_audio(Audio(path.read_bytes()), RATE), heard)


def test_samples_of_a_lossless_file_are_those_that_were_written(tmp_path: Path) -> None:
    written = tone(440)
    heard = open_audio(Audio(write_audio(tmp_path / "a.flac", written)), RATE)
    np.testing.assert_allclose(heard, written, atol=2**-15)


def test_eight_channels_are_heard_as_their_mean(tmp_path: Path) -> None:
    channels = np.stack([tone(200 + 100 * i, loud=0.1 * i) for i in range(8)])
    path = write_audio(tmp_path / "a.wav", channels, codec="pcm_f32le")
    np.testing.assert_allclose(open_audio(Audio(path), RATE), channels.mean(0), atol=1e-6)
    np.testing.assert_allclose(open_audio(Audio(channels, RATE), RATE), channels.mean(0), atol=1e-6)


def test_samples_of_any_rate_and_type() -> None:
    exact = tone(440)
    np.testing.assert_array_equal(open_audio(Audio(exact, RATE), RATE), exact)
    whole = np.round(exact * 32768).astype(np.int16)
    np.testing.assert_allclose(open_audio(Audio(whole, RATE), RATE), exact, atol=2**-15)
    long = open_audio(Audio(tone(440, 10.0, 8_000), 8_000), RATE)  # in several blocks
    assert len(long) == pytest.approx(10 * RATE, abs=RATE // 100)
    assert pitch(long) == pytest.approx(440, abs=1)


def test_a_long_recording_is_refused_or_cut_and_never_decoded_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = np.zeros(60 * RATE, np.float32)
    path = write_audio(tmp_path / "long.flac", seconds)
    with pytest.raises(AudioError, match=r"'.*long.flac': it lasts more than 30 seconds.*set max_"):
        open_audio(Audio(path), RATE, max_seconds=30)
    decoded = 0
    mixed = audio_module._resampled

    def counted(blocks, rate, wanted):
        nonlocal decoded
        for block in mixed(blocks, rate, wanted):
            decoded += len(block)
            yield block

    monkeypatch.setattr(audio_module, "_resampled", counted)
    assert len(open_audio(Audio(path, max_seconds=2.5), RATE, max_seconds=30)) == 2.5 * RATE
    assert decoded < 3.5 * RATE
    assert Audio(path, max_seconds=2.5).key != Audio(path).key
    exactly = open_audio(Audio(path), RATE, max_seconds=60)
    assert len(exactly) == 60 * RATE


def test_ten_hours_of_silence_cost_no_more_than_what_is_heard() -> None:
    """In 1.1 GB of memory that are never touched."""
    hours = np.lib.stride_tricks.as_strided(np.zeros(1, np.int16), (36_000 * 8_000,), (0,))
    with pytest.raises(AudioError, match="lasts more than 300 seconds"):
        open_audio(Audio(hours, 8_000), RATE, max_seconds=300)
    assert len(open_audio(Audio(hours, 8_000, max_seconds=5), RATE)) == 5 * RATE


def no_samples(path: Path) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
    return path


def floats(tmp_path: Path, samples: np.ndarray) -> Path:
    return write_audio(tmp_path / "a.wav", samples, codec="pcm_f32le")


BROKEN = {
    "zero seconds": (lambda p: no_samples(p / "a.wav"), "lasts zero seconds"),
    "an empty file": (lambda p: written(p / "a.wav", b""), "the file is empty"),
    "a text": (lambda p: written(p / "a.mp3", b"To be, or not to be.\n" * 99), "not audio"),
    "noise": (lambda p: written(p / "a.ogg", np.random.default_rng(0).bytes(9999)), "not audio"),
    "a playlist": (
        lambda p: written(p / "a.wav", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"),
        "not audio",
    ),
    "NaN": (lambda p: floats(p, tone(9) * np.float32("nan")), "no finite numbers"),
    "a missing file": (lambda p: p / "none.wav", "no such file"),
    "a folder": (lambda p: p, "no such file"),
    "LFS": (
        lambda p: written(p / "a.wav", b"version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
}


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_heard_is_one_clear_error(tmp_path: Path, what: str) -> None:
    make, reason = BROKEN[what]
    path = make(tmp_path)
    with pytest.raises(AudioError, match=reason) as caught:
        open_audio(Audio(path), RATE)
    assert str(path) in str(caught.value)


def test_a_film_without_sound_is_named(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        container.mux(stream.encode())
    with pytest.raises(AudioError, match=r"film.mp4': it has no sound"):
        open_audio(Audio(path), RATE)


@pytest.mark.parametrize(
    ("samples", "rate", "reason"),
    [
        (tone(9), None, "samples need a rate"),
        (np.zeros((16_000, 2), np.float32), RATE, r"16,000 channels.*\[channels, samples\]"),
        (np.zeros((1, 2, 3), np.float32), RATE, r"shape \(1, 2, 3\)"),
        (np.array(["a"]), RATE, "type <U1"),
        (np.zeros(0, np.float32), RATE, "zero seconds"),
        (np.array([np.inf, 0], np.float32), RATE, "no finite numbers"),
        (tone(9), 10**9, "1,000,000,000 samples per second"),
    ],
)
def test_samples_that_cannot_be_heard(samples: np.ndarray, rate: int | None, reason: str) -> None:
    with pytest.raises(AudioError, match=reason):
        open_audio(Audio(samples, rate), RATE)


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_audio(tmp_path / "a.wav", tone(440))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match=r"pip install 'cafe-vlm\[audio\]'"):
        open_audio(Audio(path), RATE)
    assert len(open_audio(Audio(tone(440), RATE), RATE)) == RATE // 2  # nothing to decode


def test_names_of_audio_files() -> None:
    assert is_audio_name("a/b.WAV")
    assert not is_audio_name("wav")
    assert not is_audio_name("a.png")
