"""Whether a study's scores have the paper's order: a rule, applied to every pair."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .arms import COMPARISONS, FLOOR

HOLDS, REVERSED, UNDECIDED = "holds", "reversed", "undecided"

RULE = (
    "A difference of two means counts when it is larger than its standard error, "
    "sqrt(s1^2/n1 + s2^2/n2) of the seeds' scores, times the 97.5 % quantile of Student's t with "
    "n1 + n2 - 2 degrees of freedom; else the pair is undecided. Pairs are judged one by one: of "
    "twenty without any difference, one would count."
)


class Verdict(NamedTuple):
    """One pair that the paper orders. margin: what the difference had to exceed; None: one seed
    has no spread."""

    comparison: str
    better: str
    worse: str
    difference: float
    margin: float | None
    verdict: str


def mean_and_spread(scores: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the standard deviation over seeds (None of fewer than two)."""
    spread = statistics.stdev(scores) if len(scores) > 1 else None
    return statistics.mean(scores), spread


def judge(better: Sequence[float], worse: Sequence[float]) -> tuple[float, float | None, str]:
    """(difference of the means, what it must exceed, verdict) of a pair; see RULE."""
    from scipy.stats import t

    difference = statistics.mean(better) - statistics.mean(worse)
    if min(len(better), len(worse)) < 2:
        return difference, None, UNDECIDED
    error = math.sqrt(
        statistics.variance(better) / len(better) + statistics.variance(worse) / len(worse)
    )
    margin = float(t.ppf(0.975, len(better) + len(worse) - 2)) * error
    if abs(difference) <= margin:
        return difference, margin, UNDECIDED
    return difference, margin, HOLDS if difference > 0 else REVERSED


def verdicts(scores: Mapping[str, Sequence[float]]) -> list[Verdict]:
    """Every pair that the paper orders and the scores (by arm, one a seed) have."""
    return [
        Verdict(comparison.title, better, worse, *judge(scores[better], scores[worse]))
        for comparison in COMPARISONS
        for better, worse in comparison.above
        if better in scores and worse in scores
    ]


def summary(scores: Mapping[str, Sequence[float]], what: str) -> str:
    """What the verdicts say, in a paragraph. what: the name of the scores."""
    found = verdicts(scores)
    parts = []
    for verdict, text in (
        (HOLDS, "hold here"),
        (REVERSED, "are reversed here"),
        (UNDECIDED, "are undecided (the difference is within the spread of the seeds)"),
    ):
        pairs = [
            f"{v.better} over {v.worse} ({v.difference:+.1f}"
            + (f", needs {v.margin:.1f})" if v.margin is not None else ")")
            for v in found
            if v.verdict == verdict
        ]
        parts.append(f"{len(pairs)} {text}" + (f": {', '.join(pairs)}" if pairs else ""))
    lines = [f"By {what}, of {len(found)} orderings of the paper: {'; '.join(parts)}."]
    if FLOOR in scores:
        above = [
            arm for arm in scores if arm != FLOOR and judge(scores[arm], scores[FLOOR])[2] == HOLDS
        ]
        lines.append(
            f"Above fine-tuning without pre-training ({statistics.mean(scores[FLOOR]):.1f}) by "
            f"the same rule: {', '.join(above) or 'none'}."
        )
    return " ".join(lines)
