"""Text that ships with the package, so that a first run needs no network."""

import json
import lzma
from importlib.resources import files
from typing import NamedTuple


class Article(NamedTuple):
    """The lead paragraph of a Wikipedia article; topic is one of 11, or "Uncategorized"."""

    title: str
    text: str
    topic: str


def wiki_leads() -> list[Article]:
    """10,033 English Wikipedia lead paragraphs in a fixed order (CC BY-SA 4.0, see
    WIKI-LEADS-LICENSE.md beside this file)."""
    packed = (files(__name__) / "wiki-leads.jsonl.xz").read_bytes()
    lines = lzma.decompress(packed).decode("utf-8").splitlines()
    return [Article(**json.loads(line)) for line in lines]
