"""Winograd schemas (WNLI, WSC) as a choice: who or what does the pronoun mean?

Their rows state one candidate at a time, for a text whose other rows state the others: at most one
is true. As a choice, a text's candidates compete, each written into the pronoun's place, for which
such small files suffice rather than for judging rows one by one (RoBERTa, arXiv 1907.11692, section
5.1, ranks candidates as well, with more of them from a parser). Candidates are those of the files
alone: a text with one candidate, or with none or several that are right, is left out, and scores
are not those of the benchmark.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ..examples import ChoiceExample, Example, TextExample
from .sources import nonempty

RIGHT = ("1", "true")


def read(
    source: Callable[[str | Path, str], Sequence[Example]], data_dir: str | Path, split: str
) -> list[ChoiceExample]:
    """What `source` reads, joined by its texts; pairs are options, ids the rows' joined by "+"."""
    groups: dict[str, dict[str, TextExample]] = {}
    for row in source(data_dir, split):
        assert isinstance(row, TextExample) and row.pair is not None
        groups.setdefault(row.text, {}).setdefault(row.pair, row)
    examples = []
    for text, options in groups.items():
        labels = [row.label for row in options.values()]
        right = [i for i, label in enumerate(labels) if label in RIGHT]
        labelled = None not in labels
        if len(options) < 2 or (labelled and len(right) != 1):
            continue
        name = "+".join(row.id for row in options.values())
        examples.append(ChoiceExample(name, text, tuple(options), right[0] if labelled else None))
    return nonempty(examples, f"{data_dir}, split {split}, with candidates to choose from")
