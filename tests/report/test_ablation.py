"""The ablation's report: verdicts from intervals, statements from numbers, small figures."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from cafe.ablation import claims
from cafe.ablation.claims import QUESTIONS, Claim, answer, verdict
from cafe.ablation.figures import FIGURES
from cafe.ablation.findings import Findings
from cafe.ablation.report import report_text, write_report
from cafe.errors import DataError
from cafe.metrics import Interval
from helpers.findings_made import SCORES, made

PUBLISHED = Path(__file__).parents[2] / "docs" / "results.md"


def claim(sign: int, above: float) -> Claim:
    return Claim("", "task/score", "joint", "base", sign, above)


@pytest.mark.parametrize(
    ("sign", "above", "low", "high", "says"),
    [
        (1, 0.0, 0.01, 0.05, "supported"),
        (1, 0.0, -0.01, 0.05, "not decided"),
        (1, 0.0, -0.05, 0.0, "not supported"),  # no better at all is not better
        (-1, 0.0, -0.05, -0.01, "supported"),  # less is better, and it is less
        (-1, 0.0, 0.01, 0.05, "not supported"),
        (1, -0.05, -0.04, -0.01, "supported"),  # worse, but by less than the margin
        (1, -0.05, -0.07, -0.01, "not decided"),
        (1, -0.05, -0.09, -0.06, "not supported"),
        (-1, -0.02, 0.0, 0.01, "supported"),  # a loss that grew by less than the margin
        (-1, 0.10, -0.30, -0.20, "supported"),  # a collapse of more than ten points
        (-1, 0.10, -0.30, -0.05, "not decided"),
        (-1, 0.10, -0.09, 0.05, "not supported"),
    ],
)
def test_a_verdict_is_where_the_whole_interval_lies(sign, above, low, high, says):
    assert verdict(claim(sign, above), Interval((low + high) / 2, low, high)) == says
    assert verdict(claim(sign, above), None) == "not measured"


def test_claims_that_agree_are_one_answer_and_others_are_counted():
    assert answer(["supported", "supported"]) == "supported"
    assert answer(["not decided"]) == "not decided"
    assert answer(["not decided", "supported", "supported", "not supported"]) == (
        "mixed: supported in 2 of 4, not supported in 1 of 4, not decided in 1 of 4"
    )


def test_every_claim_has_its_own_words_and_a_sign_that_fits_its_score():
    every = [c for question in QUESTIONS for c in question.claims]
    assert len(set(every)) == len(every)
    less_is_better = {claims.LOSS, claims.CHAIR_I, claims.CHAIR_S, claims.GAP}
    for question in QUESTIONS:
        worse = "collapse" in question.text  # the one question that asks for something worse
        for c in question.claims:
            assert c.sign == (-1 if (c.score in less_is_better) != worse else 1), c


def section(text: str, number: int) -> str:
    """The answer to one question, with its table."""
    return text.split(f"**{number}. ")[1].split("\n\n**")[0].split("\n\n## ")[0]


def test_the_answers_follow_the_numbers():
    differences = {
        (claims.CHAIR_I, "joint", "base"): Interval(-0.04, -0.06, -0.02),
        (claims.CHAIR_S, "joint", "base"): Interval(-0.04, -0.06, 0.02),
        (claims.THRONE, "joint", "base"): Interval(-0.04, -0.06, -0.01),
        (claims.POPE, "joint", "base"): Interval(0.04, 0.01, 0.06),
    }
    findings = made({"joint": 0.2, "base": 0.24}, differences)
    text = report_text(findings, "results", resamples=1000)
    fourth = section(text, 4)
    assert "Mixed: supported in 2 of 4, not supported in 1 of 4, not decided in 1 of 4." in fourth
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in fourth.splitlines()[4:]]
    assert [row[2:] for row in rows] == [
        ["-4.0 [-6.0, -2.0]", "**supported**"],
        ["-4.0 [-6.0, +2.0]", "**not decided**"],
        ["-4.0 [-6.0, -1.0]", "**not supported**"],
        ["+4.0 [+1.0, +6.0]", "**supported**"],
    ]
    assert rows[0][1] == "joint 20.0, base 24.0"
    assert "from 0.5 × base" in section(text, 6)


@pytest.mark.parametrize(
    ("base", "says"),
    [(0.93, "93.0% of “is there a …?” correctly, which leaves headroom"),
     (0.97, "97.0% of “is there a …?” correctly, which leaves little headroom")],
)  # fmt: skip
def test_it_says_whether_the_world_is_hard_enough(base, says):
    assert says in report_text(made({"base": base}), "results", resamples=1000)


def test_the_tables_hold_every_score_time_and_the_sweep_in_order():
    text = report_text(made({"joint": 0.25}), "results", resamples=1000)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    widths = {}
    for line in text.split("\n\n"):
        if line.startswith("| "):
            lines = line.splitlines()
            widths[lines[0]] = {row.count(" | ") for row in lines}
    assert all(len(width) == 1 for width in widths.values())
    assert any(row.startswith("| image → text R@1 | 50.0 [48.0, 52.0] |") for row in rows)
    assert any("**25.0 [23.0, 27.0]**" in row for row in rows)
    assert "| training, seconds per run | – | 110 (100 to 120) | 110 (100 to 120) |" in text
    swept = [row.split(" | ")[:2] for row in rows if re.match(r"\| [\d.]+ : \d", row)]
    assert swept == [["| 0 : 1", "3"], ["| 0.1 : 1", "1"], ["| 1 : 1", "3"], ["| 3 : 1", "1"],
                     ["| 1 : 0", "3"]]  # fmt: skip
    assert "`cafe ablate --report results.md` in 30 minutes" in text


def restricted(findings: Findings, kept: set[str]) -> Findings:
    """As if only these scores had been measured."""
    arms = tuple(
        replace(arm, map=None, scores={s: m for s, m in arm.scores.items() if s in kept})
        for arm in findings.arms
    )
    asked = tuple((c, i if {c.score, c.baseline} <= kept else None) for c, i in findings.claims)
    differences = {
        pair: {s: i for s, i in d.items() if s in kept} for pair, d in findings.differences.items()
    }
    return replace(findings, arms=arms, claims=asked, differences=differences)


def test_what_was_not_measured_is_said_and_left_out(tmp_path):
    findings = made()
    cut = restricted(findings, {claims.I2T, claims.T2I, claims.GAP})
    write_report(cut, tmp_path / "r.md", resamples=1000)
    text = (tmp_path / "r.md").read_text()
    assert "collapse when only the contrastive" not in text, "nothing of it was measured"
    assert "supported in 2 of 4, not measured in 2 of 4." in section(text, 1)
    assert "CHAIR_i" not in text.split("## All numbers")[1].split("## Figures")[0]
    assert len(list((tmp_path / "r").glob("*.png"))) == len(FIGURES)


def test_figures_are_small_pngs_that_the_report_links(tmp_path):
    path = tmp_path / "docs" / "results.md"
    write_report(made({"contrastive": 0.1}), path, resamples=1000)
    linked = re.findall(r"!\[[^\]]+\]\((.*?)\)", path.read_text())
    assert linked == [f"results/{name}.png" for name in FIGURES]
    for link in linked:
        file = path.parent / link
        assert file.stat().st_size < 150_000
        with PIL.Image.open(file) as image:
            assert image.format == "PNG"
            assert image.width > 800


def test_the_published_report_has_the_wording_of_the_generator():
    published = PUBLISHED.read_text(encoding="utf-8")
    tasks = re.search(r"\| tasks \| (.*) \|", published)
    assert tasks is not None
    measured = {s for s in SCORES if s.split("/")[0] in tasks[1].split(", ")}
    made_now = report_text(restricted(made(), measured), "results", resamples=1000)
    number = re.compile(r"[-+]?\d[\d.,]*")

    def prose(text: str) -> list[str]:
        """Headings, paragraphs, first cells of tables and figures, without their numbers."""
        lines = [line.split(" | ")[0] for line in text.splitlines()]
        verdicts = re.compile(r"(\*\*\d\. .*\?\*\*).*")
        return [number.sub("#", verdicts.sub(r"\1", line)) for line in lines]

    computed = re.compile(r"One base|Packages|\| (setting|steps|batch|threads|train|seeds|# : #)")
    wanted = [line for line in prose(made_now) if not computed.match(line)]
    assert len(wanted) > 60
    assert [line for line in wanted if line not in prose(published)] == []


def test_the_made_findings_have_every_score_that_is_asked_for():
    assert {c.score for question in QUESTIONS for c in question.claims} <= set(SCORES)


def test_a_report_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/r\.md: cannot be written"):
        write_report(made(), tmp_path / "file" / "r.md", resamples=1000)
