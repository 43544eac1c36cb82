"""The web page's access control and its thumbnails, without a browser."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import PIL.Image
import pytest

from cafe.errors import CafeError
from cafe.serving.errors import ApiError
from cafe.serving.page.mount import delete_oldest, paths_in
from cafe.serving.page.thumbnails import SMALL_PIXELS, Thumbnails
from cafe.serving.page_auth import COOKIE, LOGIN, PageAuth
from cafe.serving.streams import next_event
from cafe.types import Hit
from helpers.fakes import Fake, started
from helpers.images import noise

HOST = {b"host": b"127.0.0.1:8000"}


def status(
    auth: PageAuth, method: str, path: str, headers: dict[bytes, bytes] | None = None
) -> int:
    try:
        auth.check(method, path, HOST | (headers or {}))
    except ApiError as error:
        return error.status
    return 200


# ---------------------------------------------------------------------- access control


@pytest.mark.parametrize(
    "path",
    ["/ui", "/ui/", "/ui/config", "/ui/assets/index.js", "/ui/gradio_api/app_id", "/"],
)
def test_what_the_page_needs_is_let_through(path: str):
    assert PageAuth().covers(path)
    assert status(PageAuth(), "GET", path) == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/ui/gradio_api/proxy=http://10.0.0.1/"),
        ("GET", "/ui/proxy=http://10.0.0.1/"),
        ("GET", "/ui/gradio_api/file/etc/passwd"),
        ("GET", "/ui/gradio_api/info"),
        ("GET", "/ui/monitoring"),
        ("GET", "/ui/gradio_api/vibe-code"),
        ("POST", "/ui/gradio_api/vibe-edit"),
        ("POST", "/ui/gradio_api/run/search"),
        ("POST", "/ui/gradio_api/call/search"),
        ("POST", "/ui/gradio_api/component_server"),
        ("POST", "/ui/config"),
        ("PUT", "/ui/gradio_api/upload"),
        ("DELETE", "/ui/"),
    ],
)
def test_other_routes_of_gradio_are_not_found(method: str, path: str):
    assert status(PageAuth(), method, path) == 404


def test_the_page_auth_covers_no_route_of_the_api():
    for path in ("/v1/models", "/search", "/uix", "/health"):
        assert not PageAuth().covers(path), path


def test_a_form_of_another_site_is_refused():
    join = "/ui/gradio_api/queue/join"
    assert status(PageAuth(), "POST", join) == 200
    assert status(PageAuth(), "POST", join, {b"origin": b"http://127.0.0.1:8000"}) == 200
    for origin in (b"http://evil.example.com", b"http://127.0.0.1:9000", b"null"):
        assert status(PageAuth(), "POST", join, {b"origin": origin}) == 403, origin


def test_with_a_key_only_its_cookie_opens():
    auth = PageAuth("a-secret")
    assert status(auth, "GET", LOGIN) == status(auth, "POST", LOGIN) == 200
    assert status(auth, "GET", "/ui/") == 303
    for path in ("/ui/config", "/ui/gradio_api/file=/x", "/ui/assets/index.js"):
        assert status(auth, "GET", path) == 401, path
    assert auth.cookie("wrong") is None
    assert auth.cookie("naïve") is None
    cookie = auth.cookie("a-secret")
    assert cookie is not None
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    own = cookie.partition(";")[0].encode()
    assert status(auth, "GET", "/ui/config", {b"cookie": b"other=1; " + own}) == 200
    assert status(PageAuth("a-secret"), "GET", "/ui/config", {b"cookie": own}) == 401, (
        "another process"
    )
    assert status(auth, "GET", "/ui/config", {b"cookie": f"{COOKIE}=".encode()}) == 401
    assert "a-secret" not in own.decode()


def test_without_a_key_there_is_no_cookie():
    assert PageAuth().cookie("") is None


def test_without_gradio_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(CafeError, match=r"needs gradio: pip install 'cafe-vlm\[ui\]'"):
        started(Fake(), page=True)


# ---------------------------------------------------------------------- images


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "inside").mkdir(parents=True)
    exif = PIL.Image.Exif()
    exif[0x010E] = "where I live"
    noise(0, 1200, 900).save(root / "inside" / "a.jpg", exif=exif)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (root / "broken.png").write_bytes(b"no image")
    return root


def hit(path: object) -> Hit:
    return Hit("id", 0.5, {} if path is None else {"path": path})


def test_a_small_copy_is_sent_and_nothing_of_the_file(root: Path, tmp_path: Path):
    images = Thumbnails(root, tmp_path)
    copy = images.small(hit("inside/a.jpg"))
    assert copy is not None
    assert Path(copy).parent == tmp_path
    with PIL.Image.open(copy) as small:
        assert small.width * small.height <= SMALL_PIXELS
        assert len(small.getexif()) == 0
    assert b"where I live" in (root / "inside" / "a.jpg").read_bytes()
    assert b"where I live" not in Path(copy).read_bytes()
    assert images.small(hit("inside/a.jpg")) == copy
    with PIL.Image.open(images.large(copy)) as large:
        assert large.size == (1200, 900)


def test_a_changed_image_has_a_new_copy(root: Path, tmp_path: Path):
    images = Thumbnails(root, tmp_path)
    before = images.small(hit("inside/a.jpg"))
    os.utime(root / "inside" / "a.jpg", ns=(1, 1))
    assert images.small(hit("inside/a.jpg")) != before


def test_nothing_outside_the_root_is_read(root: Path, tmp_path: Path):
    """No name leaves it; the links in it are those of the person who named it."""
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    images = Thumbnails(root, tmp_path)
    outside = ["../secret.png", "inside/../../secret.png", str(tmp_path / "secret.png")]
    assert images.small(hit("link.png")) is not None
    for path in [
        *outside,
        "up/../secret.png",
        "inside/../link.png",
        "broken.png",
        "gone.png",
        "inside",
        "a\0b",
        7,
    ]:
        assert images.small(hit(path)) is None, path
    assert images.small(hit(None)) is None
    assert Thumbnails(None, tmp_path).small(hit("inside/a.jpg")) is None
    assert Thumbnails(tmp_path, tmp_path).small(hit("secret.png")) is not None


def test_what_is_no_copy_stays_what_it_is(root: Path, tmp_path: Path):
    """An uploaded file in the gallery's place."""
    other = str(root / "inside" / "a.jpg")
    assert Thumbnails(root, tmp_path).large(other) == other


def test_the_oldest_files_go_first(tmp_path: Path):
    for i in range(5):
        (tmp_path / f"{i}").write_bytes(b"x" * 100)
        os.utime(tmp_path / f"{i}", (i, i))
    delete_oldest(tmp_path, 250)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]
    delete_oldest(tmp_path, 250)
    assert len(list(tmp_path.iterdir())) == 2


def test_every_path_in_an_event_is_seen():
    event = {"data": [{"path": "a"}, [{"image": {"path": "b", "url": "c"}}], {"path": None}, 1]}
    assert list(paths_in(event)) == ["a", "b"]


@pytest.mark.parametrize("turns_of_the_loop", range(8))
def test_a_cancellation_that_comes_together_with_a_piece_is_not_lost(turns_of_the_loop: int):
    """`asyncio.wait_for` of Python 3.11 loses it in the first turns of the loop after the piece."""

    async def cancelled_after(turns: int) -> bool:
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        task = asyncio.create_task(next_event(time.monotonic() + 60, pieces))
        for _ in range(3):
            await asyncio.sleep(0)  # now it waits
        pieces.put_nowait("one")
        for _ in range(turns):
            await asyncio.sleep(0)
        was_running = task.cancel()
        await asyncio.wait([task])
        return task.cancelled() == was_running

    assert asyncio.run(cancelled_after(turns_of_the_loop))
