"""Scores of a classifier."""

from collections.abc import Sequence
from typing import Any


def classification(
    labels: list[int], predictions: list[int], names: Sequence[str]
) -> dict[str, Any]:
    """accuracy, macro_f1, majority (accuracy of the most frequent label) and confusion.

    macro_f1 averages the F1 of every class that occurs among labels or predictions. confusion:
    confusion[i][j] counts label i predicted as j.
    """
    from sklearn.metrics import confusion_matrix, f1_score

    count = len(labels)
    return {
        "accuracy": sum(a == b for a, b in zip(labels, predictions, strict=True)) / count,
        "macro_f1": float(f1_score(labels, predictions, average="macro", zero_division=0)),
        "majority": max(labels.count(i) for i in set(labels)) / count,
        "confusion": confusion_matrix(labels, predictions, labels=list(range(len(names)))).tolist(),
    }
