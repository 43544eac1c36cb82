"""The Python of the pages runs, and prints what the pages show."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.pages import blocks, printed

ROOT = Path(__file__).parent.parent


def check(page: Path, folder: Path, *, only_shown: bool = False) -> None:
    """Run a page's blocks; one without a text block after it prints nothing.

    only_shown   the other blocks of the page are not run: they need what a reader has
    """
    chosen = [block for block in blocks(page) if block.shown is not None or not only_shown]
    found = printed(chosen, folder) if chosen else []
    for block, output in zip(chosen, found, strict=True):
        assert output == (block.shown or ""), block.name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["python.md", "extending.md"])
def test_the_python_of_a_page_prints_what_the_page_shows(name: str, tmp_path: Path) -> None:
    page = ROOT / "docs" / name
    assert len(blocks(page)) > 3
    check(page, tmp_path)


@pytest.mark.slow
def test_the_session_in_the_readme_prints_what_it_shows(tmp_path: Path) -> None:
    check(ROOT / "README.md", tmp_path, only_shown=True)


PAGE = """\
```python
word = "red"
```

```python
print(word)
```

```text
{shown}
```
"""


def test_what_a_page_shows_wrongly_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.format(shown="red"))
    check(page, tmp_path)
    page.write_text(PAGE.format(shown="blue"))
    with pytest.raises(AssertionError, match=r"page\.md, line 6"):
        check(page, tmp_path)
    page.write_text(PAGE.format(shown="red").replace("print(word)", "print(wrod)"))
    with pytest.raises(AssertionError, match=r'"page\.md, line 6", line 1(.|\n)*NameError'):
        check(page, tmp_path)
