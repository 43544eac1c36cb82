"""The page of `cafe report`: from a real run's folder, and in a real browser."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from cafe.errors import DataError
from cafe.report.page import Curve, chart, number
from cafe.report.views import read_views, write_view
from cafe.training.evaluation_views import PairedSides, build_view
from cafe.training.run_folder import read_runs
from cafe.training.run_report import write_report
from cafe.types import Image, user

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def step_line(step: int, loss: float) -> str:
    values: dict[str, Any] = {"step": step, "loss": loss, "contrastive": loss / 4, "language": loss}
    values |= {"gradient_norm": 1.5, "learning_rate": 1e-4, "examples_per_second": 8.0}
    values |= {"tokens_per_second": 900.0, "data_wait_share": 0.25, "seconds": 2.0, "total": 60}
    return json.dumps(values | {"host_bytes": 2**30}) + "\n"


def make_run(folder: Path, rate: str = "1e-4") -> Path:
    folder.mkdir()
    view = {0: 0.1, 60: 0.6}
    lines = [evaluation(0, view[0])]
    lines += [step_line(step, 3.0 / step**0.5) for step in range(1, 61)]
    (folder / "log.jsonl").write_text("".join([*lines, evaluation(60, view[60])]))
    (folder / "recipe.yaml").write_text(f"model: tiny\noptimizer: {{learning_rate: {rate}}}\n")
    (folder / "plan.json").write_text('{"host_bytes": 2147483648}')
    for step in view:
        write_view(
            folder, build_view(step, sides(step), [user(shown_image(3), "What is it?")]), {0}
        )
    return folder


def evaluation(step: int, recall: float) -> str:
    sample = {"id": "1", "prompt": "<image> What <b>is</b> it?", "reference": "a mug"}
    sample["answer"] = f"answer of {step}"
    scores = {"image_to_text_recall@1": recall, "language_loss": 1.0}
    return (
        json.dumps({"step": step, "evaluation": scores, "seconds": 1.0, "samples": [sample]}) + "\n"
    )


def shown_image(index: int) -> Image:
    return Image(PIL.Image.new("RGB", (300, 200), (20 * index, 90, 200 - 20 * index)))


def sides(seed: int) -> PairedSides:
    drawn = np.random.default_rng(seed).normal(size=(2, 8, 16))
    units = drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)
    shown = [user(shown_image(i)) for i in range(8)], [user(f"caption {i}") for i in range(8)]
    right = [{i} for i in range(8)]
    return PairedSides(("image", "text"), shown, (units[0], units[1]), (right, right))


def test_a_view_is_what_was_embedded_and_comes_back(tmp_path: Path) -> None:
    paired = sides(1)
    view = build_view(5, paired, [])
    scores = paired.embeddings[0] @ paired.embeddings[1][0]
    first = view.searches[0]
    assert first.query.text == "caption 0"
    assert first.rank == 1 + int((scores > scores[0]).sum())
    assert first.hits[0].score == pytest.approx(float(scores.max()), abs=1e-4)
    assert all(hit.image for hit in first.hits)
    assert [hit.right for hit in first.hits] == [i == 0 for i in np.argsort(-scores)[:4].tolist()]
    flipped = PairedSides(
        ("text", "image"), paired.shown[::-1], paired.embeddings[::-1], paired.right[::-1]
    )
    assert build_view(5, flipped, []) == view
    for step in (0, 5, 7):
        write_view(tmp_path, view.model_copy(update={"step": step}), {0})
    (tmp_path / "evaluations" / "step-000009.json").write_text('{"step": 9, "ma')
    views, problems = read_views(tmp_path)
    assert [one.step for one in views] == [0, 7]
    assert len(problems) == 1
    assert "step-000009.json: cannot be read" in problems[0]


def test_torn_mixed_and_empty_folders_are_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "log.jsonl").open("a") as log:
        log.write(step_line(1, 9.0) + step_line(2, 9.0) + '{"step": 3, "lo')
    runs, notices = read_runs(run / "log.jsonl")
    assert [len(one.steps) for one in runs] == [60, 2]
    assert "holds more than one run: after step 60, line 63 is of step 1" in notices[0]
    assert "line 65 is not complete, and is not read" in notices[1]
    report = write_report([run], tmp_path / "page.html")
    assert report.notices == tuple(notices)
    assert "more than one run" in report.path.read_text()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="neither a run nor results; name the output_dir"):
        write_report([empty], tmp_path / "x.html")
    with pytest.raises(DataError, match=r"name its runs: .*run"):
        write_report([tmp_path], tmp_path / "x.html")
    (empty / "log.jsonl").touch()
    with pytest.raises(DataError, match="no line of a run's log"):
        write_report([empty], tmp_path / "x.html")


def result(model: str, version: int = 1, packages: str = "0.1") -> dict[str, Any]:
    return {
        "task": "coco-5k",
        "version": version,
        "model": model,
        "format": 1,
        "count": 4,
        "scores": {"image_to_text_recall@1": 0.5},
        "intervals": {"image_to_text_recall@1": [0.1, 0.9]},
        "samples": "a1",
        "items": {"hit": "0101", "all": "1111"},
        "ratios": {"image_to_text_recall@1": ["hit", "all"]},
        "means": {},
        "derived": None,
        "packages": {"cafe-vlm": packages},
        "details": {},
    }


def test_results_are_compared_and_other_versions_said(tmp_path: Path) -> None:
    paths = []
    for name, version, packages in (("a", 1, "0.1"), ("b", 1, "0.1"), ("c", 2, "0.2")):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(result(name, version, packages)))
    report = write_report(paths[:2], tmp_path / "two.html")
    text = report.path.read_text()
    assert report.notices == ()
    assert "0.5000 [0.100, 0.900]; +0.0000 [+0.000, +0.000]" in text
    assert "published: CLIP ViT-L: " in text
    notices = write_report(paths, tmp_path / "three.html").notices
    assert "c has another version of the task than a" in notices[0]
    assert "several versions of cafe: 0.1, 0.2" in notices[1]


def test_curves_keep_their_ends_and_leave_out_what_is_not_finite() -> None:
    drawn = chart("loss", [Curve(0, range(1000), [float(i) for i in range(1000)])])
    assert drawn is not None
    assert len(drawn["curves"][0]["points"].split()) == 180
    assert chart("loss", [Curve(0, [1], [float("nan")])]) is None
    assert [number(x) for x in (0.41234, 12500, 2.5e9, 3e-5)] == [
        "0.4123",
        "12.5k",
        "2.5G",
        "3e-05",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser_asks_for_nothing(tmp_path: Path, width: int, scheme: Any) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="pip install 'cafe-vlm[dev]'")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no browser: install Chromium")
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second", "2e-4")]
    page_path = write_report(runs, tmp_path / "report.html").path
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox"] if root else []
        )
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        asked: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(page_path.as_uri())
        assert [url for url in asked if not url.startswith("data:")] == [page_path.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("figure.chart").count() >= 9
        assert page.locator("figure.chart").first.locator("polyline").count() == 2
        assert page.locator(".search").count() == 12
        assert page.locator(".map").count() == 4
        assert page.get_by_text("learning_rate", exact=False).count()
        body = page.inner_text("body")
        for words in ("before training answer of 0", "after step 60 answer of 60", "<b>is</b>"):
            assert words in " ".join(body.split())
        assert "1.00 GiB (plan: 2.00)" in body
        svg = page.locator("figure.chart svg").first
        svg.hover()
        assert "step" in page.locator("figure.chart .at").first.inner_text()
        assert errors == []
        if folder := os.environ.get("CAFE_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / f"{width}-{scheme}.png", full_page=True)
        browser.close()
