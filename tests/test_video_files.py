"""Video files, read by PyAV: which frames, how large, and what a broken one says."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from cafe.errors import ImageError
from cafe.media import open_video
from cafe.types import Video

FRAMES, RATE, WIDTH, HEIGHT = 20, 10, 64, 48
STEP = 12  # of grey, from one frame to the next


def write_video(path: Path, frames: int = FRAMES) -> Path:
    """Frame i is grey, of level 12 i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 2_000_000
        for i in range(frames):
            pixels = np.full((HEIGHT, WIDTH, 3), STEP * i, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def levels(path: Path, max_frames: int) -> list[int]:
    """Which frames were read, by their grey."""
    clip = open_video(Video(path), max_frames)
    return [round(float(np.asarray(frame).mean()) / STEP) for frame in clip.frames]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])  # Matroska does not say how many it holds
def test_evenly_spaced_frames_are_read(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"film{suffix}")
    assert levels(path, 4) == [2, 7, 12, 17]
    assert levels(path, 100) == list(range(FRAMES))
    clip = open_video(Video(path), 4)
    assert (clip.indices, clip.total, clip.fps) == ((2, 7, 12, 17), FRAMES, RATE)
    assert {(frame.mode, frame.size) for frame in clip.frames} == {("RGB", (WIDTH, HEIGHT))}


def test_frames_fit_the_pixel_budget(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", 4)
    clip = open_video(Video(path, pixel_budget=300), 2)
    assert {frame.size for frame in clip.frames} == {(20, 15)}
    whole = open_video(Video(path), 2)  # another budget is another clip
    assert {frame.size for frame in whole.frames} == {(WIDTH, HEIGHT)}
    in_memory = open_video(Video(whole.frames, pixel_budget=300), 2)
    assert [frame.size for frame in in_memory.frames] == [(20, 15)] * 2
    assert Video(path).key != Video(path, 300).key


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", 4)
    assert open_video(Video(path), 9).total == 4
    write_video(path, 6)
    assert open_video(Video(path), 9).total == 6


def test_a_cut_file_is_named_with_the_mend(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=r"video '.*film.mp4': cannot be decoded .*remove it"):
        open_video(Video(path), 4)


def test_a_file_without_images_is_named(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ImageError, match=r"video '.*sound.mkv': it has no frames"):
        open_video(Video(tmp_path / "sound.mkv"), 4)
