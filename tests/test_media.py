"""Pictures as they come: broken, huge, turned, transparent, of many modes."""

from __future__ import annotations

import io
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from cafe.errors import ImageError
from cafe.media import MAX_ASPECT_RATIO, MAX_PIXELS, open_image
from cafe.types import Image

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)


def encoded(picture: PIL.Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG file of that size, of a hundred bytes: all that a bomb needs."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def opened(source: bytes | PIL.Image.Image | Path) -> PIL.Image.Image:
    picture = open_image(Image(source))
    assert picture.mode == "RGB"
    return picture


def halves(left: object, right: object, mode: str = "RGB") -> PIL.Image.Image:
    """Two pixels side by side, each of 8 x 8."""
    picture = PIL.Image.new(mode, (16, 8), left)  # type: ignore[arg-type]
    picture.paste(right, (8, 0, 16, 8))  # type: ignore[arg-type]
    return picture


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a picture"),
        (b"hello", "not a picture"),
        (b"GIF89a", "cannot be decoded|not a picture"),
        (encoded(PIL.Image.new("RGB", (64, 64), RED), "JPEG")[:-200], "cannot be decoded"),
        (encoded(PIL.Image.effect_noise((64, 64), 50))[:-1000], "cannot be decoded"),
        (png_header(20_000, 20_000), "far too large|exceed the limit"),
        (png_header(9_500, 9_500), "9500x9500 pixels exceed the limit of 89,000,000"),
        (png_header(201, 1), "201x1 is longer than 200:1; crop it"),
        (png_header(1, 5_000), "1x5000 is longer than 200:1; crop it"),
        (png_header(0, 5), "not a picture|cannot be decoded|empty"),
    ],
)
def test_a_bad_file_is_one_error_that_names_it(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match=rf"picture '{path}': .*({message})") as caught:
            opened(path)
        with pytest.raises(ImageError, match=message):
            opened(content)
    assert "\n" not in str(caught.value)


def test_a_bomb_is_refused_before_it_is_decoded():
    begin = time.perf_counter()
    with pytest.raises(ImageError, match="400000000 pixels"):
        opened(png_header(20_000, 20_000))
    assert time.perf_counter() - begin < 1


def test_a_warning_that_is_made_an_error_is_still_a_picture_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="too large"):
            opened(png_header(9_500, 9_500))


def test_the_limits_are_sharp():
    width = 1_000
    assert open_image(Image(encoded(PIL.Image.new("L", (width, 5)))), max_pixels=5 * width).size
    with pytest.raises(ImageError, match="1000x5 pixels exceed the limit of 4,999"):
        open_image(Image(encoded(PIL.Image.new("L", (width, 5)))), max_pixels=5 * width - 1)
    assert opened(encoded(PIL.Image.new("L", (MAX_ASPECT_RATIO, 1)))).size == (200, 1)
    assert MAX_PIXELS < (PIL.Image.MAX_IMAGE_PIXELS or 0) < 400_000_000


@pytest.mark.parametrize("name", ["nothing.png", "folder"])
def test_a_missing_file_is_told_with_its_path(tmp_path: Path, name: str):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ImageError, match=rf"picture '{tmp_path / name}': no such file"):
        opened(tmp_path / name)


def test_an_empty_picture_in_memory_is_refused():
    with pytest.raises(ImageError, match="0x5 is empty"):
        opened(PIL.Image.new("RGB", (0, 5)))


def test_pillow_keeps_its_own_limit():
    before = PIL.Image.MAX_IMAGE_PIXELS
    opened(encoded(PIL.Image.new("RGB", (4, 4))))
    with pytest.raises(ImageError):
        opened(b"hello")
    assert before == PIL.Image.MAX_IMAGE_PIXELS


# ------------------------------------------------------------------ read


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_common_formats_are_read_from_paths_bytes_and_memory(tmp_path: Path, suffix: str):
    picture = halves(RED, BLUE)
    content = encoded(picture, suffix)
    (tmp_path / "a").write_bytes(content)
    for source in (content, tmp_path / "a", PIL.Image.open(io.BytesIO(content))):
        read = np.asarray(opened(source), dtype=int)
        assert read.shape == (8, 16, 3)
        # Two pixels from the seam; lossy formats are near.
        assert np.abs(read[:, :6] - RED).max() <= 6
        assert np.abs(read[:, -6:] - BLUE).max() <= 6
    assert opened(str(tmp_path / "a")).size == (16, 8)  # type: ignore[arg-type]


def test_one_pixel_is_a_picture():
    assert opened(encoded(PIL.Image.new("RGB", (1, 1), RED))).getpixel((0, 0)) == RED


def test_an_rgb_picture_in_memory_is_passed_on_and_not_changed():
    picture = halves(RED, BLUE)
    assert opened(picture) is picture
    transparent = PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    opened(transparent)
    assert transparent.mode == "RGBA"


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(
    ("orientation", "size", "red_at"),
    [
        (1, (16, 8), (0, 0)),
        (2, (16, 8), (15, 0)),
        (3, (16, 8), (15, 0)),
        (6, (8, 16), (0, 0)),
        (8, (8, 16), (0, 15)),
    ],
)
def test_a_turned_picture_is_set_upright(
    orientation: int, size: tuple[int, int], red_at: tuple[int, int], in_memory: bool
):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    content = encoded(halves(RED, BLUE), "PNG", exif=exif)
    read = opened(PIL.Image.open(io.BytesIO(content)) if in_memory else content)
    assert read.size == size
    assert read.getpixel(red_at) == RED
    assert read.getpixel((size[0] - 1 - red_at[0], size[1] - 1 - red_at[1])) == BLUE


@pytest.mark.parametrize(
    ("left", "right", "mode"),
    [
        ((255, 0, 0, 255), (0, 0, 0, 0), "RGBA"),
        ((0, 0), (0, 0), "LA"),
    ],
)
def test_what_is_transparent_becomes_white(left: object, right: object, mode: str):
    read = opened(encoded(halves(left, right, mode)))
    assert read.getpixel((12, 4)) == WHITE
    assert read.getpixel((2, 4)) == (RED if mode == "RGBA" else WHITE)


def test_half_transparent_red_is_pink():
    read = opened(encoded(PIL.Image.new("RGBA", (2, 2), (255, 0, 0, 128))))
    assert read.getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_a_palette_with_a_transparent_colour_shows_white(transparency: int | bytes):
    picture = PIL.Image.new("P", (16, 8), 0)
    picture.putpalette([*RED, *BLUE])
    picture.paste(1, (8, 0, 16, 8))
    read = opened(encoded(picture, "PNG", transparency=transparency))
    assert read.getpixel((2, 4)) == RED
    assert read.getpixel((12, 4)) == WHITE


def test_a_transparent_colour_without_a_palette_shows_white():
    read = opened(encoded(halves(RED, BLUE), "PNG", transparency=BLUE))
    assert (read.getpixel((2, 4)), read.getpixel((12, 4))) == (RED, WHITE)


def test_cmyk_is_converted():
    read = opened(encoded(halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), "TIFF"))
    assert (read.getpixel((2, 4)), read.getpixel((12, 4))) == (RED, BLUE)
    read = opened(encoded(PIL.Image.new("CMYK", (16, 8), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(np.asarray(read, dtype=int) - (254, 0, 0)).max() <= 4


def test_sixteen_bits_become_eight_and_not_white():
    levels = np.array([[0, 257, 32_896, 65_535]] * 4, dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        read = opened(encoded(PIL.Image.fromarray(levels), kind))
        assert np.asarray(read)[0].tolist() == [[v, v, v] for v in (0, 1, 128, 255)]
    big_endian = PIL.Image.frombytes("I;16B", (4, 4), levels.byteswap().tobytes())
    assert np.asarray(opened(big_endian))[0].tolist() == [[v, v, v] for v in (0, 1, 128, 255)]


@pytest.mark.parametrize(("mode", "colour"), [("L", 255), ("1", 1), ("P", 0), ("YCbCr", None)])
def test_other_modes_are_converted(mode: str, colour: int | None):
    picture = PIL.Image.new("RGB", (8, 8), WHITE).convert(mode)
    assert opened(picture).getpixel((3, 3)) == WHITE


def test_the_first_picture_of_an_animation_is_shown():
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=10)
    assert PIL.Image.open(io.BytesIO(content)).n_frames == 2  # type: ignore[attr-defined]
    assert opened(content).getpixel((4, 4)) == RED
