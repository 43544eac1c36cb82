"""Files and directories that appear complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import unicodedata
from pathlib import Path

import pytest

from cafe.data.tables import open_table
from cafe.errors import DataError, ImageError
from cafe.files import (
    as_on_disk,
    files_in,
    inside,
    replacing,
    whole_directory,
    write_json,
    writing,
)
from cafe.media import open_image
from cafe.types import Image
from helpers.images import LFS


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_is_whole_or_as_it_was(tmp_path: Path):
    path = tmp_path / "deep" / "a.txt"

    def write(text: str, *, fail: bool = False) -> None:
        with replacing(path) as unfinished:
            unfinished.write_text(text)
            assert not path.exists() or path.read_text() != text
            if fail:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("half", fail=True)
    assert names(tmp_path) == ["deep"]
    write("one")
    with pytest.raises(KeyboardInterrupt):
        write("half", fail=True)
    assert path.read_text() == "one"
    write("two")
    assert path.read_text() == "two"
    assert names(tmp_path) == ["deep", "deep/a.txt"]


def test_a_full_disk_names_the_file_that_would_have_become(tmp_path: Path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(DataError) as caught,
        replacing(tmp_path / "a.b.txt") as unfinished,
        writing(unfinished),
    ):
        raise full
    assert str(caught.value) == f"{tmp_path}/a.b.txt: cannot be written (No space left on device)"
    assert names(tmp_path) == []


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path):
    path = tmp_path / "a.txt"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert names(tmp_path) == ["a.txt"]


def test_where_no_file_can_be_is_one_error_before_the_work(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path, reason in ((tmp_path, "is a folder"), (tmp_path / "file/x", "cannot be written")):
        with pytest.raises(DataError, match=reason), replacing(path):
            pytest.fail("the block has begun")
    with pytest.raises(DataError, match="cannot be written"):
        write_json(tmp_path / "file/x.json", {})


def test_json_is_indented_as_asked(tmp_path: Path):
    for indent, text in ((1, '{\n "a": [\n  1\n ]\n}\n'), (None, '{"a": [1]}\n')):
        write_json(tmp_path / "a.json", {"a": [1]}, indent)
        assert (tmp_path / "a.json").read_text() == text
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1]}
    assert names(tmp_path) == ["a.json"]


def test_a_directory_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "target"

    def write(*files: str, fail: bool = False) -> None:
        with whole_directory(target) as folder:
            for name in files:
                (folder / name).write_text(name)
            assert not (target / files[-1]).exists()
            if fail:
                raise OSError("no space")

    write("a")
    with pytest.raises(OSError, match="no space"):
        write("b", fail=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "a"]
    write("c", "d")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["c", "d", "target"]


@pytest.mark.parametrize("sync", [True, False])
def test_a_directory_is_on_the_disk_before_it_is_there(
    sync: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "target"
    synced: list[tuple[int, bool]] = []
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append((os.fstat(file).st_ino, target.exists()))
    )
    with whole_directory(target, sync=sync) as folder:
        (folder / "a").write_text("a")
    before = {(path.stat().st_ino, False) for path in (target, target / "a")}
    assert set(synced) == (before | {(tmp_path.stat().st_ino, True)} if sync else set())


# ---------------------------------------------------------------------- what lies in a folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """deep/a.png, links to it and out of the folder, and a secret beside the folder."""
    root = tmp_path / "real" / "root"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / "a.png").write_text("a")
    (root.parent / "secret.png").write_text("secret")
    (root / "in.png").symlink_to(root / "deep" / "a.png")
    (root / "folder").symlink_to("deep")
    (root / "out.png").symlink_to(root.parent / "secret.png")
    (root / "up").symlink_to(root.parent)
    (tmp_path / "link").symlink_to(root)
    return root


@pytest.mark.parametrize("by_link", [False, True], ids=["root", "a link to the root"])
def test_a_name_that_leads_out_of_a_folder_is_refused_and_all_else_found(root: Path, by_link: bool):
    given = root.parent.parent / "link" if by_link else root
    walked: dict[Path, Path] = {}
    for name in (
        "deep/a.png",
        "deep/../deep/a.png",
        "in.png",
        "folder/a.png",
        "../root/deep/a.png" if not by_link else "up/root/deep/a.png",
        str(root / "deep/a.png"),
        str(given / "deep/a.png"),
    ):
        assert inside(given, name) == inside(given, name, walked) == root / "deep/a.png", name
    for name, path in {
        "out.png": "out.png",
        "up/secret.png": "up/secret.png",
        str(given / "out.png"): "out.png",
        str(root / "out.png"): "out.png",
    }.items():  # the links in a folder are those of the person who named it
        assert inside(given, name) == inside(given, name, walked) == root / path, name
    for name in (
        "up/../secret.png",
        "deep/../out.png",
        str(given / "deep/../out.png"),
        "..",
        "deep/../..",
        "../secret.png",
        "folder/../../secret.png",
        str(root.parent / "secret.png"),
        "/etc/passwd",
    ):
        assert inside(given, name) is inside(given, name, walked) is None, name
    assert inside(given, "gone/x.png") == root / "gone/x.png"
    assert inside(given, "deep/..") == inside(given, ".") == root


def test_a_folder_with_parents_in_its_name_is_left_by_no_name(root: Path):
    given = root / "deep" / ".."
    assert inside(given, "out.png") == root / "out.png"
    assert inside(given, "deep/a.png") == root / "deep/a.png"
    for name in ("../secret.png", str(root.parent / "secret.png")):
        assert inside(given, name) is None


def test_a_folder_whose_name_begins_alike_is_another(root: Path):
    (root.parent / "root2").mkdir()
    assert inside(root, "../root2/x.png") is None


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "a\0b/c.png"])
def test_what_is_no_path_is_an_error(name: str, root: Path):
    with pytest.raises(ValueError, match=r"null byte|too long"):
        inside(root, name)


def test_linked_folders_are_listed_once_and_loops_end(root: Path, tmp_path: Path):
    """`folder` leads to what is listed as deep, `up` to what holds the folder."""
    other = tmp_path / "other"
    (other / "more").mkdir(parents=True)
    (other / "more" / "b.png").write_text("b")
    (other / "back").symlink_to(root)
    (other / "loop").symlink_to(other)
    (root / "first").symlink_to(other)
    (root / "second").symlink_to(other)
    (root / "self.png").symlink_to("self.png")
    expected = ["deep/a.png", "first/more/b.png", "in.png", "out.png"]
    for given in (root, tmp_path / "link"):
        assert [path.as_posix() for path in files_in(given)] == expected


def test_files_of_macos_are_not_listed(tmp_path: Path):
    for name in ("a.png", "._a.png", "deep/.DS_Store", "__MACOSX/a.png", ".hidden/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.as_posix() for path in files_in(tmp_path)] == [".hidden/b.png", "a.png"]


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD"])
def test_a_name_is_found_however_its_unicode_is_composed(tmp_path: Path, stored: str, asked: str):
    path = tmp_path / unicodedata.normalize(stored, "Ä/é.png")
    path.parent.mkdir()
    path.touch()
    found = as_on_disk(tmp_path / unicodedata.normalize(asked, "Ä/é.png"))
    assert found.samefile(path)
    missing = tmp_path / unicodedata.normalize(asked, "Ä/è.png")
    assert as_on_disk(missing) == missing


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ".tar"])
def test_records_that_git_lfs_has_not_downloaded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_text(LFS)
    with pytest.raises(DataError, match=rf"^{path}: is a Git LFS pointer.*git lfs pull"):
        list(open_table(path).rows())


@pytest.mark.parametrize("as_bytes", [False, True])
def test_an_image_that_git_lfs_has_not_downloaded(tmp_path: Path, as_bytes: bool) -> None:
    path = tmp_path / "a.jpg"
    path.write_text(LFS)
    with pytest.raises(ImageError, match=r"is a Git LFS pointer.*git lfs pull"):
        open_image(Image(path.read_bytes() if as_bytes else path))
