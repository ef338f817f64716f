"""A fine-tuning run's report: what it shows, and the calibration error behind its plot."""

import base64
import json
import re

import matplotlib.image
import numpy as np
import pytest

from fastdeberta.finetuning import report
from fastdeberta.finetuning.report import calibration, read_predictions, write_report


def test_calibration_by_hand():
    # Bins of a fifth: (0.2, 0.4] has 0.4 and 0.3, (0.8, 1] the other three.
    c = calibration([0.4, 0.3, 1.0, 0.9, 0.81], [True, False, True, True, False], bins=5)
    assert c.counts.tolist() == [0, 2, 0, 0, 3]
    np.testing.assert_allclose(c.confidence, [np.nan, 0.35, np.nan, np.nan, 2.71 / 3])
    np.testing.assert_allclose(c.accuracy, [np.nan, 0.5, np.nan, np.nan, 2 / 3])
    assert c.error == pytest.approx(2 / 5 * 0.15 + 3 / 5 * (2.71 / 3 - 2 / 3))


def test_calibration_of_the_edges_and_defaults():
    c = calibration([0.0, 1.0], [False, True])
    assert len(c.counts) == 15 and c.counts[0] == c.counts[-1] == 1
    assert c.error == 0.0
    assert calibration([1.0 + 1e-7], [True]).counts[-1] == 1


def test_calibration_tells_calibrated_from_sure():
    draw = np.random.default_rng(0)
    confidence = draw.uniform(0.5, 1, 20_000)
    correct = draw.uniform(size=20_000) < confidence
    assert calibration(confidence, correct).error < 0.02
    # Their mean is 0.75: whoever is always sure is off by a quarter.
    assert calibration(np.ones(20_000), correct).error == pytest.approx(0.25, abs=0.02)


def test_calibration_errors():
    for pair in (([], []), ([0.5], [True, False])):
        with pytest.raises(ValueError, match="equally many, and not none"):
            calibration(*pair)
    for number in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="confidence must be in"):
            calibration([number], [True])


NAMES = ["Sports & <games>", "$\\alpha$ cost$", "\u00fcber"]


def leave_run(output, rows, probabilities=True):
    """The files of a run, as training and fine-tuning write them."""
    draw = np.random.default_rng(0)
    output.mkdir(exist_ok=True)
    curves = [{"step": s, "loss": 2 / s, "learning_rate": 1e-3} for s in (1, 2, 3, 4)]
    curves += [{"step": s, "held_out/accuracy": s / 5, "held_out/loss": 1 / s} for s in (2, 4)]
    lines = []
    for shares in draw.dirichlet([1, 1, 1], rows):
        row = {"text": "x", "label": NAMES[draw.integers(3)], "prediction": NAMES[shares.argmax()]}
        if probabilities:
            row["probabilities"] = dict(zip(NAMES, shares.tolist(), strict=True))
        lines.append(row)
    for name, values in (("metrics", curves), ("predictions", lines)):
        text = "".join(json.dumps(value) + "\n" for value in values)
        (output / f"{name}.jsonl").write_text(text)
    results = {"accuracy": 0.8, "step": 4, "confusion": [[1]], "a<b": 0.123456789}
    (output / "metrics.json").write_text(json.dumps(results))
    return lines


def images(path):
    """The pictures of a page, decoded."""
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)">', path.read_text())
    return [base64.b64decode(data) for data in found]


@pytest.mark.filterwarnings("error")
def test_report(tmp_path):
    leave_run(tmp_path, 60)
    path = write_report(tmp_path, "A & B")
    assert path == tmp_path / "report.html"
    text = path.read_text()
    assert "<h1>A &amp; B</h1>" in text and "a&lt;b: 0.123457" in text and "accuracy: 0.8" in text
    assert re.findall("<h2>(.*?)</h2>", text) == [
        "Learning curves",
        "Confusion matrix",
        "Calibration",
    ]
    assert not re.search(r'(src|href)="(?!data:)', text)  # Self-contained.
    for data in images(path):
        (tmp_path / "x.png").write_bytes(data)
        pixels = matplotlib.image.imread(tmp_path / "x.png")
        assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.05


def test_what_the_figures_draw(tmp_path, monkeypatch):
    lines = leave_run(tmp_path, 60)
    drawn = []
    monkeypatch.setattr(report, "png", lambda figure: drawn.append(figure) or "")
    write_report(tmp_path)
    curves, confusion, reliability = (figure.axes for figure in drawn)
    shown = {
        line.get_label(): list(zip(*line.get_data(), strict=True))
        for axis in curves
        for line in axis.lines
    }
    assert shown["loss"] == [(2, 1 / 2), (4, 1 / 4)]  # The dev loss: of two names the later.
    assert shown["accuracy"] == [(2, 0.4), (4, 0.8)]
    (training,) = curves[0].lines
    assert list(zip(*training.get_data(), strict=True)) == [(s, 2 / s) for s in (1, 2, 3, 4)]

    counts = {tuple(map(int, t.get_position())): int(t.get_text()) for t in confusion[0].texts}
    for i, label in enumerate(NAMES):
        for j, prediction in enumerate(NAMES):
            count = sum(r["label"] == label and r["prediction"] == prediction for r in lines)
            assert counts.get((j, i), 0) == count
    assert [t.get_text() for t in confusion[0].get_yticklabels()] == NAMES
    assert confusion[0].images[0].get_clim() == (0, max(counts.values()))  # 0 is white.

    sure = [max(r["probabilities"].values()) for r in lines]
    c = calibration(sure, [r["label"] == r["prediction"] for r in lines])
    assert f"{c.error:.3f}" in reliability[0].get_title()
    heights = [bar.get_height() for bar in reliability[0].patches]
    np.testing.assert_allclose(heights, c.accuracy[c.counts > 0])
    assert [bar.get_height() for bar in reliability[1].patches] == c.counts.tolist()


def test_report_of_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="metrics.jsonl"):
        write_report(tmp_path)
    leave_run(tmp_path, 9, probabilities=False)
    assert len(images(write_report(tmp_path))) == 2
    (tmp_path / "predictions.jsonl").write_text('{"label": 1.5, "prediction": 2.0}\n')
    assert len(images(write_report(tmp_path))) == 2
    (tmp_path / "predictions.jsonl").write_text('{"label": 1, "prediction": 2}\n')  # Of a choice.
    assert len(images(write_report(tmp_path))) == 1
    (tmp_path / "metrics.jsonl").unlink()
    assert len(images(write_report(tmp_path))) == 0
    assert "accuracy: 0.8" in (tmp_path / "report.html").read_text()


def test_read_predictions(tmp_path):
    path = tmp_path / "predictions.jsonl"
    rows = [
        {"label": "b", "prediction": "a", "probabilities": {"b": 0.25, "a": 0.75}},
        {"prediction": "a", "probabilities": {"b": 0.5, "a": 0.5}},  # Without a label.
        {"label": "b", "prediction": "b", "probabilities": {"a": 0.0, "b": 1.0}},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    read = read_predictions(path)
    assert read.names == ["b", "a"]  # The order of the first line.
    assert read.labels.tolist() == [0, 0] and read.predictions.tolist() == [1, 0]
    assert read.probabilities.tolist() == [[0.25, 0.75], [1.0, 0.0]]
    del rows[2]["probabilities"]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_predictions(path).probabilities is None
    assert read_predictions(path).names == ["a", "b"]


def test_tags_and_numbers(tmp_path, monkeypatch):
    path, drawn = tmp_path / "predictions.jsonl", []
    monkeypatch.setattr(report, "png", lambda figure: drawn.append(figure) or "")
    (tmp_path / "metrics.json").write_text('{"step": 1}')
    path.write_text(
        '{"label": ["N", "V"], "prediction": ["N", "N"]}\n{"label": [], "prediction": []}\n'
        '{"label": ["D"], "prediction": ["D"]}\n'
    )
    read = read_predictions(path)
    assert read.names == ["D", "N", "V"] and read.probabilities is None
    assert read.labels.tolist() == [1, 2, 0] and read.predictions.tolist() == [1, 1, 0]
    path.write_text('{"label": 1.0, "prediction": 2.5}\n{"label": 3.0, "prediction": 0.5}\n')
    assert read_predictions(path) is None
    write_report(tmp_path)
    dots, errors = drawn[0].axes
    assert dots.collections[0].get_offsets().tolist() == [[1.0, 2.5], [3.0, 0.5]]
    assert sum(bar.get_height() for bar in errors.patches) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"label": ["a"], "prediction": []}', "line 2: 1 tags in label, 0 in prediction"),
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected a JSON object"),
        ('{"label": "a", "prediction": "a", "probabilities": {"a": 1}}', "must be of a, b, which"),
        ('{"label": "c", "prediction": "a", "probabilities": {"a": 1, "b": 0}}', "line 2: prob"),
    ],
)
def test_bad_predictions(line, message, tmp_path):
    path = tmp_path / "predictions.jsonl"
    good = {"label": "b", "prediction": "a", "probabilities": {"a": 0.75, "b": 0.25}}
    path.write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_predictions(path)
