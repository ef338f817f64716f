"""report.html: the demo's results where a person would rather look than read."""

import html
import json
from pathlib import Path
from typing import Any

from ..figures import draw_confusion, figure, page, png
from ..files import write_atomically


def write_report(path: Path, results: dict[str, Any], curves: list[dict[str, Any]]) -> None:
    """Writes one self-contained HTML file.

    Args:
        results: what the demo writes to metrics.json. curves: the lines of metrics.jsonl.
    """
    figures = [
        ("Losses", _losses(curves)),
        ("Held-out scores", _held_out(curves, results["pretraining"]["baseline"])),
        ("Topics: confusion", _confusion(results["topics"], results["topic_names"])),
    ]
    if isinstance(results["attention"], list):
        figures.append(("Attention time by length", _attention(results["attention"])))
    shown = "\n".join(f"<h2>{title}</h2>\n{png(drawn)}" for title, drawn in figures)
    installation = html.escape(json.dumps(results["installation"], indent=2))
    body = (
        f"<p>{html.escape(_summary(results))}</p>\n{shown}\n"
        f"<h2>Installation</h2>\n<pre>{installation}</pre>\n"
        "<p>Text: lead paragraphs of English Wikipedia, CC BY-SA 4.0.</p>"
    )
    write_atomically(path, page("fastdeberta demo", body))


def _summary(results: dict[str, Any]) -> str:
    p, t = results["pretraining"], results["topics"]
    ratio = p["mlm_accuracy"] / p["baseline"]["most_frequent"]
    return (
        f"Pre-training: {p['step']} steps, {p['tokens']:,} tokens. On held-out text the generator "
        f"fills {p['mlm_accuracy']:.1%} of the masks ({ratio:.1f} times the most frequent token's "
        f"share); the discriminator's AUC is {p['rtd_auc']:.3f}. Topics: "
        f"{t['pretrained']['accuracy']:.1%} with pre-training, {t['control']['accuracy']:.1%} "
        f"from random weights, {t['majority']:.1%} for the most frequent topic."
    )


def _losses(curves: list[dict[str, Any]]) -> Any:
    drawn, axes = figure(2)
    for axis, name, title in (
        (axes[0], "mlm_loss", "generator: masked-token loss (nats)"),
        (axes[1], "rtd_loss", "discriminator: replaced-token loss (nats)"),
    ):
        points = [(c["tokens"] / 1e6, c[name]) for c in curves if name in c]
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set(title=title, xlabel="million tokens")
    return drawn


def _held_out(curves: list[dict[str, Any]], baseline: dict[str, float]) -> Any:
    drawn, axes = figure(2)
    scores = [c for c in curves if "held_out/rtd_auc" in c]
    steps = [c["step"] for c in scores]
    axes[0].plot(steps, [c["held_out/mlm_accuracy"] for c in scores], marker="o", label="model")
    for name, style in (("most_frequent", "--"), ("unigram", ":")):
        label = name.replace("_", " ")
        axes[0].axhline(baseline[name], linestyle=style, color="gray", label=label)
    axes[0].set(title="generator: masked-token accuracy", xlabel="step", ylim=(0, None))
    axes[0].legend()
    axes[1].plot(steps, [c["held_out/rtd_auc"] for c in scores], marker="o", label="AUC")
    for kind in ("replaced", "original"):
        values = [c[f"held_out/rtd_accuracy_{kind}"] for c in scores]
        axes[1].plot(steps, values, marker=".", label=f"accuracy, {kind}")
    axes[1].axhline(0.5, linestyle="--", color="gray", label="AUC of chance")
    axes[1].set(title="discriminator", xlabel="step", ylim=(0, 1))
    axes[1].legend()
    return drawn


def _confusion(topics: dict[str, Any], names: list[str]) -> Any:
    drawn, axes = figure(2, height=5.5)
    for axis, name in zip(axes, ("pretrained", "control"), strict=True):
        draw_confusion(axis, topics[name]["confusion"], names)
        axis.set(title=f"{name}: {topics[name]['accuracy']:.1%}")
    axes[1].set_yticklabels([])
    return drawn


def _attention(rows: list[dict[str, float]]) -> Any:
    drawn, axes = figure(2)
    lengths = [r["length"] for r in rows]
    for axis, kind, title in (
        (axes[0], "forward", "forward"),
        (axes[1], "full", "forward + backward"),
    ):
        axis.plot(lengths, [r[f"eager_{kind}"] for r in rows], marker="o", label="transformers")
        axis.plot(lengths, [r[f"ours_{kind}"] for r in rows], marker="o", label="fastdeberta")
        axis.set(title=f"{title}, ms", xlabel="length", xscale="log", yscale="log")
        axis.set_xticks(lengths, [str(x) for x in lengths])
        axis.set_xticks([], minor=True)
        axis.legend()
    return drawn
