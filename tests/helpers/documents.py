"""PDFs and other documents that tests make: ordinary ones, and those that attack their reader."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path


def write_pdf(path: Path, pages: Sequence[str], *, password: str | None = None) -> Path:
    """A PDF with one text on each page."""
    import fpdf

    pdf = fpdf.FPDF(format="A5")
    if password is not None:
        pdf.set_encryption(owner_password="owner", user_password=password)
    pdf.set_font("Helvetica", size=14)
    for text in pages:
        pdf.add_page()
        pdf.multi_cell(0, 8, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    pdf.output(str(path))
    return path


def raw_pdf(objects: Sequence[bytes], root: int = 1) -> bytes:
    """A PDF of these objects, numbered from 1; its cross-reference table is right."""
    content = b"%PDF-1.7\n"
    places = []
    for number, body in enumerate(objects, 1):
        places.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(content)
    content += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    content += b"".join(b"%010d 00000 n \n" % place for place in places)
    content += b"trailer\n<</Size %d /Root %d 0 R>>\n" % (len(objects) + 1, root)
    return content + b"startxref\n%d\n%%%%EOF\n" % start


def stream(content: bytes, extra: bytes = b"") -> bytes:
    return b"<<%s /Length %d>>\nstream\n%s\nendstream" % (extra, len(content), content)


def one_page(
    content: bytes = b"",
    box: str = "0 0 200 200",
    *,
    resources: bytes = b"",
    others: Sequence[bytes] = (),
    catalog: bytes = b"",
    page: bytes = b"",
) -> bytes:
    """A PDF of one page; `others` are further objects, from number 5 on."""
    head = b"<</Type /Page /Parent 2 0 R /MediaBox [%s] /Contents 4 0 R /Resources <<%s>> %s>>"
    return raw_pdf(
        [
            b"<</Type /Catalog /Pages 2 0 R %s>>" % catalog,
            b"<</Type /Pages /Kids [3 0 R] /Count 1>>",
            head % (box.encode(), resources, page),
            stream(content),
            *others,
        ]
    )


def without_pages() -> bytes:
    return raw_pdf([b"<</Type /Catalog /Pages 2 0 R>>", b"<</Type /Pages /Kids [] /Count 0>>"])


def nested_forms(depth: int = 12, each: int = 10) -> bytes:
    """A page that shows a form that shows ten others that show ten others …: 10^12 strokes."""
    forms = []
    for level in range(depth):
        last = level == depth - 1
        body = b"0 0 m 200 200 l S\n" if last else b"/F Do\n" * each
        inner = b"" if last else b"/Resources <</XObject <</F %d 0 R>>>>" % (6 + level)
        forms.append(stream(body, b"/Type /XObject /Subtype /Form /BBox [0 0 200 200] " + inner))
    return one_page(b"/F Do", resources=b"/XObject <</F 5 0 R>>", others=forms)


def nested_streams(size: int = 2**30) -> bytes:
    """Page contents that are zeros, deflated twice: gigabytes from a few kilobytes."""
    packer = zlib.compressobj(1)
    block = bytes(2**20)
    once = b"".join(packer.compress(block) for _ in range(size // len(block))) + packer.flush()
    body = stream(zlib.compress(once, 9), b"/Filter [/FlateDecode /FlateDecode]")
    return raw_pdf(
        [
            b"<</Type /Catalog /Pages 2 0 R>>",
            b"<</Type /Pages /Kids [3 0 R] /Count 1>>",
            b"<</Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] /Contents 4 0 R>>",
            body,
        ]
    )


def huge_image(side: int = 60_000) -> bytes:
    """A page with an image of 60,000 x 60,000 pixels: 10 GB in memory."""
    head = b"/Type /XObject /Subtype /Image /Width %d /Height %d /BitsPerComponent 8 "
    head += b"/ColorSpace /DeviceRGB /Filter /FlateDecode"
    image = stream(zlib.compress(bytes(2**20)), head % (side, side))
    return one_page(b"200 0 0 200 0 0 cm /I Do", resources=b"/XObject <</I 5 0 R>>", others=[image])


def with_actions(marker: Path) -> bytes:
    """A page that wants to run JavaScript, start a program, and hand over an embedded file."""
    script = b"<</S /JavaScript /JS (app.launchURL\\('file://%s'\\); while\\(true\\){})>>"
    launch = b"<</S /Launch /F (touch) /Win <</F (cmd) /P (/c echo > %s)>>>>"
    name = str(marker).encode()
    return one_page(
        b"1 0 0 rg 20 20 160 160 re f",
        catalog=b"/OpenAction 5 0 R /Names <</EmbeddedFiles <</Names [(a) 7 0 R]>>>>",
        page=b"/AA <</O 6 0 R>>",
        others=[
            script % name,
            launch % name,
            b"<</Type /Filespec /F (a.sh) /EF <</F 8 0 R>>>>",
            stream(b"#!/bin/sh\ntouch " + name, b"/Type /EmbeddedFile"),
        ],
    )


_TYPES = (
    '<?xml version="1.0"?><Types xmlns="http://schemas.openxmlformats.org/package/2006/'
    'content-types"><Default Extension="rels" ContentType="application/vnd.openxmlformats-package.'
    'relationships+xml"/><Override PartName="/word/document.xml" ContentType="application/vnd.'
    'openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>'
)
_RELATIONS = (
    '<?xml version="1.0"?><Relationships xmlns="http://schemas.openxmlformats.org/package/2006/'
    'relationships"><Relationship Id="r1" Type="http://schemas.openxmlformats.org/officeDocument/'
    '2006/relationships/officeDocument" Target="word/document.xml"/></Relationships>'
)
_WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def write_docx(path: Path, pages: Sequence[str]) -> Path:
    """The smallest Word file: one paragraph on each page."""
    end = '<w:p><w:r><w:br w:type="page"/></w:r></w:p>'
    paragraphs = end.join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in pages)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("[Content_Types].xml", _TYPES)
        file.writestr("_rels/.rels", _RELATIONS)
        body = f'<w:document xmlns:w="{_WORD}"><w:body>{paragraphs}</w:body></w:document>'
        file.writestr("word/document.xml", f'<?xml version="1.0"?>{body}')
    return path
