"""The study's table, plots and report.html."""

import html
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..figures import figure, page, png
from ..files import write_atomically
from .arms import COMPARISONS, FLOOR
from .verdicts import RULE, Verdict, mean_and_spread, summary, verdicts

SCORES = ("average", "topics", "acceptability")


def scores_of(study: dict[str, Any], name: str = "average") -> dict[str, list[float]]:
    """Every arm's final scores, one a seed."""
    found: dict[str, list[float]] = {arm: [] for arm in study["plan"]["arms"]}
    for result in study["results"]:
        found[result["arm"]].append(result["points"][-1][name])
    return found


def paragraphs(study: dict[str, Any]) -> list[str]:
    """What was found, by each score."""
    names = {"average": "the average of both scores", "topics": "topics alone"}
    names["acceptability"] = "acceptability alone"
    return [summary(scores_of(study, name), names[name]) for name in SCORES]


def method(study: dict[str, Any]) -> str:
    plan = study["plan"]
    recipe = plan["recipe"]
    return (
        f"Every run takes {plan['budget']:.3g} floating-point operations of pre-training, by the "
        f"formula of ELECTRA's authors; {plan['seeds']} seeds, each with the same data order in "
        f"every arm. The encoder is of {recipe['encoder']['num_hidden_layers']} layers, "
        f"{recipe['encoder']['hidden_size']} wide, on sequences of {recipe['sequence_length']} "
        "tokens. Afterwards each is fine-tuned in the same way on topics (accuracy, %) and on "
        "acceptability of sentences (100 x Matthews' correlation); the average is of these two. "
        "Spreads are standard deviations over seeds."
    )


def rows(study: dict[str, Any]) -> list[list[str]]:
    """The table's cells, its header first."""
    paper = {arm: f"{s:.1f}" for c in COMPARISONS for arm, s in c.paper.items() if s is not None}
    table = [
        ["arm", "parameters", "steps", "tokens", "FLOPs", "seconds"]
        + ["topics", "acceptability", "average", "paper: GLUE"]
    ]
    for arm in study["plan"]["arms"]:
        own = [result for result in study["results"] if result["arm"] == arm]
        point, last = own[0]["points"][-1], own[0].get("pretraining", {})
        sizes = [part["total"] for part in own[0].get("parameters", {}).values()]
        seconds = statistics.mean(r.get("pretraining", {}).get("train_seconds", 0.0) for r in own)
        cells = [arm, " + ".join(f"{size / 1e6:.2f}M" for size in sizes) or "-"]
        cells += [f"{point['step']}", f"{point['tokens'] / 1e6:.2f}M", f"{point['flops']:.3g}"]
        cells += [f"{seconds:.0f}" if last else "-"]
        for name in ("topics", "acceptability", "average"):
            mean, spread = mean_and_spread([r["points"][-1][name] for r in own])
            cells.append(f"{mean:.1f}" + ("" if spread is None else f" ± {spread:.1f}"))
        table.append([*cells, paper.get(arm, "-")])
    return table


def show(study: dict[str, Any]) -> None:
    """Prints the table and what was found."""
    console = Console(highlight=False)
    header, *body = rows(study)
    table = Table(title="study pretraining", title_justify="left")
    for i, column in enumerate(header):
        table.add_column(column, justify="left" if i == 0 else "right")
    for cells in body:
        table.add_row(*cells)
    console.print(table)
    for paragraph in (*paragraphs(study), RULE):
        console.print(paragraph, markup=False)


def write_report(out: Path, study: dict[str, Any]) -> None:
    """Writes report.html, self-contained, and its plots as PNG files."""
    plots = []
    for name, title, drawn in (
        ("flops", "Scores by compute", _by_compute(study)),
        ("arms", "Beside the paper's order", _beside_paper(study)),
    ):
        drawn.savefig(out / f"{name}.png", dpi=110)
        plots.append(f"<h2>{title}</h2>\n{png(drawn)}")
    found = [v for name in SCORES for v in verdicts(scores_of(study, name))]
    per_score = len(found) // len(SCORES)
    pairs = [["score", "comparison", "paper's order", "difference", "needed", "verdict"]]
    pairs += [_pair(SCORES[i // per_score], v) for i, v in enumerate(found)]
    body = [
        *(f"<p>{html.escape(text)}</p>" for text in (method(study), *paragraphs(study), RULE)),
        _table(rows(study)),
        *plots,
        "<h2>Verdicts</h2>",
        _table(pairs),
        "<p>Text: lead paragraphs of English Wikipedia, CC BY-SA 4.0.",
        "The paper: Clark et al. 2020, ELECTRA, arXiv 2003.10555.</p>",
    ]
    title = "Pre-training objectives, ties and algorithms at equal compute"
    write_atomically(out / "report.html", page(title, "\n".join(body)))


def _pair(score: str, v: Verdict) -> list[str]:
    needed = "-" if v.margin is None else f"{v.margin:.1f}"
    order = f"{v.better} over {v.worse}"
    return [score, v.comparison, order, f"{v.difference:+.1f}", needed, v.verdict]


def _table(cells: list[list[str]]) -> str:
    header, *body = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th"] + ["td"] * (len(cells) - 1), cells, strict=True)
    )
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in (header, *body))}</table>"


def _by_compute(study: dict[str, Any]) -> Any:
    """Scores against operations, a line an arm, bars of one standard deviation."""
    drawn, axes = figure(3, height=4.5)
    for axis, name in zip(axes, ("topics", "acceptability", "average"), strict=True):
        for number, arm in enumerate(a for a in study["plan"]["arms"] if a != FLOOR):
            by_step: dict[int, list[dict[str, Any]]] = {}
            for result in study["results"]:
                for point in result["points"] if result["arm"] == arm else ():
                    by_step.setdefault(point["step"], []).append(point)
            means, spreads, flops = [], [], []
            for points in by_step.values():
                mean, spread = mean_and_spread([point[name] for point in points])
                means.append(mean)
                spreads.append(spread or 0.0)
                flops.append(points[0]["flops"])
            shift = 1 + 0.008 * (number - 4)  # Budgets are equal: bars would hide each other.
            axis.errorbar(
                [shift * f for f in flops],
                means,
                yerr=spreads,
                marker="o",
                markersize=4,
                capsize=2,
                label=arm,
                color=f"C{number}",
            )
        floor = scores_of(study, name).get(FLOOR)
        if floor:
            axis.axhline(statistics.mean(floor), linestyle="--", color="gray", label=FLOOR)
        axis.set(title=name, xlabel="FLOPs of pre-training")
    axes[-1].legend(fontsize=7)
    return drawn


def _beside_paper(study: dict[str, Any]) -> Any:
    """One panel a comparison: our bars in the paper's order, its scores as points."""
    scores = scores_of(study)
    shown = [c for c in COMPARISONS if any(arm in scores for arm in c.paper)]
    drawn, axes = figure(max(2, len(shown)), height=4.5)
    for axis, comparison in zip(axes, shown, strict=False):
        arms = [arm for arm in comparison.paper if arm in scores]
        found = [mean_and_spread(scores[arm]) for arm in arms]
        means, spreads = [mean for mean, _ in found], [spread or 0.0 for _, spread in found]
        axis.bar(arms, means, yerr=spreads, capsize=4, color="C0", alpha=0.6, label="here: average")
        low = min(m - s for m, s in zip(means, spreads, strict=True))
        high = max(m + s for m, s in zip(means, spreads, strict=True))
        axis.set_ylim(low - 0.5 * (high - low) - 1, high + 0.2 * (high - low) + 1)
        axis.tick_params(axis="x", rotation=30)
        axis.set(title=comparison.title, ylabel="average score, here")
        paper = [(arm, s) for arm in arms if (s := comparison.paper[arm]) is not None]
        other = axis.twinx()
        other.plot(*zip(*paper, strict=True), "k_", markersize=18, label="paper: GLUE")
        other.set(ylim=(81, 86), ylabel="GLUE, in the paper")
        axis.legend(loc="upper left", fontsize=8)
        other.legend(loc="upper right", fontsize=8)
    return drawn
