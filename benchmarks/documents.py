"""Questions over a generated corpus of PDFs: is the right page among the first five?

    python benchmarks/documents.py [MODEL] [--pages 300] [--questions 100]

Each page says one thing that no other says ("The pump of station Velora 17 was replaced in 1931.")
among sentences that all pages share; a question asks for it in other words. Printed, with 95 %
bootstrap intervals over the questions: the share of questions whose page is among the first five by
the embeddings of the page images alone and with `hybrid`, and whether the answer of the model
cites the file and page. The bundled model cannot read text in images: there, all that is found is
found by the documents' text layers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from cafe import Searcher, build_index
from cafe.metrics.interval import bootstrap_interval

FILES = 10
TOP = 5
NAMES = [
    "Velora",
    "Santik",
    "Morrow",
    "Pellan",
    "Dorvik",
    "Halsen",
    "Quimby",
    "Torrel",
    "Aldane",
    "Brisco",
]
PARTS = [
    "pump",
    "valve",
    "turbine",
    "lamp",
    "bridge",
    "clock",
    "gate",
    "furnace",
    "boiler",
    "antenna",
]
SHARED = (
    "This report was written for the yearly meeting of the water board.",
    "All measures are given in metres, and all years are those of the calendar.",
    "The pump, the valve and the lamp of every station are inspected in spring.",
    "What was replaced is listed in the register, with the year and the reason.",
)


def fact(page: int) -> tuple[str, str]:
    """What page `page` says, and the question about it. Both are its own."""
    name, part = NAMES[page % 10], PARTS[page // 10 % 10]
    station = f"{name} {page + 1}"
    year = 1700 + page
    return (
        f"The {part} of station {station} was replaced in {year}.",
        f"In which year did they replace the {part} at {station}?",
    )


def write_corpus(folder: Path, pages: int) -> list[tuple[str, int]]:
    """Write the PDFs; returns file and page of every fact."""
    import fpdf

    homes = []
    for file in range(FILES):
        pdf = fpdf.FPDF()
        pdf.set_font("Helvetica", size=12)
        for number, page in enumerate(range(file, pages, FILES), 1):
            pdf.add_page()
            rng = np.random.default_rng(page)
            sentences = [*rng.permutation(SHARED), fact(page)[0]]
            pdf.multi_cell(0, 8, " ".join(map(str, rng.permutation(sentences))))
            homes.append((page, (f"report-{file}.pdf", number)))
        pdf.output(str(folder / f"report-{file}.pdf"))
    return [home for _, home in sorted(homes)]


def shown(hits: np.ndarray) -> str:
    interval = bootstrap_interval(hits)
    return f"{hits.mean():.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--pages", type=int, default=300)
    parser.add_argument("--questions", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "corpus"
        folder.mkdir()
        homes = write_corpus(folder, options.pages)
        start = time.perf_counter()
        report = build_index(options.model, folder, Path(work) / "index")
        seconds = time.perf_counter() - start
        print(f"{report.rows} pages indexed in {seconds:.1f} s")
        searcher = Searcher.open(report.uri)
        chosen = np.random.default_rng(1).permutation(options.pages)[: options.questions]
        for name, hybrid in (("embeddings alone", False), ("hybrid", True)):
            found = []
            for page in chosen:
                hits = searcher.search(fact(page)[1], TOP, hybrid=hybrid)
                places = [(hit.hit.metadata["path"], hit.page) for hit in hits]
                found.append([homes[page] in places, homes[page] == places[0]])
            among, first = np.array(found, dtype=float).T
            print(f"{name}: among the first {TOP} {shown(among)}, first {shown(first)}")
        page = int(chosen[0])
        hits = searcher.search(fact(page)[1], TOP, hybrid=True)
        answer = searcher.answer(fact(page)[1], hits)
        print(f"{fact(page)[1]} (on {homes[page][0]}, page {homes[page][1]})")
        cited = [Path(hits[n - 1].location).name for n in answer.sources]
        print(f"answer: {answer.text!r}, sources: {'; '.join(cited)}")


if __name__ == "__main__":
    main()
