"""Tagged words in columns: CoNLL-2003's files, CoNLL-U, or the hub's `conll2003`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ...files import read_lines
from ..examples import TaggedExample
from . import hub
from .sources import files_of, find, nonempty, value

CONLL2003 = {
    "train": ("eng.train", "train.txt", "train.conll"),
    "dev": ("eng.testa", "valid.txt", "dev.txt", "testa.txt", "valid.conll", "dev.conll"),
    "test": ("eng.testb", "test.txt", "testb.txt", "test.conll"),
}
CONLLU = {split: (f"*-ud-{split}.conllu", f"{split}.conllu") for split in ("train", "dev", "test")}
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
# Of CoNLL-U: FORM and UPOS.
FORM, TAG = 1, 3


def read_conll2003(data_dir: str | Path, split: str) -> list[TaggedExample]:
    """A split of the English entities of CoNLL-2003, in IOB2.

    Raises:
        FileNotFoundError: no file of this split; says what was looked for.
        ValueError: an unknown split, or a line with too few columns; says which.
    """
    names = files_of(CONLL2003, split, "conll2003")
    if not hub.is_hub(data_dir):
        return read_columns(find(data_dir, split, names, "conll2003"))
    examples: list[TaggedExample] = []
    for where, row in hub.rows(data_dir, HUB_SPLITS[split]):
        words, tags = value(row, "tokens", where), value(row, "ner_tags", where)
        examples.append(TaggedExample(str(row.get("id", len(examples))), tuple(words), tuple(tags)))
    return nonempty(examples, f"{data_dir}, split {split}")


def read_upos(data_dir: str | Path, split: str) -> list[TaggedExample]:
    """A split of a Universal Dependencies treebank: words and their universal parts of speech.

    Raises:
        FileNotFoundError: no file of this split; says what was looked for.
        ValueError: an unknown split, or a line with too few columns; says which.
    """
    return read_columns(find(data_dir, split, files_of(CONLLU, split, "upos")), FORM, TAG)


def read_columns(path: Path, word: int = 0, tag: int | None = -1) -> list[TaggedExample]:
    """The sentences of a file with one word a line and blank lines between sentences.

    Columns are separated by spaces or tabs, in CoNLL-U (.conllu) by tabs. -DOCSTART- lines,
    CoNLL-U's comments, contractions (1-2) and empty words (1.1) are left out. IOB1 becomes IOB2.

    Args:
        word, tag: numbers of the columns, from 0; negative: from the last. tag None: no tags.

    Raises:
        ValueError: a line without such a column; says which.
    """
    examples = [
        TaggedExample(
            str(i),
            tuple(row[word] for row in rows),
            None if tag is None else iob2([row[tag] for row in rows]),
        )
        for i, rows in enumerate(_sentences(path, word, tag))
    ]
    return nonempty(examples, path)


def _sentences(path: Path, *columns: int | None) -> Iterator[list[list[str]]]:
    universal = path.suffix == ".conllu"
    # A single column cannot be both word and tag.
    least = max(
        2 if None not in columns else 1, *(abs(c) + (c >= 0) for c in columns if c is not None)
    )
    rows: list[list[str]] = []
    for number, line in read_lines(path):
        if not line.strip() or line.startswith("-DOCSTART-"):
            if rows:
                yield rows
            rows = []
            continue
        if universal and line.startswith("#"):
            continue
        cells = line.split("\t") if universal or "\t" in line else line.split()
        if len(cells) < least:
            raise ValueError(
                f"{path}, line {number}: expected at least {least} columns, got {len(cells)}"
            )
        if not universal or cells[0].isdigit():
            rows.append(cells)
    if rows:
        yield rows


def iob2(tags: Sequence[str]) -> tuple[str, ...]:
    """IOB1 or IOB2 tags as IOB2: a chunk's first tag is B-; tags without a prefix stay.

    In IOB1 a chunk begins with I-, and with B- only behind another of its type.
    """
    result, before = [], "O"
    for tag in tags:
        # What goes on has the type of the tag before, whichever its prefix.
        begins = tag.startswith("I-") and (before[:2] not in ("B-", "I-") or before[2:] != tag[2:])
        result.append(f"B-{tag[2:]}" if begins else tag)
        before = tag
    return tuple(result)
