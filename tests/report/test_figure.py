"""The demo's figure: it is written, it shows its inputs, and no texts overlap."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cafe.demo.figure import Clouds, Curves, ExampleSearch, FigureHit, draw_demo, smooth
from cafe.errors import DataError
from cafe.report.figures import draw_map

LONG = " ".join(["a small potato at the bottom right,"] * 6)


def inputs(text: str = LONG, correct: int | None = 1, steps: int = 40) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    hits = [
        FigureHit(PIL.Image.new("RGB", (96, 96), colour), 0.9 - 0.1 * i, i == correct)
        for i, colour in enumerate(("red", "blue", "green", "white", "grey"))
    ]
    clouds = [
        Clouds(rng.normal(size=(30, 8)) + shift, rng.normal(size=(30, 8))) for shift in (5, 0)
    ]
    return {
        "curves": Curves(range(1, steps + 1), np.linspace(4, 1, steps), np.full(steps, 0.5)),
        "search": ExampleSearch(text, hits, 2 if correct is not None else 17, 500),
        "before": clouds[0],
        "after": clouds[1],
    }


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written, for inspection."""
    seen: list[Figure] = []
    write = FigureCanvasAgg.print_png

    def spy(self: FigureCanvasAgg, *args: Any, **kwargs: Any) -> None:
        seen.append(self.figure)
        write(self, *args, **kwargs)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", spy)
    return seen


def texts(figure: Figure) -> list[Any]:
    """All visible texts of the figure."""
    found = figure.findobj(lambda item: hasattr(item, "get_text") and hasattr(item, "get_rotation"))
    return [t for t in found if t.get_text().strip() and t.get_visible()]


def test_the_image_is_a_png_of_a_fixed_size(tmp_path):
    draw_demo(tmp_path / "demo.png", **inputs())
    with PIL.Image.open(tmp_path / "demo.png") as image:
        assert (image.format, image.size) == ("PNG", (1800, 1260))
        assert len(np.unique(np.asarray(image.convert("L")))) > 50


def test_a_search_that_captions_mend_is_a_second_row(tmp_path, figures):
    mended = inputs(correct=0)["search"]
    draw_demo(tmp_path / "demo.png", **inputs(correct=3), mended=mended)
    with PIL.Image.open(tmp_path / "demo.png") as image:
        assert image.size == (1800, 1785)
    panels = [axes for axes in figures[0].axes if axes.images]
    assert ["correct image" in axes.get_xlabel() for axes in panels] == [
        i in (3, 5) for i in range(10)
    ]


@pytest.mark.parametrize("mended", [False, True])
@pytest.mark.parametrize("text", ["A cat.", LONG])
def test_no_two_texts_overlap_and_none_is_cut_off(tmp_path, figures, text, mended):
    more = {"mended": inputs(text)["search"]} if mended else {}
    draw_demo(tmp_path / "demo.png", **inputs(text), **more)
    (figure,) = figures
    boxes = {t: t.get_window_extent() for t in texts(figure)}
    assert len(boxes) > 15
    width, height = figure.bbox.size
    for item, box in boxes.items():
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, item.get_text()
    clashes = [
        (a.get_text(), b.get_text())
        for a, b in combinations(boxes, 2)
        if boxes[a].overlaps(boxes[b])
    ]
    assert clashes == []


def test_only_the_correct_image_is_framed_and_labelled(tmp_path, figures):
    draw_demo(tmp_path / "found.png", **inputs(correct=1))
    draw_demo(tmp_path / "lost.png", **inputs(correct=None))
    for figure, correct in zip(figures, (1, None), strict=True):
        panels = [axes for axes in figure.axes if axes.images]
        frames = [axes.spines["top"].get_linewidth() for axes in panels]
        assert len(panels) == 5
        assert [width == max(frames) > 1 for width in frames] == [i == correct for i in range(5)]
        assert ["correct image" in axes.get_xlabel() for axes in panels] == [
            i == correct for i in range(5)
        ]
    assert any("ranked 17 of 500" in t.get_text() for t in texts(figures[1]))


def test_a_run_of_one_step_can_be_drawn(tmp_path):
    draw_demo(tmp_path / "demo.png", **inputs(steps=1))
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_smoothing_averages_neighbours_only_and_keeps_straight_lines():
    np.testing.assert_allclose(smooth([3.0, 1.0]), [3.0, 1.0])  # too few to smooth
    step = np.repeat([0.0, 1.0], 30)  # 60 values: two neighbours on either side
    np.testing.assert_allclose(smooth(step)[27:33], [0, 0.2, 0.4, 0.6, 0.8, 1.0])
    np.testing.assert_allclose(smooth(np.full(60, 2.5)), 2.5)


def test_a_missing_folder_is_one_clear_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"missing/demo\.png: cannot be written"):
        draw_demo(tmp_path / "missing" / "demo.png", **inputs())


def test_a_map_shows_every_image_and_text_and_the_gap(figures, tmp_path):
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(7, 2)) + 3, rng.normal(size=(5, 2))
    draw_map(tmp_path / "map.png", images, texts, 0.734)
    axes = figures[0].axes[0]
    shown = {c.get_label(): np.asarray(c.get_offsets()) for c in axes.collections}
    np.testing.assert_allclose(shown["images"], images)
    np.testing.assert_allclose(shown["texts"], texts)
    assert axes.get_title() == "modality gap 0.73"
    with pytest.raises(DataError, match="cannot be written"):
        draw_map(tmp_path / "gone" / "map.png", images, texts, 0.0)
