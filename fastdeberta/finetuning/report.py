"""report.html of a fine-tuning run: learning curves, confusion matrix, calibration."""

import html
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from ..figures import draw_confusion, figure, page, png
from ..files import json_object, read_lines, write_atomically
from ..training.reporting import METRICS, read_metrics

PREDICTIONS = "predictions.jsonl"
_BINS = 15


class Predicted(NamedTuple):
    """A classifier's answers: names [C], labels and predictions [N] as numbers of names, and
    probabilities float64 [N, C] or None."""

    names: list[str]
    labels: np.ndarray
    predictions: np.ndarray
    probabilities: np.ndarray | None


def write_report(output: str | Path, title: str = "fastdeberta fine-tuning") -> Path:
    """Writes output/report.html, one self-contained file, from what the run left there.

    metrics.jsonl gives the learning curves, the numbers of metrics.json a table, and
    predictions.jsonl the confusion matrix (of tags, too) and, where its lines have `probabilities`,
    the calibration plot, or of a regression its numbers; what is missing is left out (see
    read_predictions).

    Returns:
        The file's path.

    Raises:
        FileNotFoundError: neither metrics.jsonl nor metrics.json is there. ValueError: a bad line
            of predictions.jsonl.
    """
    output = Path(output)
    curves, results = read_metrics(output / METRICS), {}
    if (output / "metrics.json").is_file():
        results = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    if not curves and not results:
        raise FileNotFoundError(f"no {METRICS} and no metrics.json in {output}")
    figures = []
    if curves:
        figures.append(("Learning curves", _learning_curves(curves)))
    predicted, numbers = None, []
    if (output / PREDICTIONS).is_file():
        predicted = read_predictions(output / PREDICTIONS)
        numbers = [] if predicted else read_numbers(output / PREDICTIONS)
    if numbers:
        figures.append(("Predictions", _scatter(numbers)))
    if predicted is not None:
        figures.append(("Confusion matrix", _confusion(predicted)))
        if predicted.probabilities is not None:
            figures.append(("Calibration", _calibration(predicted)))
    parts = [_table(results), *(f"<h2>{name}</h2>\n{png(figure)}" for name, figure in figures)]
    write_atomically(output / "report.html", page(title, "\n".join(parts)))
    return output / "report.html"


def read_predictions(path: Path) -> Predicted | None:
    """The classes that predictions.jsonl says; None where it has no line with a class.

    A line holds `label` and `prediction`, both the name of a class or, of a sentence, both a list
    of its words' tags; and may hold `probabilities`, an object of every class's name and
    probability. Lines without a label (or of other tasks) are passed over. Probabilities count
    where all lines have them.

    Raises:
        ValueError: a line is no JSON object, lists of tags differ in length, or its probabilities
            are not of the first line's classes.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    pairs: list[tuple[str, str]] = []
    for number, row in _lines(path):
        label, prediction = row.get("label"), row.get("prediction")
        if isinstance(label, str) and isinstance(prediction, str):
            rows.append((number, row))
            pairs.append((label, prediction))
        elif _tags(label) and _tags(prediction):
            if len(label) != len(prediction):
                raise ValueError(
                    f"{path}, line {number}: {len(label)} tags in label, "
                    f"{len(prediction)} in prediction"
                )
            pairs += zip(label, prediction, strict=True)
    if not pairs:
        return None
    names = sorted({name for pair in pairs for name in pair})
    probabilities = None
    if len(rows) == len(pairs) and all("probabilities" in row for _, row in rows):
        first = rows[0][1]["probabilities"]
        for number, row in rows:
            if not {row["label"], row["prediction"]} <= first.keys() == row["probabilities"].keys():
                raise ValueError(
                    f"{path}, line {number}: probabilities must be of {', '.join(first)}, which "
                    f"line {rows[0][0]} has, got {', '.join(row['probabilities'])}"
                )
        names = list(first)
        probabilities = np.array([[row["probabilities"][n] for n in names] for _, row in rows])
    index = {name: i for i, name in enumerate(names)}
    labels, predictions = (
        np.array([index[name] for name in side]) for side in zip(*pairs, strict=True)
    )
    return Predicted(names, labels, predictions, probabilities)


def read_numbers(path: Path) -> list[tuple[float, float]]:
    """Of a regression's predictions.jsonl each line's `label` and `prediction`.

    Raises:
        ValueError: a line is no JSON object.
    """
    pairs = ((row.get("label"), row.get("prediction")) for _, row in _lines(path))
    return [(x, y) for x, y in pairs if isinstance(x, float) and isinstance(y, float)]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in read_lines(path):
        yield number, json_object(line, f"{path}, line {number}")


def _tags(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(tag, str) for tag in value)


class Calibration(NamedTuple):
    """Bins of confidence: their edges [bins + 1], and of each the examples in it, their mean
    confidence and their accuracy [bins] (NaN: empty); and the expected calibration error."""

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float


def calibration(confidence: Any, correct: Any, bins: int = _BINS) -> Calibration:
    """How well confidences foretell whether predictions are right.

    Of bins b of equal width, (i / bins, (i + 1) / bins] (the first also holds 0):

        ECE = sum over b of  count(b) / N * |accuracy(b) - mean confidence(b)|

    Args:
        confidence: [N], the probability of each prediction. correct: [N], bool.

    Raises:
        ValueError: none, another number of one than of the other, or a confidence outside [0, 1].

    Source: Guo et al. 2017, arXiv:1706.04599.
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if confidence.shape != correct.shape or confidence.ndim != 1 or not len(confidence):
        raise ValueError(
            "confidence and correct must be equally many, and not none: "
            f"got {list(confidence.shape)} and {list(correct.shape)}"
        )
    # Rounding may carry a softmax a little over 1.
    if not ((confidence >= 0) & (confidence <= 1 + 1e-6)).all():
        raise ValueError(f"confidence must be in [0, 1], got up to {confidence.max()}")
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts, sums, right = (
        np.bincount(place, weights, bins) for weights in (None, confidence, correct)
    )
    error = float(np.abs(right - sums).sum() / len(confidence))
    with np.errstate(invalid="ignore"):
        return Calibration(edges, counts, sums / counts, right / counts, error)


def _learning_curves(curves: list[dict[str, Any]]) -> Any:
    drawn, axes = figure(2)
    names = sorted({name for line in curves for name in line})
    scores = [name for name in names if name.startswith("held_out/")]
    losses = [name for name in names if name.endswith("loss") and name not in scores]
    for axis, names, title in ((axes[0], losses, "training loss"), (axes[1], scores, "dev scores")):
        for name in names:
            points = [(line["step"], line[name]) for line in curves if name in line]
            label = name.removeprefix("held_out/")
            axis.plot(*zip(*points, strict=True), marker=".", linewidth=1, label=label)
        axis.set(title=title, xlabel="step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if names:
            axis.legend()
    return drawn


def _confusion(predicted: Predicted) -> Any:
    names = predicted.names
    matrix = np.zeros((len(names), len(names)), int)
    np.add.at(matrix, (predicted.labels, predicted.predictions), 1)
    drawn, axes = figure(1, height=min(12.0, 2.5 + 0.3 * len(names)))
    draw_confusion(axes, matrix.tolist(), names)
    accuracy = (predicted.labels == predicted.predictions).mean()
    axes.set(title=f"accuracy {accuracy:.1%}", ylabel="label")
    return drawn


def _scatter(numbers: list[tuple[float, float]]) -> Any:
    drawn, axes = figure(2)
    labels, predictions = np.array(numbers).T
    ends = [float(labels.min()), float(labels.max())]
    axes[0].scatter(labels, predictions, s=4, alpha=0.4)
    axes[0].plot(ends, ends, linestyle="--", color="gray")
    axes[0].set(title="predictions", xlabel="label", ylabel="prediction")
    axes[1].hist(predictions - labels, bins=40, edgecolor="white")
    axes[1].set(title="errors", xlabel="prediction - label", ylabel="examples")
    return drawn


def _calibration(predicted: Predicted) -> Any:
    assert predicted.probabilities is not None
    given = predicted.probabilities[np.arange(len(predicted.labels)), predicted.predictions]
    c = calibration(given, predicted.labels == predicted.predictions)
    drawn, axes = figure(2)
    width, left, some = np.diff(c.edges), c.edges[:-1], c.counts > 0
    axes[0].bar(left[some], c.accuracy[some], width[some], align="edge", edgecolor="white")
    axes[0].plot(c.confidence[some], c.accuracy[some], color="black", marker=".", linewidth=1)
    axes[0].plot([0, 1], [0, 1], linestyle="--", color="gray")
    axes[0].set(
        title=f"expected calibration error {c.error:.3f}",
        xlabel="confidence",
        ylabel="accuracy",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axes[1].bar(left, c.counts, width, align="edge", edgecolor="white")
    axes[1].set(title="examples", xlabel="confidence", xlim=(0, 1))
    return drawn


def _table(results: Mapping[str, Any]) -> str:
    """The numbers among the results."""
    rows = [
        f"{html.escape(str(name))}: {value:.6g}"
        for name, value in results.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return "<pre>" + "\n".join(rows) + "</pre>"


# What every report is made of
