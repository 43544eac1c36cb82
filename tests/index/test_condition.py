"""Conditions: what the grammar takes is written as SQL of the same meaning, the rest is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cafe.errors import DataError

pytest.importorskip("lark")
from cafe.index.condition import checked

COLUMNS = ["id", "width", "text", "seen", "notes", "Year", "between"]


@pytest.mark.parametrize(
    ("where", "sql"),
    [
        ("width >= 9", "(`width` >= 9)"),
        ("5e2<width and not seen", "((5e2 < `width`) AND (NOT (`seen`)))"),
        (
            "width=1 or width=2 and seen",
            "((`width` = 1) OR ((`width` = 2) AND (`seen`)))",
        ),
        ("(width=1 or width=2) and seen", "(((`width` = 1) OR (`width` = 2)) AND (`seen`))"),
        ("text NOT IN ('it''s', 'b')", "(`text` NOT IN ('it''s', 'b'))"),
        ("width between -1 and 2 and seen", "((`width` BETWEEN -1 AND 2) AND (`seen`))"),
        ("width not between 1 and 2", "(`width` NOT BETWEEN 1 AND 2)"),
        ("text is null or seen is not true", "((`text` IS NULL) OR (`seen` IS NOT TRUE))"),
        (
            "text ilike '%A' or text not like 'b_'",
            "((`text` ILIKE '%A') OR (`text` NOT LIKE 'b_'))",
        ),
        ("notes = 'x' and year != 3", "((`notes` = 'x') AND (`Year` != 3))"),
        ("`between` = 1", "(`between` = 1)"),
    ],
)
def test_a_condition_keeps_its_meaning(where: str, sql: str) -> None:
    assert checked(where, COLUMNS) == sql


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("width=" + "+".join(["1"] * 900), "unexpected '\\+1'"),
        ("array_length(array_repeat(id,200000000))>1", "unexpected '\\('"),
        ("_rowaddr>0", "no field named _rowaddr"),
        ("hash = 'a'", "no field named hash"),
        ("width IN (SELECT 1)", "unexpected 'SELECT'"),
        ("width = 1 -- seen", "unexpected sign at character 11"),
        ("width = 1; DROP TABLE items", "unexpected sign at character 10"),
        ("(" * 50_000, "characters exceed the limit"),
        ("(" * 15_000, "ends too early"),
        ("(" * 9_000 + "seen" + ")" * 9_000, "nested more than 20 deep"),
        ("NOT " * 2_000 + "seen", "nested more than 20 deep"),
        (" OR ".join(["seen"] * 101), "more than 100 comparisons"),
    ],
)
def test_what_could_exhaust_the_engine_is_refused(where: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as error:
        checked(where, COLUMNS)
    assert len(str(error.value)) < 1000


@pytest.mark.slow
def test_the_largest_conditions_can_be_evaluated(tmp_path: Path) -> None:
    pytest.importorskip("lancedb")
    from cafe.index import Index, IndexRow, ModelFacts

    index = Index.create(tmp_path / "i", ModelFacts("fake", "w", "p", 4))
    index.add([IndexRow("a", "text", text="it's", width=3)], np.ones((1, 4), np.float32))
    numbers = ",".join(str(number) for number in range(4000))
    for where in (
        " OR ".join(["width = 3"] * 100),
        " AND ".join(["width = 3"] * 100),
        "NOT " * 20 + "width = 3",
        "(" * 20 + "width = 3" + ")" * 20,
        f"width IN ({numbers})",
        "text = 'it''s'",
    ):
        assert index.count(where) == 1, where[:40]
        assert [hit.id for hit in index.search(np.ones(4), where=where)] == ["a"]
