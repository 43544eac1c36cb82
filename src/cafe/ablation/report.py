"""The report of an ablation: Markdown with figures, every statement computed from the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from cafe.ablation import claims
from cafe.ablation.arms import BASE, CONTRASTIVE, JOINT, LANGUAGE
from cafe.ablation.claims import Claim, Verdict, answer, questions, verdict
from cafe.ablation.figures import FIGURES
from cafe.ablation.findings import ArmScores, Findings, Measured
from cafe.errors import DataError
from cafe.metrics import Interval

LABELS = {
    BASE: "base",
    LANGUAGE: "language only",
    CONTRASTIVE: "contrastive only",
    JOINT: "joint",
}

# Score -> its name in the tables; in percent unless listed in `_PLAIN`.
ROWS: dict[str, dict[str, str]] = {
    "Retrieval": {
        claims.I2T: "image → text R@1",
        "scenes-retrieval/image_to_text_recall@5": "image → text R@5",
        claims.T2I: "text → image R@1",
        "scenes-retrieval/text_to_image_recall@5": "text → image R@5",
        "scenes-retrieval/hard_word_accuracy": "hard: one word differs (chance 25)",
        "scenes-retrieval/hard_order_accuracy": "hard: two objects swapped (chance 50)",
        claims.HARD: "hard: all of these",
    },
    "scenes-mmeb, hit@1": {
        "scenes-mmeb/classification": "classification",
        "scenes-mmeb/vqa": "VQA",
        "scenes-mmeb/retrieval": "retrieval",
        "scenes-mmeb/grounding": "grounding",
        "scenes-mmeb/ind": "in distribution",
        "scenes-mmeb/ood": "out of distribution",
        claims.MMEB: "all",
    },
    "Match question": {
        "scenes-match/match_accuracy": "statements judged rightly (chance 50)",
        "scenes-match/match_ece": "expected calibration error ↓",
        "scenes-match/match_word_accuracy": "one word differs (chance 25)",
        "scenes-match/match_order_accuracy": "two objects swapped (chance 50)",
        "scenes-match/image_to_text_reranked@1": "image → text R@1, reranked",
        "scenes-match/text_to_image_reranked@1": "text → image R@1, reranked",
        "scenes-match/image_to_text_gain@1": "gain of reranking, image → text",
        "scenes-match/text_to_image_gain@1": "gain of reranking, text → image",
    },
    "Likelihood of the caption": {
        "scenes-likelihood/likelihood_accuracy": "own caption above a near miss (chance 50)",
        claims.LIKELIER_WORD: "one word differs (chance 25)",
        claims.LIKELIER_ORDER: "two objects swapped (chance 50)",
        "scenes-likelihood/image_to_text_reranked@1": "image → text R@1, reranked",
        "scenes-likelihood/text_to_image_reranked@1": "text → image R@1, reranked",
        "scenes-likelihood/image_to_text_gain@1": "gain of reranking, image → text",
        "scenes-likelihood/text_to_image_gain@1": "gain of reranking, text → image",
    },
    "Embedded with own captions": {
        "scenes-captions/image_to_text_recall@1": "image → text R@1",
        "scenes-captions/text_to_image_recall@1": "text → image R@1",
        "scenes-captions/hard_word_accuracy": "one word differs (chance 25)",
        "scenes-captions/hard_order_accuracy": "two objects swapped (chance 50)",
    },
    "Read after a thought": {
        "scenes-thoughts/image_to_text_recall@1": "image → text R@1",
        "scenes-thoughts/text_to_image_recall@1": "text → image R@1",
        "scenes-thoughts/hard_word_accuracy": "one word differs (chance 25)",
        "scenes-thoughts/hard_order_accuracy": "two objects swapped (chance 50)",
    },
    "Late interaction": {
        "scenes-tokens/image_to_text_recall@1": "image → text R@1",
        "scenes-tokens/text_to_image_recall@1": "text → image R@1",
        "scenes-tokens/text_to_image_recall@1_pool_4": "text → image R@1, a vector for 4 tokens",
        "scenes-tokens/hard_word_accuracy": "one word differs (chance 25)",
        "scenes-tokens/hard_order_accuracy": "two objects swapped (chance 50)",
    },
    "Captions and questions": {
        claims.LOSS: "caption loss, nats per token ↓",
        claims.OBJECTS: "objects in captions, F1",
        claims.ANSWERS: "all questions, accuracy",
        claims.PRESENCE: "“is there a …?”, accuracy",
    },
    "Hallucination": {
        "scenes-pope/random/accuracy": "POPE random, accuracy",
        "scenes-pope/popular/accuracy": "POPE popular, accuracy",
        "scenes-pope/adversarial/accuracy": "POPE adversarial, accuracy",
        claims.POPE: "POPE accuracy, mean of the three",
        "scenes-pope/mean/f1": "POPE F1, mean of the three",
        "scenes-pope/mean/yes_ratio": "POPE share of yes (truth: 50)",
        claims.CHAIR_I: "CHAIR_i ↓",
        claims.CHAIR_S: "CHAIR_s ↓",
        "scenes-chair/recall": "CHAIR recall",
        "scenes-throne/overall_f1": "THRONE F1, overall",
        claims.THRONE: "THRONE F0.5, overall",
        "scenes-throne/classwise_f0.5": "THRONE F0.5, class-wise",
    },
    "Embedding space": {
        claims.GAP: "modality gap ↓",
        "gap/modality_probe_accuracy": "modality probe, accuracy ↓",
    },
}
_PLAIN = {claims.LOSS, claims.GAP}
"""Scores that are not fractions, and not shown in percent."""

_SWEPT = {
    claims.I2T: "image → text R@1",
    claims.T2I: "text → image R@1",
    claims.MMEB: "mmeb all",
    claims.OBJECTS: "caption F1",
    claims.LOSS: "caption loss ↓",
    claims.ANSWERS: "questions",
    claims.CHAIR_I: "CHAIR_i ↓",
    claims.GAP: "gap ↓",
}

_VERDICTS = """\
The claims and their margins were fixed before anything was measured. A claim is supported if the
whole 95 % interval of the difference agrees with it, not supported if no part of the interval does,
and not decided otherwise."""

_HOW = """\
A cell is the mean over the seeds with its 95 % interval. The interval covers the choice of test
scenes and of training seeds: every resample of the scenes (the same {resamples} for all models)
gives a mean over the seeds, to which Student's t with (seeds - 1) degrees of freedom adds the
spread of the seeds. Differences are paired by scene and by seed: both models of a pair were trained
on the same batches in the same order. Arms (training variants) with one seed have intervals for the
scenes alone, and so does the base, which is not trained. The gap has no per-scene values; its
scene part is a normal distribution as wide as its own bootstrap interval, taken as independent
between models. About one in twenty of these intervals misses the true value by chance. A model that
says nothing hallucinates nothing: read CHAIR together with its recall."""


def write_report(findings: Findings, path: Path, *, resamples: int) -> None:
    """Write `path` (Markdown) and its figures, `<path without suffix>/<name>.png`.

    Raises:
        DataError: a file cannot be written.
    """
    folder = path.with_suffix("")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in FIGURES.items():
            figure.draw(findings, folder / f"{name}.png")
        text = report_text(findings, folder.name, resamples=resamples)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error


def report_text(findings: Findings, folder: str, *, resamples: int) -> str:
    """The report as Markdown; figures are linked as `<folder>/<name>.png`."""
    parts = [
        "# What each of the two losses does",
        _about(findings),
        "## Answers",
        _VERDICTS,
        *_answers(findings),
        "## All numbers",
        _HOW.format(resamples=f"{resamples:,}"),
        *_numbers(findings),
        "## Differences",
        "In percentage points; loss and gap in their own units. A star marks an interval that does "
        "not contain 0. The verdicts above require more: that a margin, fixed beforehand, is kept "
        "or exceeded.",
        _differences(findings),
        "## The contrastive weight",
        _sweep(findings),
        "## Figures",
        *(f"![{figure.alt}]({folder}/{name}.png)" for name, figure in FIGURES.items()),
        "## How it was run",
        *_run(findings),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# ---------------------------------------------------------------- sentences


def _about(findings: Findings) -> str:
    settings = findings.settings
    seeds = len(findings.arm(JOINT).seeds)
    base = findings.arm(BASE).scores.get(claims.PRESENCE)
    text = (
        f"One base model, one set of {settings['train_scenes']:,} scenes, {settings['steps']} "
        f"steps of {settings['batch']} images, {_count(seeds, 'seed')}: trained with the language "
        "loss only, with the contrastive loss only, and with both. Evaluated on "
        f"{findings.test_scenes} held-out scenes. Generated by `{findings.command}` in "
        f"{findings.seconds / 60:.0f} minutes on {_count(settings['threads'], 'CPU thread')}; "
        "every statement on this page is computed from the numbers."
    )
    if base is not None:
        value = base.interval.estimate
        room = "leaves headroom" if value < 0.95 else "leaves little headroom"
        text += f" The base answers {value:.1%} of “is there a …?” correctly, which {room}."
    return text


def _answers(findings: Findings) -> Iterator[str]:
    intervals = dict(findings.claims)
    variants = [arm.name for arm in findings.arms if arm.variant]
    asked = [
        question
        for question in questions(variants)
        if any(intervals[claim] is not None for claim in question.claims)
    ]
    for number, question in enumerate(asked, 1):
        lines = [(claim, intervals[claim]) for claim in question.claims]
        verdicts: list[Verdict] = [verdict(claim, interval) for claim, interval in lines]
        yield f"**{number}. {question.text}** {_sentence(answer(verdicts))}"
        head = ("claim", "values", "difference", "verdict")
        yield _table(head, [_claim_row(findings, claim, interval) for claim, interval in lines])


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _claim_row(findings: Findings, claim: Claim, interval: Interval | None) -> tuple[str, ...]:
    if interval is None:
        return claim.statement, "–", "–", verdict(claim, interval)
    sides = [(claim.arm, claim.score), (claim.other, claim.baseline)][: 2 if claim.scale else 1]
    values = [
        f"{_label(name)} {_number(score, findings.arm(name).scores[score].interval[0])}"
        for name, score in sides
    ]
    whole = claim.scale in (0, 1)
    scaled = "" if whole else f" (from {claim.scale:g} × {_label(claim.other)})"
    shown = _signed(claim.score, interval) + scaled
    return claim.statement, ", ".join(values), shown, f"**{verdict(claim, interval)}**"


# ---------------------------------------------------------------- tables


def _numbers(findings: Findings) -> Iterator[str]:
    arms = [findings.arm(name) for name in LABELS]
    arms += [arm for arm in findings.arms if arm.variant]
    head = tuple(_label(arm.name) for arm in arms)
    for group, rows in ROWS.items():
        shown = {s: name for s, name in rows.items() if any(s in arm.scores for arm in arms)}
        if shown:
            yield _table(
                (group, *head),
                [
                    (name, *(_cell(score, arm.scores.get(score), arm) for arm in arms))
                    for score, name in shown.items()
                ],
            )
    yield _table(("Time", *head), [("training, seconds per run", *(_seconds(arm) for arm in arms))])


def _label(arm: str) -> str:
    """The name of an arm in tables; a variant's is its own."""
    return LABELS.get(arm, arm)


def _seconds(arm: ArmScores) -> str:
    if not arm.seconds:
        return "–"
    low, high = min(arm.seconds), max(arm.seconds)
    return f"{mean(arm.seconds):.0f}" + (f" ({low:.0f} to {high:.0f})" if high > low else "")


def _differences(findings: Findings) -> str:
    pairs = list(findings.differences)
    head = ("", *(f"{_label(arm)} − {_label(other)}" for arm, other in pairs))
    rows = [
        (name, *(_starred(score, findings.differences[pair][score]) for pair in pairs))
        for group in ROWS.values()
        for score, name in group.items()
        if all(score in findings.differences[pair] for pair in pairs)
    ]
    return _table(head, rows)


def _sweep(findings: Findings) -> str:
    arms = [findings.arm(LANGUAGE), *findings.sweep, findings.arm(CONTRASTIVE)]
    shown = {s: name for s, name in _SWEPT.items() if s in arms[0].scores}
    rows = []
    for arm in arms:
        contrastive, language = arm.weights or (0.0, 0.0)
        name = f"{contrastive:g} : {language:g}"
        cells = (_cell(score, arm.scores[score], arm) for score in shown)
        rows.append((name, str(len(arm.seeds)), *cells))
    return _table(("contrastive : language", "seeds", *shown.values()), rows)


def _run(findings: Findings) -> Iterator[str]:
    settings = [(key.replace("_", " "), _plain(v)) for key, v in findings.settings.items()]
    yield _table(("setting", "value"), settings)
    versions = ", ".join(f"{name} {version}" for name, version in findings.packages.items())
    yield f"Packages: {versions}."


def _cell(score: str, measured: Measured | None, arm: ArmScores) -> str:
    if measured is None:
        return "–"
    estimate, low, high = measured.interval
    text = _number(score, estimate)
    if high > low:
        text += f" [{_number(score, low)}, {_number(score, high)}]"
    return f"**{text}**" if arm.name == JOINT else text


def _starred(score: str, interval: Interval) -> str:
    star = "\\*" if interval.low > 0 or interval.high < 0 else ""
    return _signed(score, interval) + star


def _number(score: str, value: float) -> str:
    return f"{value:.3f}" if score in _PLAIN else f"{100 * value:.1f}"


def _signed(score: str, interval: Interval) -> str:
    scale, digits = (1, 3) if score in _PLAIN else (100, 1)
    estimate, low, high = (f"{scale * value:+.{digits}f}" for value in interval)
    return f"{estimate} [{low}, {high}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
