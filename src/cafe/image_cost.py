"""What an image file would cost to decode, seen from its structure, before it is decoded.

A decoder's time and memory are bounded by the pixels of an image, except for a few structures that
small files can repeat: each scan of a progressive JPEG passes over all pixels, each tag of a TIFF
(or of EXIF data, which is one) may claim the whole file as its value, and a small segment of a
JPEG, chunk of a PNG or block of a GIF costs as much as a large one. 300 kB could occupy a decoder
for minutes.
"""

from __future__ import annotations

import itertools
import mmap
import re
import struct
from collections.abc import Iterator

EncodedImage = bytes | mmap.mmap

MAX_SCANS = 100
"""Encoders write about 10; at 32 megapixels a hundred take less than a second."""

MAX_CHUNKS = 10_000
"""Segments of a JPEG, chunks of a PNG, blocks in front of a GIF's first frame."""

MAX_TAGS = 10_000
_FREE_BYTES = 2**20

_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)
"""What ends the data of a scan; a zero or the number of a restart does not."""

_SOS, _EOI = 0xDA, 0xD9
_WITHOUT_LENGTH = {0x01, 0xD8}
_EXIF, _MPF = b"Exif\0\0", b"MPF\0"
_TIFF = re.compile(rb"II[*+]\0|MM\0[*+]")
_TAG_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_LONG_TAG_BYTES = _TAG_BYTES | {16: 8, 17: 8, 18: 8}
_POINTERS = {0x8769, 0x8825, 0xA005}
"""Tags whose value is the place of another directory: EXIF, GPS, interoperability."""


def excess(content: EncodedImage) -> str | None:
    """Why a file is too costly to decode ("has more than 100 scans"); None when it is not."""
    if content[:2] == b"\xff\xd8":
        return _jpeg(content)
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(content)
    if content[:3] == b"GIF":
        return _gif(content)
    if _TIFF.match(content[:4]):
        return excess_of_tags(content)
    if content[4:8] == b"ftyp":  # AVIF: its EXIF data are read when the file is opened
        places = itertools.islice(_TIFF.finditer(content), 8)
        reasons = (excess_of_tags(content[found.start() :]) for found in places)
        return next((reason for reason in reasons if reason), None)
    return None


def _jpeg(content: EncodedImage) -> str | None:
    """A JPEG's segments have lengths; the data of a scan end with the next marker."""
    scans = segments = 0
    exif = b""
    at = 2
    while True:
        end = len(content) if scans else min(len(content), at + MAX_CHUNKS + 2)
        found = _MARKER.search(content, at, end)
        if not scans:  # Pillow reads what fills the gaps between segments byte by byte
            segments += (end if found is None else found.start()) - at
        if found is None or (marker := found[1][0]) == _EOI:
            break
        start = at = found.end()
        if marker not in _WITHOUT_LENGTH:
            at += max(2, int.from_bytes(content[at : at + 2], "big"))
        segments += 1
        scans += marker == _SOS
        if scans > MAX_SCANS:
            return f"has more than {MAX_SCANS} scans"
        if segments > MAX_CHUNKS:
            break
        kind = content[start + 2 : start + 8]
        if kind == _EXIF:
            exif += content[start + 8 : at]
        elif kind.startswith(_MPF) and (reason := excess_of_tags(content[start + 6 : at])):
            return reason
    over = segments > MAX_CHUNKS
    return f"has more than {MAX_CHUNKS:,} segments" if over else excess_of_tags(exif)


def _png(content: EncodedImage) -> str | None:
    """Those of the pixels count too: encoders put a kilobyte or more into each."""
    most = MAX_CHUNKS + len(content) // 1024
    at = 8
    for _ in range(most):
        head = content[at : at + 8]
        if len(head) < 8:
            return None
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf" and (reason := excess_of_tags(content[at + 8 : at + 8 + length])):
            return reason
        at += 12 + length
    return f"has more than {most:,} chunks"


def _gif(content: EncodedImage) -> str | None:
    """Only the first frame is decoded, so only what stands in front of it counts."""
    flags = content[10] if len(content) > 10 else 0
    at = 13 + (3 << (flags % 8 + 1) if flags & 0x80 else 0)
    for _ in range(MAX_CHUNKS):
        sign = content[at : at + 1]
        if sign in (b"", b",", b";"):
            return None
        at += 1
        if sign == b"!":
            at += 1
            for _ in range(MAX_CHUNKS):
                length = content[at] if at < len(content) else 0
                at += 1 + length
                if not length:
                    break
            else:
                break
    return f"has more than {MAX_CHUNKS:,} blocks"


def excess_of_tags(tiff: EncodedImage) -> str | None:
    """Why the tags of a TIFF, or of EXIF data, are too many; None when they are not.

    What their values would read is added up: a file whose values do not overlap has all of them
    once. Values that go beyond the end, as those of damaged files do, count up to it.
    """
    if tiff[: len(_EXIF)] == _EXIF:
        tiff = tiff[len(_EXIF) :]
    if len(tiff) < 16 or not _TIFF.match(tiff):
        return None
    order = "<" if tiff[:2] == b"II" else ">"
    long = b"+" in tiff[2:4]
    (start,) = struct.unpack(order + ("Q" if long else "I"), tiff[8:16] if long else tiff[4:8])
    places, seen = [start], set[int]()
    tags = read = 0
    while places:
        place = places.pop()
        if place in seen:
            continue
        seen.add(place)
        for tag, size, at in _tags(tiff, place, order, long):
            tags += 1
            if size > (8 if long else 4):
                read += max(0, min(size, len(tiff) - at))
            elif tag in _POINTERS:
                places.append(at)
            if tags > MAX_TAGS:
                return f"has more than {MAX_TAGS:,} tags"
            if read > 2 * len(tiff) + _FREE_BYTES:
                return "has tags that overlap"
    return None


def _tags(tiff: EncodedImage, place: int, order: str, long: bool) -> Iterator[tuple[int, int, int]]:
    """Number, bytes of the value, and the value or its place, of each tag of a directory."""
    count, entry = ("Q", "HHQQ") if long else ("H", "HHII")
    count, entry = struct.Struct(order + count), struct.Struct(order + entry)
    sizes = _LONG_TAG_BYTES if long else _TAG_BYTES
    if place + count.size > len(tiff):
        return
    (number,) = count.unpack_from(tiff, place)
    first = place + count.size
    end = min(first + number * entry.size, len(tiff) - entry.size + 1)
    for at in range(first, end, entry.size):
        tag, kind, length, value = entry.unpack_from(tiff, at)
        yield tag, sizes.get(kind, 1) * length, value
