"""The web page's door and its pictures: what a browser may reach, without a browser."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fakes import Fake, started

from cafe.errors import CafeError
from cafe.serve.door import COOKIE, LOGIN, Door
from cafe.serve.page.mount import _files, keep_below
from cafe.serve.page.pictures import SMALL_PIXELS, Pictures
from cafe.serve.refusal import Refused
from cafe.types import Hit

HOST = {b"host": b"127.0.0.1:8000"}


def status(door: Door, method: str, path: str, headers: dict[bytes, bytes] | None = None) -> int:
    try:
        door.check(method, path, HOST | (headers or {}))
    except Refused as refused:
        return refused.status
    return 200


# ---------------------------------------------------------------------- the door


@pytest.mark.parametrize(
    "path",
    ["/ui", "/ui/", "/ui/config", "/ui/assets/index.js", "/ui/gradio_api/app_id", "/"],
)
def test_what_the_page_needs_is_let_through(path: str):
    assert Door().leads_to(path)
    assert status(Door(), "GET", path) == 200


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
def test_the_rest_of_gradio_is_not_there(method: str, path: str):
    assert status(Door(), method, path) == 404


def test_the_api_is_behind_another_door():
    for path in ("/v1/models", "/search", "/uix", "/health"):
        assert not Door().leads_to(path), path


def test_a_form_of_another_site_is_refused():
    join = "/ui/gradio_api/queue/join"
    assert status(Door(), "POST", join) == 200
    assert status(Door(), "POST", join, {b"origin": b"http://127.0.0.1:8000"}) == 200
    for origin in (b"http://evil.example.com", b"http://127.0.0.1:9000", b"null"):
        assert status(Door(), "POST", join, {b"origin": origin}) == 403, origin


def test_with_a_key_only_its_cookie_opens():
    door = Door("a-secret")
    assert status(door, "GET", LOGIN) == status(door, "POST", LOGIN) == 200
    assert status(door, "GET", "/ui/") == 303
    for path in ("/ui/config", "/ui/gradio_api/file=/x", "/ui/assets/index.js"):
        assert status(door, "GET", path) == 401, path
    assert door.cookie("wrong") is None
    assert door.cookie("naïve") is None
    given = door.cookie("a-secret")
    assert given is not None
    assert "HttpOnly" in given
    assert "SameSite=Strict" in given
    own = given.partition(";")[0].encode()
    assert status(door, "GET", "/ui/config", {b"cookie": b"other=1; " + own}) == 200
    assert status(Door("a-secret"), "GET", "/ui/config", {b"cookie": own}) == 401, "another process"
    assert status(door, "GET", "/ui/config", {b"cookie": f"{COOKIE}=".encode()}) == 401
    assert "a-secret" not in own.decode()


def test_without_a_key_there_is_no_cookie():
    assert Door().cookie("") is None


def test_without_gradio_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(CafeError, match=r"needs gradio: pip install 'cafe-vlm\[ui\]'"):
        started(Fake(), page=True)


# ---------------------------------------------------------------------- pictures


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "inside").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8)
    exif = PIL.Image.Exif()
    exif[0x010E] = "where I live"
    PIL.Image.fromarray(noise).save(root / "inside" / "a.jpg", exif=exif)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (root / "broken.png").write_bytes(b"no picture")
    return root


def hit(path: object) -> Hit:
    return Hit("id", 0.5, {} if path is None else {"path": path})


def test_a_small_copy_is_sent_and_nothing_of_the_file(root: Path, tmp_path: Path):
    pictures = Pictures(root, tmp_path)
    copy = pictures.small(hit("inside/a.jpg"))
    assert copy is not None
    assert Path(copy).parent == tmp_path
    with PIL.Image.open(copy) as small:
        assert small.width * small.height <= SMALL_PIXELS
        assert len(small.getexif()) == 0
    assert b"where I live" in (root / "inside" / "a.jpg").read_bytes()
    assert b"where I live" not in Path(copy).read_bytes()
    assert pictures.small(hit("inside/a.jpg")) == copy
    with PIL.Image.open(pictures.large(copy)) as large:
        assert large.size == (1200, 900)


def test_a_changed_picture_has_a_new_copy(root: Path, tmp_path: Path):
    pictures = Pictures(root, tmp_path)
    before = pictures.small(hit("inside/a.jpg"))
    os.utime(root / "inside" / "a.jpg", ns=(1, 1))
    assert pictures.small(hit("inside/a.jpg")) != before


def test_nothing_outside_the_root_is_read(root: Path, tmp_path: Path):
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    pictures = Pictures(root, tmp_path)
    outside = ["../secret.png", "inside/../../secret.png", str(tmp_path / "secret.png")]
    for path in [*outside, "link.png", "up/secret.png", "broken.png", "gone.png", "inside", 7]:
        assert pictures.small(hit(path)) is None, path
    assert pictures.small(hit(None)) is None
    assert Pictures(None, tmp_path).small(hit("inside/a.jpg")) is None
    assert Pictures(tmp_path, tmp_path).small(hit("secret.png")) is not None


def test_what_is_no_copy_stays_what_it_is(root: Path, tmp_path: Path):
    """An uploaded file in the gallery's place."""
    other = str(root / "inside" / "a.jpg")
    assert Pictures(root, tmp_path).large(other) == other


def test_the_oldest_files_go_first(tmp_path: Path):
    for i in range(5):
        (tmp_path / f"{i}").write_bytes(b"x" * 100)
        os.utime(tmp_path / f"{i}", (i, i))
    keep_below(tmp_path, 250)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]
    keep_below(tmp_path, 250)
    assert len(list(tmp_path.iterdir())) == 2


def test_every_path_in_an_event_is_seen():
    event = {"data": [{"path": "a"}, [{"image": {"path": "b", "url": "c"}}], {"path": None}, 1]}
    assert list(_files(event)) == ["a", "b"]
