"""The page in a real browser, over a real socket, with a small random model and a small index."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from typer.testing import CliRunner

from cafe.cli import app
from cafe.data.scenes.write import write_scenes
from cafe.index import Index
from cafe.retrieval.indexing import build_index
from cafe.serving.limits import Limits
from cafe.serving.model_calls import CafeCalls
from cafe.serving.routes.search import IndexSearch
from cafe.serving.run import Server, ServerSettings
from cafe.types import Image
from helpers.documents import write_pdf
from helpers.fakes import Fake, request, started, wait_until

api = pytest.importorskip("playwright.sync_api", reason="pip install 'cafe-vlm[dev]'")
pytest.importorskip("gradio", reason="pip install 'cafe-vlm[ui]'")

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COUNT = 8
QUESTION = "What is at the top left?"
WORDS = "a big red cat"
NEW_TOKENS = 8
LIMITS = Limits(default_new_tokens=NEW_TOKENS)
WAIT_MS = 60_000
EVENTS = "**/queue/join*"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    root = hasattr(os, "geteuid") and os.geteuid() == 0  # Chromium has no sandbox for root
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=found, args=["--no-sandbox"] if root else []
            )
        except api.Error as error:
            reason = str(error).strip().splitlines()[0]
            pytest.skip(
                "no browser: install Chromium (apt-get install chromium; without root "
                f"`.venv/bin/playwright install chromium`): {reason}"
            )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, COUNT, seed=5)
    return folder / "images"


@pytest.fixture(scope="module")
def index(scenes: Path, small_dir: Path) -> Index:
    uri = scenes.parent / "index"
    done = CliRunner().invoke(app, ["index", str(small_dir), str(scenes), "--to", str(uri)])
    assert done.exit_code == 0, done.output
    return Index.open(uri)


@pytest.fixture(scope="module")
def server(small_model: Any, index: Index) -> Iterator[Server]:
    search = IndexSearch(index)
    settings = ServerSettings(name="small", port=0, page=True, limits=LIMITS)
    server = Server(lambda: CafeCalls(small_model), settings, search, search.root)
    server.start()
    wait_until(lambda: server.engine.loaded)
    yield server
    server.stop()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    with opened(browser, server) as page:
        yield page


class opened:
    """The page in a fresh browser. At its end: it asked for nothing but its own server."""

    def __init__(self, browser: Any, server: Server, width: int = 1280) -> None:
        self._context = browser.new_context(viewport={"width": width, "height": 900})
        self._page = self._context.new_page()
        self._page.set_default_timeout(WAIT_MS)
        self._url = server.url
        self._asked: list[str] = []
        self._page.on("request", lambda request: self._asked.append(request.url))

    def __enter__(self) -> Any:
        self._page.goto(self._url)
        self._page.wait_for_selector("#title, #key")
        if self._page.locator("#title").count():  # the page listens once it has moved the focus
            self._page.wait_for_function("document.activeElement.tagName === 'INPUT'")
        return self._page

    def __exit__(self, *error: Any) -> None:
        self._context.close()
        own = (self._url, "data:", "blob:")
        assert self._asked
        assert [url for url in self._asked if not url.startswith(own)] == []


def search(page: Any, words: str = WORDS) -> list[tuple[float, str]]:
    """Search by words; returns the gallery's scores and names."""
    page.fill("#words input", words)
    page.click("#search")
    return found(page)


def found(page: Any) -> list[tuple[float, str]]:
    try:
        page.get_by_text(f"The {COUNT} most similar results, best first").wait_for()
    except api.TimeoutError as error:
        status = page.locator("#search-status").inner_text()
        text = page.locator("#words input").input_value()
        raise AssertionError(f"the page says {status!r}, with {text!r} in its field") from error
    page.wait_for_function(
        f"document.querySelectorAll('#gallery button.thumbnail-item').length == {COUNT}"
    )
    captions = page.locator("#gallery .caption-label").all_inner_texts()
    parts = [re.fullmatch(r"(-?\d\.\d{3})\s+(\S+)", caption.strip()) for caption in captions]
    assert all(parts), captions
    return [(float(part[1]), part[2]) for part in parts if part]


def asked(page: Any) -> str:
    """The source of the image that questions are about."""
    image = page.locator("#asked-image img")
    image.wait_for()
    return image.get_attribute("src")


def whole_answer(page: Any) -> str:
    answer = page.locator("#answer .answer[aria-busy=false]")
    answer.wait_for()
    return answer.inner_text()


# ---------------------------------------------------------------------- search


def test_words_find_what_the_index_finds(page: Any, small_model: Any, index: Index):
    hits = index.search(small_model.encode(WORDS), COUNT)
    want = [(round(hit.score, 3), hit.id) for hit in hits]
    seen = search(page)
    assert [name for _, name in seen] == [name for _, name in want]
    assert [score for score, _ in seen] == pytest.approx([s for s, _ in want], abs=2e-3)
    page.wait_for_function(
        "[...document.querySelectorAll('#gallery img')].every(i => i.naturalWidth > 0)"
    )


def test_a_box_adds_the_order_by_words_where_there_are_captions(
    browser: Any, page: Any, scenes: Path, small_dir: Path, small_model: Any, tmp_path: Path
):
    """An image whose caption is typed comes first, whatever the embeddings say."""
    assert not page.locator("#hybrid").is_visible(), "this index has no texts"
    uri = tmp_path / "index"
    build_index(small_dir, scenes.parent / "captions.json", uri)
    with_texts = Index.open(uri)
    first = min(with_texts.search(small_model.encode(WORDS), COUNT), key=lambda hit: hit.id)
    words = str(first.metadata["text"])
    want = with_texts.search(small_model.encode(words), COUNT, words=words)
    search_of = IndexSearch(with_texts)
    settings = ServerSettings(name="small", port=0, page=True, limits=LIMITS)
    server = Server(lambda: CafeCalls(small_model), settings, search_of, search_of.root)
    server.start()
    try:
        wait_until(lambda: server.engine.loaded)
        with opened(browser, server) as page:
            page.locator("#hybrid input").check()
            page.fill("#words input", words)
            page.click("#search")
            names = [Path(name).name for _, name in found(page)]
    finally:
        server.stop()
    assert names == [Path(hit.id).name for hit in want]
    assert names[0] == Path(first.id).name


@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_of_a_document_is_shown_and_opened(
    browser: Any, small_dir: Path, small_model: Any, tmp_path: Path, width: int
):
    """The link leads to the PDF at the page; no other file of the folder is sent."""
    pytest.importorskip("pypdfium2", reason="pip install 'cafe-vlm[documents]'")
    folder, uri = tmp_path / "files", tmp_path / "index"
    pdf = write_pdf(folder / "deep" / "a report.pdf", ["Maps of the valley", "The clock tower"])
    write_pdf(folder / ".hidden.pdf", ["Not in the index"])
    build_index(small_dir, folder, uri, page_pixels=200_000)
    search_of = IndexSearch(Index.open(uri))
    settings = ServerSettings(name="small", port=0, page=True, limits=LIMITS)
    server = Server(lambda: CafeCalls(small_model), settings, search_of, search_of.root)
    server.start()
    try:
        wait_until(lambda: server.engine.loaded)
        with opened(browser, server, width) as page:
            page.locator("#hybrid input").check()
            page.fill("#words input", "clock tower")
            page.click("#search")
            first = page.locator("#gallery .caption-label").first
            first.wait_for()
            assert first.inner_text().split("\n")[1:] == ["a report.pdf", "page 2"]
            page.locator("#gallery button.thumbnail-item").first.click()
            asked(page)
            link = page.get_by_role("link", name="Open deep/a report.pdf, page 2")
            link.wait_for()
            assert link.get_attribute("href") == "document/deep/a%20report.pdf#page=2"
            assert overflow(page) == 0
            page.screenshot(path=tmp_path / "page.png", full_page=True)
            reply = page.context.request.get(f"{server.url}/ui/document/deep/a%20report.pdf")
            assert reply.body() == pdf.read_bytes()
            assert reply.headers["content-type"] == "application/pdf"
            for other in (".hidden.pdf", "deep/../.hidden.pdf", "x' OR 'a'='a", "%2e%2e/index"):
                status, body, _ = request(server, f"/ui/document/{other.replace(' ', '%20')}")
                assert status == 404, (other, body)
    finally:
        server.stop()


def test_an_image_finds_itself(page: Any, scenes: Path):
    chosen = sorted(scenes.iterdir())[3]
    page.get_by_role("button", name="Search by an image").click()
    page.set_input_files("#search-image input[type=file]", chosen)
    page.locator("#search-image img").wait_for()
    page.click("#search")
    score, name = found(page)[0]
    assert name == chosen.name
    assert score == pytest.approx(1.0, abs=2e-3)
    by_image = found(page)
    first = page.locator("#gallery .caption-label").first.inner_text()
    page.fill("#words input", WORDS)
    page.click("#search")
    page.wait_for_function(
        "old => (document.querySelector('#gallery .caption-label')?.innerText ?? old) != old",
        arg=first,
    )
    assert found(page) != by_image, "by both is another query"


@contextmanager
def held(page: Any) -> Iterator[list[Any]]:
    """The server sees no event until the end of the block, in which one is sent.

    Yields the events that the browser has sent.
    """
    events: list[Any] = []
    released = False
    page.route(EVENTS, lambda event: event.continue_() if released else events.append(event))
    with page.expect_request(EVENTS):
        yield events
    while not events:
        page.wait_for_timeout(10)
    released = True
    for event in events:
        event.continue_()


def test_a_search_begun_during_another_one_follows_it(page: Any):
    def follows(event: Any) -> bool:
        return "/queue/join" in event.url and "small blue boat" in (event.post_data or "")

    with page.expect_request(follows), held(page):
        for words in (WORDS, "a small blue boat"):
            page.fill("#words input", words)
            page.click("#search")
    found(page)


def test_search_is_disabled_until_an_uploaded_image_has_been_checked(page: Any, scenes: Path):
    page.get_by_role("button", name="Search by an image").click()
    with held(page):
        page.set_input_files("#search-image input[type=file]", sorted(scenes.iterdir())[0])
        page.get_by_text("Press Search to find").wait_for()
        page.locator("#search[disabled]").wait_for()
    page.locator("#search:not([disabled])").wait_for()


def test_enter_waits_for_the_image_check_as_the_search_button_does(page: Any, scenes: Path):
    page.get_by_role("button", name="Search by an image").click()
    with held(page) as events:
        page.set_input_files("#search-image input[type=file]", sorted(scenes.iterdir())[0])
        page.locator("#search[disabled]").wait_for()
        while not events:
            page.wait_for_timeout(10)
        page.fill("#words input", WORDS)
        page.press("#words input", "Enter")
        page.evaluate("new Promise(done => setTimeout(done, 300))")  # an event is sent in less
        assert len(events) == 1, "only the image check has been sent"
    found(page)


def test_enter_during_the_check_of_a_broken_image_searches_for_nothing(page: Any, tmp_path: Path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    page.get_by_role("button", name="Search by an image").click()
    with held(page):
        page.set_input_files("#search-image input[type=file]", broken)
        page.locator("#search[disabled]").wait_for()
        page.fill("#words input", WORDS)
        page.press("#words input", "Enter")
    page.locator("#search:not([disabled])").wait_for()
    page.evaluate("new Promise(done => setTimeout(done, 300))")  # a search starts in less
    assert page.get_by_role("alert").first.inner_text().startswith("Not a readable image")


def test_an_empty_search_says_what_to_do(page: Any):
    page.click("#search")
    alert = page.get_by_role("alert").first
    alert.wait_for()
    assert "Type what to search for" in alert.inner_text()


# ---------------------------------------------------------------------- ask


def test_a_hit_that_is_clicked_is_asked_about(page: Any, small_model: Any):
    search(page)
    page.locator("#gallery button.thumbnail-item").nth(1).click()
    source = asked(page)
    page.fill("#question input", QUESTION)
    page.click("#ask-button")
    said = whole_answer(page)
    image = Image(page.context.request.get(source).body())
    want = small_model.generate({"image": image, "text": QUESTION}, max_new_tokens=NEW_TOKENS)
    assert said == (want or "The answer is empty.")


def test_another_image_takes_the_answer_away_and_another_search_the_choice(page: Any):
    search(page)
    page.locator("#gallery button.thumbnail-item").nth(1).click()
    before = asked(page)
    page.fill("#question input", QUESTION)
    page.click("#ask-button")
    whole_answer(page)
    page.locator("#gallery button.thumbnail-item").nth(2).click()
    page.get_by_text("The answer appears here").wait_for()
    assert asked(page) != before
    assert page.locator("#gallery .selected").count() == 1
    page.fill("#words input", "a small blue boat")
    page.click("#search")
    page.locator("#gallery .selected").wait_for(state="detached")
    found(page)
    assert page.locator("#gallery .selected").count() == 0


def test_a_question_without_an_image_says_what_to_do(page: Any):
    page.fill("#question input", QUESTION)
    page.click("#ask-button")
    alert = page.locator("#answer [role=alert]")
    alert.wait_for()
    assert "Choose an image" in alert.inner_text()


def test_a_file_that_is_not_an_image_is_refused_on_upload(page: Any, tmp_path: Path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    page.set_input_files("#asked-image input[type=file]", broken)
    alert = page.locator("#answer [role=alert]")
    alert.wait_for()
    assert alert.inner_text().startswith("Not a readable image (supported: PNG")
    page.locator("#asked-image img").wait_for(state="detached")


def test_a_keyboard_is_enough(page: Any):
    page.wait_for_function("document.activeElement.closest('#words') !== null")  # it begins there
    page.keyboard.type(WORDS)
    page.keyboard.press("Enter")
    found(page)
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#gallery') !== null"):
            break
    else:
        raise AssertionError("no way into the gallery")
    page.keyboard.press("Enter")
    asked(page)
    page.wait_for_function("document.activeElement.closest('#question') !== null")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    assert whole_answer(page)


# ---------------------------------------------------------------------- narrow and wide


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(browser: Any, server: Server, tmp_path: Path, width: int):
    with opened(browser, server, width) as page:
        assert overflow(page) == 0, "before"
        search(page)
        page.locator("#gallery button.thumbnail-item").first.click()
        asked(page)
        page.fill("#question input", QUESTION)
        page.click("#ask-button")
        whole_answer(page)
        assert overflow(page) == 0, "after"
        target = tmp_path / f"page-{width}.png"
        page.screenshot(path=target, full_page=True)
        with PIL.Image.open(target) as image:
            assert image.width == width


def overflow(page: Any) -> int:
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


# ---------------------------------------------------------------------- no index; a key


def test_without_an_index_an_uploaded_image_is_asked_about_and_the_answer_streams(
    browser: Any, scenes: Path
):
    """The fake writes the question again, a word with every step."""
    model = Fake()
    model.step_seconds = 0.05
    model.stop_at = 3
    server = started(model, page=True)
    question = "one two three four five six seven"
    try:
        with opened(browser, server) as page:
            assert page.locator("#words").count() == 0
            assert not page.locator("#stop").is_visible(), "there is nothing to stop"
            page.set_input_files("#asked-image input[type=file]", sorted(scenes.iterdir())[0])
            asked(page)
            page.fill("#question input", question)
            page.click("#ask-button")
            page.locator("#answer .answer").wait_for()
            page.get_by_text("one two three", exact=True).wait_for()
            model.go_on.set()
            page.get_by_text(question, exact=True).wait_for()
            page.fill("#question input", question * 200)
            page.click("#ask-button")
            wait_until(lambda: server.engine.generating)
            page.click("#stop")
            page.locator("#stop").wait_for(state="hidden")
            wait_until(lambda: len(model.dropped) == 1 and not server.engine.generating)
            page.click("#ask-button")
            wait_until(lambda: server.engine.generating)
            # gradio notices a visitor who leaves by the stream of events, which is open by now.
            page.locator("#answer [aria-busy=true]").wait_for()
        wait_until(lambda: len(model.dropped) == 2)  # the visitor has left
    finally:
        server.stop()


def test_an_internal_error_is_reported_without_its_details(browser: Any, scenes: Path):
    server = started(Fake(), page=True)
    try:
        with opened(browser, server) as page:
            page.set_input_files("#asked-image input[type=file]", sorted(scenes.iterdir())[0])
            asked(page)
            page.fill("#question input", "bug")
            page.keyboard.press("Enter")
            alert = page.locator("#answer [role=alert]")
            alert.wait_for()
            assert "Something went wrong on the server" in alert.inner_text()
            assert "secret" not in page.content()
    finally:
        server.stop()


def test_the_key_is_asked_for_once(browser: Any):
    server = started(Fake(), page=True, api_key="a-secret")
    try:
        with opened(browser, server) as page:
            page.fill("#key", "wrong")
            page.keyboard.press("Enter")
            page.get_by_role("alert").wait_for()
            page.fill("#key", "a-secret")
            page.keyboard.press("Enter")
            page.wait_for_selector("#title")
            assert page.url == f"{server.url}/ui/"
            assert page.context.request.get(f"{server.url}/v1/models").status == 401
        assert request(server, "/ui/config")[0] == 401
        assert request(server, "/ui/")[0] == 303
        big = b"key=" + b"x" * 10_000
        assert request(server, "/ui/login", big)[0] == 413
    finally:
        server.stop()


# ---------------------------------------------------------------------- what is not served


@pytest.mark.parametrize(
    "path",
    [
        "/ui/gradio_api/file=/etc/passwd",
        "/ui/gradio_api/file=../../etc/passwd",
        "/ui/gradio_api/file=http://127.0.0.1:1/",
        "/ui/gradio_api/proxy=http://127.0.0.1:1/",
        "/ui/static/../../../../../../etc/passwd",
        "/ui/gradio_api/info",
    ],
)
def test_no_file_and_no_address_is_read(server: Server, path: str):
    status, reply, _ = request(server, path)
    assert status in (403, 404), reply
    assert "root:" not in str(reply)


def test_not_even_the_files_of_the_index_are(server: Server, scenes: Path):
    assert request(server, f"/ui/gradio_api/file={sorted(scenes.iterdir())[0]}")[0] == 404


@pytest.mark.parametrize("path", ["/etc/passwd", "http://127.0.0.1:1/a.png"])
def test_an_event_names_no_file_and_no_address(server: Server, path: str):
    image = {"path": path, "meta": {"_type": "gradio.FileData"}}
    event = {"data": ["", image], "fn_index": 0, "session_hash": "x"}
    status, reply, _ = request(server, "/ui/gradio_api/queue/join", event)
    assert (status, reply["error"]["type"]) == (403, "permission_error")


def test_another_sites_page_and_another_name_are_refused(server: Server):
    event = {"data": [], "fn_index": 0, "session_hash": "x"}
    for headers in ({"Origin": "http://evil.example.com"}, {"Host": "evil.example.com"}):
        assert request(server, "/ui/gradio_api/queue/join", event, headers=headers)[0] == 403


def test_the_page_may_not_be_framed_and_loads_nothing_from_elsewhere(server: Server):
    status, _, headers = request(server, "/ui/")
    assert status == 200
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "default-src 'self'" in headers["content-security-policy"]
