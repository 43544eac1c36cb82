"""Small files that would occupy a decoder for long are refused before they are decoded."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import PIL.Image
import pytest

from cafe.errors import ImageError
from cafe.image_cost import excess
from cafe.media import open_image
from cafe.types import Image
from helpers.images import noise

SIZE = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
PIXELS = [(273, 4, 1, 8), (278, 3, 1, 8), (279, 4, 1, 64)]


def encoded(kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    noise(0, 90, 60).save(stream, kind, **options)
    return stream.getvalue()


def scans(count: int, side: int = 64) -> bytes:
    """A progressive JPEG of so many empty scans; at a side of 5,656 each takes 5 ms."""

    def segment(marker: int, data: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data

    code = bytes([1] + [0] * 15)
    blocks = (side // 8) ** 2
    return (
        b"\xff\xd8"
        + segment(0xDB, b"\0" + b"\x01" * 64)
        + segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\x00")
        + segment(0xC4, b"\x00" + code + b"\x00")
        + segment(0xC4, b"\x10" + code + b"\x00")
        + segment(0xDA, b"\x01\x01\x00\x00\x00\x00")
        + b"\0" * (blocks // 8)
        + (segment(0xDA, b"\x01\x01\x00\x01\x3f\x00") + b"\0" * (blocks // 8)) * (count - 1)
        + b"\xff\xd9"
    )


def tags(count: int, size: int, first: list[tuple[int, int, int, int]] | None = None) -> bytes:
    """A TIFF of so many tags whose values are all the same bytes."""
    first = first or []
    total = count + len(first)
    own = [(1000 + i, 1, size, 14 + 12 * total) for i in range(count)]
    entries = b"".join(struct.pack("<HHII", *entry) for entry in [*first, *own])
    return b"II*\0" + struct.pack("<IH", 8, total) + entries + bytes(4) + b"a" * size


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def in_front(content: bytes, at: int, extra: bytes) -> bytes:
    return content[:at] + extra + content[at:]


def gif_with(extra: bytes) -> bytes:
    """A GIF with `extra` behind its palette."""
    gif = encoded("GIF")
    return in_front(gif, 13 + (3 << (gif[10] % 8 + 1)), extra)


@pytest.mark.timeout(60)  # decoding any of them takes longer
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (scans(101), "more than 100 scans"),
        (tags(1000, 100_000, [*SIZE, *PIXELS]), "tags that overlap"),
        (tags(10_001, 4, [*SIZE, *PIXELS]), "more than 10,000 tags"),
        (encoded("JPEG", exif=b"Exif\0\0" + tags(4000, 15_000)), "tags that overlap"),
        (encoded("PNG", exif=tags(2000, 50_000)), "tags that overlap"),
        (encoded("WEBP", exif=tags(2000, 50_000)), "tags that overlap"),
        (in_front(encoded("PNG"), 33, chunk(b"tEXt", b"a\0b") * 20_000), "chunks"),
        (in_front(encoded("PNG"), 33, chunk(b"IDAT", b"") * 20_000), "chunks"),
        (in_front(encoded("JPEG"), 2, b"\xff\xfe\0\2" * 10_001), "segments"),
        (b"\xff\xd8" + b"\xff" * 5_000_000, "segments"),
        (gif_with(b"!\xfe\x01a\0" * 10_001), "blocks"),
        (gif_with(b"!\xfe" + b"\x01a" * 10_001 + b"\0"), "blocks"),
    ],
    ids=lambda value: value if isinstance(value, str) else len(value),
)
def test_what_is_costly_to_decode_is_refused_at_once(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    path.write_bytes(content)
    for source in (content, path):
        with pytest.raises(ImageError, match=reason):
            open_image(Image(source))


def test_the_avif_is_not_opened() -> None:
    try:
        content = encoded("AVIF", exif=tags(2000, 50_000))
    except (KeyError, OSError):
        pytest.skip("this Pillow writes no AVIF")
    assert excess(content) == "has tags that overlap"


def test_ordinary_files_of_every_format_are_read() -> None:
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6
    exif[PIL.Image.ExifTags.Base.Make] = "a maker" * 20
    exif.get_ifd(PIL.Image.ExifTags.IFD.Exif)[37500] = b"m" * 5000
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        content = encoded(kind, exif=exif.tobytes())
        assert open_image(Image(content)).size == (60, 90), kind
    more = [noise(i, 90, 60) for i in range(1, 50)]
    for content in (
        scans(100),
        encoded("JPEG", progressive=True),
        encoded("GIF", save_all=True, append_images=more),
        encoded("MPO", save_all=True, append_images=more[:2]),
        encoded("TIFF", big_tiff=True),
        encoded("TIFF", compression="tiff_lzw"),
        encoded("BMP"),
    ):
        assert min(open_image(Image(content)).size) >= 60


def test_damaged_exif_data_do_not_make_an_image_unreadable() -> None:
    damaged = b"II*\0" + struct.pack("<IH", 8, 60_000) + b"\xff" * 5000
    assert open_image(Image(encoded("JPEG", exif=b"Exif\0\0" + damaged))).size == (90, 60)
