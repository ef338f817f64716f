"""The parts that report pages are made of; matplotlib is imported when a figure is drawn."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 65rem; margin: 2rem auto }}
img {{ max-width: 100% }} pre {{ background: #f4f4f4; padding: 1rem; overflow: auto }}
table {{ border-collapse: collapse }}
td, th {{ padding: 0.2rem 0.6rem; border-bottom: 1px solid #ccc; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
</style>
<h1>{title}</h1>
{body}
</html>
"""

# Beyond so many classes a matrix's cells are coloured only.
_NUMBERED = 40


def page(title: str, body: str) -> str:
    """An HTML page; body is HTML."""
    return _PAGE.format(title=html.escape(title), body=body)


def figure(columns: int, height: float = 3.5) -> Any:
    """A figure of matplotlib, which needs no display, and its axes, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(5.5 * columns, height), layout="constrained")


def png(drawn: Any) -> str:
    """The figure as an <img> that holds its bytes; the figure is closed."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=110)
    pyplot.close(drawn)
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def draw_confusion(axis: Any, matrix: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """matrix[i][j]: how many of label i were predicted as j."""
    most = max(map(max, matrix))
    axis.imshow(matrix, cmap="Blues", vmin=0)
    for i, row in enumerate(matrix) if len(names) <= _NUMBERED else ():
        for j, count in enumerate(row):
            if count:
                shade = "white" if count > most / 2 else "black"
                axis.text(j, i, count, ha="center", va="center", fontsize=7, color=shade)
    axis.set(xlabel="predicted")
    # A name's dollar signs are no formula.
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8, parse_math=False)
    axis.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
