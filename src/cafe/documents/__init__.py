"""Documents -> pages: images of a chosen size, and the text that the file stores for them.

confined.py   the process in which PDFium runs, with limits; it imports nothing of cafe
renderer.py   asks such processes, and replaces those that die or take too long
pages.py      a document and its pages, as the rest of cafe sees them
office.py     Word and PowerPoint files, by way of the PDF that LibreOffice makes of them
"""

from __future__ import annotations

from cafe.documents.pages import (
    MAX_PAGES,
    PAGE_PIXELS,
    Document,
    StoredPage,
    documents_readable,
    is_document,
    open_document,
    pdf_of,
)

__all__ = [
    "MAX_PAGES",
    "PAGE_PIXELS",
    "Document",
    "StoredPage",
    "documents_readable",
    "is_document",
    "open_document",
    "pdf_of",
]
