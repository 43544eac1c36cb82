"""Images as they come: broken, huge, turned, transparent, of many modes."""

from __future__ import annotations

import io
import os
import struct
import sys
import types
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageFile
import pytest

from cafe.errors import ImageError
from cafe.media import MAX_ASPECT_RATIO, MAX_PIXELS, image_size, open_image
from cafe.types import Image

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
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
    image = open_image(Image(source))
    assert image.mode == "RGB"
    return image


def halves(left: object, right: object, mode: str = "RGB") -> PIL.Image.Image:
    """Two pixels side by side, each of 8 x 8."""
    image = PIL.Image.new(mode, (16, 8), left)  # type: ignore[arg-type]
    image.paste(right, (8, 0, 16, 8))  # type: ignore[arg-type]
    return image


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (b"GIF89a", "cannot be decoded|not an image"),
        (encoded(PIL.Image.new("RGB", (64, 64), RED), "JPEG")[:-200], "cannot be decoded"),
        (encoded(PIL.Image.effect_noise((64, 64), 50))[:-1000], "cannot be decoded"),
        (png_header(20_000, 20_000), "far too large|exceed the limit"),
        (png_header(9_500, 9_500), "9500x9500 pixels exceed the limit of 89,000,000"),
        (png_header(201, 1), "201x1 is longer than 200:1; crop it"),
        (png_header(1, 5_000), "1x5000 is longer than 200:1; crop it"),
        (png_header(0, 5), "not an image|cannot be decoded|empty"),
    ],
)
def test_a_bad_file_is_one_error_that_names_it(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match=rf"image '{path}': .*({message})") as caught:
            opened(path)
        with pytest.raises(ImageError, match=message):
            opened(content)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no list of open files")
@pytest.mark.parametrize("whole", [True, False])
def test_no_file_stays_open(tmp_path: Path, whole: bool):
    """Not even while the error, whose traceback holds the image, is alive."""
    frames = [PIL.Image.effect_noise((64, 64), sigma) for sigma in (40, 50)]
    stream = io.BytesIO()
    frames[0].save(stream, "TIFF", save_all=True, append_images=frames[1:])
    path = tmp_path / "two_pages.tif"
    path.write_bytes(stream.getvalue() if whole else stream.getvalue()[:3000])
    alive = []
    try:
        alive.append(opened(path))
    except ImageError as error:
        alive.append(error)
    assert isinstance(alive[0], PIL.Image.Image if whole else ImageError)
    assert str(path) not in {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="400000000 pixels"):
        opened(png_header(20_000, 20_000))


def test_a_warning_that_is_made_an_error_is_still_a_image_error():
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
    with pytest.raises(ImageError, match=rf"image '{tmp_path / name}': no such file"):
        opened(tmp_path / name)


def test_an_empty_image_in_memory_is_refused():
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
    image = halves(RED, BLUE)
    content = encoded(image, suffix)
    (tmp_path / "a").write_bytes(content)
    for source in (content, tmp_path / "a", PIL.Image.open(io.BytesIO(content))):
        read = np.asarray(opened(source), dtype=int)
        assert read.shape == (8, 16, 3)
        # Two pixels from the seam; lossy formats are near.
        assert np.abs(read[:, :6] - RED).max() <= 6
        assert np.abs(read[:, -6:] - BLUE).max() <= 6
    assert opened(str(tmp_path / "a")).size == (16, 8)  # type: ignore[arg-type]


def test_one_pixel_is_a_image():
    assert opened(encoded(PIL.Image.new("RGB", (1, 1), RED))).getpixel((0, 0)) == RED


def test_an_rgb_image_in_memory_is_passed_on_and_not_changed():
    image = halves(RED, BLUE)
    assert opened(image) is image
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
def test_a_turned_image_is_set_upright(
    orientation: int, size: tuple[int, int], red_at: tuple[int, int], in_memory: bool
):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    content = encoded(halves(RED, BLUE), "PNG", exif=exif)
    read = opened(PIL.Image.open(io.BytesIO(content)) if in_memory else content)
    assert read.size == size
    assert read.getpixel(red_at) == RED
    assert read.getpixel((size[0] - 1 - red_at[0], size[1] - 1 - red_at[1])) == BLUE


@pytest.mark.parametrize("orientation", [1, 3, 5, 8])
@pytest.mark.parametrize("budget", [None, 100, 1000, 20_000])
def test_the_size_of_an_image_is_known_before_it_is_decoded(
    orientation: int, budget: int | None, monkeypatch: pytest.MonkeyPatch
):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    image = PIL.Image.new("RGB", (203, 91), RED)
    for content in (encoded(image, "JPEG", exif=exif), encoded(image, "PNG", exif=exif), image):
        shown = Image(content, pixel_budget=budget)
        size = open_image(shown).size
        with monkeypatch.context() as patched:
            patched.setattr(PIL.Image.Image, "load", lambda _: pytest.fail("decoded"))
            assert image_size(shown) == size
    with pytest.raises(ImageError, match="not an image"):
        image_size(Image(b"text"))


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
    image = PIL.Image.new("P", (16, 8), 0)
    image.putpalette([*RED, *BLUE])
    image.paste(1, (8, 0, 16, 8))
    read = opened(encoded(image, "PNG", transparency=transparency))
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
    image = PIL.Image.new("RGB", (8, 8), WHITE).convert(mode)
    assert opened(image).getpixel((3, 3)) == WHITE


def test_the_first_image_of_an_animation_is_shown():
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=10)
    assert PIL.Image.open(io.BytesIO(content)).n_frames == 2  # type: ignore[attr-defined]
    assert opened(content).getpixel((4, 4)) == RED


@pytest.mark.parametrize(
    ("mode", "levels", "grey"),
    [
        ("I", [0, 128, 255], [0, 128, 255]),
        ("I", [0, 257 * 100, 65_535], [0, 100, 255]),
        ("I", [-1000, 0, 1000], [0, 128, 255]),
        ("I", [0, 1_000_000, 2_000_000], [0, 128, 255]),
        ("F", [0.0, 0.2, 1.0], [0, 51, 255]),
        ("F", [0.0, 100.0, 255.0], [0, 100, 255]),
        ("F", [-2.0, float("nan"), 2.0], [0, 128, 255]),
    ],
)
def test_a_32_bit_image_is_scaled(
    tmp_path: Path, mode: str, levels: list[float], grey: list[int]
) -> None:
    array = np.array([levels], dtype=np.int32 if mode == "I" else np.float32)
    PIL.Image.fromarray(array).save(tmp_path / "deep.tiff")
    opened = open_image(Image(tmp_path / "deep.tiff"))
    assert [opened.getpixel((x, 0))[0] for x in range(3)] == grey  # type: ignore[index]


GREEN = (0, 255, 0)
LEFT_RIGHT, SECOND = halves(RED, BLUE), PIL.Image.new("RGB", (16, 8), GREEN)
BLACK_WHITE = halves(0, 1, "1")
SHOWN_LEFT = halves((*RED, 255), (0, 0, 0, 0), "RGBA")
ANIMATED = {"save_all": True, "append_images": [SECOND]}

AS_USERS_HAVE_THEM = {
    # Adobe's, which are inverted: Pillow writes them so.
    "CMYK JPEG": (encoded(halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), "JPEG"), RED, BLUE),
    "grey JPEG": (encoded(halves(0, 255, "L"), "JPEG"), (0, 0, 0), WHITE),
    "JPEG with zeros at its end": (encoded(LEFT_RIGHT, "JPEG") + bytes(100), RED, BLUE),
    "JPEG with a film at its end": (encoded(LEFT_RIGHT, "JPEG") + b"ftyp" * 50_000, RED, BLUE),
    "two JPEGs in one": (encoded(LEFT_RIGHT, "JPEG") + encoded(SECOND, "JPEG"), RED, BLUE),
    "MPO": (encoded(LEFT_RIGHT, "MPO", **ANIMATED), RED, BLUE),
    "animated GIF": (encoded(LEFT_RIGHT, "GIF", **ANIMATED), RED, BLUE),
    "animated WebP": (encoded(LEFT_RIGHT, "WEBP", lossless=True, **ANIMATED), RED, BLUE),
    "animated PNG": (encoded(LEFT_RIGHT, "PNG", **ANIMATED), RED, BLUE),
    "transparent GIF": (encoded(SHOWN_LEFT, "GIF"), RED, WHITE),
    "transparent WebP": (encoded(SHOWN_LEFT, "WEBP", lossless=True), RED, WHITE),
    "transparent TIFF": (encoded(SHOWN_LEFT, "TIFF"), RED, WHITE),
    "palette PNG": (encoded(LEFT_RIGHT.convert("P"), "PNG"), RED, BLUE),
    "palette PNG with alpha": (encoded(SHOWN_LEFT.quantize(8), "PNG"), RED, WHITE),
    "1-bit PNG": (encoded(BLACK_WHITE, "PNG"), (0, 0, 0), WHITE),
    "1-bit TIFF": (encoded(BLACK_WHITE, "TIFF"), (0, 0, 0), WHITE),
    "1-bit TIFF of a fax": (
        encoded(BLACK_WHITE, "TIFF", compression="group4"), (0, 0, 0), WHITE
    ),
    "JPEG 2000": (encoded(LEFT_RIGHT, "JPEG2000"), RED, BLUE),
}  # fmt: skip


@pytest.mark.parametrize("kind", AS_USERS_HAVE_THEM)
@pytest.mark.parametrize("budget", [None, 32])
def test_images_as_users_have_them(kind: str, budget: int | None):
    content, left, right = AS_USERS_HAVE_THEM[kind]
    read = np.asarray(open_image(Image(content, budget)), dtype=int)
    assert read.shape == ((8, 16, 3) if budget is None else (4, 8, 3))
    middle = read.shape[1] // 2
    assert np.abs(read[:, : middle - 3] - left).max() <= 8
    assert np.abs(read[:, middle + 3 :] - right).max() <= 8


@pytest.mark.skipif(not PIL.features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read():
    content = encoded(LEFT_RIGHT, "AVIF", quality=95, **ANIMATED)
    for pixel, colour in (((2, 4), RED), ((13, 4), BLUE)):
        assert np.abs(np.array(opened(content).getpixel(pixel)) - colour).max() <= 6


def heic() -> bytes:
    return struct.pack(">I", 24) + b"ftypheic" + bytes(12)


def test_heic_is_read_where_pillow_heif_is(monkeypatch: pytest.MonkeyPatch):
    """By a stand-in for it, which takes these bytes for an image of its own format."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="reading HEIC needs pillow-heif; pip install pillow-heif"):
        opened(heic())

    class Opened(PIL.ImageFile.ImageFile):
        format = "STANDIN"

        def _open(self) -> None:
            self._size, self._mode = (1, 1), "RGB"
            self.tile = [PIL.ImageFile._Tile("raw", (0, 0, 1, 1), 8, ("RGB", 0, 1))]

    def register() -> None:
        PIL.Image.register_open("STANDIN", Opened, lambda head: head[4:12] == b"ftypheic")

    monkeypatch.setattr(PIL.Image, "OPEN", dict(PIL.Image.OPEN))
    monkeypatch.setattr(PIL.Image, "ID", list(PIL.Image.ID))
    stand_in = types.ModuleType("pillow_heif")
    stand_in.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", stand_in)
    assert opened(heic()).getpixel((0, 0)) == tuple(b"hei")
