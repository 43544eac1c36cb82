"""The claims that an ablation tests, fixed before anything is measured, and their verdicts.

A claim is about one score of two arms, or about two scores of one arm: `arm - scale * other`, with
the sign that makes larger better, exceeds a threshold. With scale 0 it is about the arm alone. It
is supported if the whole 95 % interval exceeds it, not supported if
no part of the interval does, and not decided otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cafe.ablation.arms import BASE, CONTRASTIVE, JOINT, LANGUAGE
from cafe.metrics import Interval

Verdict = Literal["supported", "not supported", "not decided", "not measured"]


@dataclass(frozen=True, slots=True)
class Claim:
    """`sign * (arm - scale * other) > above`, for one score.

    statement     the same in words
    other_score   the score of `other`, where it is another one
    """

    statement: str
    score: str
    arm: str
    other: str
    sign: int
    above: float = 0.0
    scale: float = 1.0
    other_score: str | None = None

    @property
    def baseline(self) -> str:
        """The score of `other`."""
        return self.other_score or self.score


@dataclass(frozen=True, slots=True)
class ClaimGroup:
    """A question, and the claims that answer it together."""

    text: str
    claims: tuple[Claim, ...]


I2T = "scenes-retrieval/image_to_text_recall@1"
T2I = "scenes-retrieval/text_to_image_recall@1"
HARD = "scenes-retrieval/hard_accuracy"
MMEB = "scenes-mmeb/all"
ANSWERS = "presence/question_accuracy"
PRESENCE = "presence/presence_accuracy"
OBJECTS = "caption/caption_object_f1"
LOSS = "caption/caption_loss"
CHAIR_I, CHAIR_S = "scenes-chair/chair_i", "scenes-chair/chair_s"
THRONE = "scenes-throne/overall_f0.5"
POPE = "scenes-pope/mean/accuracy"
GAP = "gap/modality_gap"
WORD = "scenes-retrieval/hard_word_accuracy"
ORDER = "scenes-retrieval/hard_order_accuracy"
MATCH = "scenes-match/match_accuracy"
WAYS = {"image_to_text": "image → text", "text_to_image": "text → image"}
GAINS = tuple(f"scenes-match/{way}_gain@1" for way in WAYS)
LIKELIER_WORD = "scenes-likelihood/likelihood_word_accuracy"
LIKELIER_ORDER = "scenes-likelihood/likelihood_order_accuracy"


TRAINED_FOR = {
    "scenes-thoughts": "R@1: better read after a thought",
    "scenes-tokens": "R@1: better by token vectors",
}


def _non_inferior(
    score: str, what: str, other: str, margin: float, sign: int = 1, arm: str = JOINT
) -> Claim:
    """`arm` is worse than `other` by at most `margin`."""
    unit = f"{margin:g} nats" if score == LOSS else f"{100 * margin:g} points"
    return Claim(f"{what}: at most {unit} worse", score, arm, other, sign, above=-margin)


def _hallucinates_less(other: str) -> tuple[Claim, ...]:
    return (
        Claim("fewer hallucinated objects among those mentioned", CHAIR_I, JOINT, other, -1),
        Claim("fewer captions with a hallucinated object", CHAIR_S, JOINT, other, -1),
        Claim("higher THRONE F0.5", THRONE, JOINT, other, 1),
        Claim("higher POPE accuracy", POPE, JOINT, other, 1),
    )


def _more(score: str, what: str, baseline: str, arm: str = JOINT) -> Claim:
    """One score of an arm is larger than another one of the same arm."""
    return Claim(what, score, arm, arm, 1, other_score=baseline)


def _at_least(score: str, what: str, goal: float) -> Claim:
    return Claim(f"{what}: at least {100 * goal:g}", score, JOINT, JOINT, 1, goal, scale=0.0)


QUESTIONS = (
    ClaimGroup(
        "Does joint training keep retrieval at the contrastive-only level?",
        (
            _non_inferior(I2T, "image → text, R@1", CONTRASTIVE, 0.05),
            _non_inferior(T2I, "text → image, R@1", CONTRASTIVE, 0.05),
            _non_inferior(HARD, "hard captions", CONTRASTIVE, 0.05),
            _non_inferior(MMEB, "scenes-mmeb, all sets", CONTRASTIVE, 0.05),
        ),
    ),
    ClaimGroup(
        "Does joint training keep generation at the language-only level?",
        (
            _non_inferior(ANSWERS, "answers to questions", LANGUAGE, 0.02),
            _non_inferior(OBJECTS, "objects in captions, F1", LANGUAGE, 0.02),
            _non_inferior(LOSS, "caption loss", LANGUAGE, 0.02, sign=-1),
        ),
    ),
    ClaimGroup(
        "Does generation collapse when only the contrastive loss trains?",
        (
            Claim(
                "answers to questions: over 10 points worse than language-only",
                ANSWERS, CONTRASTIVE, LANGUAGE, -1, 0.10,
            ),
            Claim(
                "objects in captions, F1: over 10 points worse than language-only",
                OBJECTS, CONTRASTIVE, LANGUAGE, -1, 0.10,
            ),
            Claim(
                "caption loss: over 0.5 nats worse than language-only",
                LOSS, CONTRASTIVE, LANGUAGE, 1, 0.5,
            ),
        ),
    ),
    ClaimGroup("Does joint training hallucinate less than the base?", _hallucinates_less(BASE)),
    ClaimGroup(
        "Does joint training hallucinate less than language-only training on the same data?",
        _hallucinates_less(LANGUAGE),
    ),
    ClaimGroup(
        "Does the modality gap close?",
        (
            Claim("narrower than the base's", GAP, JOINT, BASE, -1),
            Claim("less than half as wide as the base's", GAP, JOINT, BASE, -1, scale=0.5),
            Claim("narrower than after language-only training", GAP, JOINT, LANGUAGE, -1),
        ),
    ),
    ClaimGroup(
        "Do the words of the jointly trained model find more than its embedding?",
        (
            *(
                _more(
                    f"scenes-captions/{way}_recall@1",
                    f"{name}, R@1: more with its captions mixed into the embeddings",
                    f"scenes-retrieval/{way}_recall@1",
                )
                for way, name in WAYS.items()
            ),
            *(
                _more(
                    f"scenes-likelihood/{way}_reranked@1",
                    f"{name}, R@1: more with ten reranked by the likelihood of the caption",
                    f"scenes-retrieval/{way}_recall@1",
                )
                for way, name in WAYS.items()
            ),
            *(
                _more(
                    f"scenes-likelihood/{way}_reranked@1",
                    f"{name}, R@1: more reranked by the likelihood than by the match question",
                    f"scenes-match/{way}_reranked@1",
                )
                for way, name in WAYS.items()
            ),
            _more(LIKELIER_WORD, "captions with one wrong word: more by likelihood", WORD),
            _more(LIKELIER_ORDER, "captions with two objects swapped: more by likelihood", ORDER),
        ),
    ),
    ClaimGroup(
        "Does the jointly trained model reach the goals that were set?",
        (
            *(
                _at_least(
                    f"scenes-likelihood/{way}_reranked@1",
                    f"{name}, R@1, ten reranked by likelihood",
                    0.95,
                )
                for way, name in WAYS.items()
            ),
            *(
                _at_least(
                    f"scenes-likelihood/{way}_gain@1", f"{name}, gain of reranking by it", 0.15
                )
                for way, name in WAYS.items()
            ),
            _at_least(LIKELIER_WORD, "captions with one wrong word, by likelihood", 0.80),
            _at_least(LIKELIER_ORDER, "captions with two objects swapped, by likelihood", 0.75),
            _at_least(MATCH, "match question, near misses", 0.88),
        ),
    ),
)  # fmt: skip


def questions(variants: Sequence[str] = ()) -> tuple[ClaimGroup, ...]:
    """All questions of an ablation: those of the loss weights, and three for each variant.

    A question of which no score is measured has no place in a report.
    """
    return (*QUESTIONS, *(question for name in variants for question in _of_variant(name)))


def _of_variant(name: str) -> tuple[ClaimGroup, ...]:
    """What a variant of the joint training finds, and what it costs, the same for every variant."""
    better = {
        I2T: "image → text, R@1",
        T2I: "text → image, R@1",
        WORD: "captions with one wrong word",
        ORDER: "captions with two objects swapped",
        MATCH: "match question, near misses",
        GAINS[0]: "gain of reranking, image → text",
        GAINS[1]: "gain of reranking, text → image",
    }
    return (
        ClaimGroup(
            f"Does {name} find more than joint training alone?",
            tuple(
                Claim(f"{what}: better", score, name, JOINT, 1) for score, what in better.items()
            ),
        ),
        ClaimGroup(
            f"Does {name} find more in the way that it was trained for than by its embedding?",
            tuple(
                _more(
                    f"{task}/{way}_recall@1",
                    f"{words}, {how}",
                    f"scenes-retrieval/{way}_recall@1",
                    name,
                )
                for task, how in TRAINED_FOR.items()
                for way, words in WAYS.items()
            ),
        ),
        ClaimGroup(
            f"Does {name} keep generation at the level of joint training alone?",
            (
                _non_inferior(ANSWERS, "answers to questions", JOINT, 0.02, arm=name),
                _non_inferior(OBJECTS, "objects in captions, F1", JOINT, 0.02, arm=name),
                _non_inferior(LOSS, "caption loss", JOINT, 0.02, sign=-1, arm=name),
                Claim("fewer hallucinated objects than the base", CHAIR_I, name, BASE, -1),
            ),
        ),
    )


def verdict(claim: Claim, difference: Interval | None) -> Verdict:
    """The verdict on the claim, given the interval of `arm - scale * other`."""
    if difference is None:
        return "not measured"
    ends = sorted((claim.sign * difference.low, claim.sign * difference.high))
    if ends[0] > claim.above:
        return "supported"
    return "not supported" if ends[1] <= claim.above else "not decided"


def answer(verdicts: Sequence[Verdict]) -> str:
    """One answer from the verdicts on a question: theirs if they agree, else their counts."""
    counts = Counter(verdicts)
    if len(counts) == 1:
        return verdicts[0]
    order: tuple[Verdict, ...] = ("supported", "not supported", "not decided", "not measured")
    return "mixed: " + ", ".join(
        f"{name} in {counts[name]} of {len(verdicts)}" for name in order if counts[name]
    )
